"""Scalars that show what Nadam does during a run, for any logger."""

from typing import Any

import jax
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._leaves import complex_like
from optax_nadam._nadam import direction
from optax_nadam._rules import Factor, Hyperparameters, coefficients_at, momentum_at, parse_rule, scalar_dtype
from optax_nadam._state import INJECTED, KINDS, convert_moments, get_state
from optax_nadam._tree import is_masked, nodes_of

__all__ = ["scalars"]


def scalars(opt_state: Any, config: NadamConfig, gradients: optax.Updates | None = None) -> dict[str, jax.Array]:
    r"""The step that led to an optimizer state, in a few scalars.

    With the scalars of :func:`optax_nadam.scale_by_nadam`, whose update is :math:`u_t`, and over the :math:`n`
    elements of all leaves,

    .. math:: u^m_t = c^m_t m_t / d_t, \quad u^g_t = c^g_t g_t / d_t, \quad u_t = u^m_t + u^g_t, \quad
              d_t = \sqrt{c^v_t v_t + \bar\varepsilon} + \varepsilon

    ================== =============================================================================================
    ``mu``             :math:`\mu_t`, the momentum
    ``mu_product``     :math:`P_t`, the product of the momenta, as in the state
    ``m_norm``         :math:`\lVert m_t \rVert`, as stored, not debiased; in units of the gradient
    ``root_v_norm``    :math:`\lVert \sqrt{v_t} \rVert`, likewise
    ``momentum_rms``   :math:`\lVert u^m_t \rVert / \sqrt n`, the length of the part that the moments give
    ``update_rms``     :math:`\lVert u_t \rVert / \sqrt n`, the length of the step, before the learning rate
    ``gradient_share`` :math:`\langle u^g_t, u_t \rangle / \lVert u_t \rVert^2`, the share of the look-ahead; the rest
                       is that of the momentum. Negative where the gradient opposes a larger momentum
    ================== =============================================================================================

    the last two only with gradients. In a compiled step they read the moments and the gradients once more on a TPU or
    one GPU, up to twice more on many GPUs, several times on a CPU: call it only in the steps that are logged.

    Args:
      opt_state: a state that ``update`` returned, with one :class:`optax_nadam.ScaleByNadamState` in it, at any depth.
      config: the hyperparameters and the rule of the run; its other fields are not used. Values
        that ``optax.inject_hyperparams`` stores in the state take precedence over the config's.
      gradients: :math:`g_t` as Nadam's own transformation got it, after clipping and averaging; a tree like the params;
        leaves for which the state has an ``optax.MaskedNode`` are ignored.

    Returns:
      Arrays of shape ``()``, in float32, or in float64 when x64 is enabled. Before the first step, and for an update of
      zero, some are NaN.

    Raises:
      ValueError: there is no Nadam state, or more than one; the gradients do not fit it in structure or shape.
      TypeError: a gradient is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> config = optax_nadam.NadamConfig(learning_rate=0.1, b1=0.95)
      >>> tx = config.build()
      >>> params, gradients = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([0.5, 3.0])}
      >>> _, state = tx.update(gradients, tx.init(params))
      >>> for name, x in optax_nadam.diagnostics.scalars(state, config, gradients).items():
      ...     print(f"{name} {x:.4f}")
      mu 0.4751
      mu_product 0.4751
      m_norm 0.1521
      root_v_norm 0.0962
      momentum_rms 0.0307
      update_rms 1.0307
      gradient_share 0.9702
    """
    state = convert_moments(get_state(opt_state), m_dtype=None, v_dtype=None)
    rule, h = parse_rule("rule", config.rule), _hyperparameters(opt_state, config)
    dtype = scalar_dtype()
    t, product = state.count.astype(dtype), state.mu_product.astype(dtype)
    mu = jnp.asarray(momentum_at(t, h, rule).value, dtype)
    c = coefficients_at(rule, t, Factor.of(product), h)

    def update_from(g: optax.Updates) -> tuple[optax.Updates, jax.Array]:
        u = jax.tree.map(lambda g, m, v: direction(g, m, v, c, rule.power), g, m, v)
        return u, _dot(u, u)

    m, v = (jax.tree.map(_wide, moments) for moments in (state.m, state.v))
    n = max(1, sum(x.size for x in jax.tree.leaves(m)))
    u_m, u_m_squared = update_from(jax.tree.map(jnp.zeros_like, m))
    shown = {
        "mu": mu,
        "mu_product": product,
        "m_norm": jnp.sqrt(_dot(m, m)),
        "root_v_norm": jnp.sqrt(_total(v)),
        "momentum_rms": jnp.sqrt(u_m_squared / n),
    }
    if gradients is None:
        return shown
    u, u_squared = update_from(_fitting(gradients, m))
    return shown | {"update_rms": jnp.sqrt(u_squared / n), "gradient_share": 1 - _dot(u_m, u) / u_squared}


def _hyperparameters(opt_state: Any, config: NadamConfig) -> Hyperparameters:
    """The hyperparameters of the config, or those that ``optax.inject_hyperparams`` stores in their place."""
    around = (node for node in nodes_of(opt_state, INJECTED) if any(nodes_of(node, KINDS)))
    injected = {name: jnp.real(x).astype(scalar_dtype()) for node in around for name, x in node.hyperparams.items()}
    return Hyperparameters(*(injected.get(name, getattr(config, name)) for name in Hyperparameters._fields))


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, complex_like(scalar_dtype(), x))


def _fitting(gradients: optax.Updates, m: optax.Updates) -> optax.Updates:
    """The gradients of the leaves that have moments."""
    unmasked = jax.tree.map(lambda m, g: m if is_masked(m) else g, m, gradients, is_leaf=is_masked)
    validation.check_like_moments("gradients", unmasked, m)
    return jax.tree.map(_wide, unmasked)


def _dot(x: optax.Updates, y: optax.Updates) -> jax.Array:
    return _total(jax.tree.map(lambda x, y: jnp.real(x * jnp.conj(y)), x, y))


def _total(tree: optax.Updates) -> jax.Array:
    return sum(map(jnp.sum, jax.tree.leaves(tree)), jnp.zeros((), scalar_dtype()))
