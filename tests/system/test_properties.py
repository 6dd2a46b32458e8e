"""Any tree of leaves follows the reference: random trees of random leaves under random hyperparameters.

2 x 20 trees, 2 x 2000 in ``python run.py long``; in float32 within 4e-7 of the largest intermediate number, in float64
within 1e-14.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import numpy as jnp

from optax_nadam import _rules, scale_by_nadam
from tests.reference import Nadam


@dataclass(frozen=True)
class Leaf:
    """What a leaf is like at every step; its numbers come from a seed."""

    shape: tuple[int, ...]
    dtype: str


class Pair(NamedTuple):
    """A container with names."""

    left: Any
    right: Any


# Few, so that few are compiled.
SHAPES = [(), (1,), (17,), (0,), (0, 4, 1), (2, 3), (1, 2, 1, 3)]
NARROW_AND_SINGLE = ["float16", "bfloat16", "float32", "complex64"]


def trees(dtypes):
    """Nested containers of up to six leaves, with None here and there."""
    leaves = st.none() | st.builds(Leaf, st.sampled_from(SHAPES), st.sampled_from(dtypes))

    def containers(inside):
        return (
            st.lists(inside, max_size=3)
            | st.dictionaries(st.sampled_from("abc"), inside, max_size=3)
            | st.tuples(inside, inside)
            | st.builds(Pair, inside, inside)
        )

    return st.recursive(leaves, containers, max_leaves=6)


STEPS, SEEDS = st.integers(1, 4), st.integers(0, 2**32 - 1)
DIALECTS = st.builds(
    Nadam,
    rule=st.sampled_from(list(_rules.RULES)),
    b1=st.just(0.0) | st.floats(0.5, 1 - 2.0**-10, width=32),
    b2=st.floats(0.5, 1 - 2.0**-16, width=32),
    eps=st.sampled_from([2.0**-27, 2.0**-23, 2.0**-10]),
    eps_root=st.sampled_from([0.0, 2.0**-27]),
    momentum_decay=st.floats(0.0, 10.0, width=32, allow_subnormal=False),
)


def gradients(rng, leaf, steps):
    """Gradients of a leaf, of another magnitude at every step, and one in four of them zero."""
    shape, dtype = (steps, *leaf.shape), jnp.dtype(leaf.dtype)
    x = rng.normal(size=shape) * (1j * rng.normal(size=shape) + 1 if dtype.kind == "c" else 1)
    magnitudes = 10.0 ** rng.uniform(-4, 4, size=(steps, *(1,) * len(leaf.shape)))
    largest = float(jnp.finfo(dtype).max)
    return np.clip(x * magnitudes * (rng.random(shape) < 0.75), -largest, largest).astype(dtype)


def assert_within(got, expected, scale, dtype, narrow=None):
    """Equal to within a few roundings of the largest intermediate number, and one rounding to a narrow dtype."""
    got = np.asarray(got).astype(expected.dtype)
    computed = 4e-7 if jnp.finfo(dtype).bits <= 32 else 1e-14
    stored = jnp.finfo(narrow or dtype)
    least = float(jnp.finfo(dtype).tiny) + float(stored.smallest_subnormal)
    bound = computed * scale + float(stored.eps) / 2 * np.abs(expected) + least
    assert np.all(np.abs(got - expected) <= bound)


def check(reference, tree, steps, seed):
    """Takes the steps; compares updates and state with the reference, and their dtypes with the documented ones."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda leaf: gradients(rng, leaf, steps), tree)
    h = {name: jnp.asarray(getattr(reference, name)) for name in _rules.Hyperparameters._fields}
    tx = scale_by_nadam(**h, rule=reference.rule)
    state = tx.init(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree))
    for step in range(steps):
        g = jax.tree.map(lambda x, step=step: jnp.asarray(x[step]), grads)
        u, state = tx.update(g, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(u, g)
    chex.assert_type([state.count, state.mu_product], [jnp.int32, jnp.zeros(()).dtype])
    assert state.count == steps
    chex.assert_trees_all_equal_structs(state.m, state.v, tree)
    for leaf, *of_leaf in zip(*map(jax.tree.leaves, (tree, grads, u, state.m, state.v)), strict=True):
        check_leaf(reference, leaf.dtype, *of_leaf)


def check_leaf(reference, dtype, grads, u, m, v):
    stored_in = {"float16": "float32", "bfloat16": "float32"}.get(dtype, dtype)
    real = {"complex64": "float32", "complex128": "float64"}.get(stored_in, stored_in)
    assert (m.shape, v.shape, m.dtype, v.dtype) == (*2 * [grads.shape[1:]], stored_in, real)
    wide = np.clongdouble if "complex" in dtype else np.longdouble
    u_expected, m_expected, v_expected, _ = reference.updates(grads.astype(wide))
    # The same with nothing that cancels: the size of the terms.
    u_scale, m_scale, *_ = reference.updates(np.abs(grads.astype(wide)))
    assert_within(u, u_expected[-1], u_scale[-1], m.dtype, narrow=dtype)
    assert_within(m, m_expected, m_scale, m.dtype)
    assert_within(v, v_expected, v_expected, v.dtype)


@pytest.mark.property
@given(DIALECTS, trees(NARROW_AND_SINGLE), STEPS, SEEDS)
def test_any_tree(reference, tree, steps, seed):
    check(reference, tree, steps, seed)


@pytest.mark.property
@pytest.mark.x64
@given(DIALECTS, trees(["bfloat16", "float32", "float64", "complex128"]), STEPS, SEEDS)
def test_any_tree_x64(reference, tree, steps, seed):
    check(reference, tree, steps, seed)
