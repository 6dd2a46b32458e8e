"""Codes of a byte, with a scale for each row and each column.

- A code is one of the two next to the number, unbiased, within 5 standard errors, in leaves of any shape.
- The scale of an element is the smaller of the largest in its row and in its column, of a vector in its segment.
- Two 8-bit moments take at most 3 bytes a parameter; leaves that would take more have no codes.
- A NaN or infinity shows in its own element alone.
- A step of weight 0 changes no scale, and in float32 at most one code in 10^5, by one.
"""

import functools
import math

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam._leaves import abs_squared
from optax_nadam._moments import average, zero_m, zero_v
from optax_nadam._quantized import Moment, _largest_of_windows, decode_codes, encode_codes
from optax_nadam._rounding import RandomBits
from tests.helpers import NANS

SIGNED, UNSIGNED = jnp.dtype(jnp.int8), jnp.dtype(jnp.uint8)
every_dtype = pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
# A matrix, one with batch axes, and vectors, the second with a last segment of 41; and the size of their numbers.
SIZES: dict[tuple[int, ...], float] = {
    (40, 33): 1e20,
    (20, 2, 20, 15): 1e-10,
    (1024,): 3.0,
    (1065,): 1e-9,
}
every_shape = pytest.mark.parametrize("shape", SIZES, ids=str)
two_shapes = pytest.mark.parametrize("shape", [(20, 2, 20, 15), (1065,)], ids=str)


@functools.partial(jax.jit, static_argnames="dtype")
def encoded(x, dtype, step=1):
    return encode_codes(x, dtype, RandomBits.for_m(step, 0))


@functools.partial(jax.jit, static_argnames="real")
def numbers_of(moment, real=jnp.float32):
    return decode_codes(moment, real)


def decoded(moment):
    return np.asarray(numbers_of(moment), float)


def levels(dtype):
    """The fractions of the scale that codes stand for: squares with a sign, or fourth powers."""
    k = np.arange(-127, 128) if dtype == SIGNED else np.arange(1, 255)
    return np.sign(k) * (k / 127) ** 2 if dtype == SIGNED else (k / 254) ** 4


def largest(x, segment=128):
    """The scale of each element, by the definition."""
    size = np.abs(x)
    if x.ndim == 1:
        of_segments = [part.max() for part in np.split(size, range(segment, x.size, segment))]
        return np.repeat(of_segments, segment)[: x.size]
    column = x.ndim - 2 - int(np.argmax(x.shape[-2::-1]))  # the longest, of equal ones the last
    return np.minimum(size.max(-1, keepdims=True), size.max(column, keepdims=True))


def uneven(rng, shape, dtype):
    """Numbers of either sign, or of none, from 1e-8 of the largest on."""
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 0, size=shape)
    return (x if dtype == SIGNED else np.abs(x)).astype(np.float32)


@every_dtype
def test_levels_of_codes(dtype):
    expected = levels(dtype)
    codes = np.arange(-127 if dtype == SIGNED else 1, 128 if dtype == SIGNED else 255).astype(dtype)
    got = decoded(Moment(codes, (np.full(2, 3, np.float32),)))
    np.testing.assert_allclose(got, 3 * expected, rtol=1e-6)


@every_shape
@every_dtype
def test_codes_unbiased(rng, dtype, shape):
    """One of the two codes next to the number, whose mean is the number, small and large ones alike."""
    x, steps, possible = uneven(rng, shape, dtype) * np.float32(SIZES[shape]), 64, levels(dtype)
    draws = np.stack([decoded(encoded(x, dtype, step)) for step in range(steps)])
    scale = largest(x.astype(float))
    fraction = np.clip(x / scale, possible[0], None)  # v has no zero
    i = np.clip(np.searchsorted(possible, fraction), 1, None)
    below, gap = possible[i - 1], possible[i] - possible[i - 1]
    up, went_up = (fraction - below) / gap, (draws / scale - below) / gap
    np.testing.assert_allclose(went_up, went_up > 0.5, atol=1e-3)
    for part in np.array_split(np.argsort(np.abs(fraction), axis=None), 4):
        error, p = (went_up - up).reshape(steps, -1)[:, part], up.ravel()[part]
        assert abs(np.sum(error)) < 5 * np.sqrt(steps * np.sum(p * (1 - p)))


@pytest.mark.parametrize(("shape", "axis"), [((1000, 100), 0), ((3, 70, 7, 90), 1), ((40, 33), 0)])
def test_windows_of_a_gpu(rng, shape, axis):
    """On a GPU the largest of columns is found in two stages."""
    x = rng.random(shape, np.float32)
    np.testing.assert_array_equal(_largest_of_windows(jnp.asarray(x), axis).max(axis), x.max(axis))


# The shapes of the scales of a leaf: rows, then columns. None where they take more than half a byte a parameter.
SCALES: dict[tuple[int, ...], list[tuple[int, ...]] | None] = {
    (32, 32): [(32,), (32,)],
    (512, 3000): [(512,), (3000,)],
    (3, 3, 64, 100): [(3, 3, 64), (3, 3, 100)],
    (64, 3, 20, 20): [(64, 3, 20), (3, 20, 20)],
    (96, 4, 64): [(96, 4), (4, 64)],
    (5, 64, 64, 32): [(5, 64, 64), (5, 64, 32)],
    (1024,): [(8,)],
    (5001,): [(40,)],
    (8, 128): None,
    (3, 3, 8, 100): None,
    (4096, 1): None,
    (1, 5003): None,
    (1023,): None,
    (31, 33): None,
    (0, 64): None,
    (): None,
}


@pytest.mark.parametrize(("shape", "scales"), SCALES.items(), ids=str)
def test_shapes_and_sizes(shape, scales):
    for zero, dtype in ((zero_m, SIGNED), (zero_v, UNSIGNED)):
        moment = jax.eval_shape(lambda param, zero=zero: zero(param, "int8"), np.ones(shape, np.float32))
        assert moment.array.shape == shape
        assert moment.array.dtype == (dtype if scales else jnp.float32)
        assert [(s.shape, s.dtype) for s in moment.scales] == [(s, jnp.float32) for s in scales or []]
        assert scales is None or sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moment)) <= 1.5 * math.prod(
            shape
        )


def test_no_codes_of_complex():
    z = jnp.ones((32, 64), jnp.complex64)
    assert (zero_m(z, "int8").array.dtype, zero_v(z, "int8").array.dtype) == (jnp.complex64, UNSIGNED)


@two_shapes
@every_dtype
def test_not_finite_alone(rng, dtype, shape):
    """All else is as if it were zero."""
    x, bad = uneven(rng, shape, dtype), np.array([*NANS, np.inf], np.float32)
    where = rng.choice(x.size, bad.size, replace=False)
    zeroed, broken = x.copy(), x.copy()
    zeroed.flat[where], broken.flat[where] = 0, bad
    expected, got = encoded(zeroed, dtype), encoded(broken, dtype)
    chex.assert_trees_all_equal(got.scales, expected.scales)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(decoded(got))), np.sort(where))
    np.testing.assert_array_equal(np.delete(got.array, where), np.delete(expected.array, where))


@every_dtype
def test_zeros_and_signs(dtype):
    """A row of zeros is one; small numbers keep their sign, and no other v is zero."""
    x = np.tile(np.float32([1.0, 1e-3, 1e-20, 0.5, 1e-6]), (40, 8)) * (1 if dtype == UNSIGNED else -1)
    x[3] = x[4, 5] = 0
    got = decoded(encoded(x, dtype))
    assert np.all(got[3] == 0)
    assert np.all(got * x >= 0)
    assert dtype == SIGNED or np.all(got[4] > 0)


@two_shapes
@pytest.mark.parametrize(("f", "dtype"), [(lambda g: g, SIGNED), (abs_squared, UNSIGNED)])
def test_no_weight_no_change(rng, shape, f, dtype):
    """Whatever the random bits, but the very smallest and largest of them."""
    stored, g, steps = encoded(uneven(rng, shape, dtype), dtype), np.ones(shape, np.float32), 20
    after = jax.lax.map(
        lambda step: average(stored, f, g, jnp.float32(0), RandomBits.for_v(step, 0))[1], jnp.arange(steps)
    )
    for scale, each in zip(stored.scales, after.scales, strict=True):
        np.testing.assert_array_equal(each, np.broadcast_to(scale, each.shape))
    changed = np.asarray(after.array, int) - np.asarray(stored.array, int)
    assert np.max(np.abs(changed)) <= 1
    assert np.count_nonzero(changed) <= 1


@pytest.mark.x64
@every_dtype
def test_float64_leaves(rng, dtype):
    """Computed in float64: the largest of a row may be over its scale, a float32, by less than a code."""
    x = np.abs(rng.normal(size=(64, 64))) * 1.0000000123
    got = encoded(x, dtype)
    assert {s.dtype for s in got.scales} == {jnp.dtype(jnp.float32)}
    scale = largest(x)
    assert np.max(np.abs(np.asarray(got.array, int))) == (127 if dtype == SIGNED else 254)
    np.testing.assert_allclose(np.asarray(numbers_of(got, jnp.float64)), x, atol=(2 / 127 * scale).max())
