"""bfloat16 weights trained at higher precision: what rounding drops is stored beside them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax import export, lax
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import dtype_of, in_device_memory, placed_like, zeros_like
from optax_nadam._rounding import RandomBits, bits_of, number_of, without_derivative
from optax_nadam._tree import by_name, by_names_of, is_masked, map_nodes, the_node, unzip

_FLOAT16 = (
    "{leaf} has dtype float16; compensated stores what rounding to bfloat16 drops. Cast it to bfloat16 or float32."
)
_WIDENED = (
    " If applying an update has changed their dtype: use optax.apply_updates, which keeps it; equinox.apply_updates"
    " does not."
)
_MISFIT = (
    "{leaf} is {got}, but this state of compensated was made for a leaf that is {expected}. Pass the params that"
    " belong to the state, or call init again."
)
_MASTER = (
    "{leaf} is {got}, but this state of compensated was made for a leaf of shape {shape}, and takes weights of float32."
    " Pass the tree that init was called on, in float32."
)


@functools.partial(export.register_namedtuple_serialization, serialized_name="optax_nadam.CompensatedState")
class CompensatedState(NamedTuple):
    """State of :func:`compensated`. The field names are the format on disk and do not change.

    Attributes:
      count: updates so far, int32, shape ``()``.
      remainder: a tree like the params: for each bfloat16 leaf an int8 or int16 array of its shape, the difference
        between the trained weights and the params, in units of the last bit stored, or None where nothing is stored;
        ``optax.MaskedNode`` for other leaves.
      inner_state: the state of the inner optimizer, which sees float32 weights.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in every Optax state
    remainder: Any
    inner_state: Any


def compensated(
    inner: optax.GradientTransformation, *, remainder_dtype: DTypeLike | None = jnp.int8
) -> optax.GradientTransformationExtraArgs:
    r"""Trains bfloat16 weights as if they were wider, and stores beside them what rounding drops.

    A bfloat16 weight holds 8 significant bits: an update of less than a 512th of it is lost. Here the inner optimizer
    sees and updates the weights :math:`\theta` with all their bits, in float32; ``params`` are these rounded to
    bfloat16, and the state stores the difference, in units of the last bit stored:

    .. math::

      \theta' = \theta + u, \qquad p' = \operatorname{bfloat16}(\theta'), \qquad
      r' = \operatorname{bits}(\theta') - \operatorname{bits}(p')

    With int16 no bit of float32 is lost: :math:`\theta` follows a float32 run with the same gradients bit for bit, and
    the params are those weights rounded to the nearest, ties away from zero. With int8, params and remainder hold
    24 bits together, the last of them stochastically rounded, unbiased, so that smaller updates count too. With None,
    the bfloat16 weights themselves are stochastically rounded, unbiased, and no byte is stored: an update far below the
    last bit of a weight then counts in the mean over many steps only, and each step adds noise of up to that bit.

    The update returned is float32, and ``optax.apply_updates`` makes the right bfloat16 weights of it. It must be
    applied unchanged: wrap a whole optimizer, learning rate included; clipping, masks and ``optax.MultiSteps`` may be
    inside or outside (outside and under ``lax.scan`` from Optax 0.2.8 on, whose accumulator keeps its dtype).
    Leaves that are not bfloat16 are updated by the inner optimizer alone. Where one step moves a weight across zero, to
    under a hundredth of its magnitude, the addition in float32 may miss the bfloat16 number by :math:`2^{-24}` of the
    old weight; the next step continues from there.

    Args:
      inner: any Optax optimizer.
      remainder_dtype: int8, one byte a weight, int16, two, or None, no byte.

    Returns:
      A gradient transformation whose state is a :class:`CompensatedState` and whose ``update`` needs ``params``. Extra
      arguments go to ``inner``.

    Raises:
      ValueError: another dtype, at once; params missing, or params or gradients that do not fit the state, while
        ``update`` is traced.
      TypeError: float16 leaves, while ``init`` is traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> tx = optax_nadam.compensated(optax.sgd(2.5e-3))
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(jnp.full(2, 0.5, jnp.bfloat16), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params, [round(w, 2) for w in optax_nadam.master_params(state, params).tolist()]
      (Array([0.9375, 0.9375], dtype=bfloat16), [0.94, 0.94])

    References:
      Zamirai et al., `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020, on what rounding loses.
    """
    dtype = _parse_remainder_dtype("remainder_dtype", remainder_dtype)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> CompensatedState:
        _check_not_float16("params", params)
        remainder = jax.tree.map(lambda p: _zero_remainder(p, dtype), params)
        return CompensatedState(jnp.zeros((), jnp.int32), remainder, inner.init(_in_float32(params)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, CompensatedState]:
        validation.check_state("compensated", state, CompensatedState)
        validation.check_arrays("compensated", (state.count, state.remainder))
        _check_params(params, state.remainder)
        validation.check_structure("gradients", updates, params)
        validation.check_shapes("gradients", updates, params)
        with jax.named_scope("compensated"):
            count: Any = optax.safe_increment(state.count)
            weights = jax.tree.map(_weight, params, state.remainder)
        steps, inner_state = inner.update(_in_float32(updates), state.inner_state, weights, **extra_args)
        with jax.named_scope("compensated"):
            structure: Any = jax.tree.structure(params)
            trees = (params, weights, steps, state.remainder)
            leaves = enumerate(zip(*map(structure.flatten_up_to, trees), strict=True))
            stepped = [_update_leaf(p, w, u, r, RandomBits.for_weights(count, i)) for i, (p, w, u, r) in leaves]
            applied, remainder = unzip(structure, stepped, 2)
        return applied, CompensatedState(count, remainder, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def master_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """The weights that :func:`compensated` trains, with all their bits, for evaluation and export.

    Args:
      opt_state: an optimizer state with one :class:`CompensatedState` in it, at any depth.
      params: the weights that belong to it.

    Returns:
      A tree like the params, with float32 in place of bfloat16 leaves.

    Raises:
      ValueError: there is no such state, or more than one, or it does not fit the params.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(2)}
      >>> state = optax_nadam.compensated(optax.sgd(1e-3)).init(params)
      >>> optax_nadam.master_params(state, params)["w"].dtype
      dtype('float32')
    """
    remainder = the_node("opt_state", opt_state, CompensatedState).remainder
    _check_params(params, remainder)
    structure: Any = jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(params), _remainders("params", params, remainder), strict=True)
    return jax.tree.unflatten(structure, [_weight(p, jax.tree.map(in_device_memory, r)) for p, r in pairs])


def set_master_params(opt_state: Any, weights: optax.Params) -> tuple[optax.Params, Any]:
    r"""Params and state of :func:`compensated` that stand for given weights: the inverse of :func:`master_params`.

    A checkpoint in float32 continues so in bfloat16: ``params.astype(bfloat16)`` alone would drop up to
    :math:`2^{-8}` of each weight. With a remainder of int16 nothing is lost, with int8 at most :math:`2^{-16}` of a
    weight, with None what bfloat16 drops; all are rounded to the nearest, ties away from zero.

    Args:
      opt_state: an optimizer state with one :class:`CompensatedState` in it, at any depth, as ``init`` makes it of the
        params in bfloat16; it is not changed.
      weights: a tree like the params, float32 where these are bfloat16. Under jit or not, sharded or not.

    Returns:
      The params, bfloat16 where the state has a remainder, and a new optimizer state.

    Raises:
      ValueError: there is no such state, or more than one, or the weights do not fit it.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> weights = {"w": jnp.array([0.1, 0.2]), "b": jnp.zeros(2)}
      >>> tx = optax_nadam.compensated(optax.sgd(1e-3), remainder_dtype="int16")
      >>> state = tx.init(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
      >>> params, state = optax_nadam.set_master_params(state, weights)
      >>> params["w"].dtype.name, optax_nadam.master_params(state, params)["w"].tolist() == weights["w"].tolist()
      ('bfloat16', True)
    """
    state = the_node("opt_state", opt_state, CompensatedState)
    _check_masters(weights, state.remainder)
    remainders = _remainders("weights", weights, state.remainder)
    split = [_split_leaf(w, r) for w, r in zip(jax.tree.leaves(weights), remainders, strict=True)]
    params, by_weights = unzip(jax.tree.structure(weights), split, 2)
    remainder = by_names_of(state.remainder, by_weights)
    new = state._replace(remainder=remainder)
    return params, map_nodes(lambda _: new, opt_state, CompensatedState)


def _parse_remainder_dtype(name: str, value: DTypeLike | None) -> jnp.dtype | None:
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in (jnp.int8, jnp.int16):
        raise ValueError(f"{name} must be int8, int16 or None, got {value!r}.")
    return dtype


def _check_not_float16(name: str, tree: Any) -> None:
    """Rejects leaves of float16."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if dtype_of(leaf) == jnp.float16:
            raise TypeError(_FLOAT16.format(leaf=validation.place(name, tree, index)))


def _check_params(params: Any, remainder: Any) -> None:
    """Rejects params that are missing or do not fit the remainder."""
    if params is None:
        raise ValueError("compensated needs params: call update(grads, state, params).")
    for leaf, p, r in _with_remainders("params", params, remainder):
        shape = p.shape if r is None else getattr(r, "shape", None)
        expected = (jnp.bfloat16, shape) if _is_compensated(r) else None
        got = (p.dtype, p.shape) if p.dtype == jnp.bfloat16 else None
        if got != expected:
            wanted = f"bfloat16 of shape {shape}" if expected else "not bfloat16"
            text = _MISFIT.format(leaf=leaf(), got=f"{p.dtype} of shape {p.shape}", expected=wanted)
            raise ValueError(text + (_WIDENED if expected and p.shape == shape else ""))


def _check_masters(weights: Any, remainder: Any) -> None:
    """Rejects weights that do not fit the remainder, or have more bits than float32."""
    for leaf, w, r in _with_remainders("weights", weights, remainder):
        dtype, shape = dtype_of(w), getattr(r, "shape", jnp.shape(w))
        wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4
        if _is_compensated(r) and (not wide or jnp.shape(w) != shape):
            raise ValueError(_MASTER.format(leaf=leaf(), got=f"{dtype} of shape {jnp.shape(w)}", shape=shape))


def _with_remainders(name: str, tree: Any, remainder: Any) -> Iterator[tuple[Callable[[], str], Any, Any]]:
    """Each leaf, a function that makes its name, and its remainder, in trees of one structure."""
    remainders = _remainders(name, tree, remainder)
    for index, (leaf, r) in enumerate(zip(jax.tree.leaves(tree), remainders, strict=True)):
        yield functools.partial(validation.place, name, tree, index), leaf, r


def _remainders(name: str, tree: Any, remainder: Any) -> list[Any]:
    """What is in the place of each leaf: an array, None or a MaskedNode; the containers may be those of Flax nnx."""
    structure: Any = jax.tree.structure(tree)
    try:
        return structure.flatten_up_to(remainder)
    except (ValueError, TypeError) as error:
        found = by_name(remainder, is_leaf=lambda node: node is None or is_masked(node))
        names = by_name(tree)
        if not {each for each, r in found.items() if r is not None} <= names.keys() <= found.keys():
            raise validation.wrong_structure(name, error) from None
    return [found[each] for each in names]


def _is_compensated(remainder: Any) -> bool:
    """Whether this is in the place of a bfloat16 leaf, stored or not; in that of others there is a MaskedNode."""
    return remainder is None or hasattr(remainder, "shape")


def _is_bfloat16(leaf: Any) -> bool:
    return dtype_of(leaf) == jnp.bfloat16


def _in_float32(tree: Any) -> Any:
    """The tree with float32 in place of bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_bfloat16(x) else x, tree)


def _zero_remainder(p: Any, dtype: DTypeLike | None) -> Any:
    if not _is_bfloat16(p):
        return optax.MaskedNode()
    return None if dtype is None else zeros_like(p, dtype)


def _weight(p: jax.Array, remainder: Any) -> jax.Array:
    """The weight with what bfloat16 dropped; for another leaf the param itself."""
    if not _is_bfloat16(p):
        return p
    bits = bits_of(p.astype(jnp.float32))
    return number_of(bits if remainder is None else bits + _in_bits(remainder))


def _update_leaf(
    p: jax.Array, weight: jax.Array, step: jax.Array, remainder: Any, random: RandomBits
) -> tuple[jax.Array, Any]:
    """The update from a bfloat16 param to its new value, and the new remainder; another leaf takes the step itself."""
    if not _is_bfloat16(p):
        return step, remainder
    now, drawn = p.astype(jnp.float32), random.draw(weight.shape).astype(jnp.int32)
    target = _rounded_down(without_derivative(weight + step.astype(weight.dtype)), remainder, drawn)
    if remainder is None:
        return target - now, None
    # A cast to bfloat16 and back would be deleted under jit. What the addition does not reach has no remainder anyway,
    # but with the comparison XLA makes one pass of the step for TPU, without it sometimes three.
    nearest = _nearest(target)
    reached = lax.reduce_precision(now + (nearest - now), exponent_bits=8, mantissa_bits=7) == nearest
    stored = jnp.where(reached, _remainder(target, nearest, remainder), 0).astype(remainder.dtype)
    # Computed from the stored remainder: otherwise XLA makes several passes for TPU where one is enough.
    return number_of(bits_of(target) - _in_bits(stored)) - now, stored


def _split_leaf(weight: jax.Array, remainder: Any) -> tuple[jax.Array, Any]:
    """The param and the remainder nearest to a weight, placed like the remainder; another leaf is its own param."""
    if not _is_compensated(remainder):
        return weight, remainder
    half = (1 << _dropped_bits(remainder)) >> 1
    target = _rounded_down(jnp.asarray(weight).astype(jnp.float32), remainder, half)
    nearest = _nearest(target)
    param = nearest.astype(jnp.bfloat16)
    if remainder is None:
        return param, None
    stored = _remainder(target, nearest, remainder).astype(remainder.dtype)
    return in_device_memory(placed_like(param, remainder)), placed_like(stored, remainder)


def _rounded_down(weight: jax.Array, remainder: Any, added: jax.Array | int) -> jax.Array:
    """The weight in the bits that are stored, rounded down after a number less than the last of them is added."""
    fraction = (1 << _dropped_bits(remainder)) - 1
    return number_of((bits_of(weight) + (added & fraction)) & ~fraction)


def _nearest(x: jax.Array) -> jax.Array:
    """The nearest bfloat16, ties away from zero, so that what is left over fits 16 bits; infinities stay."""
    return number_of((bits_of(x) + 0x8000) & ~0xFFFF)


def _remainder(target: jax.Array, nearest: jax.Array, like: jax.Array) -> jax.Array:
    """What the nearest bfloat16 lacks, in units of the last bit stored."""
    return (bits_of(target) - bits_of(nearest)) >> _dropped_bits(like)


def _in_bits(remainder: jax.Array) -> jax.Array:
    """A remainder in units of the last bit of float32."""
    return remainder.astype(jnp.int32) << _dropped_bits(remainder)


def _dropped_bits(remainder: jax.Array | None) -> int:
    """How many of the 16 bits that bfloat16 drops the remainder does not store."""
    return 16 if remainder is None else 16 - 8 * remainder.dtype.itemsize
