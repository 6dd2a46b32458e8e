"""Nadam chained with and wrapped in everything of Optax that has a state; the list is made from Optax itself.

- Loading changes Nadam's own fields and the counters of schedules, ``inject_hyperparams`` and
  ``MultiSteps.gradient_step``; nothing else.
- A loaded state has the shardings and memory kinds of the fresh one, on 8 devices, float32 and narrow; it can be
  donated, and what nobody has placed stays free to move.
- Every constructor works under ``inject_hyperparams``, or its error names ``static_args``.
- 8-bit moments of every kind of leaf, compensated, inside every wrapper: eager and compiled steps agree, and states can
  be donated.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import optax_nadam
from optax_nadam import NadamConfig, compat, get_state
from optax_nadam._tree import nodes_of

pytestmark = pytest.mark.lenient("Optax's transformations mix dtypes")
CONFIG = NadamConfig(learning_rate=0.1, rule="constant", eps=1e-8)
SCHEDULE = optax.linear_schedule(0.1, 0.0, 100)
COUNT = 100_000


@functools.cache
def listed() -> Mapping[str, Callable[..., Any]]:
    """Every function of Optax that returns a gradient transformation, by its name."""
    found = {}
    for module in (optax, optax.contrib):
        for name, f in inspect.getmembers(module, inspect.isfunction):
            if "GradientTransformation" in str(inspect.signature(f).return_annotation):
                found[name] = f
    return found


# What wraps our optimizer, and how it is called.
AROUND: dict[str, Callable[[Any], Any]] = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(optax.trace(0.5), tx),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step > 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step > 0),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(
        SCHEDULE
    ),
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "masked": lambda tx: optax.masked(tx, True),
    "mechanize": optax.contrib.mechanize,
    "multi_transform": lambda tx: optax.multi_transform({"ours": tx}, "ours"),
    "named_chain": lambda tx: optax.named_chain(("ours", tx)),
    "partition": lambda tx: optax.partition({"ours": tx}, "ours"),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.1), opaque_mode=False),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "with_extra_args_support": optax.with_extra_args_support,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}
AROUND["inject_stateful_hyperparams"] = AROUND["inject_hyperparams"]

# The arguments of what is chained with it, by their names.
ARGUMENTS: dict[str, Any] = {
    "b1": 0.9,
    "clipping": 1.0,
    "decay": 0.9,
    "eta": 0.1,
    "gamma": 0.5,
    "l2_norm_clip": 1.0,
    "learning_rate": SCHEDULE,
    "mask": False,
    "max_backtracking_steps": 3,
    "max_delta": 1.0,
    "max_linesearch_steps": 3,
    "max_norm": 1.0,
    "measure": optax.tree.norm,
    "measure_name": "norm",
    "noise_multiplier": 0.1,
    "seed": 0,
    "step_size": 0.1,
    "step_size_fn": SCHEDULE,
    "threshold": 1.0,
    "f": lambda updates, params: updates,
}


NO_SCHEDULE = ("optimistic_adam", "rprop", "scale_by_rprop", "sm3")
OTHERS: dict[str, dict[str, Any]] = {name: {"learning_rate": 0.1} for name in NO_SCHEDULE}

# Some that are listed are deprecated, and dpsgd of Optax 0.2.8 does not pass its key on.
quiet = pytest.mark.filterwarnings("ignore:Specifying a key will be required", "ignore:.* is deprecated")


def beside(name: str) -> Any:
    """A transformation of Optax with the arguments it needs."""
    f, arguments = listed()[name], ARGUMENTS | OTHERS.get(name, {})
    needed = [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty]
    return f(**{name: arguments[name] for name in needed if name != "args"})


PARAMS = {"a": jnp.ones((16, 64)), "b": jnp.full((4, 8), 2.0), "c": jnp.ones(3)}


def source(params: Any) -> optax.ScaleByAdamState:
    """The state of another run, in which every number differs from that of a fresh state."""
    return optax.ScaleByAdamState(
        count=jnp.int32(COUNT), mu=jax.tree.map(lambda p: 0.5 * p, params), nu=jax.tree.map(lambda p: 0.25 * p, params)
    )


COUNTERS = ("ScaleByScheduleState", "WeightDecaySchedule", "WrappedScheduleState", "InjectStatefulHyperparamsState")


def assert_loads(tx, ours=PARAMS):
    """Loads into a fresh state: Nadam's own numbers and the counters change, nothing else."""
    fresh = tx.init(PARAMS)
    loaded = compat.optax.load_state(fresh, source(ours), config=CONFIG)
    chex.assert_trees_all_equal_structs(loaded, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, fresh)
    nadam = get_state(loaded)
    assert nadam.count == COUNT
    moments = {id(x) for x in jax.tree.leaves(nadam)}
    counters = {id(node.count) for node in nodes_of(loaded, tuple) if type(node).__name__ in COUNTERS}
    counters |= {id(node.gradient_step) for node in nodes_of(loaded, optax.MultiStepsState)}
    for (path, x), before in zip(jax.tree_util.tree_leaves_with_path(loaded), jax.tree.leaves(fresh), strict=True):
        if id(x) in counters:
            assert x == COUNT, path
        elif id(x) not in moments:
            got, expected = (
                jax.random.key_data(y) if jnp.issubdtype(y.dtype, jax.dtypes.prng_key) else y for y in (x, before)
            )
            np.testing.assert_array_equal(got, expected, err_msg=str(path))


@pytest.mark.parametrize("name", sorted(AROUND))
def test_loading_inside(name):
    flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(PARAMS)])
    assert_loads(AROUND[name](optax_nadam.nadamw(SCHEDULE, rule="constant")), flat if name == "flatten" else PARAMS)


@quiet
def test_loading_beside():
    """Beside every other transformation of Optax, in a chain and on another part of the params."""
    others = sorted(set(listed()) - set(AROUND))
    assert len(others) > 60
    assert set(AROUND) - set(listed()) == {"MultiSteps"}
    ours = optax_nadam.nadamw(SCHEDULE, rule="constant")
    for name in others:
        parts = optax.partition({"ours": ours, "theirs": beside(name)}, {"a": "ours", "b": "theirs", "c": "ours"})
        assert_loads(parts, PARAMS | {"b": optax.MaskedNode()})
        assert_loads(optax.chain(beside(name), ours))


def load(state, params):
    return compat.optax.load_state(state, source(params), config=CONFIG)


def count_seven(state, params):
    return optax_nadam.set_count(state, 7, CONFIG)


@pytest.mark.parametrize("narrow", [{}, {"m_dtype": "int8", "v_dtype": "bfloat16"}], ids=["float32", "narrow"])
@pytest.mark.parametrize("kind", [memory.kind for memory in jax.devices("cpu")[0].addressable_memories()])
def test_stays_in_place(narrow, kind):
    """On its devices, in its memory."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*x)) for x in (["data"], []))
    params = {"kernel": jax.device_put(jnp.ones((64, 128)), rows), "bias": jax.device_put(jnp.ones(5), everywhere)}
    state = jax.jit(optax_nadam.nadamw(SCHEDULE, **narrow).init)(params)
    fresh = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), state)
    for change in (load, count_seven):
        got, expected = (jax.tree.map(lambda x: x.sharding, x) for x in (change(fresh, params), fresh))
        assert got == expected
        assert {sharding.memory_kind for sharding in jax.tree.leaves(got)} == {kind}


def test_free_to_move():
    """What nobody has placed may be computed with on any device, before and after loading."""
    tx = optax_nadam.nadamw(SCHEDULE)
    elsewhere = jax.device_put(PARAMS, jax.devices()[3])
    updates, _ = tx.update(elsewhere, load(tx.init(PARAMS), PARAMS), elsewhere)
    assert updates["a"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize(("change", "count"), [(load, COUNT), (count_seven, 7)])
def test_donation(change, count):
    """Each counter is an array of its own: no array may be donated twice."""
    tx = inject(optax_nadam.nadamw)(SCHEDULE, weight_decay=SCHEDULE)
    state = change(tx.init(PARAMS), PARAMS)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    _, state = jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
    assert get_state(state).count == count + 1


inject = optax.inject_hyperparams
# What each wants in static_args, if anything.
UNDER_INJECTION: dict[Any, str] = {
    optax_nadam.nadam: "",
    optax_nadam.nadamw: "",
    compat.optax.nadam: "",
    compat.optax.nadamw: "",
    compat.algoperf.nadamw: "power",
    compat.keras.nadam: "beta_1",
    compat.keras.legacy_nadam: "beta_1",
    compat.torch.nadam: "eps",
    compat.timm.nadamw: "eps",
    compat.timm.nadamlegacy: "eps",
}


@pytest.mark.parametrize(("make", "wants"), UNDER_INJECTION.items())
def test_injected(make, wants):
    """Each works as it is, or says what to name in ``static_args``; and then it works."""
    first, *others = inspect.signature(make).parameters
    if wants:
        with pytest.raises(TypeError, match=f"{wants} must be a number, got .*static_args"):
            inject(make)(**{first: 0.1}).init(PARAMS)
    tx, params = inject(make, static_args=others if wants else ())(**{first: 0.1}), jnp.ones(3)
    state = tx.init(params)
    state.hyperparams[first] = jnp.float32(0.2)
    updates, _ = jax.jit(tx.update)(params, state, params)
    plain = make(0.2)
    expected, _ = plain.update(params, plain.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_injected_dtype():
    with pytest.raises(TypeError, match=r"m_dtype is an array.*write \"bfloat16\", or static_args=\('m_dtype',\)"):
        inject(optax_nadam.nadamw)(0.1, m_dtype=jnp.bfloat16).init(PARAMS)
    tx = inject(optax_nadam.nadamw, static_args="m_dtype")(0.1, m_dtype=jnp.bfloat16)
    assert get_state(tx.init(PARAMS)).m["a"].dtype == jnp.bfloat16


def test_injected_in_bfloat16():
    """As bfloat16, 0.999 is 1, and every update NaN."""
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(
        TypeError, match=r"b1 has dtype bfloat16, .*in bfloat16 0.999 is 1. Pass hyperparam_dtype=jnp.float"
    ):
        inject(optax_nadam.nadamw)(0.1).init(narrow)
    tx = inject(optax_nadam.nadamw, hyperparam_dtype=jnp.float32)(0.1)
    updates, _ = tx.update(narrow, tx.init(narrow), narrow)
    chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize(("field", "value"), [("count", 3), ("mu_product", 0.5)])
def test_python_numbers(field, value):
    tx = optax_nadam.scale_by_nadam()
    state = tx.init(PARAMS)._replace(**{field: value})
    with pytest.raises(TypeError, match=f"scale_by_nadam got a state in which state.{field} is {value}, not an array"):
        tx.update(PARAMS, state)
    with pytest.raises(TypeError, match=f"get_state got a state in which state.{field} is {value}"):
        load(state, PARAMS)


def format_of(path):
    """Each format is that of a leaf; of complex ones, m has no codes."""
    return None if path == "wide" else "int8"


BY_LEAF = optax_nadam.nadamw(0.1, m_dtype=format_of, v_dtype=format_of)
REAL: dict[str, Any] = {"wide": jnp.ones((16, 64)), "narrow": jnp.ones((8, 128), jnp.bfloat16)}
EVERY_KIND = REAL | {"complex": jnp.full(3, 1 + 2j, jnp.complex64)}
# The others treat complex leaves as these do, but for MultiSteps, which accumulates complex gradients in float32.
WITH_COMPLEX = ("chain", "flatten", "split_real_and_imaginary")
# Their fresh states have one array in two places, which cannot be donated.
SHARES_ARRAYS = ("mechanize", "sam")
# Updates of compensated are float32; it wants the dtype of the gradients, so it goes inside.
INSIDE_ONLY = ("apply_if_finite",)


def donated_steps(tx, params, grads, copied=False):
    """Updates and state of two compiled steps, each of which may overwrite the state before it."""
    update, state = jax.jit(tx.update, donate_argnums=1), tx.init(params)
    if copied:
        state = jax.tree.map(jnp.copy, state)
    first = update(grads, state, params)
    return first, update(grads, first[1], params)


# These are inject_hyperparams, partition and, for an optimizer that takes extra arguments, none at all; a chain and a
# mask with their states in other containers; apply_if_finite with other conditions.
SAME = {"inject_stateful_hyperparams", "multi_transform", "with_extra_args_support"}
SAME |= {"named_chain", "selective_transform", "conditionally_mask", "conditionally_transform"}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", sorted(AROUND.keys() - SAME))
def test_formats_inside(name):
    """8-bit beside other moments, every kind of leaf, compensated weights, inside every wrapper."""
    params, shares_arrays = EVERY_KIND if name in WITH_COMPLEX else REAL, name in SHARES_ARRAYS
    if name == "mechanize":  # which takes one dtype for all leaves
        params = {"w": REAL["wide"]}
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    grads = jax.tree.map(lambda p: 0.5 * p, getattr(params, "fast", params))
    tx = optax.with_extra_args_support(AROUND[name](optax_nadam.compensated(BY_LEAF)))
    if name in INSIDE_ONLY:
        with pytest.raises(TypeError, match="must have equal output types"):
            donated_steps(tx, params, grads)
        tx = optax_nadam.compensated(AROUND[name](BY_LEAF))
    if shares_arrays:
        with pytest.raises(Exception, match="previously donated"):
            donated_steps(tx, params, grads)
    eager = tx.update(grads, tx.init(params), params)
    first, second = donated_steps(tx, params, grads, copied=shares_arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second, eager)
    # What the compiler makes one operation is rounded once, in bfloat16 too.
    for x, y in zip(*map(jax.tree.leaves, (first[0], eager[0])), strict=True):
        tolerance = 2.0**-7 if x.shape == REAL["narrow"].shape else 1e-5
        x, y = (np.asarray(z).astype(complex if jnp.iscomplexobj(z) else float) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-6)
