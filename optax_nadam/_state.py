"""Nadam's state, and what a user does with it: get it, convert its moments."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import export
from jax.typing import DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import complex_like, compute_dtype, in_device_memory, in_memory_of
from optax_nadam._moments import Moment, decode, encode, parse_format, zero_m, zero_v
from optax_nadam._quantized import Quantized, as_quantized, is_quantized
from optax_nadam._rounding import RandomBits
from optax_nadam._tree import map_nodes, nodes_of, the_node

_NO_NADAM = "opt_state must hold a ScaleByNadamState, but holds none. Pass what init or update of a Nadam returned."


@functools.partial(export.register_namedtuple_serialization, serialized_name="optax_nadam.ScaleByNadamState")
class ScaleByNadamState(NamedTuple):
    r"""State of Nadam. The field names are the format on disk and do not change.

    Attributes:
      count: steps taken, int32, shape ``()``; it stops at the largest int32.
      mu_product: :math:`P_t`, the product of the momenta used so far, shape ``()``; float32, or float64 when
        x64 is enabled.
      m: mean of the gradients, a tree like the params; float32 for leaves of at most 32 bits, float64 for
        float64 leaves, complex for complex ones; with ``m_dtype``, bfloat16 or a :class:`Quantized` in place of a
        leaf.
      v: mean of the squared gradients, likewise; real for complex leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in every Optax state
    mu_product: jax.Array
    m: optax.Updates
    v: optax.Updates


# The states of Optax that store hyperparameters.
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def get_state(opt_state: Any) -> ScaleByNadamState:
    """The one Nadam state in an optimizer state, at any depth of chains and wrappers.

    Args:
      opt_state: what ``init`` or ``update`` of an optimizer returned.

    Returns:
      The state, its arrays not copied.

    Raises:
      ValueError: there is none, or more than one.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> tx = optax.chain(optax.clip(1.0), optax_nadam.nadam())
      >>> optax_nadam.get_state(tx.init(jnp.ones(2)))._fields
      ('count', 'mu_product', 'm', 'v')
    """
    state = the_node("opt_state", opt_state, ScaleByNadamState)
    validation.check_arrays("opt_state", state)
    return state._replace(m=as_quantized(state.m), v=as_quantized(state.v))


def convert_moments(opt_state: Any, *, m_dtype: DTypeLike | None, v_dtype: DTypeLike | None) -> Any:
    """The same optimizer state with its moments in other formats, and back.

    A run continues in the format of its state, so this is how a float32 run continues in 8 bits, or an 8-bit run in
    float32. Into a wider format the numbers are copied; into a narrower one they are stochastically rounded, unbiased,
    as in every step. Moments already in the format are not changed.

    Args:
      opt_state: a state with any number of :class:`ScaleByNadamState` in it, at any depth.
      m_dtype: the format of the first moments, as in :func:`scale_by_nadam`; None is the format of the default.
      v_dtype: the format of the second moments. Both are required, so that neither changes by accident.

    Returns:
      A new state, for the optimizer with these formats; what was in host memory still is.

    Raises:
      ValueError: a format that is not offered, or no Nadam state in ``opt_state``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> state = optax_nadam.nadam().init(jnp.ones((32, 64)))
      >>> small = optax_nadam.convert_moments(state, m_dtype="int8", v_dtype="int8")
      >>> small[0].v.codes.dtype, small[0].v.scale.shape
      (dtype('uint8'), (32,))
      >>> optax_nadam.convert_moments(small, m_dtype=None, v_dtype=None)[0].v.dtype
      dtype('float32')
    """
    m_format, v_format = parse_format("m_dtype", m_dtype), parse_format("v_dtype", v_dtype)
    if not any(nodes_of(opt_state, ScaleByNadamState)):
        raise ValueError(_NO_NADAM)

    def convert(node: ScaleByNadamState) -> ScaleByNadamState:
        state = get_state(node)
        count = in_device_memory(state.count)
        return state._replace(
            m=_converted(state.m, lambda x: zero_m(x, m_format), RandomBits.for_m(count)),
            v=_converted(state.v, lambda x: zero_v(x, v_format), RandomBits.for_v(count)),
        )

    return map_nodes(convert, opt_state, ScaleByNadamState)


def _converted(moments: Any, zero: Callable[[jax.Array], Moment], bits: RandomBits) -> Any:
    """The moments in the format of the zeros that ``zero`` makes."""

    def convert(stored: Moment) -> Moment:
        in_memory = jax.tree.map(in_device_memory, stored)
        value = decode(in_memory, complex_like(compute_dtype(stored), stored))
        like = zero(value)
        if isinstance(stored, Quantized) and isinstance(like, Quantized):
            return stored
        (memory, *_) = jax.tree.leaves(stored)
        return jax.tree.map(functools.partial(in_memory_of, memory), encode(value, like, bits))

    return jax.tree.map(convert, moments, is_leaf=is_quantized)
