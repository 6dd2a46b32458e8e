"""Stochastic rounding.

- To bfloat16 it is unbiased, within 5 standard errors over 2^20 draws, with an error under one unit; numbers that are
  bfloat16 already are not changed, and a NaN stays NaN, whatever its bits, also 0x7fffffff, that of NVIDIA GPUs.
- The random bits are a function of step, leaf and position only, no two elements of a leaf have the same, and steps,
  leaves, positions and draws do not go together, within 5 standard errors.
- A derivative through rounding is an error, one that does not go through it is not.
"""

import functools
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import compensated, nadam
from optax_nadam._rounding import RandomBits, round_to
from tests.helpers import NANS

MANY = 2**20
every_half = pytest.mark.parametrize("high", [False, True])


@functools.partial(jax.jit, static_argnames=("of", "shape"))
def drawn(of, step, leaf, shape=(MANY,)):
    return of(step, leaf).draw(shape)


@functools.partial(jax.jit, static_argnames=("dtype", "high"))
def rounded(x, dtype, high):
    return round_to(x, dtype, bits_of_step_1(high))


def bits_of_step_1(high):
    return RandomBits(jnp.int32(1), jnp.int32(0), high)


@every_half
def test_bits_by_position(high):
    """The bits of a leaf are those of its rows, one after another."""
    of = functools.partial(RandomBits, high=high)
    rows, vector = (np.asarray(drawn(of, 1, 0, shape)) for shape in ((4, 8, 32), (1024,)))
    np.testing.assert_array_equal(rows.ravel(), vector)


def test_bits_uniform():
    low, high = (np.asarray(drawn(of, 3, 5)) for of in (RandomBits.for_m, RandomBits.for_v))
    assert len(np.unique(high.astype(np.uint32) << 16 | low)) == MANY
    for draw in (low, high):
        counts = np.bincount(draw, minlength=2**16)
        # Of a Poisson distribution with this mean, the variance is as large; 65536 of them tell it to under 1%.
        assert abs(np.var(counts) / np.mean(counts) - 1) < 0.05


def test_bits_independent():
    kinds = (RandomBits.for_m, RandomBits.for_v, RandomBits.for_weights)
    (m, v, weights), (_, then, _), (_, there, _) = (
        [np.asarray(drawn(of, *step_and_leaf)) for of in kinds] for step_and_leaf in ((41, 0), (42, 0), (41, 1))
    )
    of_one_step = [(m, v), (m, weights), (v, weights)]
    of_others = [(v, then), (v >> 15, then >> 15), (v, there), (then, there), (v[1:], v[:-1]), (v[256:], v[:-256])]
    for a, b in of_one_step + of_others:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(MANY)


@every_half
def test_rounding_unbiased(high):
    for value in np.array([1.0, 1.2345678, -3.3e-5, 7.7e30, 1.00001, 2.0**-126 * 1.7, 255.7], np.float32):
        got = np.asarray(rounded(np.full(MANY, value), jnp.bfloat16, high), float)
        unit = 2.0 ** (np.floor(np.log2(abs(value))) - 7)
        assert np.all(np.abs(got - value) < unit), value
        assert abs(np.mean(got) - value) < 5 * unit / 2 / np.sqrt(MANY), value


@every_half
def test_bfloat16_unchanged(high):
    """Numbers of bfloat16, and every NaN."""
    numbers = np.array([0.0, -0.0, 1.0, -1.5, 2.0**-126, np.inf, -np.inf], np.float32)
    expected = np.tile(np.concatenate([numbers, NANS]), (1000, 1))
    got = np.asarray(rounded(expected, jnp.bfloat16, high), np.float32)
    np.testing.assert_array_equal(got, expected)
    zeros = expected == 0
    np.testing.assert_array_equal(np.signbit(got)[zeros], np.signbit(expected)[zeros])


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_other_dtypes_cast(dtype):
    """They are cast."""
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    chex.assert_trees_all_equal(rounded(x, dtype, False), x.astype(dtype))


INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
NARROW = {
    "int8": nadam(0.1, **INT8),
    "int8 m": nadam(0.1, m_dtype="int8"),
    "bfloat16 v": nadam(0.1, v_dtype="bfloat16"),
    "compensated": compensated(nadam(0.1)),
}


@pytest.mark.parametrize("tx", NARROW.values(), ids=NARROW)
def test_no_derivative(tx):
    """None through two steps, or of a compensated weight; but one where the rounded numbers are held constant."""
    params = np.ones((32, 64), jnp.bfloat16 if tx is NARROW["compensated"] else np.float32)

    def loss(g, hold=lambda x: x):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(hold(params * g.astype(params.dtype)), hold(state), params)
        return jnp.sum(updates.astype(jnp.float32))

    for derivative in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.jit(jax.jacfwd(loss))):
        with pytest.raises(TypeError, match=r"Stochastic rounding has no derivative.*m_dtype=None.*stop_gradient"):
            derivative(2.0)
    assert jax.jit(jax.grad(lambda g: loss(g, jax.lax.stop_gradient)))(2.0) == 0


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_derivative_of_the_rate(dtype):
    """That of a step, in which nothing of it is rounded, is the direction."""
    params = np.ones((32, 64), np.float32)

    def stepped(rate):
        tx = nadam(rate, m_dtype=dtype, v_dtype=dtype)
        updates, _ = tx.update(params, tx.init(params), params)
        return jnp.sum(optax.apply_updates(params, updates))

    (at_1, at_0), slope = jax.jit(lambda *rates: ([*map(stepped, rates)], jax.grad(stepped)(rates[0])))(1.0, 0.0)
    np.testing.assert_allclose(slope, at_1 - at_0, rtol=1e-5)
