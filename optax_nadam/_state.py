"""Nadam's state: find it in an optimizer state, convert its moments, replace its values."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from jax import export
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import complex_like, compute_dtype, in_device_memory, in_memory_of
from optax_nadam._moments import Moment, decode, encode, parse_format, zero_m, zero_v
from optax_nadam._quantized import Quantized, as_quantized, is_quantized
from optax_nadam._rounding import RandomBits

_Node = TypeVar("_Node")

_NOT_ONE = (
    "{name} must hold one {kind}, but holds {number}. Pass what init or update of the optimizer returned, or the part"
    " of it that holds one."
)
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


@functools.cache
def _counters() -> dict[type, str]:
    """The states of Optax that count steps, most of them to look something up in a schedule, and the field that counts.

    Found at the first call, since ``init`` starts JAX's backend, which an import must not.
    """
    schedule = optax.constant_schedule(0.0)
    return {
        **dict.fromkeys(INJECTED, "count"),
        optax.ScaleByScheduleState: "count",
        type(optax.schedules.WrappedSchedule(schedule).init()): "count",
        type(optax.add_decayed_weights(schedule).init(None)): "count",
        optax.MultiStepsState: "gradient_step",
    }


def nodes_of(tree: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    """The nodes of a kind in an optimizer state, at any depth, also those inside others of the kind."""
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind)):
        if isinstance(node, kind):
            yield node
            yield from (inner for child in _children(node) for inner in nodes_of(child, kind))


def map_nodes(f: Callable[[Any], Any], tree: Any, kind: type | tuple[type, ...]) -> Any:
    """The tree with every node of a kind replaced by ``f`` of it, inner nodes first."""

    def mapped(node: Any) -> Any:
        if not isinstance(node, kind):
            return node
        inner = jax.tree.map(lambda child: map_nodes(f, child, kind), node, is_leaf=lambda child: child is not node)
        return f(inner)

    return jax.tree.map(mapped, tree, is_leaf=lambda node: isinstance(node, kind))


def the_node(name: str, tree: Any, kind: type[_Node]) -> _Node:
    """The one node of a kind in an optimizer state.

    Raises:
      ValueError: there is none, or more than one; the text begins with the argument's name.
    """
    found = list(nodes_of(tree, kind))
    if len(found) != 1:
        raise ValueError(_NOT_ONE.format(name=name, kind=kind.__name__, number=len(found)))
    return found[0]


def _children(node: Any) -> list[Any]:
    return jax.tree.leaves(node, is_leaf=lambda child: child is not node)


def in_form_of(like: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``tree`` in the structure of ``like`` if only the containers differ: fields in one, keys in the other.

    Flax nnx keeps names but not containers: it returns a NamedTuple in a variable as a mapping, its fields sorted. Any
    other tree is returned unchanged.
    """
    form: Any = jax.tree.structure(like, is_leaf)
    if jax.tree.structure(tree, is_leaf) == form:
        return tree
    found, wanted = _by_name(tree, is_leaf), _by_name(like, is_leaf)
    renamed = found.keys() == wanted.keys() and any(found[name][0] != wanted[name][0] for name in wanted)
    return by_names_of(like, tree, is_leaf) if renamed else tree


def by_names_of(like: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``tree`` in the structure of ``like``, leaf by leaf of the same name, whatever the containers.

    Checkpoints keep names but not containers: Orbax without a target restores tuples as lists and an empty container as
    None. Where a leaf of one has no counterpart in the other, the tree is returned unchanged.
    """
    found, wanted = _by_name(tree, is_leaf), _by_name(like, is_leaf)
    if found.keys() != wanted.keys():
        return tree
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf), [found[name][1] for name in wanted])


def _by_name(tree: Any, is_leaf: Callable[[Any], bool] | None) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Path and leaf by the names along the path, whether these are fields or keys."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): (path, leaf) for path, leaf in leaves}


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


def map_parts(f: Callable[[Any], Any], opt_state: Any) -> Any:
    """The optimizer state with ``f`` of each largest part that has one Nadam state: of the whole where that has one."""

    def mapped(node: Any) -> Any:
        found = sum(1 for _ in nodes_of(node, ScaleByNadamState))
        if found <= 1:
            return f(node) if found else node
        return jax.tree.map(mapped, node, is_leaf=lambda child: child is not node)

    return mapped(opt_state)


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
        value = numbers_of(stored)
        like = zero(value)
        if isinstance(stored, Quantized) and isinstance(like, Quantized):
            return stored
        (memory, *_) = jax.tree.leaves(stored)
        return jax.tree.map(functools.partial(in_memory_of, memory), encode(value, like, bits))

    return jax.tree.map(convert, moments, is_leaf=is_quantized)


def numbers_of(stored: Moment) -> jax.Array:
    """The numbers of a moment, in the dtype they are computed in, and in device memory."""
    return decode(jax.tree.map(in_device_memory, stored), complex_like(compute_dtype(stored), stored))


def put_state(opt_state: Any, *, count: int, mu_product: float, m: Any, v: Any) -> Any:
    """The optimizer state with these values in its Nadam state, and ``count`` in the counters of schedules.

    Args:
      opt_state: a state of the optimizer that is to continue, as its ``init`` makes it; it is not changed.
      count: steps taken.
      mu_product: the product of the momenta so far.
      m: first moments, arrays in a tree with the names of the params; its containers may be others.
      v: second moments, likewise.

    Returns:
      A new state, with the dtypes, the formats of the moments and the sharding of the old one.

    Raises:
      ValueError: the moments do not fit the state in structure or shape; the text names the leaf.
      TypeError: a moment is not an array of numbers.
    """
    old = get_state(opt_state)
    m, v = by_names_of(old.m, m, is_quantized), by_names_of(old.v, v, is_quantized)
    for name, moments, like in (("m", m, old.m), ("v", v, old.v)):
        validation.check_like_moments(name, moments, like)
    new = old._replace(
        m=_encoded(m, old.m, RandomBits.for_m(_largest_int32(count))),
        v=_encoded(v, old.v, RandomBits.for_v(_largest_int32(count))),
    )
    return put_count(map_nodes(lambda _: new, opt_state, ScaleByNadamState), count=count, mu_product=mu_product)


def _encoded(moments: Any, like: Any, bits: RandomBits) -> Any:
    """Arrays of any dtype as moments in the format and on the devices of ``like``."""

    def encode_copy(x: Any, like: Moment) -> Moment:
        # A copy: jnp.asarray may share the memory of an array that its framework updates in place.
        encoded = encode(jnp.array(in_device_memory(x), complex_like(compute_dtype(like), like)), like, bits)
        return jax.tree.map(placed_like, encoded, like)

    return jax.tree.map(encode_copy, moments, like)


def put_count(opt_state: Any, *, count: int, mu_product: float) -> Any:
    """The optimizer state with ``count`` in its Nadam state and in the counters of schedules, each in its own buffer.

    Args:
      opt_state: a state with one :class:`ScaleByNadamState` in it; it is not changed.
      count: steps taken.
      mu_product: the product of the momenta so far.

    Returns:
      A new state.
    """
    get_state(opt_state)

    def set_nadam(state: ScaleByNadamState) -> ScaleByNadamState:
        return _replaced(state, count=_largest_int32(count), mu_product=mu_product)

    return map_nodes(set_nadam, put_counters(opt_state, count), ScaleByNadamState)


def put_counters(opt_state: Any, count: int) -> Any:
    """The optimizer state with ``count`` in the counters of schedules."""

    def set_counter(node: Any) -> Any:
        return _replaced(node, **{_counters()[type(node)]: _largest_int32(count)})

    return map_nodes(set_counter, opt_state, tuple(_counters()))


def _replaced(node: Any, **numbers: float) -> Any:
    """A record with some of its scalars replaced."""
    return node._replace(**{name: _scalar_like(x, getattr(node, name)) for name, x in numbers.items()})


def _largest_int32(count: int) -> int:
    """A count, at most the largest int32, where the counters of Optax stop."""
    return min(count, jnp.iinfo(jnp.int32).max)


def _scalar_like(number: float, like: jax.Array) -> jax.Array:
    """A number as a new array with the dtype of ``like`` and on its devices."""
    return placed_like(jnp.array(number, like.dtype), like)


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array with the sharding and the memory kind of ``like``, where that is committed to its devices."""
    if isinstance(like, jax.core.Tracer) or not getattr(like, "committed", False):
        return x
    return jax.device_put(x, like.sharding)
