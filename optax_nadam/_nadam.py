"""The algorithm: the update of a leaf, and the optimizers made of it.

A gradient is checked while tracing; then come the scalars of the step, the leaf update, and the storage of the moments.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import abs_squared, complex_like, compute_dtype
from optax_nadam._moments import Formats, average, zero_m, zero_v
from optax_nadam._quantized import Moment
from optax_nadam._rounding import RandomBits
from optax_nadam._rules import (
    Coefficients,
    Hyperparameters,
    Rule,
    RuleName,
    check_hyperparameters,
    parse_rule,
    scalar_dtype,
    scalars_of_step,
)
from optax_nadam._schedules import parse_learning_rate, parse_weight_decay
from optax_nadam._state import NadamState, ScaleByNadamState, check_nadam_state, moments_of, with_moments


def scale_by_nadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    eps_root: ArrayLike = 0.0,
    *,
    momentum_decay: ArrayLike = 4e-3,
    rule: RuleName | Rule = "scheduled",
    m_dtype: Any = None,
    v_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by Nadam's step, without learning rate or sign.

    With :math:`t` counted from 1 and the variant's scalars :math:`a_t, c^g_t, c^m_t, c^v_t` (below),

    .. math::

      m_t &= a_t\, m_{t-1} + (1 - a_t)\, g_t \\
      v_t &= \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2 \\
      u_t &= (c^g_t g_t + c^m_t m_t) / (\sqrt{c^v_t v_t + \bar\varepsilon} + \varepsilon)

    where :math:`\mu_t = \beta_1 (1 - \tfrac12\, 0.96^{\psi t})` for ``scheduled``, ``dozat2016``, ``torch1`` and
    ``loss_scaled`` and :math:`\mu_t = \beta_1` for the others; :math:`P_t = \mu_1 \cdots \mu_t` and
    :math:`P_{t+1} = P_t\, \mu_{t+1}`, but :math:`P_t = \mu_t` for ``loss_scaled``; :math:`a_t = \beta_1`, but
    :math:`a_t = \mu_t` for ``dozat2016``; and

    =============== ========================= =================================== =============================
    rule            :math:`c^g_t`             :math:`c^m_t`                       :math:`c^v_t`
    =============== ========================= =================================== =============================
    ``scheduled``   :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})`       :math:`1/(1-\beta_2^t)`
    ``constant``    :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})`       :math:`1/(1-\beta_2^t)`
    ``simplified``  :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_t)`           :math:`1/(1-\beta_2^t)`
    ``dozat2016``   :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})`       :math:`\beta_2/(1-\beta_2^t)`
    ``adam``        :math:`0`                 :math:`1/(1-P_t)`                   :math:`1/(1-\beta_2^t)`
    ``torch1``      :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-\mu_t P_{t+1})` :math:`1/(1-\beta_2^t)`
    ``loss_scaled`` :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})`       :math:`1/(1-\beta_2^t)`
    ``eps_hat``     :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_t)`           :math:`1/(1-\beta_2^t)`
    ``undebiased``  :math:`1-\mu_t`           :math:`\mu_{t+1}`                   :math:`1`
    ``flux``        :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})`       :math:`\beta_2/(1-\beta_2^t)`
    =============== ========================= =================================== =============================

    and ``eps_hat`` has :math:`\varepsilon_t = \varepsilon / \sqrt{1-\beta_2^t}`. The rules are those of tf.keras,
    Keras 3 and PyTorch (``scheduled``), Optax (``constant``), timm and AlgoPerf (``simplified``), the paper
    (``dozat2016``), Adam, which has no look-ahead (``adam``), PyTorch 1.10 to 1.13 (``torch1``), Keras 3 on JAX under a
    LossScaleOptimizer (``loss_scaled``), tf.contrib (``eps_hat``), AlgoPerf with ``debias=False`` (``undebiased``), and
    Flux and Optimisers.jl (``flux``).

    Each leaf is computed in float32, or in float64 if it has 64-bit parts; the update has the gradient's dtype.
    Leaves that are ``None`` or ``optax.MaskedNode`` pass through. Complex leaves have a real ``v``. With ``eps`` above
    zero, gradients up to 1e18 in magnitude give finite updates; the square of a larger one may overflow float32: that
    element does not move for one step and is NaN afterwards, so clip where such gradients can occur.

    Args:
      b1: decay :math:`\beta_1` of the first moment and limit of the momentum, in [0, 1).
      b2: decay :math:`\beta_2` of the second moment, in [0, 1).
      eps: :math:`\varepsilon \ge 0`, added to the root; in units of the gradient.
      eps_root: :math:`\bar\varepsilon \ge 0`, added under the root; in units of the squared gradient. Above zero it
        makes the update differentiable where gradients are zero.
      momentum_decay: :math:`\psi \ge 0`, how fast the momentum rises from :math:`\beta_1/2` to
        :math:`\beta_1`, per step: 0.004 in tf.keras up to 2.10 and in PyTorch, 1 in Keras 3. Without effect where
        :math:`\mu_t = \beta_1`.
      rule: the variant, by its name in the table, or a :class:`Rule` of your own.
      m_dtype: the format ``m`` is stored in. None: float32, and float64 for leaves with 64-bit parts; ``"float32"``,
        ``"float64"``: that, for complex leaves their parts. ``"bfloat16"``: 2 bytes a parameter. ``"int8"``: codes of
        one byte and scales, see :class:`QuantizedNadamState`; leaves under 1024 elements, and those that are so narrow
        that their scales would take more than half a byte a parameter, are stored as with None, as are complex ones.
        Both narrow formats are stochastically rounded, unbiased; the random bits are a function of step, leaf and
        position, the same in every run and on any number of devices. What has been rounded has no derivative: to
        differentiate through an update is an error. Instead of one format, a tree of formats with the structure of the
        params or its first levels, such as ``{"embed": None, "blocks": "int8"}``, or a function from the path of a
        leaf, such as ``"blocks/0/kernel"``, to its format.
      v_dtype: the format ``v`` is stored in, likewise.

    All numbers may also be scalar arrays, traced or not. Python numbers are used in double precision and checked.

    Returns:
      A gradient transformation whose state is a :class:`ScaleByNadamState`, or where a format may be int8 a
      :class:`QuantizedNadamState`. It ignores ``params`` (but checks
      them if given) and extra arguments.

    Raises:
      ValueError: a number out of range or an unknown rule, at once; another optimizer's state, and gradients or
        params that do not have the structure and shapes the state was made for, while ``update`` is traced; formats
        that do not fit the params, while ``init`` is.
      TypeError: a hyperparameter that is not a number, at once; an integer, boolean or non-array leaf, and complex
        mixed with real, while ``init`` or ``update`` is traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> tx = optax.chain(optax_nadam.scale_by_nadam(), optax.scale(-0.01))
      >>> params = {"w": jnp.array([1.0, -1.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.5, 3.0])}, state)
      >>> [f"{x:.6f}" for x in optax.apply_updates(params, updates)["w"].tolist()]
      ['0.989435', '-1.010565']

    References:
      Dozat, `Incorporating Nesterov Momentum into Adam
      <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    variant, h = parse_rule("rule", rule), Hyperparameters(b1, b2, eps, eps_root, momentum_decay)
    return scale_by(variant, h, m_dtype, v_dtype, variant.power)


def scale_by(
    rule: Rule, h: Hyperparameters, m_dtype: Any, v_dtype: Any, power: float
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_nadam` with another exponent than the rule's; with 0 the update is not normalised."""
    check_hyperparameters(h)
    m_formats, v_formats = Formats("m_dtype", m_dtype), Formats("v_dtype", v_dtype)

    def init(params: optax.Params) -> NadamState:
        validation.check_leaves("params", params)
        leaves = jax.tree.leaves(params)
        m = [zero_m(p, x) for p, x in zip(leaves, m_formats.of(params), strict=True)]
        v = [zero_v(p, x) for p, x in zip(leaves, v_formats.of(params), strict=True)]
        new = ScaleByNadamState(jnp.zeros((), jnp.int32), jnp.ones((), scalar_dtype()), params, params)
        return with_moments(new, m, v, quantized=m_formats.any_8_bit or v_formats.any_8_bit)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, NadamState]:
        del extra_args
        check_nadam_state("scale_by_nadam", state)
        validation.check_like_moments("gradients", updates, state.m)
        if params is not None:
            validation.check_like_moments("params", params, state.m)
        with jax.named_scope("nadam"):
            count: Any = optax.safe_increment(state.count)
            mu_product, c = scalars_of_step(rule, count, state.mu_product, h)
            leaves = zip(jax.tree.leaves(updates), *moments_of(state), strict=True)
            stepped = [_update_leaf(g, m, v, c, count, np.uint32(i), power) for i, (g, m, v) in enumerate(leaves)]
        u, m, v = ([each[i] for each in stepped] for i in range(3))
        new = state._replace(count=count, mu_product=mu_product.astype(state.mu_product.dtype))
        return jax.tree.unflatten(jax.tree.structure(updates), u), with_moments(new, m, v)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnums=6)
def _update_leaf(
    g: jax.Array, m: Moment, v: Moment, c: Coefficients, step: jax.Array, leaf: jax.Array, power: float
) -> tuple[jax.Array, Moment, Moment]:
    """One step of one leaf; traced once for all leaves of a shape."""
    real = compute_dtype(g, m, v)
    c = Coefficients(*(x.astype(real) for x in c))
    grad = g.astype(complex_like(real, g))

    m_t, m_stored = average(m, lambda g: g, grad, c.m_weight, RandomBits.for_m(step, leaf))
    v_t, v_stored = average(v, abs_squared, grad, c.v_weight, RandomBits.for_v(step, leaf))
    if v.scales:  # a code may stand for a v that no gradients give with this m
        v_t = jnp.maximum(v_t, c.v_floor * abs_squared(m_t))
    u = direction(grad, m_t, v_t, c, power)
    return u.astype(g.dtype), m_stored, v_stored


def direction(g: jax.Array, m: jax.Array, v: jax.Array, c: Coefficients, power: float) -> jax.Array:
    """The update of a leaf, from its gradient and its moments of the same step."""
    numerator = c.cg.astype(g.dtype) * g + c.cm.astype(g.dtype) * m
    v_hat = c.cv * v + c.eps_root
    denominator = (jnp.sqrt(v_hat) if power == 0.5 else v_hat**power) + c.eps
    return numerator / denominator.astype(g.dtype)


def nadam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    eps_root: ArrayLike = 0.0,
    *,
    momentum_decay: ArrayLike = 4e-3,
    rule: RuleName | Rule = "scheduled",
    m_dtype: Any = None,
    v_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nadam with scheduled momentum, as in tf.keras and PyTorch; not ``optax.nadam``, which is ``rule="constant"``.

    .. math::

      \theta_t = \theta_{t-1} - \alpha_t u_t

    with :math:`u_t` from :func:`scale_by_nadam`. The defaults are those of ``tf.keras.optimizers.Nadam`` in TensorFlow
    1.x. For a new run try ``rule="constant"`` and tune ``b1``: on small tasks it ended below a tuned Adam, the default
    did not (``docs/evidence.md``). The optimizer of ``optax.nadam``, with its defaults, is
    :func:`optax_nadam.compat.optax.nadam`.

    Args:
      learning_rate: :math:`\alpha`, a number, a scalar array, a :class:`ScheduleConfig`, or a schedule that maps the
        steps taken so far, 0 at first, to a number.
      b1: see :func:`scale_by_nadam`, as are the arguments below.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the variant.
      m_dtype: the format the first moment is stored in.
      v_dtype: the format the second moment is stored in.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: as :func:`scale_by_nadam`, and for a learning rate that is not finite.
      TypeError: as :func:`scale_by_nadam`, and for a learning rate that is not a number, array or schedule.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> loss = lambda x: jnp.sum(x**2)
      >>> tx = optax_nadam.nadam(learning_rate=0.1)
      >>> x = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> float(loss(x)) < 1e-3
      True
    """
    alpha = parse_learning_rate(learning_rate)
    return optax.chain(
        scale_by_nadam(
            b1, b2, eps, eps_root, momentum_decay=momentum_decay, rule=rule, m_dtype=m_dtype, v_dtype=v_dtype
        ),
        optax.scale_by_learning_rate(alpha),
    )


def nadamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    eps_root: ArrayLike = 0.0,
    *,
    momentum_decay: ArrayLike = 4e-3,
    rule: RuleName | Rule = "scheduled",
    m_dtype: Any = None,
    v_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nadam with scheduled momentum and decoupled weight decay; not ``optax.nadamw``, which is ``rule="constant"``.

    .. math::

      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from :func:`scale_by_nadam`. The optimizer of ``optax.nadamw``, with its defaults, is
    :func:`optax_nadam.compat.optax.nadamw`.

    Args:
      learning_rate: :math:`\alpha`, as in :func:`nadam`.
      b1: see :func:`scale_by_nadam`, as are the arguments up to ``v_dtype``.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the variant.
      m_dtype: the format the first moment is stored in.
      v_dtype: the format the second moment is stored in.
      weight_decay: :math:`\lambda \ge 0`, multiplied by the learning rate; a number, a scalar array, or a schedule of
        the steps taken.
      mask: a tree of booleans like the params, a prefix of it, or a function from params to one: the leaves
        that decay. None for all.

    Returns:
      A gradient transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: as :func:`nadam`, for a negative weight decay, and when ``update`` gets no params.
      TypeError: as :func:`nadam`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> tx = optax_nadam.nadamw(0.01, weight_decay=0.1, mask={"kernel": True, "bias": False})
      >>> params = {"kernel": jnp.array(1.0), "bias": jnp.array(1.0)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.array(0.5), "bias": jnp.array(0.5)}, state, params)
      >>> {name: f"{float(u):.6f}" for name, u in updates.items()}
      {'bias': '-0.010565', 'kernel': '-0.011565'}

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    alpha = parse_learning_rate(learning_rate)
    decay = parse_weight_decay(weight_decay)
    return optax.chain(
        scale_by_nadam(
            b1, b2, eps, eps_root, momentum_decay=momentum_decay, rule=rule, m_dtype=m_dtype, v_dtype=v_dtype
        ),
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_learning_rate(alpha),
    )
