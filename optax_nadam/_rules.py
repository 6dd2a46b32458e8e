r"""A rule per dialect: from the step number to the scalars of one update.

"Nadam" names several optimizers. All of them make the same leaf update (``_nadam.py``) and differ in a
few scalars that are formed once a step, here. A :class:`Rule` is the data that tells one dialect from
another; :func:`coefficients` turns it, the step and the hyperparameters into the scalars.

Two cares run through this file. Differences of nearly equal numbers are never formed: :math:`1-\mu_t`,
:math:`1-P_t` and :math:`1-\beta^t` are computed as such. And everything that can be had from a Python
number is had in double precision, before it meets an array.
"""

import dataclasses
import enum
import functools
import math
import numbers
from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import ArrayLike

_LOG_096 = math.log(0.96)
# The product of more momenta than this is zero in float32, for any b1 up to .99999.
_STEPS_TO_ZERO = 10_000_000


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


class Correction(enum.StrEnum):
    r"""What a moment is divided by, to undo its start from zero.

    For ``m`` (the gradient beside it is divided by :math:`1 - P_t`, or by nothing where ``m`` is):

    * ``NEXT``: :math:`1 - P_{t+1}`, the product that the look-ahead momentum belongs to.
    * ``CURRENT``: :math:`1 - P_t`.
    * ``TWICE``: :math:`1 - P_t \mu_t \mu_{t+1}`, where torch before 2.0 took :math:`\mu_t` in twice.
    * ``NONE``: nothing.

    For ``v``:

    * ``CURRENT``: :math:`1 - \beta_2^t`.
    * ``NEXT``: :math:`(1 - \beta_2^t) / \beta_2`: its own decay, one step ahead.
    * ``NONE``: nothing.
    """

    NEXT = "next"
    CURRENT = "current"
    TWICE = "twice"
    NONE = "none"


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What tells one dialect of Nadam from another.

    Attributes:
      warmup: :math:`\mu_t = \beta_1 (1 - \tfrac12 0.96^{\psi t})`; otherwise :math:`\mu_t = \beta_1`.
      keeps_product: :math:`P_t = P_{t-1} \mu_t`; otherwise :math:`P_t = \mu_t`.
      m_by_momentum: ``m`` decays by :math:`\mu_t`; otherwise by :math:`\beta_1`.
      m_correction: how ``m`` is debiased.
      v_correction: how ``v`` is debiased.
      eps_hat: epsilon is added before ``v`` is debiased: :math:`\varepsilon_t = \varepsilon / \sqrt{1-\beta_2^t}`.
      power: of the debiased ``v`` in the denominator: the square root.
    """

    warmup: bool = True
    keeps_product: bool = True
    m_by_momentum: bool = False
    m_correction: Correction = Correction.NEXT
    v_correction: Correction = Correction.CURRENT
    eps_hat: bool = False
    power: float = 0.5

    def __post_init__(self) -> None:
        """Takes corrections by their names too, as they come from JSON."""
        object.__setattr__(self, "m_correction", Correction(self.m_correction))
        object.__setattr__(self, "v_correction", Correction(self.v_correction))


_SIMPLIFIED = Rule(warmup=False, m_correction=Correction.CURRENT)

RULES = {
    "scheduled": Rule(),
    "constant": Rule(warmup=False),
    "simplified": _SIMPLIFIED,
    "dozat2016": Rule(m_by_momentum=True, v_correction=Correction.NEXT),
    "torch1": Rule(m_correction=Correction.TWICE),
    "loss_scaled": Rule(keeps_product=False),
    "eps_hat": dataclasses.replace(_SIMPLIFIED, eps_hat=True),
    "undebiased": Rule(warmup=False, m_correction=Correction.NONE, v_correction=Correction.NONE),
    "flux": Rule(warmup=False, v_correction=Correction.NEXT),
}


def rule_named(rule: str | Rule) -> Rule:
    """The rule, whether it is given itself or by its name."""
    return RULES[rule] if isinstance(rule, str) else rule


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
    product, next_product = _products(rule, mu, next_mu, previous, t, h)
    v_decay = _power(h.b2, t)

    g_debias, m_debias = {
        Correction.NEXT: (product.complement, next_product.complement),
        Correction.CURRENT: (product.complement, product.complement),
        Correction.TWICE: (product.complement, (mu * next_product).complement),
        Correction.NONE: (1.0, 1.0),
    }[rule.m_correction]
    cv = {
        Correction.NEXT: h.b2 / v_decay.complement,
        Correction.CURRENT: 1 / v_decay.complement,
        Correction.NONE: 1.0,
    }[rule.v_correction]

    scalar = functools.partial(jnp.asarray, dtype=dtype)
    c = Coefficients(
        m_weight=scalar(mu.complement if rule.m_by_momentum else 1 - h.b1),
        v_weight=scalar(1 - h.b2),
        cg=scalar(mu.complement / g_debias),
        cm=scalar(next_mu.value / m_debias),
        cv=scalar(cv),
        eps_root=scalar(h.eps_root),
        eps=scalar(h.eps / jnp.sqrt(v_decay.complement) if rule.eps_hat else h.eps),
    )
    return c, scalar(product.value)


def _products(
    rule: Rule, mu: _Factor, next_mu: _Factor, previous: jax.Array, t: jax.Array, h: Hyperparameters
) -> tuple[_Factor, _Factor]:
    r"""The products of the momenta up to this step and up to the next, :math:`P_t` and :math:`P_{t+1}`."""
    if not rule.warmup:
        return _power(h.b1, t), _power(h.b1, t + 1)
    product = mu * _Factor(previous, 1 - previous) if rule.keeps_product else mu
    return product, next_mu * product


def momentum_at(step: jax.Array | np.ndarray, h: Hyperparameters, rule: Rule) -> _Factor:
    r"""Momentum at a step, :math:`\mu_t = \beta_1 (1 - \tfrac12 0.96^{\psi t})` or :math:`\beta_1`."""
    exp = np.exp if isinstance(step, np.ndarray) else jnp.exp
    withheld = 0.5 * exp(_LOG_096 * h.momentum_decay * step) if rule.warmup else 0.0
    return _Factor(h.b1 * (1 - withheld), (1 - h.b1) + h.b1 * withheld)


def mu_product_after(count: int, b1: float, momentum_decay: float, rule: Rule) -> float:
    r""":math:`P_t` after a number of steps, in double precision: what a checkpoint without it has lost."""
    if not rule.warmup:
        return b1**count
    h = Hyperparameters(b1, 0.0, 0.0, 0.0, momentum_decay)
    first = 1 if rule.keeps_product else max(1, count)
    steps = np.arange(first, min(count, _STEPS_TO_ZERO) + 1, dtype=np.float64)
    return float(np.prod(momentum_at(steps, h, rule).value))


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
