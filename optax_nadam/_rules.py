r"""A rule per variant: from the step number to the scalars of one update.

"Nadam" names several optimizers. All of them make the same leaf update (``_nadam.py``) and differ in a
few scalars that are computed once a step, here. A :class:`Rule` describes a variant as data;
:func:`product_at` and :func:`coefficients_at` turn it, the step and the hyperparameters into the scalars.

Two principles: nearly equal numbers are never subtracted, :math:`1-\mu_t`, :math:`1-P_t` and :math:`1-\beta^t` are
computed directly; and everything that can be computed from Python numbers is computed in double precision,
before it is combined with an array.
"""

import dataclasses
import functools
import math
import typing
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import ArrayLike

from optax_nadam import _validation as validation

_TINY = 2.0**-126  # the smallest normal float32
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


def check_hyperparameters(h: Hyperparameters) -> None:
    """Rejects Python numbers out of range and arrays that are not scalars."""
    validation.check_decay("b1", h.b1)
    validation.check_decay("b2", h.b2)
    validation.check_not_negative("eps", h.eps)
    validation.check_not_negative("eps_root", h.eps_root)
    validation.check_not_negative("momentum_decay", h.momentum_decay)


class Coefficients(NamedTuple):
    r"""The scalars of one step, in float32, or float64 when x64 is enabled.

    Attributes:
      m_weight: :math:`1 - a_t`, the weight of the gradient in ``m``.
      v_weight: :math:`1 - \beta_2`, the weight of the squared gradient in ``v``.
      cg: factor of the gradient in the update.
      cm: factor of ``m`` in the update.
      cv: factor of ``v`` under the square root.
      v_floor: :math:`v / |m|^2` is never less where both are exact; what rounding to 8 bits may break.
      eps_root: added under the square root.
      eps: added to the square root.
    """

    m_weight: jax.Array
    v_weight: jax.Array
    cg: jax.Array
    cm: jax.Array
    cv: jax.Array
    v_floor: jax.Array
    eps_root: jax.Array
    eps: jax.Array


MDecay = Literal["b1", "mu"]
MCorrection = Literal["next", "current", "twice", "none"]
VCorrection = Literal["current", "next", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    r"""A variant of Nadam, as static data from which the scalars of a step are computed.

    Attributes:
      momentum_schedule: :math:`\mu_t = \beta_1 (1 - \tfrac12 0.96^{\psi t})`; otherwise :math:`\mu_t = \beta_1`.
      running_product: :math:`P_t = P_{t-1} \mu_t`; otherwise :math:`P_t = \mu_t`.
      nesterov: the update is :math:`\mu_{t+1} m_t + (1 - \mu_t) g_t`, each term debiased; otherwise ``m`` alone, as
        in Adam.
      m_decay: what ``m`` decays by: ``"b1"``, :math:`\beta_1`, or ``"mu"``, :math:`\mu_t`.
      m_correction: what ``m`` is divided by, to correct its bias towards zero: :math:`1 - P_{t+1}` (``"next"``, the
        product up to the look-ahead momentum), :math:`1 - P_t` (``"current"``), :math:`1 - P_t \mu_t \mu_{t+1}`
        (``"twice"``: PyTorch before 2.0) or nothing (``"none"``). The gradient is divided by :math:`1 - P_t`, with
        ``"none"`` by nothing either.
      v_correction: what ``v`` is divided by: :math:`1 - \beta_2^t` (``"current"``), :math:`(1 - \beta_2^t) / \beta_2`
        (``"next"``) or nothing (``"none"``).
      eps_hat: epsilon is added before ``v`` is debiased: :math:`\varepsilon_t = \varepsilon / \sqrt{1-\beta_2^t}`.
      power: the exponent of the debiased ``v`` in the denominator, positive; 0.5 is the square root.

    Raises:
      ValueError: a decay or correction that is not one of those above, or a power that is not positive and finite.
      TypeError: a power that is not a number, or another value that is not a boolean.

    Examples:
      >>> import optax_nadam
      >>> cube_root = optax_nadam.Rule(momentum_schedule=False, power=1 / 3)
      >>> tx = optax_nadam.nadam(rule=cube_root)
    """

    momentum_schedule: bool = True
    running_product: bool = True
    nesterov: bool = True
    m_decay: MDecay = "b1"
    m_correction: MCorrection = "next"
    v_correction: VCorrection = "current"
    eps_hat: bool = False
    power: float = 0.5

    def __post_init__(self) -> None:
        """Checks type and range of every field."""
        for name in ("momentum_schedule", "running_product", "nesterov", "eps_hat"):
            validation.check_bool(name, getattr(self, name))
        validation.check_choice("m_decay", self.m_decay, typing.get_args(MDecay))
        validation.check_choice("m_correction", self.m_correction, typing.get_args(MCorrection))
        validation.check_choice("v_correction", self.v_correction, typing.get_args(VCorrection))
        validation.check_positive("power", self.power)


RuleName = Literal[
    "scheduled",
    "constant",
    "simplified",
    "dozat2016",
    "adam",
    "torch1",
    "loss_scaled",
    "eps_hat",
    "undebiased",
    "flux",
]

_SIMPLIFIED = Rule(momentum_schedule=False, m_correction="current")

RULES: dict[str, Rule] = {
    "scheduled": Rule(),
    "constant": Rule(momentum_schedule=False),
    "simplified": _SIMPLIFIED,
    "dozat2016": Rule(m_decay="mu", v_correction="next"),
    "adam": dataclasses.replace(_SIMPLIFIED, nesterov=False),
    "torch1": Rule(m_correction="twice"),
    "loss_scaled": Rule(running_product=False),
    "eps_hat": dataclasses.replace(_SIMPLIFIED, eps_hat=True),
    "undebiased": Rule(momentum_schedule=False, m_correction="none", v_correction="none"),
    "flux": Rule(momentum_schedule=False, v_correction="next"),
}


def parse_rule(name: str, value: Any) -> Rule:
    """The rule, given as a :class:`Rule` or by its name."""
    if isinstance(value, Rule):
        return value
    validation.check_choice(name, value, RULES)
    return RULES[value]


@dataclasses.dataclass(frozen=True)
class Factor:
    """A number in [0, 1] and its distance from 1, each to full precision."""

    value: ArrayLike
    complement: ArrayLike

    @classmethod
    def of(cls, value: jax.Array) -> "Factor":
        """The factor of a value, whose complement is as accurate as the value."""
        return cls(value, 1 - value)

    def __mul__(self, other: "Factor") -> "Factor":
        return Factor(self.value * other.value, self.complement + self.value * other.complement)


def scalar_dtype() -> jnp.dtype:
    """The dtype of ``mu_product`` and the coefficients: float32, or float64 when x64 is enabled."""
    return jnp.result_type(float)


def scalars_of_step(
    rule: Rule, step: jax.Array, mu_product: jax.Array, hyperparameters: Hyperparameters
) -> tuple[jax.Array, Coefficients]:
    r"""The product of the momenta up to and including step :math:`t`, and the coefficients of that step.

    Args:
      rule: the variant.
      step: :math:`t \ge 1`, an integer scalar.
      mu_product: :math:`P_{t-1}`, a scalar of :func:`scalar_dtype`.
      hyperparameters: Python numbers become constants of the compiled function, arrays its arguments.

    Returns:
      :math:`P_t` and the coefficients.
    """
    named = hyperparameters._asdict()
    constants = {k: float(x) for k, x in named.items() if validation.is_number(x)}
    arrays = {k: x for k, x in named.items() if k not in constants}
    return _scalars_of_step(rule, tuple(constants.items()), step, mu_product, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scalars_of_step(
    rule: Rule,
    constants: tuple[tuple[str, float], ...],
    step: jax.Array,
    mu_product: jax.Array,
    arrays: dict[str, ArrayLike],
) -> tuple[jax.Array, Coefficients]:
    dtype = scalar_dtype()
    # optax.inject_hyperparams makes numbers complex where the params are.
    scalars = {k: jnp.real(x).astype(dtype) for k, x in arrays.items()}
    h = Hyperparameters(**dict(constants), **scalars)
    t = step.astype(dtype)
    product = product_at(rule, t, mu_product.astype(dtype), h)
    return jnp.asarray(product.value, dtype), coefficients_at(rule, t, product, h)


def product_at(rule: Rule, t: jax.Array, previous: jax.Array, h: Hyperparameters) -> Factor:
    r"""The product of the momenta, :math:`P_t`, from :math:`P_{t-1}`."""
    if not rule.momentum_schedule:
        return _decayed(h.b1, t)
    mu = momentum_at(t, h, rule)
    return mu * Factor.of(previous) if rule.running_product else mu


def coefficients_at(rule: Rule, t: jax.Array, product: Factor, h: Hyperparameters) -> Coefficients:
    r"""The coefficients of step :math:`t`, from the product of the momenta up to and including it."""
    mu, next_mu = momentum_at(t, h, rule), momentum_at(t + 1, h, rule)
    next_product = next_mu * product
    v_decay = _decayed(h.b2, t)

    g_debias, m_debias = {
        "next": (product.complement, next_product.complement),
        "current": (product.complement, product.complement),
        "twice": (product.complement, (mu * next_product).complement),
        "none": (1.0, 1.0),
    }[rule.m_correction]
    cv = {
        "current": 1 / v_decay.complement,
        "next": h.b2 / v_decay.complement,
        "none": 1.0,
    }[rule.v_correction]

    scalar = functools.partial(jnp.asarray, dtype=scalar_dtype())
    return Coefficients(
        m_weight=scalar(mu.complement if rule.m_decay == "mu" else 1 - h.b1),
        v_weight=scalar(1 - h.b2),
        cg=scalar(mu.complement / g_debias if rule.nesterov else 0.0),
        cm=scalar((next_mu.value if rule.nesterov else 1.0) / m_debias),
        cv=scalar(cv),
        v_floor=scalar(_v_floor(rule, h)),
        eps_root=scalar(h.eps_root),
        eps=scalar(h.eps / jnp.sqrt(v_decay.complement) if rule.eps_hat else h.eps),
    )


def _v_floor(rule: Rule, h: Hyperparameters) -> ArrayLike:
    r"""The least :math:`v / |m|^2`, by Cauchy and Schwarz: :math:`(1-\beta_2)(1-\beta_1^2/\beta_2) / (1-b)^2`.

    :math:`b` is the least decay of ``m``: :math:`\beta_1`, or half of it where ``m`` decays by a momentum that rises
    from there. Zero, which is no bound, where :math:`\beta_1^2 \ge \beta_2`.
    """
    least = h.b1 / 2 if rule.m_decay == "mu" else h.b1
    return (1 - h.b2) * jnp.maximum(h.b2 - h.b1**2, 0) / (jnp.maximum(h.b2, _TINY) * (1 - least) ** 2)


def momentum_at(step: jax.Array | np.ndarray, h: Hyperparameters, rule: Rule) -> Factor:
    r"""Momentum at a step, :math:`\mu_t = \beta_1 (1 - \tfrac12 0.96^{\psi t})` or :math:`\beta_1`."""
    exp = np.exp if isinstance(step, np.ndarray) else jnp.exp
    withheld = 0.5 * exp(_LOG_096 * h.momentum_decay * step) if rule.momentum_schedule else 0.0
    return Factor(h.b1 * (1 - withheld), (1 - h.b1) + h.b1 * withheld)


def mu_product_after(count: int, b1: float, momentum_decay: float, rule: Rule) -> float:
    r""":math:`P_t` after a number of steps, in double precision, for checkpoints that do not store it."""
    if not rule.momentum_schedule:
        return b1**count
    h = Hyperparameters(b1, 0.0, 0.0, 0.0, momentum_decay)
    first = 1 if rule.running_product else max(1, count)
    steps = np.arange(first, min(count, _STEPS_TO_ZERO) + 1, dtype=np.float64)
    return float(np.prod(momentum_at(steps, h, rule).value))


def _decayed(base: ArrayLike, exponent: jax.Array) -> Factor:
    r""":math:`b^t` and :math:`1 - b^t` for :math:`0 \le b < 1` and :math:`t \ge 1`."""
    x = exponent * _log(base)
    return Factor(jnp.exp(x), -_expm1(x))


def _log(base: ArrayLike) -> ArrayLike:
    """Logarithm of a number in [0, 1), in double precision where it is a Python number."""
    if isinstance(base, float):
        return math.log(base) if base else -math.inf
    return jnp.log1p(base - 1)


def _expm1(x: jax.Array) -> jax.Array:
    """``exp(x) - 1`` for ``x <= 0`` to one or two units in the last place; XLA's own is off by up to five on a CPU."""
    small = jnp.maximum(x, -0.7)
    series = functools.reduce(lambda tail, k: 1 + small / k * tail, range(18, 1, -1), jnp.ones_like(x))
    return jnp.where(x > -0.7, small * series, jnp.exp(x) - 1)
