"""Values put into an optimizer state, those of a checkpoint or a count: formats, counters, placement."""

import functools
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
from optax_nadam._state import INJECTED, KINDS, NadamState, get_state, moments_of, with_moments
from optax_nadam._tree import by_names_of, map_nodes


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
    seed = _at_most_int32(count)
    like_m, like_v = moments_of(old)
    new = with_moments(
        _replaced(old, count=count, mu_product=mu_product),
        [
            _encoded(x, y, RandomBits.for_m(seed, i))
            for i, (x, y) in enumerate(zip(jax.tree.leaves(m), like_m, strict=True))
        ],
        [
            _encoded(x, y, RandomBits.for_v(seed, i))
            for i, (x, y) in enumerate(zip(jax.tree.leaves(v), like_v, strict=True))
        ],
    )
    return map_nodes(lambda _: new, opt_state, KINDS)


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


def put_counters(opt_state: Any, count: int) -> Any:
    """The optimizer state with ``count`` in the counters of schedules, each in its own buffer."""
    counters = _counters()
    return map_nodes(lambda node: _replaced(node, **{counters[type(node)]: count}), opt_state, tuple(counters))


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

    def scalar_like(number: float, like: jax.Array) -> jax.Array:
        return placed_like(jnp.array(_at_most_int32(number), like.dtype), like)

    return node._replace(**{name: scalar_like(x, getattr(node, name)) for name, x in numbers.items()})


def _at_most_int32(number: float) -> float:
    """A number, at most the largest int32, where the counters of Optax stop."""
    return min(number, jnp.iinfo(jnp.int32).max)
