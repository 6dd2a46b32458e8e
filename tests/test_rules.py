"""The scalars of a step.

- :math:`1 - b^t` is right to 3e-7 for t up to 10^7, to 1e-14 in float64; momentum and its complement are to 2e-7.
- The product of the momenta that a checkpoint lacks is computed to 1e-12.
- The tables of the rules, in the docstring and on the page of the maths, have the formulas of the code.
"""

import math
import re
import typing
from pathlib import Path

import numpy as np
import pytest
from jax import numpy as jnp

import optax_nadam
from optax_nadam import _rules
from tests.helpers import every_rule
from tests.reference import RULES, Nadam

STEPS = np.unique(np.concatenate([np.arange(1, 3000), np.geomspace(3000, 1e7, 3000).astype(int)]))


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_one_minus_power(kind):
    for b in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999):
        base = float(kind(b)) if kind is np.float32 else kind(b)
        complement = _rules._decayed(base, jnp.asarray(STEPS, jnp.float32)).complement
        exact = -np.expm1(STEPS * np.log(float(base)))
        np.testing.assert_allclose(np.asarray(complement, float), exact, rtol=3e-7, err_msg=f"b={b}")


@pytest.mark.x64
def test_one_minus_power_x64():
    complement = _rules._decayed(0.99999, jnp.asarray(STEPS, jnp.float64)).complement
    exact = -np.expm1(STEPS * np.log1p(np.longdouble(0.99999) - 1))
    np.testing.assert_allclose(np.asarray(complement), np.asarray(exact, float), rtol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_momentum_to_2e_7(rule):
    t = np.asarray([1, 2, 10, 1000, 10**6], np.longdouble)
    for momentum_decay in (0.0, 4e-3, 1.0, 1e3):
        expected = Nadam(rule, b1=0.99, momentum_decay=momentum_decay).mu(t)
        h = _rules.Hyperparameters(0.99, 0.999, 1e-7, 0.0, momentum_decay)
        mu = _rules.momentum_at(jnp.asarray(t, jnp.float32), h, _rules.RULES[rule])
        for got, exact in ((mu.value, expected), (mu.complement, 1 - expected)):
            error = np.max(np.abs(np.asarray(got) / exact - 1))
            assert error <= 2e-7, f"momentum_decay={momentum_decay}"


def test_first_coefficient():
    """It is exact, however close momentum is to one."""
    h = _rules.Hyperparameters(0.99999, 0.999, 1e-7, 0.0, 1e3)
    product, c = _rules.scalars_of_step(_rules.RULES["scheduled"], jnp.int32(1), jnp.float32(1.0), h)
    assert c.cg == 1
    np.testing.assert_allclose(product, 0.99999, rtol=1e-7)


@every_rule
def test_mu_product_after(rule):
    reference, product = Nadam(rule, b1=0.97, momentum_decay=0.3), 1.0
    for count in range(501):
        rebuilt = _rules.mu_product_after(count, 0.97, 0.3, _rules.RULES[rule])
        np.testing.assert_allclose(rebuilt, product, rtol=1e-12, err_msg=f"after {count} steps")
        *_, product = reference.step(1.0, 0.0, 0.0, count + 1, product)


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
def test_bad_rules(field, value, kind, text):
    with pytest.raises(kind, match=f"{field} {re.escape(text)}"):
        _rules.Rule(**{field: value})


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
def test_tables_of_formulas(where, formulas):
    """They have the rules and the formulas of the code, and type checkers know the names."""
    assert tuple(formulas) == tuple(_rules.RULES) == typing.get_args(_rules.RuleName)
    h = _rules.Hyperparameters(0.9, 0.99, 1e-3, 0.0, 0.3)
    for name, rule in _rules.RULES.items():
        mu = Nadam(momentum_decay=0.3).mu(np.arange(1, 9)) if rule.momentum_schedule else np.full(8, 0.9)
        first = 0 if rule.running_product else 6
        names = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "mu": mu[6], "next_mu": mu[7]}
        names |= {"product": np.prod(mu[first:7]), "next_product": np.prod(mu[first:])}
        _, c = _rules.scalars_of_step(rule, jnp.int32(7), jnp.float32(np.prod(mu[:6])), h)
        got = [c.cg, c.cm, c.cv]
        if where == "page":
            got = [1 - c.m_weight, *got, c.eps]
        expected = [of_latex(formula, 7, names) for formula in formulas[name]]
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
