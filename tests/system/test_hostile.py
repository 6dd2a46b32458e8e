"""Hostile values and trees: what they lead to, and that they affect nothing else."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from flax import struct
from jax import numpy as jnp

from optax_nadam import _rules, clip_by_global_norm, nadamw, scale_by_nadam
from tests.reference import Nadam

ALL_RULES = pytest.mark.parametrize("rule", _rules.RULES)
of_optax = pytest.mark.lenient("Optax's wrapper mixes dtypes")
NARROW_AND_SINGLE = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64)
HERE = np.asarray([False, True, False, False])  # the element of a leaf of 4 that gets the hostile value


def leaves_with(value, dtypes=NARROW_AND_SINGLE):
    """A leaf for each dtype with a value in one of its elements, and one leaf without."""
    ordinary = jnp.asarray([1.0, -0.5, 2.0, 0.25])
    tree = {jnp.dtype(d).name: jnp.where(HERE, jnp.asarray(value, d), ordinary.astype(d)) for d in dtypes}
    return tree | {"untouched": ordinary}


def two_steps(tx, first, second):
    """What two steps give, after an ordinary one: updates, m and v of each."""
    _, state = tx.update(second, tx.init(second))
    u, after = tx.update(first, state)
    u_next, last = tx.update(second, after)
    return [(u, after.m, after.v), (u_next, last.m, last.v)]


def elements(trees, where):
    """The elements of every leaf but the untouched one, where the hostile value was or where it was not."""
    return [np.asarray(x)[where] for tree in trees for name, x in tree.items() if name != "untouched"]


def assert_nothing_else_changed(hostile, ordinary):
    chex.assert_trees_all_equal([tree["untouched"] for tree in hostile], [tree["untouched"] for tree in ordinary])
    chex.assert_trees_all_equal(elements(hostile, ~HERE), elements(ordinary, ~HERE))


@ALL_RULES
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
def test_a_gradient_that_is_not_finite_corrupts_its_own_element_for_good_and_no_other(rule, bad):
    tx = scale_by_nadam(rule=rule)
    corrupted, ordinary = (two_steps(tx, leaves_with(value), leaves_with(1.0)) for value in (bad, 1.0))
    for got, expected in zip(corrupted, ordinary, strict=True):
        assert_nothing_else_changed(got, expected)
    assert np.all(np.isnan(elements(corrupted[0][:1], HERE)))
    assert not np.any(np.isfinite(elements(corrupted[0], HERE)))
    assert np.all(np.isnan(elements(corrupted[1], HERE)))


@of_optax
@ALL_RULES
def test_apply_if_finite_continues_as_if_the_bad_gradients_had_never_come(rule):
    tx = optax.apply_if_finite(nadamw(0.1, rule=rule), max_consecutive_errors=3)
    update = jax.jit(tx.update)

    def run(values):
        params = leaves_with(0.5)
        state = tx.init(params)
        for value in values:
            updates, state = update(leaves_with(value), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    (params, state), (expected, expected_state) = (
        run([1.0, jnp.nan, jnp.inf, -2.0, -jnp.inf, 3.0]),
        run([1.0, -2.0, 3.0]),
    )
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)
    assert state.total_notfinite == 3


# The square of the first overflows; the second is the largest number there is.
TOO_LARGE = {
    jnp.bfloat16: (1e20, float(jnp.finfo(jnp.bfloat16).max)),
    jnp.float32: (1e20, float(jnp.finfo(jnp.float32).max)),
    jnp.complex64: (1e20, float(jnp.finfo(jnp.float32).max)),
    jnp.float64: (1e160, float(jnp.finfo(jnp.float64).max)),
    jnp.complex128: (1e160, float(jnp.finfo(jnp.float64).max)),
}


@ALL_RULES
@pytest.mark.x64
@pytest.mark.parametrize("dtype", TOO_LARGE, ids=lambda d: jnp.dtype(d).name)
def test_a_square_that_overflows_stops_its_element_at_once_and_corrupts_it_for_good(rule, dtype):
    tx = scale_by_nadam(rule=rule)
    for value in TOO_LARGE[dtype]:
        hostile, ordinary = (two_steps(tx, leaves_with(x, [dtype]), leaves_with(1.0, [dtype])) for x in (value, 1.0))
        for got, expected in zip(hostile, ordinary, strict=True):
            assert_nothing_else_changed(got, expected)
        (u, _, v), (u_next, _, v_next) = [elements(step, HERE) for step in hostile]
        assert np.isinf(v)
        assert np.isnan(v_next)
        # In the largest number's own step the numerator may overflow too.
        assert u == 0 or (np.isnan(u) and value > 1e38)
        assert np.isnan(u_next)


CLIPS = {
    "clip": (optax.clip(1e18), lambda g: jax.tree.map(lambda x: jnp.clip(x, -1e18, 1e18), g)),
    # The norm overflows to infinity, by which everything is divided.
    "clip_by_global_norm": (optax.clip_by_global_norm(1.0), lambda g: jax.tree.map(jnp.zeros_like, g)),
    "our clip_by_global_norm": (clip_by_global_norm(1.0), lambda g: jax.tree.map(jnp.zeros_like, g)),
}


@of_optax
@ALL_RULES
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("value", [1e20, -float(jnp.finfo(jnp.bfloat16).max)])
def test_clipping_saves_the_run_from_gradients_that_are_too_large(rule, clip, value):
    clipping, clipped = CLIPS[clip]
    reals = [jnp.bfloat16, jnp.float32]
    plain, tx = scale_by_nadam(rule=rule), optax.chain(clipping, scale_by_nadam(rule=rule))
    small, large = (leaves_with(x, reals) for x in (1e-3, value))
    small = optax.tree.scale(0.1, small)
    state, plain_state = tx.init(small), plain.init(small)
    for g, as_clipped in [(small, small), (large, clipped(large)), (small, small), (small, small)]:
        u, state = tx.update(g, state)
        expected, plain_state = plain.update(as_clipped, plain_state)
        chex.assert_trees_all_equal(u, expected)
        chex.assert_tree_all_finite((u, state))


@ALL_RULES
def test_the_extremes_of_float16_are_ordinary_numbers(rng, rule):
    signs = jnp.asarray(rng.choice([-1.0, 0.0, 1.0], (50, 64)), jnp.float16)
    grads = {name: signs * getattr(jnp.finfo(jnp.float16), name) for name in ("max", "tiny", "smallest_subnormal")}
    tx = scale_by_nadam(rule=rule)
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    state, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)
    for name, g in grads.items():
        expected, m, v, _ = Nadam(rule).updates(np.asarray(g, float))
        error = np.linalg.norm(np.asarray(updates[name], float) - expected) / np.linalg.norm(expected)
        assert error < 2.0**-11 + 1e-6, name  # the rounding of the update to float16
        np.testing.assert_allclose(state.m[name], m, rtol=1e-6, atol=1e-6 * np.max(np.abs(m)), err_msg=name)
        np.testing.assert_allclose(state.v[name], v, rtol=1e-6, err_msg=name)


@ALL_RULES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_gradients_next_to_nothing_count_as_such(rule, dtype):
    tx, tiny = scale_by_nadam(rule=rule), jnp.asarray([1e-37, 1e-38, -1e-40, 1e-45], dtype)
    zero, one = jnp.zeros_like(tiny), jnp.ones_like(tiny)
    u, state = tx.update(tiny, tx.init(tiny))
    # True of processors that keep subnormal numbers and of those that flush them to zero, as XLA does on a CPU.
    assert np.all(np.abs(u) <= 10 * np.abs([1e-37, 1e-38, 1e-40, 1e-45]) / 1e-7)
    _, as_zero = tx.update(zero, tx.init(zero))
    chex.assert_trees_all_close(tx.update(one, state), tx.update(one, as_zero), rtol=1e-6, atol=1e-37)


@ALL_RULES
def test_moments_fade_away_through_the_subnormal_numbers(rule):
    tx, first = scale_by_nadam(b2=0.9, rule=rule), jnp.asarray([1.0, 1e-12, 1e-18, -1e-30])
    grads = jnp.zeros((2000, 4)).at[0].set(first)
    state, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(first), grads)
    chex.assert_tree_all_finite(u)
    smallest = jnp.finfo(jnp.float32).tiny
    assert np.all(np.abs([state.m, state.v]) < smallest)
    np.testing.assert_allclose(u[-1], 0.0, atol=10 * float(smallest) / 1e-7)


@ALL_RULES
def test_a_zero_gradient_needs_eps_or_eps_root(rule):
    cases = {(0.0, 0.0): jnp.nan, (0.0, 1e-30): 0.0, (1e-30, 0.0): 0.0}

    @jax.jit
    def first_updates(g):
        optimizers = [scale_by_nadam(eps=eps, eps_root=eps_root, rule=rule) for eps, eps_root in cases]
        return [tx.update(g, tx.init(g))[0] for tx in optimizers]

    for (case, expected), got in zip(cases.items(), first_updates(jnp.zeros(2)), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=f"eps and eps_root {case}")


def assert_one_step_follows_the_reference(tree):
    tx = scale_by_nadam()
    u, state = tx.update(tree, tx.init(tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(u, state.m, state.v, tree)
    for g, got in zip(jax.tree.leaves(tree), jax.tree.leaves(u), strict=True):
        expected, *_ = Nadam().updates(np.asarray(g, float)[None])
        np.testing.assert_allclose(got, expected[0], rtol=3e-7)


def test_leaves_of_every_rank_and_of_no_elements(rng):
    shapes: list[tuple[int, ...]] = [(), *((2,) * rank for rank in range(1, 9)), (0,), (3, 0, 2), (1,) * 8]
    assert_one_step_follows_the_reference([jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes])


@pytest.mark.parametrize("empty", [None, (), [], {}, {"a": None, "b": [(), {}]}], ids=repr)
def test_trees_without_leaves_keep_their_structure_and_count_steps(empty):
    tx = scale_by_nadam()
    u, state = jax.jit(tx.update)(empty, tx.init(empty))
    chex.assert_trees_all_equal_structs(u, state.m, state.v, empty)
    assert state.count == 1


def test_a_tree_of_200_levels():
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
def test_nodes_of_other_libraries_and_of_users(node, compiled):
    leaves = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}
    tx, grads = scale_by_nadam(), {"outer": [node(**leaves), None]}
    state = tx.init(grads)
    update = jax.jit(tx.update) if compiled else tx.update
    u, state = update(grads, state)
    expected, expected_state = update(leaves, tx.init(leaves))
    for tree, want in ((u, expected), (state.m, expected_state.m), (state.v, expected_state.v)):
        inner, nothing = tree["outer"]
        assert isinstance(inner, node)
        assert nothing is None
        chex.assert_trees_all_equal({"w": inner.w, "b": inner.b}, want)


def many_leaves(count):
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 2), (1, 5)]
    return [np.full(shapes[i % 4], 1e-3 * (i + 1), np.float32) for i in range(count)]


def assert_each_has_its_own_update(updates, tree, steps):
    """Every leaf is constant: so is its update, that of the first of its elements."""
    first = np.asarray([g.flat[0] for g in tree], float)
    expected, *_ = Nadam().updates(np.tile(first, (steps, 1)))
    assert [u.shape for u in updates] == [g.shape for g in tree]
    got = np.concatenate([np.ravel(u) for u in updates])
    np.testing.assert_allclose(got, np.repeat(expected[-1], [g.size for g in tree]), rtol=5e-7)


def test_ten_thousand_leaves_outside_jit():
    tx, tree = scale_by_nadam(), many_leaves(10_000)
    u, _ = tx.update(tree, tx.init(tree))
    assert_each_has_its_own_update(u, tree, 1)


@pytest.mark.long
def test_two_thousand_leaves_compiled():
    tx, tree = scale_by_nadam(), many_leaves(2_000)
    update = jax.jit(tx.update)
    _, state = update(tree, tx.init(tree))
    u, _ = update(tree, state)
    assert_each_has_its_own_update(u, tree, 2)


@pytest.mark.long
def test_a_leaf_whose_moments_pass_2_to_31_bytes_each():
    size = 2**29 + 8
    tx = scale_by_nadam()
    update = jax.jit(tx.update, donate_argnums=(0, 1))
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
