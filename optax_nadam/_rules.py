r"""A rule per dialect: from the step number to the scalars of one update.

"Nadam" names several optimizers. All of them make the same leaf update (``_nadam.py``) and differ in a
few scalars that are formed once a step, here. A :class:`Rule` is the data that tells one dialect from
another; :func:`coefficients` turns it, the step and the hyperparameters into the scalars.

Two cares run through this file. Differences of nearly equal numbers are never formed: :math:`1-\mu_t`,
:math:`1-P_t` and :math:`1-\beta^t` are computed as such. And everything that can be had from a Python
number is had in double precision, before it meets an array.
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, NamedTuple, TypeGuard

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike

_LOG_096 = math.log(0.96)


class Hyperparameters(NamedTuple):
    """What the user chose, each a Python number or a scalar array."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    eps_root: ArrayLike
    momentum_decay: ArrayLike


class Coefficients(NamedTuple):
    r"""The scalars of one step, in float32, or float64 when x64 is enabled.

    Attributes:
      m_weight: :math:`1 - a_t`, the weight of the gradient in ``m``.
      v_weight: :math:`1 - \beta_2`, the weight of the squared gradient in ``v``.
      cg: factor of the gradient in the update.
      cm: factor of ``m`` in the update.
      cv: factor of ``v`` under the square root.
      eps_root: added under the square root.
      eps: added to the square root.
    """

    m_weight: jax.Array
    v_weight: jax.Array
    cg: jax.Array
    cm: jax.Array
    cv: jax.Array
    eps_root: jax.Array
    eps: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What tells one dialect of Nadam from another.

    Attributes:
      warmup: :math:`\mu_t = \beta_1 (1 - \tfrac12 0.96^{\psi t})`; otherwise :math:`\mu_t = \beta_1`.
      m_by_momentum: ``m`` decays by :math:`\mu_t`; otherwise by :math:`\beta_1`.
      m_looks_ahead: ``m`` is debiased by :math:`1 - P_{t+1}`; otherwise by :math:`1 - P_t`.
      v_carries_b2: :math:`\hat v` has the factor :math:`\beta_2`.
    """

    warmup: bool = True
    m_by_momentum: bool = False
    m_looks_ahead: bool = True
    v_carries_b2: bool = False


RULES = {
    "scheduled": Rule(),
    "constant": Rule(warmup=False),
    "simplified": Rule(warmup=False, m_looks_ahead=False),
    "dozat2016": Rule(m_by_momentum=True, v_carries_b2=True),
}


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A number in [0, 1] and its distance from 1, each to full precision."""

    value: ArrayLike
    complement: ArrayLike

    def __mul__(self, other: "_Factor") -> "_Factor":
        return _Factor(self.value * other.value, self.complement + self.value * other.complement)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a hyperparameter is a Python (or NumPy) number: a constant, that can be checked."""
    return isinstance(value, numbers.Real)


def scalar_dtype() -> jnp.dtype:
    """The dtype of ``mu_product`` and the coefficients: float32, or float64 when x64 is enabled."""
    return jnp.result_type(float)


def coefficients(
    rule: Rule, step: jax.Array, mu_product: jax.Array, hyperparameters: Hyperparameters
) -> tuple[Coefficients, jax.Array]:
    r"""The scalars of step :math:`t`, and the product of the momenta up to and including it.

    Args:
      rule: the dialect.
      step: :math:`t \ge 1`, an integer scalar.
      mu_product: :math:`P_{t-1}`, a scalar of :func:`scalar_dtype`.
      hyperparameters: Python numbers become constants of the compiled function, arrays its arguments.

    Returns:
      The coefficients and :math:`P_t`.
    """
    named = hyperparameters._asdict()
    constants = {k: float(x) for k, x in named.items() if is_number(x)}
    arrays = {k: x for k, x in named.items() if k not in constants}
    return _coefficients(rule, tuple(constants.items()), step, mu_product, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _coefficients(
    rule: Rule,
    constants: tuple[tuple[str, float], ...],
    step: jax.Array,
    mu_product: jax.Array,
    arrays: dict[str, ArrayLike],
) -> tuple[Coefficients, jax.Array]:
    dtype = scalar_dtype()
    # optax.inject_hyperparams makes numbers complex where the params are.
    scalars = {k: jnp.real(x).astype(dtype) for k, x in arrays.items()}
    h = Hyperparameters(**dict(constants), **scalars)
    t, previous = step.astype(dtype), mu_product.astype(dtype)

    mu, next_mu = momentum_at(t, h, rule), momentum_at(t + 1, h, rule)
    if rule.warmup:
        product = mu * _Factor(previous, 1 - previous)
        next_product = next_mu * product
    else:
        product, next_product = _power(h.b1, t), _power(h.b1, t + 1)
    v_decay = _power(h.b2, t)

    scalar = functools.partial(jnp.asarray, dtype=dtype)
    c = Coefficients(
        m_weight=scalar(mu.complement if rule.m_by_momentum else 1 - h.b1),
        v_weight=scalar(1 - h.b2),
        cg=scalar(mu.complement / product.complement),
        cm=scalar(next_mu.value / (next_product if rule.m_looks_ahead else product).complement),
        cv=scalar((h.b2 if rule.v_carries_b2 else 1) / v_decay.complement),
        eps_root=scalar(h.eps_root),
        eps=scalar(h.eps),
    )
    return c, scalar(product.value)


def momentum_at(step: jax.Array, h: Hyperparameters, rule: Rule) -> _Factor:
    r"""Momentum at a step, :math:`\mu_t = \beta_1 (1 - \tfrac12 0.96^{\psi t})` or :math:`\beta_1`."""
    withheld = 0.5 * jnp.exp(_LOG_096 * h.momentum_decay * step) if rule.warmup else 0.0
    return _Factor(h.b1 * (1 - withheld), (1 - h.b1) + h.b1 * withheld)


def _power(base: ArrayLike, exponent: jax.Array) -> _Factor:
    r""":math:`b^t` and :math:`1 - b^t` for :math:`0 \le b < 1` and :math:`t \ge 1`."""
    x = exponent * _log(base)
    return _Factor(jnp.exp(x), -_expm1(x))


def _log(base: ArrayLike) -> ArrayLike:
    """Logarithm of a number in [0, 1), in double precision where it is a Python number."""
    if isinstance(base, float):
        return math.log(base) if base else -math.inf
    return jnp.log1p(base - 1)


def _expm1(x: jax.Array) -> jax.Array:
    """``exp(x) - 1`` for ``x <= 0`` to the last place or two; XLA's own is off by up to five on a CPU."""
    small = jnp.maximum(x, -0.7)
    series = functools.reduce(lambda tail, k: 1 + small / k * tail, range(18, 1, -1), jnp.ones_like(x))
    return jnp.where(x > -0.7, small * series, jnp.exp(x) - 1)
