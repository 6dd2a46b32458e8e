"""Optax's own generic tests, run on our optimizers; and those of sharding, which Optax skips on recent JAX.

Optax ships its tests. Three of the files run each of their tests on every optimizer of a list. Here they are loaded
once more, into a namespace of their own where that list, and the module that its names are looked up in, are ours.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import types
import unittest
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_nadam import compat, nadam, nadamw, scale_by_nadam


def dozat2016(learning_rate: optax.ScalarOrSchedule):
    return optax.chain(scale_by_nadam(rule="dozat2016"), optax.scale_by_learning_rate(learning_rate))


def of_rate(make):
    """An optimizer of one argument: the others are Python numbers, of which inject_hyperparams would make arrays."""

    def optimizer(learning_rate: optax.ScalarOrSchedule):
        return make(learning_rate)

    return optimizer


# No name is part of another, so that the description of a test tells whose it is.
OF_EACH_RULE: dict[str, Any] = {
    "nadam(scheduled)": nadam,
    "nadamw(constant)": functools.partial(nadamw, rule="constant"),
    "scale_by_nadam(dozat2016)": dozat2016,
    "timm.nadamw(simplified)": of_rate(compat.timm.nadamw),
}
OPTIMIZERS = OF_EACH_RULE | {
    "torch.nadam": of_rate(compat.torch.nadam),
    "keras.nadam": of_rate(compat.keras.nadam),
    "keras.legacy_nadam": of_rate(compat.keras.legacy_nadam),
}


class Suite(NamedTuple):
    """A test file of Optax.

    Attributes:
      optimizers: names of those it runs on.
      substitutes: what names in the file stand for, whatever the file itself binds them to.
      left_out: its tests, or classes of them, that are not about the optimizers of a list; what they are about.
    """

    optimizers: list[str]
    substitutes: dict[str, Any]
    left_out: dict[str, str]


def listed(names):
    return [{"opt_name": name, "opt_kwargs": {"learning_rate": 0.01}} for name in names]


SUITES = {
    "optax._src.alias_test": Suite(
        optimizers=list(OPTIMIZERS),
        substitutes={
            "alias": types.SimpleNamespace(**OPTIMIZERS),
            "_OPTIMIZERS_UNDER_TEST": listed(OPTIMIZERS),
        },
        left_out={
            "AliasTest.test_explicit_dtype": "the argument mu_dtype and the field mu of sgd, adam and adamw",
            "LBFGSTest": "L-BFGS",
        },
    ),
    "optax.contrib._common_test": Suite(
        optimizers=list(OF_EACH_RULE),
        substitutes={
            # What it wraps, in mechanize, schedule_free and reduce_on_plateau, is called sgd.
            "alias": types.SimpleNamespace(**OF_EACH_RULE, sgd=nadam),
            "_MAIN_OPTIMIZERS_UNDER_TEST": listed(OF_EACH_RULE),
            "_BASE_OPTIMIZERS": [],  # further ones to wrap in mechanize
        },
        left_out={},
    ),
    "optax._src.float64_test": Suite(
        optimizers=list(OPTIMIZERS),
        substitutes={"ALL_MODULES": [(name, make, {"learning_rate": 0.1}) for name, make in OPTIMIZERS.items()]},
        left_out={},
    ),
}

# The message with which a suite skips a test whose description has all these parts.
SKIPS = {
    ("test_optimizers_can_be_wrapped_in_inject_hyperparams", "'reduce_on_plateau'"): (
        "reduce_on_plateau is not supported by inject_hyperparams."
    )
}


class Namespace(dict[str, Any]):
    """A module's namespace in which some names cannot be reassigned."""

    def __init__(self, fixed):
        """Starts with the fixed names."""
        super().__init__(fixed)
        self.fixed = fixed

    def __setitem__(self, name, value):
        super().__setitem__(name, self.fixed.get(name, value))


def path_of(module):
    spec: Any = importlib.util.find_spec(module)
    return Path(spec.origin)


def generated_by(module):
    """The tests of a private copy of a module."""
    namespace = Namespace({"__name__": module, **SUITES[module].substitutes})
    exec(compile(path_of(module).read_bytes(), path_of(module), "exec"), namespace)
    classes = [x for x in namespace.values() if isinstance(x, type) and issubclass(x, unittest.TestCase)]
    tests = [cls(name) for cls in classes for name in unittest.defaultTestLoader.getTestCaseNames(cls)]
    return [test for test in tests if not left_out(module, written_as(test))]


def left_out(module, test):
    """Whether a test, or its whole class, is excluded."""
    return not {test, test.partition(".")[0]}.isdisjoint(SUITES[module].left_out)


def written_as(test):
    """Class and method of a test as its file has them, without what parameters add."""
    return inspect.unwrap(getattr(test, test._testMethodName)).__qualname__


def description(test):
    """Name and parameters, the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", test.id())


TESTS = {module: generated_by(module) for module in SUITES}


@pytest.mark.lenient("the suites mix dtypes")
@pytest.mark.parametrize("test", [test for tests in TESTS.values() for test in tests], ids=description)
def test_of_optax(test):
    expected = next((why for parts, why in SKIPS.items() if all(part in test.id() for part in parts)), None)
    assert skipped(test) == expected


def skipped(test):
    """Runs a test; returns why it was skipped, if it was."""
    try:
        test.debug()
    except unittest.SkipTest as skip:
        return str(skip)
    return None


@pytest.mark.parametrize("module", SUITES)
def test_every_test_of_a_suite_runs_on_every_optimizer(module):
    classes = [node for node in ast.parse(path_of(module).read_bytes()).body if isinstance(node, ast.ClassDef)]
    methods = [(cls.name, node.name) for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef)]
    written = {f"{cls}.{name}" for cls, name in methods if name.startswith("test_")}
    expected = {test for test in written if not left_out(module, test)}
    for name in SUITES[module].optimizers:
        assert {written_as(test) for test in TESTS[module] if name in test.id()} == expected


@pytest.mark.parametrize("module", SUITES)
def test_optax_itself_stays_as_it_is(module):
    original = vars(importlib.import_module(module))
    assert not [name for name, ours in SUITES[module].substitutes.items() if original[name] is ours]


EACH_RULE = pytest.mark.parametrize("make", OF_EACH_RULE.values(), ids=OF_EACH_RULE)
set_mesh: Any = getattr(jax, "set_mesh", None) or getattr(jax.sharding, "use_mesh", None)  # as JAX 0.6 calls it


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=["explicit", "automatic"])
def mesh(request):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(request.param,))
    with set_mesh(mesh):
        yield mesh


def moments(state):
    return optax.tree.get(state, "m"), optax.tree.get(state, "v")


@EACH_RULE
def test_the_state_is_sharded_like_the_params_and_stays_so(make, mesh):
    tx = make(learning_rate=1.0)
    params = jax.device_put(jnp.zeros((2, 8, 4), jnp.float16), NamedSharding(mesh, PartitionSpec(None, "x")))
    state = tx.init(params)
    updated = [update(params, state, params)[1] for update in (tx.update, jax.jit(tx.update))]
    for other in [state, jax.jit(tx.init)(params), *updated]:
        assert jax.tree.map(jax.typeof, other) == jax.tree.map(jax.typeof, state)
        assert all(x.sharding.is_equivalent_to(params.sharding, x.ndim) for x in moments(other))


@EACH_RULE
def test_an_abstract_parameter_gives_the_same_state(make):
    tx = make(learning_rate=1.0)
    abstract = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    chex.assert_trees_all_equal(tx.init(abstract), tx.init(jnp.zeros((2, 4, 8))))


@EACH_RULE
def test_shardings_of_the_params_map_to_those_of_the_state(make):
    tx = make(learning_rate=1.0)
    shardings = {"w": "of w", "b": "of b"}
    state = tx.init({"w": jnp.zeros((1, 2)), "b": jnp.zeros(2)})
    mapped = optax.tree.map_params(tx, lambda _, s: s, state, shardings, transform_non_params=lambda _: "replicated")
    assert moments(mapped) == (shardings, shardings)
    assert optax.tree.get(mapped, "mu_product") == "replicated"
