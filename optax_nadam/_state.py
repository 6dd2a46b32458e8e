"""Nadam's state, and what a user does with it: get it, convert its moments."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax import export
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import complex_like, compute_dtype, in_device_memory, in_memory_of
from optax_nadam._moments import Formats, decode, encode, zero_m, zero_v
from optax_nadam._quantized import Moment, number_of_scales, scale_shapes
from optax_nadam._rounding import RandomBits
from optax_nadam._tree import map_nodes, nodes_of, the_node

_APART = (
    "{name} got a state in which {leaf} is {got} in place of {wanted}. Pass the state that init or update returned, or"
    " restore it in its own dtypes; for another format, use convert_moments."
)
_SPLIT = (
    "{name} got 8-bit moments of shape {shape} split by jax.shard_map over {axes}, and scales that are not: the largest"
    " magnitude of a row or a column would be that of a part. Call init inside shard_map too, so that each part has"
    " scales of its own; or let jit split the moments, and shard_map only what is around the optimizer."
)
_RESTORED = (
    "{name} got a state in the form of a dict, as it is restored from disk without a target. Restore it with the target"
    " tx.init(params), or put what was restored into it: set_state(tx.init(params), restored)."
)
_WIDE: tuple[DTypeLike, ...] = (jnp.float32, jnp.bfloat16, jnp.float64)
_COMPLEX: tuple[DTypeLike, ...] = (jnp.complex64, jnp.complex128)
_NO_NADAM = "opt_state must hold a ScaleByNadamState, but holds none. Pass what init or update of a Nadam returned."


@functools.partial(export.register_namedtuple_serialization, serialized_name="optax_nadam.ScaleByNadamState")
class ScaleByNadamState(NamedTuple):
    r"""State of Nadam. The field names are the format on disk and do not change.

    Attributes:
      count: steps taken, int32, shape ``()``; it stops at the largest int32.
      mu_product: :math:`P_t`, the product of the momenta used so far, shape ``()``; float32, or float64 when
        x64 is enabled.
      m: mean of the gradients, a tree like the params; float32 for leaves of at most 32 bits, float64 for
        float64 leaves, complex for complex ones; with ``m_dtype``, bfloat16.
      v: mean of the squared gradients, likewise; real for complex leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in every Optax state
    mu_product: jax.Array
    m: optax.Updates
    v: optax.Updates


@functools.partial(export.register_namedtuple_serialization, serialized_name="optax_nadam.QuantizedNadamState")
class QuantizedNadamState(NamedTuple):
    r"""State of Nadam with 8-bit moments. The field names are the format on disk and do not change.

    .. math:: x_{ij} = \operatorname{sign}(k_{ij})\, (|k_{ij}| / K)^p \min(r_i, c_j)

    The codes :math:`k` of ``m`` are signed, with :math:`K = 127, p = 2`; those of ``v`` are not, with
    :math:`K = 254, p = 4`. So both ``m`` and the root of ``v`` resolve small values beside large ones. The row scale
    :math:`r_i` is the largest magnitude along the last axis, the column scale :math:`c_j` that along the longest other
    axis; all further axes are batch. A vector has one scale for every 128 elements. The codes -128 and 255 stand for
    NaN.

    Attributes:
      count: as in :class:`ScaleByNadamState`.
      mu_product: likewise.
      m: codes of the mean of the gradients, a tree like the params, int8; leaves that are not worth codes, and complex
        ones, as in :class:`ScaleByNadamState`.
      v: codes of the mean of the squared gradients, likewise, uint8.
      scales: float32 arrays in the order of the leaves with codes, those of ``m`` first: of a leaf of shape
        ``(..., d, f)`` the rows ``(..., d)``, then the columns ``(..., f)``; of a vector of ``n`` elements ``n / 128``,
        rounded up. A scalar where no leaf has codes.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in every Optax state
    mu_product: jax.Array
    m: optax.Updates
    v: optax.Updates
    scales: tuple[jax.Array, ...] | jax.Array


NadamState = ScaleByNadamState | QuantizedNadamState
KINDS = (ScaleByNadamState, QuantizedNadamState)


def moments_of(state: NadamState) -> tuple[list[Moment], list[Moment]]:
    """The first and the second moments, leaf by leaf, each with its scales."""
    rest = iter(_scales_of(state))

    def moments(tree: Any) -> list[Moment]:
        return [Moment(x, tuple(itertools.islice(rest, number_of_scales(x)))) for x in jax.tree.leaves(tree)]

    m = moments(state.m)
    return m, moments(state.v)


def _scales_of(state: NadamState) -> list[jax.Array]:
    """All scales, in order."""
    return [s for s in jax.tree.leaves(getattr(state, "scales", ())) if s.ndim]


def with_moments(state: NadamState, m: list[Moment], v: list[Moment], *, quantized: bool | None = None) -> NadamState:
    """The state with other moments, leaf by leaf, and of the kind that has scales if they may have some."""
    if quantized is None:
        quantized = isinstance(state, QuantizedNadamState)
    m_tree, v_tree = (
        jax.tree.unflatten(jax.tree.structure(tree), [moment.array for moment in moments])
        for tree, moments in ((state.m, m), (state.v, v))
    )
    if not quantized:
        return ScaleByNadamState(state.count, state.mu_product, m_tree, v_tree)
    variable: Any = jax.tree.structure(state.count)  # of an array, or of a variable of Flax nnx that holds one
    scales = tuple(jax.tree.unflatten(variable, [s]) for moment in (*m, *v) for s in moment.scales)
    # Without codes a scalar: optax.tree.map_params needs a leaf, and Orbax saves no array of size zero.
    return QuantizedNadamState(state.count, state.mu_product, m_tree, v_tree, scales or jnp.zeros(()))


def check_nadam_state(name: str, state: Any) -> None:
    """Rejects another optimizer's state, and one whose m, v and scales do not belong together."""
    if isinstance(state, Mapping):
        raise ValueError(_RESTORED.format(name=name))
    validation.check_state(name, state, KINDS)
    validation.check_arrays(name, state)
    validation.check_structure(f"v of the state that {name} got", state.v, state.m)
    _check_scalars(name, state)
    _check_moments(name, "m", state.m, state.m, _WIDE + _COMPLEX, jnp.int8)
    _check_moments(name, "v", state.v, state.m, _WIDE, jnp.uint8)
    codes = [x for x in jax.tree.leaves((state.m, state.v)) if number_of_scales(x)]
    wanted = [(x, shape) for x in codes for shape in scale_shapes(x.shape)]
    scales = _scales_of(state)
    if len(scales) != len(wanted):
        text = f"{len(scales)} arrays", f"{len(wanted)}, two for each leaf of codes and one for a vector"
        raise ValueError(_APART.format(name=name, leaf="scales", got=text[0], wanted=text[1]))
    for i, (scale, (x, shape)) in enumerate(zip(scales, wanted, strict=True)):
        if (scale.shape, scale.dtype) != (shape, jnp.float32):
            got, expected = f"{scale.dtype}, {scale.shape}", f"float32, {shape}"
            raise ValueError(_APART.format(name=name, leaf=f"scales[{i}]", got=got, wanted=expected))
        if axes := _varies_over(x) - _varies_over(scale):
            raise ValueError(_SPLIT.format(name=name, shape=x.shape, axes=", ".join(sorted(map(repr, axes)))))


def _check_scalars(name: str, state: NadamState) -> None:
    """Rejects a count or a product of the momenta that was cast."""
    for field, kind in (("count", jnp.integer), ("mu_product", (jnp.float32, jnp.float64))):
        (x,) = jax.tree.leaves(getattr(state, field))
        if not (jnp.issubdtype(x.dtype, kind) if isinstance(kind, type) else x.dtype in kind):
            wanted = "an integer" if field == "count" else "float32 or float64"
            raise ValueError(_APART.format(name=name, leaf=field, got=x.dtype, wanted=wanted))


def _check_moments(
    name: str, field: str, tree: Any, like: Any, dtypes: tuple[DTypeLike, ...], codes_dtype: DTypeLike
) -> None:
    """Rejects moments that are neither numbers nor codes, or of another shape than those in ``like``."""
    for index, (x, other) in enumerate(zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)):
        if x.shape != other.shape or x.dtype not in (*dtypes, codes_dtype):
            leaf = validation.place(field, tree, index)
            known = ", ".join(str(jnp.dtype(dtype)) for dtype in (*dtypes, codes_dtype))
            wanted = f"an array of shape {other.shape} and one of the dtypes {known}"
            raise ValueError(_APART.format(name=name, leaf=leaf, got=f"{x.dtype}, {x.shape}", wanted=wanted))


def _varies_over(x: Any) -> frozenset[str]:
    """The axes of ``jax.shard_map`` over which an array differs, as far as its check knows them."""
    if not isinstance(x, jax.core.Tracer):
        return frozenset()
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else getattr(getattr(kind, "mat", None), "varying", frozenset())


# The states of Optax that store hyperparameters.
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def get_state(opt_state: Any) -> ScaleByNadamState | QuantizedNadamState:
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
    state = the_node("opt_state", opt_state, KINDS)
    check_nadam_state("get_state", state)
    return state


def convert_moments(opt_state: Any, *, m_dtype: Any, v_dtype: Any) -> Any:
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
      ValueError: a format that is not offered, or no Nadam state in ``opt_state``, or one whose moments and scales do
        not belong together.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> state = optax_nadam.nadam().init(jnp.ones((32, 64)))
      >>> small = optax_nadam.convert_moments(state, m_dtype="int8", v_dtype="int8")
      >>> small[0].v.dtype, [x.shape for x in small[0].scales]
      (dtype('uint8'), [(32,), (64,), (32,), (64,)])
      >>> optax_nadam.convert_moments(small, m_dtype=None, v_dtype=None)[0].v.dtype
      dtype('float32')
    """
    m_formats, v_formats = Formats("m_dtype", m_dtype), Formats("v_dtype", v_dtype)
    if not any(nodes_of(opt_state, KINDS)):
        raise ValueError(_NO_NADAM)

    def convert(state: NadamState) -> NadamState:
        def paired(moments: list[Moment], formats: Formats) -> Iterator[tuple[Moment, Any]]:
            return zip(moments, formats.of(state.m), strict=True)

        check_nadam_state("convert_moments", state)
        count = in_device_memory(*jax.tree.leaves(state.count))
        m, v = moments_of(state)
        m = [_converted(x, zero_m, f, RandomBits.for_m(count, i)) for i, (x, f) in enumerate(paired(m, m_formats))]
        v = [_converted(x, zero_v, f, RandomBits.for_v(count, i)) for i, (x, f) in enumerate(paired(v, v_formats))]
        return with_moments(state, m, v, quantized=m_formats.any_8_bit or v_formats.any_8_bit)

    return map_nodes(convert, opt_state, KINDS)


def _converted(stored: Moment, zero: Callable[..., Moment], dtype: DTypeLike | None, bits: RandomBits) -> Moment:
    """The moment in the format of the zeros that ``zero`` makes."""
    value = numbers_of(stored)
    like = zero(value, dtype)
    if stored.scales and like.scales:
        return stored
    return jax.tree.map(functools.partial(in_memory_of, stored.array), encode(value, like, bits))


def numbers_of(stored: Moment) -> jax.Array:
    """The numbers of a moment, in the dtype they are computed in, and in device memory."""
    return decode(jax.tree.map(in_device_memory, stored), complex_like(compute_dtype(stored), stored.array))
