"""Codes of a byte: one of the two next to each number, unbiased; rows, scales and sizes."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import Quantized
from optax_nadam._moments import decode, encode, zero_m, zero_v
from optax_nadam._quantized import quantize
from optax_nadam._rounding import RandomBits
from tests.test_rounding import every_nan

MANY = 2**18
BITS = RandomBits(jnp.int32(1), high=False)
SIGNED, UNSIGNED = jnp.int8, jnp.uint8


def of(dtype, shape):
    return Quantized(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.bfloat16))


def levels(dtype):
    """Every number that a code stands for, with a scale of 1."""
    codes = jnp.arange(-127, 128, dtype=dtype) if dtype == SIGNED else jnp.arange(256).astype(dtype)
    return np.asarray(Quantized(codes, jnp.ones((), jnp.bfloat16)).decode(jnp.float32), float)


def test_levels_are_squares_with_a_sign_and_fourth_powers():
    k = np.arange(-127, 128)
    np.testing.assert_allclose(levels(SIGNED), np.sign(k) * (k / 127) ** 2, rtol=5e-7)
    np.testing.assert_allclose(levels(UNSIGNED), (np.arange(256) / 255) ** 4, rtol=5e-7)


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**90])
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("fraction", [0.999, 0.7, 0.1234, 0.01, 3e-4, 2e-6])
def test_either_neighbour_and_unbiased(dtype, fraction, scale):
    rows = jnp.full((MANY // 64, 64), np.float32(fraction * scale)).at[:, 0].set(scale)
    stored = quantize(rows, of(dtype, rows.shape), BITS)
    got = np.asarray(stored.decode(jnp.float32), float)[:, 1:] / scale
    possible = levels(dtype)
    above = possible[np.searchsorted(possible, fraction)]
    below = possible[np.searchsorted(possible, fraction) - 1]
    if dtype == UNSIGNED:  # which has no zero
        fraction = max(fraction, possible[1])
    assert np.all((np.abs(got - above) <= 1e-6 * above) | (np.abs(got - below) <= 1e-6 * above))
    assert abs(np.mean(got) - fraction) < 5 * (above - below) / 2 / np.sqrt(got.size) + 1e-6 * fraction


def test_signs_are_kept_and_small_second_moments_stay_above_zero():
    row = jnp.tile(jnp.array([1.0, -1.0, -1e-3, 1e-20]), 16)[None]
    m = quantize(row, of(SIGNED, (1, 64)), BITS).decode(jnp.float32)
    assert np.all(np.sign(m) * np.sign(row) >= 0)
    assert np.all(m[0, :2] == row[0, :2])
    v = quantize(jnp.abs(row), of(UNSIGNED, (1, 64)), BITS).decode(jnp.float32)
    np.testing.assert_allclose(np.min(v), 255.0**-4, rtol=5e-7)


@pytest.mark.parametrize("largest", [1.0, 1.00001, 3.3e-5, 1.999, 7.7e30, 1.5e-38])
def test_the_scale_is_the_next_bfloat16_of_the_largest_in_the_row(largest):
    row = jnp.linspace(-largest, largest / 2, 64)[None]
    scale = float(quantize(row, of(SIGNED, (1, 64)), BITS).scale[0])
    largest = float(np.float32(largest))
    assert largest <= scale < largest * (1 + 2**-7)
    assert scale == largest or float(jnp.nextafter(jnp.bfloat16(scale), jnp.bfloat16(0))) < largest


@every_nan
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
def test_rows_of_zeros_are_zeros_and_what_is_not_finite_shows_in_its_row_alone(dtype, nan):
    rows = jnp.zeros((4, 64)).at[1].set(3.0).at[2, 5].set(nan).at[3, 5].set(jnp.inf)
    got = np.asarray(quantize(rows, of(dtype, rows.shape), BITS).decode(jnp.float32))
    assert np.all(got[0] == 0)
    np.testing.assert_allclose(got[1], 3, rtol=2**-21)  # on a GPU, code / K is code * (1 / K)
    assert np.all(np.isnan(got[2]))
    assert not np.isfinite(got[3, 5])


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((32, 64), (32,)),
        ((1024,), ()),
        ((1000, 100), (1000,)),
        ((50, 63), ()),
        ((3, 3, 8, 100), (3, 3, 8)),
        ((64, 3, 7, 7), (64,)),
        ((12, 5, 20, 60), (12, 5)),
        ((7, 1, 1, 200), (7, 1, 1)),
        ((129, 129), (129,)),
        ((4096, 1), ()),
        ((1, 5003), (1,)),
    ],
)
def test_a_scale_for_as_many_of_the_last_axes_as_hold_64_elements(shape, scales, rng):
    m: Any = zero_m(jnp.ones(shape), "int8")
    v: Any = zero_v(jnp.ones(shape), "int8")
    assert (m.codes.dtype, v.codes.dtype, m.scale.dtype) == (jnp.int8, jnp.uint8, jnp.bfloat16)
    assert m.codes.shape == v.codes.shape == shape
    assert m.scale.shape == v.scale.shape == scales
    assert sum(x.nbytes for x in jax.tree.leaves((m, v))) <= 2.07 * math.prod(shape)

    x = rng.normal(size=shape).astype(np.float32)
    through = jax.jit(lambda x, like: decode(encode(x, like, BITS), jnp.float32))
    got = np.asarray(through(x, m))
    row = np.max(np.abs(x), axis=tuple(range(len(scales), len(shape))), keepdims=True)
    assert np.all(np.abs(got - x) <= row * ((2 * np.sqrt(np.abs(x) / row) + 1 / 127) / 127 + 0.01))


@pytest.mark.parametrize("shape", [(), (5,), (1023,), (0, 64), (3, 341)])
def test_leaves_under_1024_elements_stay_float32(shape):
    for zero in (zero_m, zero_v):
        assert zero(jnp.ones(shape), "int8").dtype == jnp.float32


@pytest.mark.x64
def test_wide_and_complex_leaves():
    z, wide = jnp.ones((32, 64), jnp.complex64), jnp.ones((32, 64), jnp.float64)
    assert zero_m(z, "int8").dtype == jnp.complex64
    codes = [x.dtype for x in (*jax.tree.leaves(zero_v(z, "int8")), *jax.tree.leaves(zero_m(wide, "int8")))]
    assert codes == [jnp.uint8, jnp.bfloat16, jnp.int8, jnp.bfloat16]
    assert zero_m(wide[0], "int8").dtype == jnp.float64
