"""The transformations that some variants need and Optax does not have.

- ``clip_by_global_norm`` is exact in every dtype, within two units in the last place.
- Gradients accumulate in at least float32, and in no narrower or less complex dtype than their own.
- A complex leaf as two real ones is masked and clipped as one leaf, as in timm.
- Caution and clipping follow their formulas, and a gradient that is NaN is seen in the update.
"""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, accumulate, clip_by_global_norm, get_state, nadam, scale_by_nadam
from optax_nadam._wrappers import freeze_rows_without_gradient
from tests.helpers import run
from tests.reference import Nadam

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
OPTIONS = pytest.mark.parametrize("option", [{"cautious": True}, {"clip_by_gradient_rms": 0.5}])


def normal(rng, shape, dtype):
    """Random numbers as NumPy float64 or complex128, representable in the dtype, and as an array of it."""
    x = rng.normal(size=shape)
    if np.dtype(jnp.dtype(dtype)).kind == "c":
        x = x + 1j * rng.normal(size=shape)
    narrow = jnp.asarray(x, dtype)
    return np.asarray(narrow, np.result_type(x, np.float64)), narrow


def unit(dtype):
    return float(jnp.finfo(dtype).eps)


def clipped(max_norm, leaves):
    return clip_by_global_norm(max_norm).update(leaves, optax.EmptyState())[0]


@pytest.mark.x64
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_in_every_dtype(rng, dtype):
    """Also where it is float64 because of one leaf."""
    wide, leaves = zip(*(normal(rng, shape, dtype) for shape in ((50,), ())), strict=True)
    for more in ([], [jnp.asarray(rng.normal(size=9))]) if dtype == "bfloat16" else ([],):
        norm = np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in (*wide, *more)))
        limits = (0.5 * norm, 2 * norm, jnp.float32(0.5 * norm))
        every = jax.jit(lambda leaves, limits=limits: [clipped(limit, leaves) for limit in limits])([*leaves, *more])
        for limit, got in zip(limits, every, strict=True):
            chex.assert_type(got[: len(leaves)], dtype)
            for g, x in zip(got, [*wide, *more], strict=True):
                expected = x * min(1, float(limit) / norm)
                np.testing.assert_allclose(np.asarray(g, x.dtype), expected, rtol=2 * unit(g.dtype))


def test_norm_of_narrow():
    """It neither overflows nor stalls, and gradients come to the moments clipped."""
    many = clipped(1.0, 600 * [jnp.ones(1, jnp.bfloat16)])  # a sum of ones in bfloat16 stops at 256
    np.testing.assert_allclose(many[0], 600**-0.5, rtol=unit(jnp.bfloat16))
    g = jnp.full(1000, 10.0, jnp.float16)
    configs = [NadamConfig(clip_global_norm=1.0), NadamConfig(clip_norm=1.0)]
    for tx in (*(config.build() for config in configs), optax.chain(clip_by_global_norm(1.0), nadam())):
        _, state = tx.update(g, tx.init(g))
        np.testing.assert_allclose(get_state(state).m, 0.1 * 1000**-0.5, rtol=unit(jnp.float16))


def test_within_norm_unchanged(rng):
    """What is small, zero or no leaf stays as it is."""
    for g in (jnp.asarray(rng.normal(size=9), jnp.float32), jnp.zeros(3)):
        chex.assert_trees_all_equal(clipped(100.0, g), g)
    empty = {"none": None, "masked": optax.MaskedNode()}
    assert clipped(1.0, empty) == empty


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), jnp.ones(1), "1.0"])
def test_bad_norms(bad):
    with pytest.raises((ValueError, TypeError), match="max_norm must be"):
        clip_by_global_norm(bad)


@pytest.mark.x64
@pytest.mark.lenient("Optax splits complex leaves with mixed dtypes")
@pytest.mark.parametrize("as_real", [False, True])
def test_accumulated_dtypes(rng, as_real):
    """Inside scan, which rejects a state that changes its dtype."""
    dtypes = ["float32", "complex128"] if as_real else ["bfloat16", "float64", "complex64"]
    wide, grads = zip(*(normal(rng, (6, 8), dtype) for dtype in dtypes), strict=True)
    state, u = run(NadamConfig(learning_rate=0.1, accumulate_steps=3, complex_as_real=as_real).build(), grads)
    means = tuple(jnp.asarray(x.reshape(2, 3, 8).mean(axis=1), g.dtype) for x, g in zip(wide, grads, strict=True))
    _, expected = run(NadamConfig(learning_rate=0.1, complex_as_real=as_real).build(), means)
    for g, x, got, of_means, mean in zip(grads, wide, u, expected, state.acc_grads, strict=True):
        chex.assert_type(got, g.dtype)
        chex.assert_trees_all_equal(got[jnp.array([0, 1, 3, 4])], jnp.zeros((4, 8), g.dtype))
        # Where the sign of a rounded mean decides, its last bit is the step's.
        rtol = 40 * unit(g.dtype)
        np.testing.assert_allclose(np.asarray(got[2::3], x.dtype), np.asarray(of_means, x.dtype), rtol=rtol)
        assert mean.dtype == jnp.promote_types(g.dtype, jnp.float32)


@pytest.mark.parametrize("other", [{"b": jnp.ones(2)}, {"a": jnp.ones(3)}])
def test_accumulate_misfits(other):
    """They are refused before they are accumulated."""
    tx = NadamConfig(accumulate_steps=2).build()
    with pytest.raises(ValueError, match=r"gradients.*this optimizer state was made for"):
        tx.update(other, tx.init({"a": jnp.ones(2)}))


@pytest.mark.lenient("optax.MultiSteps mixes dtypes")
def test_is_multi_steps(rng):
    """It is MultiSteps, with what an optimizer needs besides: params and extra arguments, some of them functions."""
    grads = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    inner = optax.chain(optax.adamw(0.1), optax.scale_by_backtracking_linesearch(4))

    def loss(params):
        return jnp.sum(params**2)

    def end(tx):
        params, update = jnp.ones(5), jax.jit(tx.update, static_argnames="value_fn")
        state = tx.init(params)
        for g in grads:
            u, state = update(g, state, params, value=loss(params), grad=2 * params, value_fn=loss)
            params = optax.apply_updates(params, u)
        return params

    chex.assert_trees_all_close(end(accumulate(inner, 3)), end(optax.MultiSteps(inner, 3)), rtol=1e-5)


def test_functions_are_not_kept():
    """A function may close over what the caller traces, which no cache of ours holds on to."""
    tx, g = accumulate(optax.sgd(0.1), 2), jnp.ones(2)

    def update(scale):
        return tx.update(g, tx.init(g), g, value_fn=lambda p: scale * p)[1].acc_grads

    with jax.checking_leaks():
        chex.assert_trees_all_equal(jax.jit(update)(jnp.float32(2.0)), g)


@pytest.mark.parametrize(("steps", "kind"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_accumulate_steps(steps, kind):
    with pytest.raises(kind, match=f"steps must be .*got {steps!r}"):
        accumulate(optax.sgd(0.1), steps)


def test_accumulate_many():
    """A mean in bfloat16 would ignore gradients from the 256th on."""
    grads = jnp.repeat(jnp.array([0, 1], jnp.bfloat16), np.array([500, 499]))
    state, _ = run(NadamConfig(accumulate_steps=1000).build(), grads)
    np.testing.assert_allclose(state.acc_grads, 499 / 999, rtol=1e-5)


def test_cautious_signs():
    """Updates may all be zero, are so where the gradient is, and are not where their product with it vanishes.

    Not compiled: XLA would make a choice of the product of zero and infinity.
    """
    g = {"against": jnp.full(4, 1e-3), "zero": jnp.asarray([0.0, 1.0]), "tiny": jnp.asarray([1e-30, -1e-30])}
    m = {"against": jnp.full(4, -1.0), "zero": jnp.ones(2), "tiny": jnp.zeros(2)}
    tx = NadamConfig(learning_rate=-1.0, rule="simplified", cautious=True).build()
    nadam_state, *others = tx.init(g)
    state = nadam_state._replace(m=m, v=jax.tree.map(jnp.ones_like, g), count=jnp.int32(5))
    signs = jax.tree.map(jnp.sign, tx.update(g, (state, *others))[0])
    chex.assert_trees_all_equal(
        signs, {"against": jnp.zeros(4), "zero": jnp.array([0.0, 1.0]), "tiny": jnp.array([1.0, -1.0])}
    )


def test_cautious_mask(rng):
    """The mask is that of the update, found without the normalisation, on which the sign does not depend."""
    g = jnp.asarray(rng.normal(size=(12, 40)), jnp.float32)
    u, got = (run(NadamConfig(cautious=cautious).build(), g)[1] for cautious in (False, True))
    agrees = u * g < 0
    assert 0 < np.mean(agrees[-1]) < 1
    share = np.mean(agrees, axis=1, keepdims=True)
    np.testing.assert_allclose(got, np.where(agrees, u / share, 0), rtol=1e-6, atol=1e-9)  # of steps of 1e-3


@pytest.mark.parametrize("option", [{"cautious": True}, {"clip_by_gradient_rms": 0.5}, {"accumulate_steps": 1}])
def test_nan_is_seen(option):
    """Now and in the steps after it: a masked element would stand still and nobody would know."""
    _, u = run(NadamConfig(**option).build(), jnp.asarray([[jnp.nan, 1.0], [1.0, 1.0]]))
    assert np.all(np.isnan(u[:, 0]))


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_clip_by_rms(rng, dtype, rtol):
    wide, grads = normal(rng, (3, 50), dtype)
    scales = np.array([[1.0], [0.125], [4.0]])
    wide, grads = wide * scales, grads * jnp.asarray(scales, dtype)
    _, u = run(NadamConfig(learning_rate=1.0, rule="simplified", clip_by_gradient_rms=0.5).build(), grads)
    plain, _, v, _ = Nadam("simplified").history(wide)
    t = np.arange(1, 4)[:, None]
    rms = np.sqrt(np.mean((wide / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)) ** 2, axis=1, keepdims=True))
    assert rms[-1] > 1
    chex.assert_type(u, dtype)
    np.testing.assert_allclose(np.asarray(u, float), -plain / np.maximum(1, rms / 0.5), rtol=rtol, atol=1e-6)


@pytest.mark.lenient("Optax splits complex leaves with mixed dtypes")
@OPTIONS
def test_split_leaves(rng, option):
    """A complex leaf is masked and clipped as ``torch.view_as_real`` has it: one leaf with a last axis of two."""
    parts = jnp.asarray(rng.normal(size=(10, 6, 2)), jnp.float32) * jnp.linspace(0.1, 2.0, 10)[:, None, None]
    _, expected = run(NadamConfig(rule="simplified", **option).build(), parts)
    split = NadamConfig(rule="simplified", complex_as_real=True, **option).build()
    _, got = run(split, jax.lax.complex(parts[..., 0], parts[..., 1]))
    np.testing.assert_allclose(got, jax.lax.complex(expected[..., 0], expected[..., 1]), rtol=1e-5)


@OPTIONS
def test_options_rotate(rng, option):
    """Nadam's step rotates with complex gradients, and so do masks and clips: by a quarter turn or any other angle."""
    g = jnp.asarray(rng.normal(size=(10, 6)) + 1j * rng.normal(size=(10, 6)), jnp.complex64)
    tx = NadamConfig(rule="simplified", **option).build()
    for turn in (jnp.exp(jnp.complex64(0.7j)), jnp.complex64(1j)):
        (_, u), (_, turned) = run(tx, g), run(tx, g * turn)
        np.testing.assert_allclose(turned, u * turn, rtol=1e-4, atol=1e-8)


def test_rows_frozen():
    """They are chosen by a tree or by a function."""
    params = {"table": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    grads = {"table": jnp.asarray([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]), "bias": jnp.zeros(2)}
    state = scale_by_nadam().init(params)._replace(m=params, v=params)
    expected, _ = scale_by_nadam().update(grads, state)
    expected["table"] = expected["table"].at[1].set(0)
    for mask in ({"table": True, "bias": False}, lambda params: jax.tree.map(lambda p: p.ndim == 2, params)):
        updates, _ = freeze_rows_without_gradient(scale_by_nadam(), mask).update(grads, state)
        chex.assert_trees_all_equal(updates, expected)
    assert jnp.all(updates["bias"] != 0)
