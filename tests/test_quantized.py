"""Codes of a byte.

- A code is one of the two next to the number, unbiased, within 5 standard errors over 2^18 draws.
- Two 8-bit moments take at most 2.07 bytes a parameter, whatever the shape, for leaves from 1024 elements.
- A scale is the next bfloat16 of the largest in its row; a NaN or infinity shows in its row alone.
"""

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
from tests.helpers import NANS

MANY = 2**18
BITS = RandomBits(jnp.int32(1), high=False)
SIGNED, UNSIGNED = jnp.int8, jnp.uint8
every_dtype = pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])


def quantized(rows, dtype):
    return quantize(rows, Quantized(jnp.zeros(rows.shape, dtype), jnp.zeros(rows.shape[:-1], jnp.bfloat16)), BITS)


def levels(dtype):
    """Every number that a code stands for, with a scale of 1."""
    codes = jnp.arange(-127, 128, dtype=dtype) if dtype == SIGNED else jnp.arange(256).astype(dtype)
    return np.asarray(Quantized(codes, jnp.ones((), jnp.bfloat16)).decode(jnp.float32), float)


def test_levels_of_codes():
    """Squares with a sign, and fourth powers."""
    k = np.arange(-127, 128)
    np.testing.assert_allclose(levels(SIGNED), np.sign(k) * (k / 127) ** 2, rtol=5e-7)
    np.testing.assert_allclose(levels(UNSIGNED), (np.arange(256) / 255) ** 4, rtol=5e-7)


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**90])
def test_codes_unbiased(dtype, scale):
    """One of the two codes next to the number."""
    possible = levels(dtype)
    for fraction in (0.999, 0.7, 0.1234, 0.01, 3e-4, 2e-6):
        rows = jnp.full((MANY // 64, 64), np.float32(fraction * scale)).at[:, 0].set(scale)
        got = np.asarray(quantized(rows, dtype).decode(jnp.float32), float)[:, 1:] / scale
        i = np.searchsorted(possible, fraction)
        below, above = possible[i - 1], possible[i]
        mean = max(fraction, possible[1]) if dtype == UNSIGNED else fraction  # without a zero
        assert np.all((np.abs(got - above) <= 1e-6 * above) | (np.abs(got - below) <= 1e-6 * above)), fraction
        assert abs(np.mean(got) - mean) < 5 * (above - below) / 2 / np.sqrt(got.size) + 1e-6 * mean, fraction


def test_signs_kept():
    """They are kept, and small second moments stay above zero."""
    row = jnp.tile(jnp.array([1.0, -1.0, -1e-3, 1e-20]), 16)[None]
    m = quantized(row, SIGNED).decode(jnp.float32)
    assert np.all(np.sign(m) * np.sign(row) >= 0)
    assert np.all(m[0, :2] == row[0, :2])
    v = quantized(jnp.abs(row), UNSIGNED).decode(jnp.float32)
    np.testing.assert_allclose(np.min(v), 255.0**-4, rtol=5e-7)


def test_scale_rounds_up():
    """The next bfloat16 of the largest in the row."""
    largest = jnp.array([1.0, 1.00001, 3.3e-5, 1.999, 7.7e30, 1.5e-38])
    scale = quantized(jnp.outer(largest, jnp.linspace(-1, 0.5, 64)), SIGNED).scale
    wide, below = scale.astype(jnp.float32), jnp.nextafter(scale, jnp.bfloat16(0)).astype(jnp.float32)
    assert np.all((largest <= wide) & (wide < largest * (1 + 2**-7)) & ((wide == largest) | (below < largest)))


@every_dtype
def test_not_finite_in_row(dtype):
    """It shows in its own row alone; a row of zeros is zeros."""
    rows = np.zeros((3 + len(NANS), 64), np.float32)
    rows[1], rows[2, 5], rows[3:, 5] = 3.0, np.inf, NANS
    got = np.asarray(quantized(jnp.asarray(rows), dtype).decode(jnp.float32))
    assert np.all(got[0] == 0)
    np.testing.assert_allclose(got[1], 3, rtol=2**-21)  # on a GPU, code / K is code * (1 / K)
    assert not np.isfinite(got[2, 5])
    assert np.all(np.isnan(got[3:]))


ROWS = {
    (32, 64): (32,),
    (1024,): (),
    (1000, 100): (1000,),
    (50, 63): (),
    (3, 3, 8, 100): (3, 3, 8),
    (64, 3, 7, 7): (64,),
    (12, 5, 20, 60): (12, 5),
    (7, 1, 1, 200): (7, 1, 1),
    (129, 129): (129,),
    (4096, 1): (),
    (1, 5003): (1,),
}


@pytest.mark.parametrize(("shape", "scales"), ROWS.items())
def test_rows_and_sizes(shape, scales, rng):
    """As many of the last axes as hold 64 elements."""
    m: Any = zero_m(jnp.ones(shape), "int8")
    v: Any = zero_v(jnp.ones(shape), "int8")
    assert (m.codes.dtype, v.codes.dtype, m.scale.dtype) == (jnp.int8, jnp.uint8, jnp.bfloat16)
    assert m.codes.shape == v.codes.shape == shape
    assert m.scale.shape == v.scale.shape == scales
    assert sum(x.nbytes for x in jax.tree.leaves((m, v))) <= 2.07 * math.prod(shape)

    x = rng.normal(size=shape).astype(np.float32)
    got = np.asarray(jax.jit(lambda x, like: decode(encode(x, like, BITS), jnp.float32))(x, m))
    row = np.max(np.abs(x), axis=tuple(range(len(scales), len(shape))), keepdims=True)
    assert np.all(np.abs(got - x) <= row * ((2 * np.sqrt(np.abs(x) / row) + 1 / 127) / 127 + 0.01))


@pytest.mark.x64
def test_leaves_not_in_bytes():
    """Those under 1024 elements stay wide, and so does a complex first moment."""
    for zero in (zero_m, zero_v):
        for shape in ((), (5,), (1023,), (0, 64), (3, 341)):
            assert [zero(jnp.ones(shape, x), "int8").dtype for x in ("float32", "float64")] == ["float32", "float64"]
    z, wide = jnp.ones((32, 64), jnp.complex64), jnp.ones((32, 64), jnp.float64)
    assert zero_m(z, "int8").dtype == jnp.complex64
    codes = [x.dtype for x in (*jax.tree.leaves(zero_v(z, "int8")), *jax.tree.leaves(zero_m(wide, "int8")))]
    assert codes == [jnp.uint8, jnp.bfloat16, jnp.int8, jnp.bfloat16]
