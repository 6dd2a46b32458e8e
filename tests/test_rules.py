"""The scalars of a step."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import optax_nadam
from optax_nadam import _rules
from tests.reference import FURTHER_RULES, RULES, Nadam

STEPS = np.unique(np.concatenate([np.arange(1, 3000), np.geomspace(3000, 1e7, 3000).astype(int)]))


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_one_minus_a_power_is_right_to_3e_7(kind):
    for b in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999):
        base = kind(b)
        number = float(base)
        base = number if isinstance(base, float | np.floating) else base
        complement = _rules._decayed(base, jnp.asarray(STEPS, jnp.float32)).complement
        exact = -np.expm1(STEPS * np.log(number))
        np.testing.assert_allclose(np.asarray(complement, float), exact, rtol=3e-7, err_msg=f"b={b}")


@pytest.mark.x64
def test_one_minus_a_power_is_right_to_1e_14_in_float64():
    b = np.longdouble(0.99999)
    complement = jax.vmap(lambda t: _rules._decayed(0.99999, t).complement)(jnp.asarray(STEPS, jnp.float64))
    exact = -np.expm1(STEPS * np.log1p(b - 1))
    np.testing.assert_allclose(np.asarray(complement), np.asarray(exact, float), rtol=1e-14)


def test_powers_of_zero_are_zero():
    for base in (0.0, jnp.float32(0.0)):
        power = _rules._decayed(base, jnp.float32(3.0))
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
    product, c = _rules.scalars_of_step(_rules.RULES["scheduled"], jnp.int32(1), jnp.float32(1.0), h)
    assert c.cg == 1
    np.testing.assert_allclose(product, 0.99999, rtol=1e-7)


@pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
def test_a_product_that_is_not_stored_is_computed(rule):
    reference, product = Nadam(rule, b1=0.97, momentum_decay=0.3), 1.0
    for count in range(501):
        rebuilt = _rules.mu_product_after(count, 0.97, 0.3, _rules.RULES[rule])
        np.testing.assert_allclose(rebuilt, product, rtol=1e-12, err_msg=f"after {count} steps")
        *_, product = reference.step(1.0, 0.0, 0.0, count + 1, product)


def test_the_names_of_rules_are_those_that_type_checkers_know():
    assert typing.get_args(_rules.RuleName) == tuple(_rules.RULES) == rules_in_the_docstring()


def rules_in_the_docstring():
    """The first column of the table of rules in ``scale_by_nadam``."""
    table = re.findall(r"^ *``(\w+)`` +:math:", optax_nadam.scale_by_nadam.__doc__ or "", re.MULTILINE)
    return tuple(table)


def test_rules_come_from_json_and_go_into_it():
    for rule in _rules.RULES.values():
        assert _rules.Rule(**json.loads(json.dumps(dataclasses.asdict(rule)))) == rule


@pytest.mark.parametrize(
    ("field", "value", "kind", "text"),
    [
        ("m_correction", "thrice", ValueError, "must be one of 'next', 'current', 'twice', 'none', got 'thrice'"),
        ("v_correction", "twice", ValueError, "must be one of 'current', 'next', 'none', got 'twice'"),
        ("m_decay", "b2", ValueError, "must be one of 'b1', 'mu', got 'b2'"),
        ("power", 0, ValueError, "must be finite and positive, got 0"),
        ("power", "half", TypeError, "must be a number"),
        *((name, "no", TypeError, "must be True or False, got 'no'") for name in ("momentum_schedule", "eps_hat")),
        *((name, 1, TypeError, "must be True or False, got 1") for name in ("nesterov", "running_product")),
    ],
)
def test_a_rule_that_no_step_could_follow_is_refused_when_it_is_made(field, value, kind, text):
    with pytest.raises(kind, match=f"{field} {re.escape(text)}"):
        _rules.Rule(**{field: value})


@pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
def test_coefficients_follow_from_the_product_of_the_same_step(rule):
    """The two halves, as diagnostics use them: from the product in the state after the step, not the one before."""
    variant, h = _rules.RULES[rule], _rules.Hyperparameters(0.9, 0.99, 1e-3, 0.0, 0.5)
    previous = jnp.float32(1.0)
    for t in range(1, 20):
        previous, expected = _rules.scalars_of_step(variant, jnp.int32(t), previous, h)
        got = _rules.coefficients_at(variant, jnp.float32(t), _rules.Factor.of(previous), h)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
def test_numbers_and_arrays_give_the_same_coefficients(rule):
    numbers = _rules.Hyperparameters(0.875, 0.96875, 2.0**-20, 2.0**-30, 0.25)  # exact in float32
    arrays = _rules.Hyperparameters(*map(jnp.float32, numbers))
    for t in (1, 7, 1000):
        args = _rules.RULES[rule], jnp.int32(t), jnp.float32(0.5)
        for got, expected in zip(
            jax.tree.leaves(_rules.scalars_of_step(*args, arrays)),
            jax.tree.leaves(_rules.scalars_of_step(*args, numbers)),
            strict=True,
        ):
            np.testing.assert_allclose(got, expected, rtol=3e-7)
            assert got.dtype == expected.dtype == jnp.float32


def of_latex(formula, t, names):
    """The value of a formula as the tables of the rules have it."""
    text = re.sub(r"\\sqrt\{((?:[^{}]|\{[^{}]*\})*)\}", r"sqrt(\1)", formula.strip("$ "))
    group = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
    text = re.sub(rf"\\frac{group}{group}", r"((\1)/(\2))", text)
    for latex, python in {
        r"\,": " ",
        r"\beta_1": "b1",
        r"\beta_2": "b2",
        r"\mu_{t+1}": "next_mu",
        r"\mu_t": "mu",
        "P_{t+1}": "next_product",
        "P_t": "product",
        r"\varepsilon": "eps",
        "^{t+1}": "**(t+1)",
        "^t": "**t",
    }.items():
        text = text.replace(latex, python)
    return eval(re.sub(r"(?<=\w) +(?=\w)", "*", text), {"sqrt": math.sqrt, "t": t, **names})


def tables():
    """The table of rules in the docstring and that of the maths page: names, and formulas of cg, cm and cv."""
    docstring = re.findall(r"^ *``(\w+)`` +:math:(.+)$", optax_nadam.scale_by_nadam.__doc__ or "", re.MULTILINE)
    yield "docstring", {name: re.findall(r"`([^`]+)`", "`" + cells.lstrip("`")) for name, cells in docstring}
    page = (Path(__file__).parents[1] / "docs" / "maths.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    yield "page", {name: cells.split(" | ") for name, cells in rows}


@pytest.mark.parametrize(("where", "formulas"), list(tables()))
@pytest.mark.parametrize("rule", _rules.RULES)
def test_the_tables_of_the_rules_have_the_formulas_of_the_code(where, formulas, rule):
    assert tuple(formulas) == tuple(_rules.RULES)
    h = _rules.Hyperparameters(0.9, 0.99, 1e-3, 0.0, 0.3)
    scheduled = [0.9 * (1 - 0.5 * 0.96 ** (0.3 * k)) for k in range(1, 9)]
    mu = scheduled if _rules.RULES[rule].momentum_schedule else 8 * [0.9]
    product, next_product = math.prod(mu[:7]), math.prod(mu)
    if rule == "loss_scaled":
        product, next_product = mu[6], mu[6] * mu[7]
    names = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "mu": mu[6], "next_mu": mu[7]}
    names |= {"product": product, "next_product": next_product}
    _, c = _rules.scalars_of_step(_rules.RULES[rule], jnp.int32(7), jnp.float32(math.prod(mu[:6])), h)
    got = {"cg": c.cg, "cm": c.cm, "cv": c.cv}
    if where == "page":
        got = {"a": 1 - c.m_weight, **got, "eps": c.eps}
    expected = [of_latex(formula, 7, names) for formula in formulas[rule]]
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-5)
