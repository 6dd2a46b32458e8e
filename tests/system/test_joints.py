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
from optax_nadam._state import nodes_of

pytestmark = pytest.mark.lenient("Optax's transformations mix dtypes")
CONFIG = NadamConfig(learning_rate=0.1, rule="constant", eps=1e-8)
SCHEDULE = optax.linear_schedule(0.1, 0.0, 100)
COUNT = 100_000


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
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
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
