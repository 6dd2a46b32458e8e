"""The algorithm: its state, the update of a leaf, and the optimizers made of it.

The way of a gradient is one line: checked while tracing, scalars from the rule, the leaf update, moments kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._moments import Moment, averaged, real_dtype, with_parts, zero_m, zero_v
from optax_nadam._quantized import is_quantized
from optax_nadam._rounding import Chance
from optax_nadam._rules import Coefficients, Hyperparameters, Rule, coefficients, rule_named, scalar_dtype


class ScaleByNadamState(NamedTuple):
    r"""State of Nadam. The field names are the format on disk and do not change.

    Attributes:
      count: steps taken, int32, shape ``()``; it stops at the largest int32.
      mu_product: :math:`P_t`, the product of the momenta used so far, shape ``()``; float32, or float64 when
        x64 is enabled.
      m: mean of the gradients, a tree like the params; float32 for leaves of at most 32 bits, float64 for
        float64 leaves, complex for complex ones; where ``m_dtype`` says so, bfloat16 or a :class:`Quantized` in
        place of a leaf.
      v: mean of the squared gradients, likewise; real for complex leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in every Optax state
    mu_product: jax.Array
    m: optax.Updates
    v: optax.Updates


def get_state(opt_state: Any) -> ScaleByNadamState:
    """The one Nadam state in an optimizer state, at any depth.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_nadam) if is_nadam(s)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one ScaleByNadamState, but holds {len(found)}.")
    return found[0]


def is_nadam(node: Any) -> bool:
    """Whether a node of an optimizer state is Nadam's."""
    return isinstance(node, ScaleByNadamState)


def scale_by_nadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    eps_root: ArrayLike = 0.0,
    *,
    momentum_decay: ArrayLike = 4e-3,
    rule: str | Rule = "scheduled",
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by Nadam's step, without learning rate or sign.

    With :math:`t` counted from 1 and every dialect's scalars :math:`a_t, c^g_t, c^m_t, c^v_t` (table below),

    .. math::

      m_t &= a_t\, m_{t-1} + (1 - a_t)\, g_t \\
      v_t &= \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2 \\
      u_t &= (c^g_t g_t + c^m_t m_t) / (\sqrt{c^v_t v_t + \bar\varepsilon} + \varepsilon)

    where :math:`\mu_t = \beta_1 (1 - \tfrac12\, 0.96^{\psi t})`, but :math:`\mu_t = \beta_1` for ``constant`` and
    ``simplified``, :math:`P_t = \mu_1 \cdots \mu_t` and

    ============== =============== ========================= ============================= =============================
    rule           :math:`a_t`     :math:`c^g_t`             :math:`c^m_t`                 :math:`c^v_t`
    ============== =============== ========================= ============================= =============================
    ``scheduled``  :math:`\beta_1` :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})` :math:`1/(1-\beta_2^t)`
    ``constant``   :math:`\beta_1` :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})` :math:`1/(1-\beta_2^t)`
    ``simplified`` :math:`\beta_1` :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_t)`     :math:`1/(1-\beta_2^t)`
    ``dozat2016``  :math:`\mu_t`   :math:`(1-\mu_t)/(1-P_t)` :math:`\mu_{t+1}/(1-P_{t+1})` :math:`\beta_2/(1-\beta_2^t)`
    ============== =============== ========================= ============================= =============================

    Each leaf is computed in float32, or in float64 if it has 64-bit parts; the update has the gradient's dtype.
    Leaves that are ``None`` or ``optax.MaskedNode`` pass through. Complex leaves have a real ``v``. With ``eps`` above
    zero, gradients up to 1e18 in magnitude give finite updates; the square of a larger one may overflow float32: that
    element stands still for a step and is NaN from the next on, so clip where such gradients can come.

    Args:
      b1: decay :math:`\beta_1` of the first moment and limit of the momentum, in [0, 1).
      b2: decay :math:`\beta_2` of the second moment, in [0, 1).
      eps: :math:`\varepsilon \ge 0`, added to the root; in units of the gradient.
      eps_root: :math:`\bar\varepsilon \ge 0`, added under the root; in units of the squared gradient. Above zero it
        makes the update differentiable where gradients are zero.
      momentum_decay: :math:`\psi \ge 0`, how fast the momentum rises from :math:`\beta_1/2` to
        :math:`\beta_1`, per step: 0.004 in tf.keras up to 2.10 and in PyTorch, 1 in Keras 3. Read by ``scheduled``
        and ``dozat2016`` only.
      rule: the dialect: ``"scheduled"`` (tf.keras up to 2.10, Keras 3, PyTorch), ``"constant"`` (Optax),
        ``"simplified"`` (timm, AlgoPerf) or ``"dozat2016"`` (the paper).
      m_dtype: how ``m`` is kept. None: float32, and float64 on leaves with 64-bit parts; ``"float32"``, ``"float64"``:
        that (its parts, for complex leaves). ``"bfloat16"``: 2 bytes a parameter. ``"int8"``: a byte, and a scale for
        each row, a :class:`Quantized`; leaves under 1024 elements stay as they are. The narrow ones are rounded up or
        down by chance, so that they are right in the mean; the chance is a function of step and position, the same
        in every run and on any devices. The ``m`` of complex leaves is not made narrow.
      v_dtype: how ``v`` is kept, likewise.

    All numbers may also be scalar arrays, traced or not. Python numbers are used in double precision and checked.

    Returns:
      A gradient transformation whose state is a :class:`ScaleByNadamState`. It ignores ``params`` (but checks
      them if given) and extra arguments.

    Raises:
      ValueError: a number out of range or an unknown rule, at once; another optimizer's state, and gradients or
        params whose structure or shapes are not those the state was made for, while ``update`` is traced.
      TypeError: a hyperparameter that is no number, at once; an integer, boolean or non-array leaf, and complex
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
    h = Hyperparameters(b1, b2, eps, eps_root, momentum_decay)
    validation.check_hyperparameters(h)
    validation.check_moment_dtype("m_dtype", m_dtype)
    validation.check_moment_dtype("v_dtype", v_dtype)
    validation.check_rule("rule", rule)
    dialect = rule_named(rule)

    def init(params: optax.Params) -> ScaleByNadamState:
        validation.check_leaves("params", params)
        return ScaleByNadamState(
            count=jnp.zeros((), jnp.int32),
            mu_product=jnp.ones((), scalar_dtype()),
            m=jax.tree.map(lambda p: zero_m(p, m_dtype), params),
            v=jax.tree.map(lambda p: zero_v(p, v_dtype), params),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByNadamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByNadamState]:
        del extra_args
        validation.check_state("scale_by_nadam", state, ScaleByNadamState)
        validation.check_like_state("gradients", updates, state.m)
        if params is not None:
            validation.check_like_state("params", params, state.m)
        with jax.named_scope("nadam"):
            count = optax.safe_increment(state.count)
            c, mu_product = coefficients(dialect, count, state.mu_product, h)
            leaves = zip(*(jax.tree.leaves(tree, is_quantized) for tree in (updates, state.m, state.v)), strict=True)
            stepped = [_update_leaf(g, m, v, c, count, dialect.power) for g, m, v in leaves]
        u, m, v = _unzip(jax.tree.structure(updates), stepped)
        return u, ScaleByNadamState(count, mu_product.astype(state.mu_product.dtype), m, v)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnums=5)
def _update_leaf(
    g: jax.Array, m: Moment, v: Moment, c: Coefficients, step: jax.Array, power: float
) -> tuple[jax.Array, Moment, Moment]:
    """One step of one leaf; traced once for all leaves of a shape."""
    real = real_dtype(g, m, v)
    whole = with_parts(real, g)
    c = Coefficients(*(x.astype(real) for x in c))

    grad = g.astype(whole)
    m_new, m_kept = averaged(m, grad, c.m_weight, Chance(step, 0))
    v_new, v_kept = averaged(v, _abs_squared(grad), c.v_weight, Chance(step, 1))
    u = direction(grad, m_new, v_new, c, power)
    return u.astype(g.dtype), m_kept, v_kept


def direction(g: jax.Array, m: jax.Array, v: jax.Array, c: Coefficients, power: float) -> jax.Array:
    """The update of a leaf, from its gradient and its moments of the same step."""
    numerator = c.cg.astype(g.dtype) * g + c.cm.astype(g.dtype) * m
    denominator = _power(c.cv * v + c.eps_root, power) + c.eps
    return numerator / denominator.astype(g.dtype)


def _power(x: jax.Array, power: float) -> jax.Array:
    return jnp.sqrt(x) if power == 0.5 else x**power


def _abs_squared(x: jax.Array) -> jax.Array:
    return jnp.real(x * jnp.conj(x))


def _unzip(treedef: Any, triples: list[tuple[jax.Array, Moment, Moment]]) -> tuple[Any, Any, Any]:
    """Triples, a leaf each, as three trees; nodes that check their children never get anything but arrays."""
    first, second, third = (jax.tree.unflatten(treedef, [triple[i] for triple in triples]) for i in range(3))
    return first, second, third


def nadam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    eps_root: ArrayLike = 0.0,
    *,
    momentum_decay: ArrayLike = 4e-3,
    rule: str | Rule = "scheduled",
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nadam, by default that of ``tf.keras.optimizers.Nadam`` in TensorFlow 1.x.

    .. math::

      \theta_t = \theta_{t-1} - \alpha_t u_t

    with :math:`u_t` from :func:`scale_by_nadam`.

    Args:
      learning_rate: :math:`\alpha`, a number, a scalar array, or a schedule that maps the steps taken so far,
        0 at first, to a number.
      b1: see :func:`scale_by_nadam`, as all that follow.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the dialect.
      m_dtype: how the first moment is kept.
      v_dtype: how the second moment is kept.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: as :func:`scale_by_nadam`, and for a learning rate that is not finite.
      TypeError: as :func:`scale_by_nadam`, and for a learning rate that is no number, array or schedule.

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
    validation.check_learning_rate(learning_rate)
    return _chain(
        "nadam",
        scale_by_nadam(
            b1, b2, eps, eps_root, momentum_decay=momentum_decay, rule=rule, m_dtype=m_dtype, v_dtype=v_dtype
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def nadamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    eps_root: ArrayLike = 0.0,
    *,
    momentum_decay: ArrayLike = 4e-3,
    rule: str | Rule = "scheduled",
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nadam with decoupled weight decay, as AdamW is to Adam.

    .. math::

      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from :func:`scale_by_nadam`.

    Args:
      learning_rate: :math:`\alpha`, as in :func:`nadam`.
      b1: see :func:`scale_by_nadam`, as all up to ``v_dtype``.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the dialect.
      m_dtype: how the first moment is kept.
      v_dtype: how the second moment is kept.
      weight_decay: :math:`\lambda \ge 0`, in units of the update; it is multiplied by the learning rate.
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
    validation.check_learning_rate(learning_rate)
    validation.check_not_negative("weight_decay", weight_decay)
    return _chain(
        "nadamw",
        scale_by_nadam(
            b1, b2, eps, eps_root, momentum_decay=momentum_decay, rule=rule, m_dtype=m_dtype, v_dtype=v_dtype
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _chain(name: str, *links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain``, which says whose state it got when it gets another optimizer's."""
    chained = optax.chain(*links)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        validation.check_chain_state(name, state, ScaleByNadamState, len(links))
        return chained.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chained.init, update)
