"""Hostile values and trees: what they lead to, and that they affect nothing else.

- An inf or NaN in a gradient makes that element's update NaN, and no other element's; so does, one step later, a number
  whose square overflows.
- ``optax.apply_if_finite`` skips gradients that are not finite: the run continues as if they had not come, bit for bit.
- After clipping, gradients of any finite size are harmless.
- The largest and smallest float16 are ordinary numbers; subnormal gradients and moments never give NaN; zero gradients
  give zero updates, in float16 too, if eps or eps_root is above zero.
- Any rank, leaves without elements, empty trees, 200 levels of nesting, dataclasses and custom nodes, also those that
  check their children; 1,000 leaves; in ``python run.py long`` 10,000, and a leaf of 2^29 elements.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from flax import struct
from jax import numpy as jnp

from optax_nadam import clip_by_global_norm, nadamw, scale_by_nadam
from tests.helpers import few_rules, relative_error, run
from tests.reference import Nadam

of_optax = pytest.mark.lenient("Optax's wrapper mixes dtypes")
NOT_FINITE = dict.fromkeys(("float16", "bfloat16", "float32", "complex64"), (np.inf, -np.inf, np.nan))
# The square of the first overflows; the second is the largest number there is.
TOO_LARGE = {
    "bfloat16": (1e20, float(jnp.finfo(jnp.bfloat16).max)),
    "float32": (1e20, float(jnp.finfo(jnp.float32).max)),
    "complex64": (1e20, float(jnp.finfo(jnp.float32).max)),
    "float64": (1e160, float(jnp.finfo(jnp.float64).max)),
    "complex128": (1e160, float(jnp.finfo(jnp.float64).max)),
}
ORDINARY = (1.0, -0.5, 2.0, 0.25)


def leaves_with(values):
    """A leaf for each dtype, of ordinary numbers and then of these."""
    return {dtype: jnp.asarray([*ORDINARY, *x], dtype) for dtype, x in values.items()} | {"other": jnp.ones(3)}


def two_steps(tx, first, second):
    """What two steps give, after an ordinary one: updates, m and v of each."""
    _, state = tx.update(second, tx.init(second))
    u, after = tx.update(first, state)
    u_next, last = tx.update(second, after)
    return [(u, after.m, after.v), (u_next, last.m, last.v)]


def hostile_elements(rule, values):
    """What two steps make of the hostile elements; all others are as if these had been ones."""
    ones = leaves_with({dtype: np.ones_like(x) for dtype, x in values.items()})
    hostile, ordinary = (two_steps(scale_by_nadam(rule=rule), first, ones) for first in (leaves_with(values), ones))
    rest = slice(len(ORDINARY))
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[rest], steps) for steps in (hostile, ordinary)))
    return [[{dtype: np.asarray(x[dtype][4:]) for dtype in values} for x in step] for step in hostile]


@few_rules
def test_not_finite(rule):
    (u, m, v), (u_next, *_) = hostile_elements(rule, NOT_FINITE)
    for dtype in NOT_FINITE:
        assert np.isnan([u[dtype], u_next[dtype]]).all(), dtype
        assert not np.isfinite([m[dtype], v[dtype]]).any(), dtype


@few_rules
@pytest.mark.x64
def test_square_overflows(rule):
    (u, _, v), (u_next, _, v_next) = hostile_elements(rule, TOO_LARGE)
    for dtype in TOO_LARGE:
        assert np.isinf(v[dtype]).all(), dtype
        assert np.isnan([u_next[dtype], v_next[dtype]]).all(), dtype
        # The element does not move; in the largest number's own step the numerator may overflow too.
        moderate, largest = u[dtype]
        assert moderate == 0, dtype
        assert largest == 0 or np.isnan(largest), dtype


@of_optax
def test_apply_if_finite():
    tx = optax.apply_if_finite(nadamw(0.1), max_consecutive_errors=3)
    update = jax.jit(tx.update)

    def run(values):
        params = leaves_with(dict.fromkeys(NOT_FINITE, (0.5,)))
        state = tx.init(params)
        for value in values:
            updates, state = update(leaves_with(dict.fromkeys(NOT_FINITE, (value,))), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = run([1.0, jnp.nan, jnp.inf, -2.0, -jnp.inf, 3.0])
    expected, expected_state = run([1.0, -2.0, 3.0])
    chex.assert_trees_all_equal((params, state.inner_state), (expected, expected_state.inner_state))
    assert state.total_notfinite == 3


CLIPS = {
    "clip": (optax.clip(1e18), lambda g: jax.tree.map(lambda x: jnp.clip(x, -1e18, 1e18), g)),
    # The norm overflows to infinity, by which everything is divided.
    "clip_by_global_norm": (optax.clip_by_global_norm(1.0), lambda g: jax.tree.map(jnp.zeros_like, g)),
    "our clip_by_global_norm": (clip_by_global_norm(1.0), lambda g: jax.tree.map(jnp.zeros_like, g)),
}


@of_optax
@few_rules
def test_clipped(rule):
    plain = scale_by_nadam(rule=rule)
    small = optax.tree.scale(0.1, leaves_with(dict.fromkeys(("bfloat16", "float32"), (1e-3,))))
    for name, (clipping, clipped) in CLIPS.items():
        tx = optax.chain(clipping, plain)
        for value in (1e20, -float(jnp.finfo(jnp.bfloat16).max)):
            large = leaves_with(dict.fromkeys(("bfloat16", "float32"), (value,)))
            state, plain_state = tx.init(small), plain.init(small)
            for g, as_clipped in [(small, small), (large, clipped(large)), (small, small), (small, small)]:
                u, state = tx.update(g, state)
                expected, plain_state = plain.update(as_clipped, plain_state)
                chex.assert_trees_all_equal(u, expected, custom_message=name)
                chex.assert_tree_all_finite((u, state))


@few_rules
def test_extremes_of_float16(rng, rule):
    signs = jnp.asarray(rng.choice([-1.0, 0.0, 1.0], (50, 64)), jnp.float16)
    grads = {name: signs * getattr(jnp.finfo(jnp.float16), name) for name in ("max", "tiny", "smallest_subnormal")}
    state, updates = run(scale_by_nadam(rule=rule), grads)
    for name, g in grads.items():
        expected, m, v, _ = Nadam(rule).updates(np.asarray(g, float))
        assert relative_error(updates[name], expected) < 2.0**-11 + 1e-6, name  # the rounding of the update to float16
        np.testing.assert_allclose(state.m[name], m, rtol=1e-6, atol=1e-6 * np.max(np.abs(m)), err_msg=name)
        np.testing.assert_allclose(state.v[name], v, rtol=1e-6, err_msg=name)


@few_rules
def test_subnormal_gradients(rule):
    """They count as next to nothing."""
    tx, sizes = scale_by_nadam(rule=rule), np.asarray([1e-37, 1e-38, -1e-40, 1e-45])
    tiny = {dtype: jnp.asarray(sizes, dtype) for dtype in ("bfloat16", "float32", "complex64")}
    zero, one = (jax.tree.map(like, tiny) for like in (jnp.zeros_like, jnp.ones_like))
    u, state = tx.update(tiny, tx.init(tiny))
    # True of processors that keep subnormal numbers and of those that flush them to zero, as XLA does on a CPU.
    assert all(np.all(np.abs(x) <= 10 * np.abs(sizes) / 1e-7) for x in u.values())
    _, as_zero = tx.update(zero, tx.init(zero))
    chex.assert_trees_all_close(tx.update(one, state), tx.update(one, as_zero), rtol=1e-6, atol=1e-37)


@few_rules
def test_subnormal_moments(rule):
    tx, first = scale_by_nadam(b2=0.9, rule=rule), jnp.asarray([1.0, 1e-12, 1e-18, -1e-30])
    grads = jnp.zeros((2000, 4)).at[0].set(first)
    state, u = run(tx, grads)
    chex.assert_tree_all_finite(u)
    smallest = jnp.finfo(jnp.float32).tiny
    assert np.all(np.abs([state.m, state.v]) < smallest)
    np.testing.assert_allclose(u[-1], 0.0, atol=10 * float(smallest) / 1e-7)


@few_rules
def test_zero_gradient(rule):
    cases = {(0.0, 0.0): jnp.nan, (0.0, 1e-30): 0.0, (1e-30, 0.0): 0.0}

    @jax.jit
    def first_updates(g):
        optimizers = [scale_by_nadam(eps=eps, eps_root=eps_root, rule=rule) for eps, eps_root in cases]
        return [tx.update(g, tx.init(g))[0] for tx in optimizers]

    zeros = [jnp.zeros(2), jnp.zeros(2, jnp.float16)]
    for (case, expected), got in zip(cases.items(), first_updates(zeros), strict=True):
        np.testing.assert_array_equal(got, np.full((2, 2), expected), err_msg=f"eps and eps_root {case}")


def assert_one_step_follows_the_reference(tree):
    tx = scale_by_nadam()
    u, state = tx.update(tree, tx.init(tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(u, state.m, state.v, tree)
    for g, got in zip(jax.tree.leaves(tree), jax.tree.leaves(u), strict=True):
        expected, *_ = Nadam().updates(np.asarray(g, float)[None])
        np.testing.assert_allclose(got, expected[0], rtol=3e-7)


def test_every_rank(rng):
    shapes: list[tuple[int, ...]] = [(), *((2,) * rank for rank in range(1, 9)), (0,), (3, 0, 2), (1,) * 8]
    assert_one_step_follows_the_reference([jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes])


@pytest.mark.parametrize("empty", [None, (), [], {}, {"a": None, "b": [(), {}]}], ids=repr)
def test_no_leaves(empty):
    tx = scale_by_nadam()
    u, state = jax.jit(tx.update)(empty, tx.init(empty))
    chex.assert_trees_all_equal_structs(u, state.m, state.v, empty)
    assert state.count == 1


def test_200_levels():
    tree: Any = jnp.asarray([1.0, -3.0])
    for level in range(200):
        tree = {"in": tree} if level % 2 else [tree, None]
    assert_one_step_follows_the_reference(tree)


class Named(NamedTuple):
    """Python's own container with names."""

    w: Any
    b: Any


@chex.dataclass
class OfChex:
    """Chex's."""

    w: Any
    b: Any


@struct.dataclass
class OfFlax:
    """Flax's."""

    w: Any
    b: Any


@dataclass
class Checking:
    """A user's, which accepts only arrays, abstract or not."""

    w: Any
    b: Any

    def __post_init__(self):
        """Rejects children that are not arrays."""
        if not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in (self.w, self.b)):
            raise TypeError(f"expected arrays, got {self.w!r} and {self.b!r}")


jax.tree_util.register_pytree_node(Checking, lambda x: ((x.w, x.b), None), lambda _, children: Checking(*children))


@pytest.mark.parametrize("node", [Named, OfChex, OfFlax, Checking])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_nodes(node, compiled):
    leaves = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}
    tx, grads = scale_by_nadam(), {"outer": [node(**leaves), None]}
    update = jax.jit(tx.update) if compiled else tx.update
    (u, state), (expected, plain) = update(grads, tx.init(grads)), update(leaves, tx.init(leaves))
    for tree, want in ((u, expected), (state.m, plain.m), (state.v, plain.v)):
        chex.assert_trees_all_equal(tree, {"outer": [node(**want), None]})


@pytest.mark.parametrize(
    ("count", "compiled"),
    [
        (1_000, False),
        pytest.param(10_000, False, marks=pytest.mark.long),
        pytest.param(2_000, True, marks=pytest.mark.long),
    ],
)
def test_many_leaves(count, compiled):
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 2), (1, 5)]
    tree = [np.full(shapes[i % 4], 1e-3 * (i + 1), np.float32) for i in range(count)]
    tx = scale_by_nadam()
    u, _ = (jax.jit(tx.update) if compiled else tx.update)(tree, tx.init(tree))
    # Every leaf is constant: so is its update, that of the first of its elements.
    expected, *_ = Nadam().updates(np.asarray([[g.flat[0] for g in tree]], float))
    assert [x.shape for x in u] == [g.shape for g in tree]
    got = np.concatenate([np.ravel(x) for x in u])
    np.testing.assert_allclose(got, np.repeat(expected[0], [g.size for g in tree]), rtol=5e-7)


@pytest.mark.long
def test_2_to_29_elements():
    size = 2**29 + 8
    tx = scale_by_nadam()
    update = jax.jit(tx.update, donate_argnums=(0, 1))  # moments pass 2^31 bytes each
    spread = jax.jit(lambda step: _spread(jax.lax.iota(jnp.uint32, size), jnp.uint32(step)).astype(jnp.bfloat16))
    state = tx.init(jax.ShapeDtypeStruct((size,), jnp.bfloat16))
    for step in range(2):
        u, state = update(spread(step), state)

    sample = np.r_[0:1000, size // 2 : size // 2 + 1000, size - 1000 : size].astype(np.uint32)
    grads = np.stack([_spread(sample, np.uint32(step)).astype(jnp.bfloat16).astype(float) for step in range(2)])
    expected, m, v, _ = Nadam().updates(grads)
    np.testing.assert_allclose(state.m[sample], m, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state.v[sample], v, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(u[sample], float), expected[1], rtol=2.0**-8, atol=1e-6)


def _spread(index, step):
    """Numbers in [-1, 1) that depend on every bit of the index, the same in JAX and NumPy."""
    mixed = ((index + step * 977) * np.uint32(2654435761)) >> np.uint32(8)
    return mixed.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
