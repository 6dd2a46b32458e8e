"""Scalars that show what Nadam does during a run, for any logger."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from optax_nadam._config import NadamConfig, product_after
from optax_nadam._leaves import complex_like, in_device_memory
from optax_nadam._moments import decode
from optax_nadam._nadam import direction
from optax_nadam._quantized import Moment
from optax_nadam._rules import Factor, Hyperparameters, coefficients_at, momentum_at, parse_rule, scalar_dtype
from optax_nadam._state import INJECTED, KINDS, get_state, moments_of
from optax_nadam._tree import nodes_of

__all__ = ["rms", "scalars"]

_NOT_A_CONFIG = (
    "config must be the NadamConfig of the run, got {value!r}. For an optimizer that was not built from one, pass a"
    " NadamConfig with its b1, b2, eps, eps_root, momentum_decay and rule."
)
_ANOTHER_CONFIG = (
    "config is not that of this run: after {count} steps the product of its momenta is {expected:.6g}, but that of"
    " opt_state is {got:.6g}. Pass the config with the b1, momentum_decay and rule of the optimizer."
)


def scalars(opt_state: Any, config: NadamConfig) -> dict[str, jax.Array]:
    r"""What Nadam's state is after a step, in a few scalars, with all that ``optax.snapshot`` has recorded.

    With the scalars of :func:`optax_nadam.scale_by_nadam`, and over the :math:`n` elements of all leaves,

    .. math:: u^m_t = c^m_t m_t / (\sqrt{c^v_t v_t + \bar\varepsilon} + \varepsilon_t)

    ================ ===============================================================================================
    ``mu``           :math:`\mu_t`, the momentum
    ``mu_product``   :math:`P_t`, the product of the momenta, as in the state
    ``m_norm``       :math:`\lVert m_t \rVert`, as stored, not debiased; in units of the gradient
    ``root_v_norm``  :math:`\lVert \sqrt{v_t} \rVert`, likewise
    ``momentum_rms`` :math:`\lVert u^m_t \rVert / \sqrt n`, the length of the part of the step that the moments give,
                     before the learning rate
    ================ ===============================================================================================

    and each measurement of an ``optax.snapshot`` in the chain under its own name: see :func:`rms` for the length of the
    step itself. In a compiled step they read the moments once more on a TPU or a GPU, several times on a CPU: call it
    only in the steps that are logged. Outside of jit it is one compiled program.

    Args:
      opt_state: a state that ``update`` returned, with one Nadam state in it, at any depth.
      config: the hyperparameters and the rule of the run; its other fields are not used. Values that
        ``optax.inject_hyperparams`` stores in the state take precedence over the config's.

    Returns:
      Arrays of shape ``()``, in float32, or in float64 when x64 is enabled; what a snapshot recorded as it is. Before
      the first step some are NaN.

    Raises:
      ValueError: there is no Nadam state, or more than one; outside of jit, a config with another product of momenta
        than the state has, which is noticed as long as that is not zero.
      TypeError: ``config`` is not a :class:`optax_nadam.NadamConfig`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> from optax_nadam import diagnostics
      >>> config = optax_nadam.NadamConfig(learning_rate=0.1, b1=0.95)
      >>> tx = optax.chain(config.build(), optax.snapshot("step_rms", diagnostics.rms))
      >>> params, gradients = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([0.5, 3.0])}
      >>> _, state = tx.update(gradients, tx.init(params))
      >>> for name, x in diagnostics.scalars(state, config).items():
      ...     print(f"{name} {x:.4f}")
      m_norm 0.1521
      momentum_rms 0.0307
      mu 0.4751
      mu_product 0.4751
      root_v_norm 0.0962
      step_rms 0.1031
    """
    if not isinstance(config, NadamConfig):
        raise TypeError(_NOT_A_CONFIG.format(value=config))
    state = get_state(opt_state)
    count, product = jax.tree.leaves((state.count, state.mu_product))
    injected = _injected(opt_state)
    if not {"b1", "momentum_decay"} & set(injected):
        _check_product(count, product, config)
    moments: Any = jax.tree.map(in_device_memory, moments_of(state))
    measured = [m for node in nodes_of(opt_state, optax.SnapshotState) for m in node.measurement.items()]
    return dict(_scalars(count, product, *moments, injected, config=config)) | dict(measured)


def rms(updates: optax.Updates) -> jax.Array:
    r"""The root mean square of all elements, :math:`\sqrt{\sum |u|^2 / n}`: what ``optax.snapshot`` can record.

    After a whole optimizer it is the length of the step, weight decay and learning rate included; after
    :func:`optax_nadam.scale_by_nadam`, that of Nadam's update alone. Recorded where the step is taken, it is right
    under clipping, masks and accumulation too.

    Args:
      updates: a tree of arrays.

    Returns:
      An array of shape ``()``, in float32, or in float64 when x64 is enabled; 0 without elements.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> tx = optax.chain(
      ...     optax_nadam.scale_by_nadam(),
      ...     optax.snapshot("update_rms", optax_nadam.diagnostics.rms),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> _, state = tx.update(jnp.array([0.5, 3.0]), tx.init(jnp.ones(2)))
      >>> print(f"{optax.tree.get(state, 'update_rms'):.4f}")
      1.0565
    """
    leaves = jax.tree.leaves(updates)
    return jnp.sqrt(_sum_of_squares(leaves) / max(1, sum(jnp.size(x) for x in leaves)))


def _injected(opt_state: Any) -> dict[str, jax.Array]:
    """The hyperparameters that ``optax.inject_hyperparams`` stores around Nadam."""
    around = (node for node in nodes_of(opt_state, INJECTED) if any(nodes_of(node, KINDS)))
    named = (item for node in around for item in node.hyperparams.items())
    return {name: x for name, x in named if name in Hyperparameters._fields}


def _check_product(count: Any, product: Any, config: NadamConfig) -> None:
    """Rejects a config that did not make this product of the momenta, where that is known."""
    if isinstance(count, jax.core.Tracer) or isinstance(product, jax.core.Tracer):
        return
    expected, got = product_after(int(count), config), float(product)
    if not np.isclose(got, expected, rtol=0.01, atol=1e-30):
        raise ValueError(_ANOTHER_CONFIG.format(count=int(count), expected=expected, got=got))


# One program, also outside of jit: XLA:CPU may hang where several that sum over devices are in flight.
@functools.partial(jax.jit, static_argnames="config")
def _scalars(
    count: jax.Array,
    product: jax.Array,
    m: Sequence[Moment],
    v: Sequence[Moment],
    injected: dict[str, jax.Array],
    *,
    config: NadamConfig,
) -> dict[str, jax.Array]:
    dtype, rule = scalar_dtype(), parse_rule("rule", config.rule)
    own = {name: jnp.real(x).astype(dtype) for name, x in injected.items()}
    h = Hyperparameters(*(own.get(name, getattr(config, name)) for name in Hyperparameters._fields))
    t, product = count.astype(dtype), product.astype(dtype)
    c = coefficients_at(rule, t, Factor.of(product), h)
    pairs = [(decode(x, complex_like(dtype, x.array)), decode(y, dtype)) for x, y in zip(m, v, strict=True)]
    by_moments = [direction(jnp.zeros_like(x), x, y, c, rule.power) for x, y in pairs]
    return {
        "mu": jnp.asarray(momentum_at(t, h, rule).value, dtype),
        "mu_product": product,
        "m_norm": jnp.sqrt(_sum_of_squares([x for x, _ in pairs])),
        "root_v_norm": jnp.sqrt(sum((y.sum() for _, y in pairs), jnp.zeros((), dtype))),
        "momentum_rms": rms(by_moments),
    }


def _sum_of_squares(leaves: Sequence[Any]) -> jax.Array:
    wide = [jnp.asarray(x, complex_like(scalar_dtype(), x)) for x in leaves]
    return sum((jnp.sum(jnp.real(x * jnp.conj(x))) for x in wide), jnp.zeros((), scalar_dtype()))
