"""The transformations that some variants need and Optax does not have."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, _wrappers, accumulate, clip_by_global_norm, get_state, nadam, scale_by_nadam
from tests.reference import Nadam

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(rng, shape, dtype):
    """Random numbers as NumPy float64 or complex128, representable in the dtype, and as an array of it."""
    x = rng.normal(size=shape)
    if np.dtype(jnp.dtype(dtype)).kind == "c":
        x = x + 1j * rng.normal(size=shape)
    narrow = jnp.asarray(x, dtype)
    return np.asarray(narrow, np.result_type(x, np.float64)), narrow


def unit(dtype):
    return float(jnp.finfo(dtype).eps)


@pytest.mark.x64
@every_dtype
def test_the_global_norm_is_right_in_every_dtype(rng, dtype):
    wide, leaves = zip(*(normal(rng, shape, dtype) for shape in ((50,), (4, 3), ())), strict=True)
    norm = np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in wide))
    for max_norm in (0.5 * norm, 2 * norm, jnp.float32(0.5 * norm)):
        clipped, _ = clip_by_global_norm(max_norm).update(leaves, optax.EmptyState())
        expected = [x * min(1, float(max_norm) / norm) for x in wide]
        for got, x in zip(clipped, expected, strict=True):
            chex.assert_type(got, dtype)
            np.testing.assert_allclose(np.asarray(got, x.dtype), x, rtol=2 * unit(dtype))


def test_the_global_norm_neither_overflows_nor_stalls_in_narrow_dtypes():
    tenth, _ = clip_by_global_norm(1.0).update(jnp.full(1000, 10.0, jnp.float16), optax.EmptyState())
    np.testing.assert_allclose(tenth, 1000**-0.5, rtol=unit(jnp.float16))
    many = 2000 * [jnp.ones(1, jnp.bfloat16)]
    clipped, _ = clip_by_global_norm(1.0).update(many, optax.EmptyState())
    np.testing.assert_allclose(clipped[0], 2000**-0.5, rtol=unit(jnp.bfloat16))


@pytest.mark.parametrize(
    "make",
    [
        lambda: NadamConfig(clip_global_norm=1.0).build(),
        lambda: NadamConfig(clip_norm=1.0).build(),
        lambda: optax.chain(clip_by_global_norm(1.0), nadam()),
    ],
    ids=["clip_global_norm", "clip_norm", "chain"],
)
def test_clipped_float16_gradients_reach_the_moments(make):
    g = jnp.full(1000, 10.0, jnp.float16)
    tx = make()
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(get_state(state).m, 0.1 * 1000**-0.5, rtol=unit(jnp.float16))


@pytest.mark.x64
def test_one_float64_leaf_makes_the_norm_float64(rng):
    leaves = {"double": jnp.asarray(rng.normal(size=9)), "single": jnp.asarray(rng.normal(size=9), jnp.float32)}
    clipped, _ = clip_by_global_norm(1e-3).update(leaves, optax.EmptyState())
    norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in leaves.values()))
    np.testing.assert_allclose(clipped["double"], leaves["double"] * 1e-3 / norm, rtol=1e-15)


def test_gradients_within_the_norm_are_not_changed_and_zeros_stay_zero(rng):
    for g in (jnp.asarray(rng.normal(size=9), jnp.float32), jnp.zeros(3)):
        chex.assert_trees_all_equal(clip_by_global_norm(100.0).update(g, optax.EmptyState())[0], g)
    empty = {"none": None, "masked": optax.MaskedNode()}
    assert clip_by_global_norm(1.0).update(empty, optax.EmptyState())[0] == empty


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), jnp.ones(1), "1.0"])
def test_bad_norms(bad):
    with pytest.raises((ValueError, TypeError), match="max_norm must be"):
        clip_by_global_norm(bad)


@pytest.mark.x64
@pytest.mark.lenient("Optax splits complex leaves with mixed dtypes")
@every_dtype
@pytest.mark.parametrize("as_real", [False, True])
def test_gradients_accumulate_in_no_narrower_dtype_than_float32_and_their_own(rng, dtype, as_real):
    """Inside scan, which rejects a state that changes its dtype."""
    wide, grads = normal(rng, (6, 8), dtype)
    tx = NadamConfig(learning_rate=0.1, accumulate_steps=3, complex_as_real=as_real).build()
    state, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)
    chex.assert_type(u, dtype)
    chex.assert_trees_all_equal(u[jnp.array([0, 1, 3, 4])], jnp.zeros((4, 8), dtype))
    means = wide.reshape(2, 3, 8).mean(axis=1)
    every_step = NadamConfig(learning_rate=0.1, complex_as_real=as_real).build()
    _, expected = jax.lax.scan(
        lambda s, g: every_step.update(g, s)[::-1], every_step.init(grads[0]), jnp.asarray(means, dtype)
    )
    # Where the sign of a rounded mean decides, its last bit is the step's: so it is compared by the moments as well.
    np.testing.assert_allclose(np.asarray(u[2::3], wide.dtype), np.asarray(expected, wide.dtype), rtol=40 * unit(dtype))
    real = jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32
    accumulator = jnp.result_type(real, dtype) if jnp.iscomplexobj(grads) else real
    assert {x.dtype for x in jax.tree.leaves(state.acc_grads)} == {jnp.dtype(accumulator)}


@pytest.mark.parametrize("other", [{"b": jnp.ones(2)}, {"a": jnp.ones(3)}])
def test_gradients_that_do_not_fit_are_refused_before_they_are_accumulated(other):
    tx = NadamConfig(accumulate_steps=2).build()
    with pytest.raises(ValueError, match=r"gradients.*this optimizer state was made for"):
        tx.update(other, tx.init({"a": jnp.ones(2)}))


def test_complex_gradients_accumulate_both_parts():
    g = jnp.full(1, 0.3 + 0.4j, jnp.complex64)
    steps = []
    for k in (1, 2):
        tx = NadamConfig(learning_rate=0.1, accumulate_steps=k).build()
        state = tx.init(g)
        for _ in range(k):
            u, state = tx.update(g, state)
        steps.append(u)
    np.testing.assert_allclose(steps[0], -0.0634 - 0.0845j, atol=1e-4)
    chex.assert_trees_all_close(*steps, rtol=1e-6)


@pytest.mark.lenient("optax.MultiSteps mixes dtypes")
def test_accumulate_is_multi_steps(rng):
    """Of any optimizer, with what it needs besides: params, and extra arguments, of which some are functions."""
    grads = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    inner = optax.chain(optax.adamw(0.1), optax.scale_by_backtracking_linesearch(4))

    def run(tx):
        params = jnp.ones(5)
        state = tx.init(params)
        for g in grads:
            extra = {"value": jnp.sum(params**2), "grad": 2 * params, "value_fn": lambda p: jnp.sum(p**2)}
            u, state = tx.update(g, state, params, **extra)
            params = optax.apply_updates(params, u)
        return params

    chex.assert_trees_all_close(run(accumulate(inner, 3)), run(optax.MultiSteps(inner, 3)), rtol=1e-5)


@pytest.mark.parametrize(("steps", "kind"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_accumulate_counts_in_whole_steps(steps, kind):
    with pytest.raises(kind, match=f"steps must be .*got {steps!r}"):
        accumulate(optax.sgd(0.1), steps)


def test_an_accumulated_mean_in_bfloat16_does_not_stall():
    """A mean in bfloat16 would ignore gradients from the 256th on."""
    tx = NadamConfig(accumulate_steps=1000).build()
    g = jnp.ones(2, jnp.bfloat16)
    body = lambda _, s: tx.update(g, s)[1]  # noqa: E731
    state = jax.lax.fori_loop(0, 500, lambda _, s: tx.update(0 * g, s)[1], tx.init(g))
    state = jax.lax.fori_loop(0, 499, body, state)
    np.testing.assert_allclose(state.acc_grads, 499 / 999, rtol=1e-5)


def cautious_step(m, g):
    """The update, before sign and learning rate, of a cautious Nadam whose ``v`` is one."""
    tx = NadamConfig(learning_rate=-1.0, rule="simplified", cautious=True).build()
    nadam_state, *others = tx.init(g)
    state = (nadam_state._replace(m=m, v=jnp.ones_like(g), count=jnp.int32(5)), *others)
    return tx.update(g, state)[0]


def test_cautious_updates_may_all_be_zero():
    chex.assert_trees_all_equal(cautious_step(jnp.full(4, -1.0), jnp.full(4, 1e-3)), jnp.zeros(4))


def test_cautious_updates_are_zero_where_the_gradient_is():
    updates = cautious_step(jnp.ones(2), jnp.asarray([0.0, 1.0]))
    assert updates[0] == 0
    assert updates[1] > 0


def test_caution_sees_the_sign_of_gradients_whose_product_with_the_update_vanishes():
    np.testing.assert_array_equal(jnp.sign(cautious_step(jnp.zeros(2), jnp.asarray([1e-30, -1e-30]))), [1, -1])


@pytest.mark.parametrize("option", [{"cautious": True}, {"clip_by_gradient_rms": 0.5}, {"accumulate_steps": 1}])
def test_a_gradient_that_is_nan_is_seen_in_the_update(option):
    """Now and in the steps after it: a masked element would stand still and nobody would know."""
    tx, g = NadamConfig(**option).build(), jnp.asarray([jnp.nan, 1.0])
    u, state = tx.update(g, tx.init(g))
    later, _ = tx.update(jnp.ones(2), state)
    assert np.isnan(u[0])
    assert np.isnan(later[0])


@pytest.mark.parametrize("rule", ["scheduled", "eps_hat", "undebiased"])
def test_caution_takes_the_mask_from_the_update_itself(rng, rule):
    """Which it finds without the normalisation, on which the sign does not depend."""
    g = jnp.asarray(rng.normal(size=(12, 40)), jnp.float32)

    def updates(cautious):
        tx = NadamConfig(rule=rule, cautious=cautious).build()
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1]

    u, got = updates(False), updates(True)
    agrees = u * g < 0
    assert 0 < np.mean(agrees[-1]) < 1
    share = np.mean(agrees, axis=1, keepdims=True)
    np.testing.assert_allclose(got, np.where(agrees, u / share, 0), rtol=1e-6, atol=1e-9)  # of steps of 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_clipping_by_the_rms_of_the_gradient_over_the_root(rng, dtype):
    config = NadamConfig(learning_rate=1.0, rule="simplified", clip_by_gradient_rms=0.5)
    tx = config.build()
    grads = [jnp.asarray(scale * rng.normal(size=50), dtype) for scale in (1.0, 0.1, 3.0)]
    state = tx.init(grads[0])
    plain, *_ = Nadam("simplified").updates(np.stack([np.asarray(g, np.float64) for g in grads]))
    _, _, v = np.zeros(50), np.zeros(50), np.zeros(50)
    for t, g in enumerate(grads, start=1):
        updates, state = tx.update(g, state)
        chex.assert_type(updates, dtype)
        wide = np.asarray(g, np.float64)
        v = 0.999 * v + 0.001 * wide**2
        rms = np.sqrt(np.mean((wide / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)) ** 2))
        expected = -plain[t - 1] / max(1.0, rms / 0.5)
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=tolerance, atol=1e-6)
    assert rms > 1


def as_complex(x):
    return jnp.asarray(x[..., 0] + 1j * x[..., 1], jnp.complex64)


@pytest.mark.lenient("Optax splits complex leaves with mixed dtypes")
@pytest.mark.parametrize("option", [{"cautious": True}, {"clip_by_gradient_rms": 0.5}])
def test_a_complex_leaf_as_two_real_ones_is_masked_and_clipped_as_one_leaf(rng, option):
    """As ``torch.view_as_real`` has it: one leaf with a last axis of two."""
    parts = jnp.asarray(rng.normal(size=(10, 6, 2)), jnp.float32) * jnp.linspace(0.1, 2.0, 10)[:, None, None]
    real = NadamConfig(rule="simplified", **option).build()
    split = NadamConfig(rule="simplified", complex_as_real=True, **option).build()
    _, expected = jax.lax.scan(lambda s, g: real.update(g, s)[::-1], real.init(parts[0]), parts)
    grads = as_complex(parts)
    _, got = jax.lax.scan(lambda s, g: split.update(g, s)[::-1], split.init(grads[0]), grads)
    np.testing.assert_allclose(got, as_complex(expected), rtol=1e-5)


@pytest.mark.parametrize("option", [{"cautious": True}, {"clip_by_gradient_rms": 0.5}])
def test_masks_and_clips_of_complex_leaves_turn_with_them(rng, option):
    """Nadam's step rotates with the gradients, and so do masks and clips: by a quarter turn or any other angle."""
    g = jnp.asarray(rng.normal(size=(10, 6)) + 1j * rng.normal(size=(10, 6)), jnp.complex64)
    tx = NadamConfig(rule="simplified", **option).build()
    turn = jnp.exp(jnp.complex64(0.7j))
    (_, u), (_, turned) = (jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(x[0]), x) for x in (g, g * turn))
    np.testing.assert_allclose(turned, u * turn, rtol=1e-4, atol=1e-8)


def test_clipping_by_the_rms_takes_the_absolute_value():
    steps = []
    for g in (0.5, 0.5j):
        tx = NadamConfig(learning_rate=1.0, rule="simplified", clip_by_gradient_rms=0.1).build()
        steps.append(tx.update(jnp.full(1, g, jnp.complex64), tx.init(jnp.ones(1, jnp.complex64)))[0])
    np.testing.assert_allclose(steps[1], 1j * steps[0], rtol=1e-6)
    np.testing.assert_allclose(steps[0], -0.19, rtol=1e-5)


def test_rows_are_chosen_by_a_function_too():
    def mask(params):
        return jax.tree.map(lambda p: p.ndim == 2, params)

    params = {"table": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    chosen = _wrappers.freeze_rows_without_gradient(scale_by_nadam(), mask)
    fixed = _wrappers.freeze_rows_without_gradient(scale_by_nadam(), {"table": True, "bias": False})
    state = chosen.init(params)._replace(m=params, v=params)
    grads = {"table": jnp.asarray([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]), "bias": jnp.zeros(2)}
    updates, _ = chosen.update(grads, state)
    chex.assert_trees_all_equal(updates, fixed.update(grads, state)[0])
    assert jnp.all(updates["bias"] != 0)
