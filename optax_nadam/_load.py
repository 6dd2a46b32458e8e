"""Values put into an optimizer state, those of a checkpoint or a count: formats, counters, placement."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig, product_after
from optax_nadam._leaves import complex_like, compute_dtype, in_device_memory, placed_like
from optax_nadam._moments import encode
from optax_nadam._quantized import Moment
from optax_nadam._rounding import RandomBits
from optax_nadam._state import (
    INJECTED,
    KINDS,
    NadamState,
    QuantizedNadamState,
    ScaleByNadamState,
    check_nadam_state,
    get_state,
    moments_of,
    numbers_of,
    with_moments,
)
from optax_nadam._tree import by_names_of, map_nodes, names_of, nodes_of

_OLD_CODES = (
    "state has the 8-bit moments of optax_nadam 0.2.0, a record in the place of each leaf, which this version does not"
    " read. In 0.2.0, load it, convert_moments(opt_state, m_dtype=None, v_dtype=None), and save the result: that loads"
    " here, and set_state puts it into the new 8-bit format."
)


def put_state(opt_state: Any, *, count: int, mu_product: float, m: Any, v: Any) -> Any:
    """The optimizer state with these values in its Nadam state.

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
    m, v = by_names_of(old.m, m), by_names_of(old.v, v)
    for name, moments, like in (("m", m, old.m), ("v", v, old.v)):
        validation.check_like_moments(name, moments, like)
    step = _at_most_int32(count)
    like_m, like_v = moments_of(old)
    new_m = [_encoded(x, y, RandomBits.for_m(step, i)) for i, (x, y) in enumerate(_paired(m, like_m))]
    new_v = [_encoded(x, y, RandomBits.for_v(step, i)) for i, (x, y) in enumerate(_paired(v, like_v))]
    new = with_moments(_replaced(old, count=count, mu_product=mu_product), new_m, new_v)
    return map_nodes(lambda _: new, opt_state, KINDS)


def _paired(tree: Any, moments: list[Moment]) -> Iterator[tuple[Any, Moment]]:
    return zip(jax.tree.leaves(tree), moments, strict=True)


def _encoded(x: Any, like: Moment, bits: RandomBits) -> Moment:
    """An array of any dtype as a moment in the format and on the devices of another."""
    # A copy: jnp.asarray may share the memory of an array that its framework updates in place.
    copy = jnp.array(in_device_memory(x), complex_like(compute_dtype(like), like.array))
    return jax.tree.map(placed_like, encode(copy, like, bits), like)


def set_count(opt_state: Any, count: ArrayLike, config: NadamConfig) -> Any:
    r"""The optimizer state as after a number of steps: all counters are set together, the moments stay.

    The step of Nadam depends on the number of steps in two ways: ``count`` and the product of the momenta
    :math:`P_t`. A count without its product gives a wrong step.

    Args:
      opt_state: a state with one :class:`ScaleByNadamState` in it, at any depth; it is not changed.
      count: steps taken, a whole number that is not negative.
      config: the hyperparameters of the run, ``b1``, ``momentum_decay`` and ``rule`` determine the product.

    Returns:
      A new state. ``count`` and ``mu_product`` of Nadam are set, and the counters of learning rate and weight decay
      schedules and of ``optax.inject_hyperparams``.

    Raises:
      ValueError: there is no Nadam state, or more than one; a negative count.
      TypeError: a count that is not a whole number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> config = optax_nadam.NadamConfig()
      >>> state = optax_nadam.set_count(config.build().init(jnp.ones(2)), 10, config)
      >>> nadam = optax_nadam.get_state(state)
      >>> int(nadam.count), f"{nadam.mu_product:.6f}"
      (10, '0.000344')
    """
    steps = validation.parse_count("count", count)
    get_state(opt_state)  # of which there is one

    def set_progress(state: NadamState) -> NadamState:
        return _replaced(state, count=steps, mu_product=product_after(steps, config))

    return put_counters(map_nodes(set_progress, opt_state, KINDS), steps)


def set_state(opt_state: Any, state: Any) -> Any:
    """The optimizer state with the count, the product and the moments of another: for a run that changes midway.

    The formats of the moments are those of ``opt_state``; into narrower ones they are stochastically rounded, unbiased.
    What the params had and what they have now must have the same names and shapes: let the moments grow, shrink or
    lose a leaf before, as numbers, see the example.

    Args:
      opt_state: a state of the optimizer that is to continue, as its ``init`` makes it of the new params; it is not
        changed.
      state: the state to continue from: a :class:`ScaleByNadamState`, a :class:`QuantizedNadamState`, or an optimizer
        state with one of them in it. Also one that was restored from disk without a target, in which the containers
        have become dicts and lists.

    Returns:
      A new state. As after :func:`set_count`, the counters of schedules are set too. Nothing else is taken from
      ``state``.

    Raises:
      ValueError: there is no Nadam state in either, or more than one; the moments do not fit in structure or shape;
        8-bit moments of version 0.2.0.
      TypeError: a moment is not an array of numbers.

    Examples:
      A vocabulary grows by eight rows. A new row gets the mean of ``v`` over the others: with zeros, its first step
      would be several times as long as the learning rate.

      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> tx = optax_nadam.nadam(m_dtype="int8", v_dtype="int8")
      >>> opt_state = tx.init({"embed": jnp.ones((100, 32))})
      >>> old = optax_nadam.get_state(optax_nadam.convert_moments(opt_state, m_dtype=None, v_dtype=None))
      >>> m = {"embed": jnp.pad(old.m["embed"], ((0, 8), (0, 0)))}
      >>> v = {"embed": jnp.pad(old.v["embed"], ((0, 8), (0, 0)), mode="mean")}
      >>> new = optax_nadam.set_state(tx.init({"embed": jnp.ones((108, 32))}), old._replace(m=m, v=v))
      >>> optax_nadam.get_state(new).m["embed"].shape
      (108, 32)
    """
    found = _found_state(state, get_state(opt_state))
    numbers = [[numbers_of(x) for x in moments] for moments in moments_of(found)]
    m, v = (jax.tree.unflatten(jax.tree.structure(t), x) for t, x in zip((found.m, found.v), numbers, strict=True))
    (count, product), _ = jax.tree.flatten((found.count, found.mu_product))
    new = put_counters(put_state(opt_state, count=int(count), mu_product=float(product), m=m, v=v), int(count))
    return map_nodes(lambda node: _with_codes_of(found, node), new, KINDS)


def _with_codes_of(found: NadamState, new: NadamState) -> NadamState:
    """The new state with the codes of the one that it was made of, where both have codes: rounded once, not twice."""

    def copied(x: Any, like: jax.Array) -> jax.Array:
        # A copy, of NumPy's arrays too: the result may be donated, and what it was made of used again.
        return placed_like(jnp.array(in_device_memory(x)), like)

    def kept(tree: Any, moments: list[Moment], new_tree: Any, new_moments: list[Moment]) -> list[Moment]:
        numbered = jax.tree.unflatten(jax.tree.structure(tree), range(len(moments)))
        order = jax.tree.leaves(by_names_of(new_tree, numbered))
        pairs = [(moments[i], like) for i, like in zip(order, new_moments, strict=True)]
        return [jax.tree.map(copied, x, like) if x.scales and like.scales else like for x, like in pairs]

    (m, v), (new_m, new_v) = moments_of(found), moments_of(new)
    return with_moments(new, kept(found.m, m, new.m, new_m), kept(found.v, v, new.v, new_v))


def _found_state(state: Any, like: NadamState) -> NadamState:
    """The one Nadam state in what may have lost its containers, as dicts of Nadam's fields; ``like`` has the names."""
    if any(nodes_of(state, KINDS)):
        return get_state(state)
    found = [node for node in jax.tree.leaves(state, is_leaf=_has_fields) if _has_fields(node)]
    if len(found) != 1:
        return get_state(state)  # which raises
    fields = dict(found[0])
    for name in ("m", "v"):
        paths = [names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(fields[name])]
        if any(path[-1:] == ["codes"] for path in paths):
            raise ValueError(_OLD_CODES)
        fields[name] = by_names_of(getattr(like, name), fields[name])
    scales = fields.pop("scales", None)
    if scales is None:
        restored: NadamState = ScaleByNadamState(**fields)
    else:
        in_order = [scales[key] for key in sorted(scales, key=int)] if isinstance(scales, Mapping) else scales
        restored = QuantizedNadamState(**fields, scales=tuple(in_order))
    check_nadam_state("set_state", restored)
    return restored


def _has_fields(node: Any) -> bool:
    """Whether a node is a mapping that was a Nadam state."""
    return isinstance(node, Mapping) and set(ScaleByNadamState._fields) <= set(node)


def put_counters(opt_state: Any, count: int) -> Any:
    """The optimizer state with ``count`` in the counters of schedules, each in its own buffer."""
    counters = _counters()
    return map_nodes(lambda node: _replaced(node, **{counters[type(node)]: count}), opt_state, tuple(counters))


def has_schedule(opt_state: Any) -> bool:
    """Whether the learning rate of the optimizer is a schedule, or can be set from outside."""
    return any(True for _ in nodes_of(opt_state, (*INJECTED, optax.ScaleByScheduleState)))


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
        type(optax.add_decayed_weights(schedule).init(())): "count",
        optax.MultiStepsState: "gradient_step",
    }


def _replaced(node: Any, **numbers: float) -> Any:
    """A record with some of its scalars replaced."""

    def scalar_like(number: float, like: Any) -> Any:
        # Of Flax nnx it is a variable, with an array in it.
        return jax.tree.map(lambda x: placed_like(jnp.array(_at_most_int32(number), x.dtype), x), like)

    return node._replace(**{name: scalar_like(x, getattr(node, name)) for name, x in numbers.items()})


def _at_most_int32(number: float) -> float:
    """A number, at most the largest int32, where the counters of Optax stop."""
    return min(number, jnp.iinfo(jnp.int32).max)
