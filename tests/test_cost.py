"""What a step costs, in figures that do not depend on the machine."""

from typing import Any

import jax
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import _nadam, _rules, nadam, nadamw, scale_by_nadam
from tests.reference import RULES


def leaves(number, shape=(64,)):
    return {f"w{i}": jnp.ones(shape) for i in range(number)}


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def equations(make_step, tx, number):
    params = leaves(number)
    return len(jax.make_jaxpr(make_step(tx))(params, tx.init(params), params).eqns)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("make_step", "make", "a_leaf"),
    [
        (lambda tx: lambda params, state, grads: tx.update(grads, state, params), scale_by_nadam, 1),
        (step_of, nadamw, 5),
    ],
    ids=["scale_by_nadam", "whole step of nadamw"],
)
def test_equations_a_leaf(make_step, make, a_leaf, rule):
    tx = make(rule=rule)
    assert equations(make_step, tx, 21) - equations(make_step, tx, 20) == a_leaf
    assert equations(make_step, tx, 0) <= 6


@pytest.fixture
def traced(monkeypatch):
    """A list that grows by a name each time a function is traced."""
    calls: list[str] = []

    def watch(module, name, shown):
        original = getattr(module, name)

        def watched(*args):
            calls.append(shown(*args))
            return original(*args)

        monkeypatch.setattr(module, name, watched)

    watch(_nadam, "_abs_squared", lambda x: f"leaf {x.shape}")
    watch(_rules, "_log", lambda base: "coefficients")
    jax.clear_caches()
    return calls


def test_the_leaf_update_is_traced_once_a_shape(traced):
    tx, params = scale_by_nadam(), leaves(30, (7, 11)) | {"other": jnp.ones((3, 5))}
    jax.jit(tx.update).lower(params, tx.init(params))
    assert sorted(traced) == ["coefficients", "leaf (3, 5)", "leaf (7, 11)"]


def test_an_eager_loop_compiles_once_even_as_hyperparameters_change(traced):
    params = leaves(3) | {"other": jnp.ones((3, 5))}
    for k in range(5):
        tx = scale_by_nadam(b1=jnp.float32(0.8 + 0.01 * k), b2=jnp.float32(0.99))
        tx.update(params, tx.init(params))
    assert sorted(traced) == ["coefficients", "leaf (3, 5)", "leaf (64,)"]


@pytest.mark.parametrize("make", [nadam, nadamw])
def test_no_temporary_grows_with_the_leaves(make):
    def temporaries(size):
        tx, params = make(1e-3), leaves(2, (size, size))
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        compiled: Any = step.lower(params, tx.init(params), params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(512) == temporaries(256) < 1024


@pytest.mark.lenient("optax.nadam itself mixes dtypes")
def test_bytes_and_kernels_are_no_more_than_those_of_optax_nadam():
    def compiled(tx):
        params = leaves(1, (512, 512))
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        return step.lower(params, tx.init(params), params).compile()

    ours, theirs = compiled(nadam(1e-3)), compiled(optax.nadam(1e-3))
    a_parameter = 1e-3 * 512 * 512
    assert ours.cost_analysis()["bytes accessed"] <= theirs.cost_analysis()["bytes accessed"] + a_parameter
    assert large_kernels(ours) <= large_kernels(theirs)


def large_kernels(compiled):
    """How many instructions of the entry computation make a whole leaf."""
    entry = compiled.as_text().split("ENTRY")[1]
    return sum(" = f32[512,512]" in line and "parameter(" not in line for line in entry.splitlines())
