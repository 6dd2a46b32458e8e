"""The moments of a run in another format, so that it may go on in it."""

from typing import Any

import jax
from jax.typing import DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._moments import Moment, decoded, kept_like, real_dtype, with_parts, zero_m, zero_v
from optax_nadam._nadam import is_nadam
from optax_nadam._quantized import Quantized, is_quantized
from optax_nadam._rounding import Chance


def convert_moments(opt_state: Any, *, m_dtype: DTypeLike | None = None, v_dtype: DTypeLike | None = None) -> Any:
    """The same optimizer state with its moments in another format, and back.

    A run continues in the format of its state, so this is how a float32 run goes on in bytes, or a run in bytes in
    float32 (the default). To the wider format the numbers are kept; to the narrower they are rounded by chance, right
    in the mean, as in every step. What has the format already stays as it is, bit for bit.

    Args:
      opt_state: a state with any number of :class:`ScaleByNadamState` in it, at any depth.
      m_dtype: the format of the first moments, as in :func:`scale_by_nadam`.
      v_dtype: of the second moments.

    Returns:
      A new state, as the optimizer with these formats has it.

    Raises:
      ValueError: a format that is not offered, or no Nadam state in ``opt_state``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> state = optax_nadam.nadam().init(jnp.ones((32, 64)))
      >>> small = optax_nadam.convert_moments(state, m_dtype="int8", v_dtype="int8")
      >>> small[0].v.codes.dtype, small[0].v.scale.shape
      (dtype('uint8'), (32,))
      >>> optax_nadam.convert_moments(small)[0].v.dtype
      dtype('float32')
    """
    validation.check_moment_dtype("m_dtype", m_dtype)
    validation.check_moment_dtype("v_dtype", v_dtype)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_nadam)
    if not any(map(is_nadam, nodes)):
        raise ValueError("opt_state must hold a ScaleByNadamState, but holds none.")

    def convert(node: Any) -> Any:
        if not is_nadam(node):
            return node
        m = jax.tree.map(lambda x: _in_format(x, zero_m, m_dtype, Chance(node.count, 0)), node.m, is_leaf=is_quantized)
        v = jax.tree.map(lambda x: _in_format(x, zero_v, v_dtype, Chance(node.count, 1)), node.v, is_leaf=is_quantized)
        return node._replace(m=m, v=v)

    return jax.tree.map(convert, opt_state, is_leaf=is_nadam)


def _in_format(kept: Moment, zero: Any, dtype: DTypeLike | None, chance: Chance) -> Moment:
    """A moment as another format has it; ``zero`` makes the first one of that format."""
    value = decoded(kept, with_parts(real_dtype(kept), kept))
    like = zero(value, dtype)
    if isinstance(kept, Quantized) and isinstance(like, Quantized):
        return kept
    return kept_like(value, like, chance)
