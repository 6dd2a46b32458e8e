"""Optax's own generic tests pass on our optimizers; the second and those for wrappers are long.

Optax ships its tests. Three of the files run each of their tests on every optimizer of a list. Here they are loaded
once more, into a namespace of their own where that list, and the module that its names are looked up in, are ours.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import types
import unittest
from pathlib import Path
from typing import Any, NamedTuple

import optax
import pytest

from optax_nadam import compat, nadam, nadamw


def of_rate(make):
    """An optimizer of one argument: the others are Python numbers, of which inject_hyperparams would make arrays."""

    def optimizer(learning_rate: optax.ScalarOrSchedule):
        return make(learning_rate)

    return optimizer


# With weight decay; with complex leaves as two real ones. Rules differ in scalars alone.
# No name is part of another, so that the description of a test tells whose it is.
OPTIMIZERS: dict[str, Any] = {
    "nadamw": nadamw,
    "torch.nadam": of_rate(compat.torch.nadam),
}
# For the suite whose tests are those of the first and the same for wrappers.
FEW = {"timm.nadamw": of_rate(compat.timm.nadamw)}


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
        optimizers=list(FEW),
        substitutes={
            # What it wraps, in mechanize, schedule_free and reduce_on_plateau, is called sgd.
            "alias": types.SimpleNamespace(**FEW, sgd=nadam),
            "_MAIN_OPTIMIZERS_UNDER_TEST": listed(FEW),
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


def is_short(test):
    """Whether it is about the first optimizer; the others are long."""
    return next(iter(OPTIMIZERS)) in test.id().replace("timm.nadamw", "")


TESTS = {module: generated_by(module) for module in SUITES}


@pytest.mark.lenient("the suites mix dtypes")
@pytest.mark.parametrize(
    "test",
    [
        pytest.param(test, marks=() if is_short(test) else pytest.mark.long)
        for tests in TESTS.values()
        for test in tests
    ],
    ids=lambda test: re.sub(" at 0x[0-9a-f]+", "", test.id()),
)
def test_optax(test):
    expected = next((why for parts, why in SKIPS.items() if all(part in test.id() for part in parts)), None)
    skipped = None
    try:
        test.debug()
    except unittest.SkipTest as skip:
        skipped = str(skip)
    assert skipped == expected


@pytest.mark.parametrize("module", SUITES)
def test_nothing_is_left_out(module):
    """Every test of a file runs on every optimizer, and Optax itself stays as it is."""
    classes = [node for node in ast.parse(path_of(module).read_bytes()).body if isinstance(node, ast.ClassDef)]
    methods = [(cls.name, node.name) for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef)]
    written = {f"{cls}.{name}" for cls, name in methods if name.startswith("test_")}
    expected = {test for test in written if not left_out(module, test)}
    for name in SUITES[module].optimizers:
        assert {written_as(test) for test in TESTS[module] if name in test.id()} == expected
    original = vars(importlib.import_module(module))
    assert not [name for name, ours in SUITES[module].substitutes.items() if original[name] is ours]
