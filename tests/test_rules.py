"""The scalars of a step."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import _rules
from tests.reference import FURTHER_RULES, RULES, Nadam

STEPS = np.unique(np.concatenate([np.arange(1, 3000), np.geomspace(3000, 1e7, 3000).astype(int)]))


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_one_minus_a_power_is_right_to_3e_7(kind):
    for b in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999):
        base = kind(b)
        number = float(base)
        base = number if _rules.is_number(base) else base
        complement = _rules._power(base, jnp.asarray(STEPS, jnp.float32)).complement
        exact = -np.expm1(STEPS * np.log(number))
        np.testing.assert_allclose(np.asarray(complement, float), exact, rtol=3e-7, err_msg=f"b={b}")


@pytest.mark.x64
def test_one_minus_a_power_is_right_to_1e_14_in_float64():
    b = np.longdouble(0.99999)
    complement = jax.vmap(lambda t: _rules._power(0.99999, t).complement)(jnp.asarray(STEPS, jnp.float64))
    exact = -np.expm1(STEPS * np.log1p(b - 1))
    np.testing.assert_allclose(np.asarray(complement), np.asarray(exact, float), rtol=1e-14)


def test_powers_of_zero_are_zero():
    for base in (0.0, jnp.float32(0.0)):
        power = _rules._power(base, jnp.float32(3.0))
        assert power.value == 0
        assert power.complement == 1


@pytest.mark.parametrize("rule", RULES)
def test_momentum_and_its_complement_are_right_to_2e_7(rule):
    t = np.asarray([1, 2, 10, 1000, 10**6], np.longdouble)
    for momentum_decay in (0.0, 4e-3, 1.0, 1e3):
        expected = Nadam(rule, b1=0.99, momentum_decay=momentum_decay).mu(t)
        h = _rules.Hyperparameters(0.99, 0.999, 1e-7, 0.0, momentum_decay)
        mu = _rules.momentum_at(jnp.asarray(t, jnp.float32), h, _rules.RULES[rule])
        for got, exact in ((mu.value, expected), (mu.complement, 1 - expected)):
            error = np.max(np.abs(np.asarray(got) / exact - 1))
            assert error <= 2e-7, f"momentum_decay={momentum_decay}"


def test_first_coefficient_is_exact_however_close_momentum_is_to_one():
    h = _rules.Hyperparameters(0.99999, 0.999, 1e-7, 0.0, 1e3)
    c, product = _rules.coefficients(_rules.RULES["scheduled"], jnp.int32(1), jnp.float32(1.0), h)
    assert c.cg == 1
    np.testing.assert_allclose(product, 0.99999, rtol=1e-7)


@pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
def test_a_lost_product_is_rebuilt(rule):
    reference, product = Nadam(rule, b1=0.97, momentum_decay=0.3), 1.0
    for count in range(501):
        rebuilt = _rules.mu_product_after(count, 0.97, 0.3, _rules.RULES[rule])
        np.testing.assert_allclose(rebuilt, product, rtol=1e-12, err_msg=f"after {count} steps")
        *_, product = reference.step(1.0, 0.0, 0.0, count + 1, product)


def test_corrections_may_be_given_by_name():
    assert _rules.Rule(m_correction="twice") == _rules.RULES["torch1"]  # type: ignore[arg-type]  # as from JSON
    with pytest.raises(ValueError, match="thrice"):
        _rules.Rule(m_correction="thrice")  # type: ignore[arg-type]  # the error is what is tested


@pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
def test_numbers_and_arrays_give_the_same_coefficients(rule):
    numbers = _rules.Hyperparameters(0.875, 0.96875, 2.0**-20, 2.0**-30, 0.25)  # exact in float32
    arrays = _rules.Hyperparameters(*map(jnp.float32, numbers))
    for t in (1, 7, 1000):
        args = _rules.RULES[rule], jnp.int32(t), jnp.float32(0.5)
        for got, expected in zip(
            jax.tree.leaves(_rules.coefficients(*args, arrays)),
            jax.tree.leaves(_rules.coefficients(*args, numbers)),
            strict=True,
        ):
            np.testing.assert_allclose(got, expected, rtol=3e-7)
            assert got.dtype == expected.dtype == jnp.float32
