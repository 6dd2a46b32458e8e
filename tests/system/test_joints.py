"""Nadam chained with and wrapped in everything of Optax that has a state; the list is made from Optax itself."""

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
MEMORIES = [memory.kind for memory in jax.devices("cpu")[0].addressable_memories()]  # one before JAX 0.7.2


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


def assert_loading_changes_nadam_and_schedules_and_nothing_else(tx, params, ours):
    """Loads into a fresh state and compares it leaf by leaf."""
    fresh = tx.init(params)
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
            np.testing.assert_array_equal(numbers(x), numbers(before), err_msg=str(path))


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@quiet
def test_the_table_has_everything_that_optax_has():
    for name in listed():
        if name not in AROUND:
            beside(name).init(PARAMS["a"])
    assert set(AROUND) - set(listed()) == {"MultiSteps"}


@pytest.mark.parametrize("name", sorted(AROUND))
def test_loading_through_a_wrapper(name):
    tx = AROUND[name](optax_nadam.nadamw(SCHEDULE, rule="constant", eps=1e-8))
    assert_loading_changes_nadam_and_schedules_and_nothing_else(tx, PARAMS, ours(name, PARAMS))


def ours(name, params):
    """The params as our optimizer sees them inside a wrapper."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)]) if name == "flatten" else params


@quiet
def test_loading_beside_every_other_transformation():
    for name in sorted(set(listed()) - set(AROUND)):
        labels = {"a": "ours", "b": "theirs", "c": "ours"}
        parts = {"ours": optax_nadam.nadamw(SCHEDULE, rule="constant"), "theirs": beside(name)}
        masked = {"a": PARAMS["a"], "b": optax.MaskedNode(), "c": PARAMS["c"]}
        assert_loading_changes_nadam_and_schedules_and_nothing_else(optax.partition(parts, labels), PARAMS, masked)
        chained = optax.chain(beside(name), optax_nadam.nadamw(SCHEDULE, rule="constant"))
        assert_loading_changes_nadam_and_schedules_and_nothing_else(chained, PARAMS, PARAMS)


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(params, memory_kind=None):
    """Each leaf of more than one axis split over eight devices, the others on all of them."""

    def place(p):
        spec = jax.sharding.PartitionSpec("data") if p.ndim > 1 else jax.sharding.PartitionSpec()
        return jax.device_put(p, jax.sharding.NamedSharding(mesh(), spec, memory_kind=memory_kind))

    return jax.tree.map(place, params)


LARGE = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(5)}


@pytest.mark.parametrize("narrow", [{}, {"m_dtype": "int8", "v_dtype": "bfloat16"}], ids=["float32", "narrow"])
@pytest.mark.parametrize(
    "memory_kind", [None, *(memory.kind for memory in jax.devices("cpu")[0].addressable_memories())]
)
def test_a_loaded_state_is_where_the_fresh_one_is(narrow, memory_kind):
    tx = optax_nadam.nadamw(SCHEDULE, **narrow)
    params = sharded(LARGE)
    fresh = jax.jit(tx.init)(params)
    if memory_kind is not None:
        fresh = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory_kind)), fresh)
    loaded = compat.optax.load_state(fresh, source(LARGE), config=CONFIG)
    for x, like in zip(jax.tree.leaves(loaded), jax.tree.leaves(fresh), strict=True):
        assert x.sharding == like.sharding
        assert x.sharding.memory_kind == like.sharding.memory_kind
    moved = optax_nadam.set_count(fresh, 7, CONFIG)
    for x, like in zip(jax.tree.leaves(moved), jax.tree.leaves(fresh), strict=True):
        assert x.sharding == like.sharding


def test_a_state_on_the_default_device_stays_free_to_move():
    """What nobody has placed may be computed with on any device, before and after loading."""
    tx = optax_nadam.nadamw(SCHEDULE)
    loaded = compat.optax.load_state(tx.init(PARAMS), source(PARAMS), config=CONFIG)
    elsewhere = jax.device_put(PARAMS, jax.devices()[3])
    updates, _ = tx.update(elsewhere, loaded, elsewhere)
    assert updates["a"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize("change", ["load_state", "set_count"])
def test_a_loaded_state_can_be_donated(change):
    """Each counter is an array of its own: no array may be donated twice."""
    tx = inject(optax_nadam.nadamw)(SCHEDULE, weight_decay=SCHEDULE)
    fresh = tx.init(PARAMS)
    if change == "load_state":
        state = compat.optax.load_state(fresh, source(PARAMS), config=CONFIG)
    else:
        state = optax_nadam.set_count(fresh, 7, CONFIG)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    _, state = jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
    assert get_state(state).count == (COUNT if change == "load_state" else 7) + 1


inject = optax.inject_hyperparams
UNDER_INJECTION: dict[str, tuple[Any, Any]] = {
    "nadam": (optax_nadam.nadam, {}),
    "nadamw": (optax_nadam.nadamw, {}),
    "compat.optax.nadam": (compat.optax.nadam, {}),
    "compat.optax.nadamw": (compat.optax.nadamw, {}),
    "compat.algoperf.nadamw": (compat.algoperf.nadamw, "power"),
    "compat.keras.nadam": (compat.keras.nadam, "beta_1"),
    "compat.keras.legacy_nadam": (compat.keras.legacy_nadam, "beta_1"),
    "compat.torch.nadam": (compat.torch.nadam, "eps"),
    "compat.timm.nadamw": (compat.timm.nadamw, "eps"),
    "compat.timm.nadamlegacy": (compat.timm.nadamlegacy, "eps"),
}


def static_args_of(make):
    """All its arguments but the learning rate, which is its first."""
    return tuple(inspect.signature(make).parameters)[1:]


@pytest.mark.parametrize("name", UNDER_INJECTION)
def test_constructors_under_inject_hyperparams(name):
    """Each works as it is, or says what to name in ``static_args``; and then it works."""
    make, wants = UNDER_INJECTION[name]
    first = next(iter(inspect.signature(make).parameters))
    if wants:
        with pytest.raises(TypeError, match=f"{wants} must be a number, got .*static_args"):
            inject(make)(**{first: 0.1}).init(PARAMS)
    tx = inject(make, static_args=static_args_of(make) if wants else ())(**{first: 0.1})
    state = tx.init(PARAMS)
    state.hyperparams[first] = jnp.float32(0.2)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    plain = make(0.2)
    expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_a_dtype_that_was_called_as_a_schedule_is_refused():
    with pytest.raises(TypeError, match=r"m_dtype is an array.*write \"bfloat16\", or static_args=\('m_dtype',\)"):
        inject(optax_nadam.nadamw)(0.1, m_dtype=jnp.bfloat16).init(PARAMS)
    tx = inject(optax_nadam.nadamw, static_args="m_dtype")(0.1, m_dtype=jnp.bfloat16)
    assert get_state(tx.init(PARAMS)).m["a"].dtype == jnp.bfloat16


def test_decays_that_injection_made_bfloat16_are_refused():
    """As bfloat16, 0.999 is 1, and every update NaN."""
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(
        TypeError, match=r"b1 has dtype bfloat16, .*in bfloat16 0.999 is 1. Pass hyperparam_dtype=jnp.float"
    ):
        inject(optax_nadam.nadamw)(0.1).init(narrow)
    tx = inject(optax_nadam.nadamw, hyperparam_dtype=jnp.float32)(0.1)
    updates, _ = tx.update(narrow, tx.init(narrow), narrow)
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("field", "value", "place"), [("count", 3, "state.count"), ("mu_product", 0.5, "state.mu_product")]
)
def test_python_numbers_in_a_state_are_named(field, value, place):
    tx = optax_nadam.scale_by_nadam()
    state = tx.init(PARAMS)._replace(**{field: value})
    with pytest.raises(TypeError, match=rf"scale_by_nadam got a state in which {place} is {value}, not an array"):
        tx.update(PARAMS, state)
    with pytest.raises(TypeError, match=rf"opt_state got a state in which {place} is {value}"):
        compat.optax.load_state(state, source(PARAMS), config=CONFIG)


FORMATS: dict[str, Callable[[], Any]] = {
    "float32": lambda: optax_nadam.nadamw(0.1),
    "bfloat16": lambda: optax_nadam.nadamw(0.1, m_dtype="bfloat16", v_dtype="bfloat16"),
    "int8": lambda: optax_nadam.nadamw(0.1, m_dtype="int8", v_dtype="int8"),
    "compensated": lambda: optax_nadam.compensated(optax_nadam.nadamw(0.1, m_dtype="int8", v_dtype="int8")),
}
EVERY_KIND: dict[str, Any] = {
    "real": jnp.ones((16, 64)),
    "complex": jnp.full(3, 1 + 2j, jnp.complex64),
    "narrow": jnp.ones((8, 128), jnp.bfloat16),
}
# Optax's mechanize takes one dtype for all leaves, its MultiSteps accumulates complex gradients in float32.
KINDS: dict[str, Any] = {
    "mechanize": {"real": EVERY_KIND["real"]},
    "MultiSteps": {"real": EVERY_KIND["real"], "narrow": EVERY_KIND["narrow"]},
}
# Their fresh states have one array in two places, which cannot be donated.
SHARES_ARRAYS = ("mechanize", "sam")
# Updates of compensated are float32; these wrappers want the dtype of the gradients, so they go inside of it.
INSIDE_ONLY = dict.fromkeys(
    ("apply_if_finite", "conditionally_mask", "conditionally_transform"), "must have equal output types"
)


def two_steps(tx, params, compiled, copied=False):
    """The updates and the state of a second step; compiled, each state is donated to the next step."""
    update = jax.jit(tx.update, donate_argnums=1) if compiled else tx.update
    grads, state = jax.tree.map(lambda p: 0.5 * p, params), tx.init(params)
    if copied:
        state = jax.tree.map(jnp.copy, state)
    if isinstance(params, optax.LookaheadParams):
        grads = grads.fast
    for _ in range(2):
        updates, state = update(grads, state, params)
    return updates, state


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", sorted(AROUND))
def test_every_format_on_every_kind_of_leaf_inside_every_wrapper(name):
    """Fresh states and those of a step can be donated, and compiled steps are the eager ones."""
    params = KINDS.get(name, EVERY_KIND)
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    for kind, make in FORMATS.items():
        tx = optax.with_extra_args_support(AROUND[name](make()))
        if kind == "compensated" and name in INSIDE_ONLY:
            with pytest.raises(TypeError, match=INSIDE_ONLY[name]):
                two_steps(tx, params, compiled=True)
            tx = optax_nadam.compensated(AROUND[name](FORMATS["int8"]()))
        if name in SHARES_ARRAYS:
            with pytest.raises(Exception, match="previously donated"):
                two_steps(tx, params, compiled=True)
        compiled, eager = (two_steps(tx, params, x, copied=name in SHARES_ARRAYS) for x in (True, False))
        chex.assert_trees_all_equal_shapes_and_dtypes(compiled, eager)
        # What the compiler makes one operation is rounded once, in bfloat16 too.
        for x, y in zip(*map(jax.tree.leaves, (compiled[0], eager[0])), strict=True):
            tolerance = 2.0**-7 if x.shape == EVERY_KIND["narrow"].shape else 1e-5
            chex.assert_trees_all_close(as_float32(x), as_float32(y), rtol=tolerance, atol=1e-6)


def as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
