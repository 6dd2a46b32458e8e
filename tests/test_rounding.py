"""Stochastic rounding: unbiased, to one of the two nearest numbers, a function of position and step only."""

import chex
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam._rounding import RandomBits, round_to

MANY = 2**20
NANS = (
    0x7FC00000,
    0xFFC00000,
    0x7FFFFFFF,
    0xFFFFFFFF,
    0x7F810000,
)  # the second is x86's own, the third an NVIDIA GPU's
every_nan = pytest.mark.parametrize("nan", [np.uint32(bits).view(np.float32) for bits in NANS], ids=map(hex, NANS))


def both_draws(step, number=MANY):
    return [np.asarray(RandomBits(jnp.int32(step), high).draw((number,))) for high in (False, True)]


def test_the_bits_of_a_leaf_are_those_of_its_rows_one_after_another():
    for high in (False, True):
        bits = RandomBits(jnp.int32(3), high)
        chex.assert_trees_all_equal(bits.draw((4, 8, 32)).reshape(-1), bits.draw((1024,)))


def test_no_two_elements_have_the_same_bits_and_all_values_are_alike():
    low, high = both_draws(3)
    assert len(np.unique(high.astype(np.uint32) << 16 | low)) == MANY
    for draw in (low, high):
        counts = np.bincount(draw, minlength=2**16)
        # Of a Poisson distribution with this mean, the variance is as large; 65536 of them tell it to under 1%.
        assert abs(np.var(counts) / np.mean(counts) - 1) < 0.05


def test_steps_positions_and_draws_do_not_go_together():
    (low, high), (_, then), (_, backwards) = both_draws(41), both_draws(42), both_draws(-41)
    pairs = [(high, then), (high, backwards), (high[1:], high[:-1]), (high[256:], high[:-256]), (low, high)]
    for a, b in [*pairs, (high >> 15, then >> 15)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(MANY)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("value", [1.0, 1.2345678, -3.3e-5, 7.7e30, 1.00001, 2.0**-126 * 1.7, 255.7])
def test_rounding_to_bfloat16_is_unbiased_and_never_off_by_a_whole_unit(value, high):
    exact = float(np.float32(value))
    got = np.asarray(round_to(jnp.full(MANY, value), jnp.bfloat16, RandomBits(jnp.int32(1), high)), float)
    unit = 2.0 ** (np.floor(np.log2(abs(exact))) - 7)
    assert np.all(np.abs(got - exact) < unit)
    assert abs(np.mean(got) - exact) < 5 * unit / 2 / np.sqrt(MANY)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.5, 2.0**-126, np.inf, -np.inf, np.nan])
def test_bfloat16_numbers_are_not_changed(value):
    got = round_to(jnp.full(1000, value), jnp.bfloat16, RandomBits(jnp.int32(1), high=False))
    chex.assert_trees_all_equal(got, jnp.full(1000, value, jnp.bfloat16))
    assert np.all(np.signbit(got) == np.signbit(value)) or np.isnan(value)


@every_nan
@pytest.mark.parametrize("high", [False, True])
def test_nan_stays_nan_whatever_its_bits(nan, high):
    got = round_to(jnp.full(1000, nan), jnp.bfloat16, RandomBits(jnp.int32(1), high))
    assert np.all(np.isnan(got))


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_other_dtypes_are_cast(dtype):
    x = jnp.linspace(-1, 1, 7)
    chex.assert_trees_all_equal(round_to(x, dtype, RandomBits(jnp.int32(1), high=False)), x.astype(dtype))
