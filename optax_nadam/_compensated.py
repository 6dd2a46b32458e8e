"""bfloat16 weights trained at higher precision: what rounding drops is stored beside them."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax import export, lax
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import dtype_of, zeros_like
from optax_nadam._rounding import RandomBits
from optax_nadam._state import the_node

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


@functools.partial(export.register_namedtuple_serialization, serialized_name="optax_nadam.CompensatedState")
class CompensatedState(NamedTuple):
    """State of :func:`compensated`. The field names are the format on disk and do not change.

    Attributes:
      count: updates so far, int32, shape ``()``.
      remainder: a tree like the params: for each bfloat16 leaf an int8 or int16 array of its shape, the difference
        between the trained weights and the params, in units of the last bit stored; ``optax.MaskedNode`` for other
        leaves.
      inner_state: the state of the inner optimizer, which sees float32 weights.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in every Optax state
    remainder: Any
    inner_state: Any


def compensated(
    inner: optax.GradientTransformation, *, remainder_dtype: DTypeLike = jnp.int8
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
    24 bits together, the last of them stochastically rounded, unbiased, so that smaller updates count too.

    The update returned is float32, and ``optax.apply_updates`` makes the right bfloat16 weights of it. It must be
    applied unchanged: wrap a whole optimizer, learning rate included; clipping, masks and ``optax.MultiSteps`` may be
    inside or outside (outside and under ``lax.scan`` from Optax 0.2.8 on, whose accumulator keeps its dtype).
    Leaves that are not bfloat16 are updated by the inner optimizer alone. Where one step moves a weight across zero, to
    under a hundredth of its magnitude, the addition in float32 may miss the bfloat16 number by :math:`2^{-24}` of the
    old weight; the next step continues from there.

    Args:
      inner: any Optax optimizer.
      remainder_dtype: int8, one byte a weight, or int16, two.

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
      >>> tx = optax_nadam.compensated(optax.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(1000):
      ...     updates, state = tx.update(jnp.full(2, 0.5, jnp.bfloat16), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params, [round(w, 3) for w in optax_nadam.master_params(state, params).tolist()]
      (Array([0.5, 0.5], dtype=bfloat16), [0.5, 0.5])

    References:
      Zamirai et al., `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020, on what rounding loses.
    """
    dtype = _parse_remainder_dtype("remainder_dtype", remainder_dtype)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> CompensatedState:
        _check_not_float16("params", params)
        remainder = jax.tree.map(lambda p: zeros_like(p, dtype) if _is_bfloat16(p) else optax.MaskedNode(), params)
        return CompensatedState(jnp.zeros((), jnp.int32), remainder, inner.init(_wide(params)))

    def update(
        updates: optax.Updates, state: CompensatedState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, CompensatedState]:
        validation.check_state("compensated", state, CompensatedState)
        validation.check_arrays("compensated", (state.count, state.remainder))
        _check_params(params, state.remainder)
        validation.check_structure("gradients", updates, params)
        validation.check_shapes("gradients", updates, params)
        with jax.named_scope("compensated"):
            count = optax.safe_increment(state.count)
            masters = jax.tree.map(_master, params, state.remainder)
        steps, inner_state = inner.update(_wide(updates), state.inner_state, masters, **extra_args)
        with jax.named_scope("compensated"):
            target = functools.partial(_target, random=RandomBits.for_weights(count))
            targets = jax.tree.map(target, params, masters, steps, state.remainder)
            remainder = jax.tree.map(_remainder, params, targets, state.remainder)
            applied = jax.tree.map(_to_apply, params, targets, remainder, steps)
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
    return jax.tree.map(_master, params, remainder)


def _parse_remainder_dtype(name: str, value: DTypeLike) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in (jnp.int8, jnp.int16):
        raise ValueError(f"{name} must be int8 or int16, got {value!r}.")
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
    structure: Any = jax.tree.structure(params)
    try:
        remainders = structure.flatten_up_to(remainder)
    except (ValueError, TypeError) as error:
        raise validation.wrong_structure("params", error) from None
    for index, (p, r) in enumerate(zip(jax.tree.leaves(params), remainders, strict=True)):
        expected = (jnp.bfloat16, r.shape) if hasattr(r, "shape") else None
        got = (p.dtype, p.shape) if p.dtype == jnp.bfloat16 else None
        if got != expected:
            wanted = f"bfloat16 of shape {r.shape}" if expected else "not bfloat16"
            leaf = validation.place("params", params, index)
            text = _MISFIT.format(leaf=leaf, got=f"{p.dtype} of shape {p.shape}", expected=wanted)
            raise ValueError(text + (_WIDENED if expected and p.shape == r.shape else ""))


def _is_bfloat16(leaf: Any) -> bool:
    return dtype_of(leaf) == jnp.bfloat16


def _wide(tree: Any) -> Any:
    """The tree with float32 in place of bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_bfloat16(x) else x, tree)


def _master(p: jax.Array, remainder: Any) -> jax.Array:
    """The weight with what bfloat16 dropped; for another leaf the weight itself."""
    if not _is_bfloat16(p):
        return p
    return _number(_bits(p.astype(jnp.float32)) + _as_bits(remainder))


def _target(p: jax.Array, master: jax.Array, step: jax.Array, remainder: Any, random: RandomBits) -> jax.Array:
    """The weight after the step, stochastically rounded to the bits that are stored."""
    if not _is_bfloat16(p):
        return p
    fraction = (1 << _dropped_bits(remainder)) - 1
    bits = _bits(master + step.astype(master.dtype)) + (random.draw(master.shape).astype(jnp.int32) & fraction)
    return _number(bits & ~fraction)


def _remainder(p: jax.Array, target: jax.Array, remainder: Any) -> Any:
    """The target less its nearest bfloat16; zero where the addition in float32 does not reach that bfloat16.

    It is zero there anyway, but with the comparison XLA makes one pass of the step for TPU, without it sometimes three.
    """
    if not _is_bfloat16(p):
        return remainder
    nearest, now = _nearest(target), p.astype(jnp.float32)
    # A cast to bfloat16 and back would be deleted under jit.
    reached = lax.reduce_precision(now + (nearest - now), exponent_bits=8, mantissa_bits=7)
    lacking = (_bits(target) - _bits(nearest)) >> _dropped_bits(remainder)
    return jnp.where(reached == nearest, lacking, 0).astype(remainder.dtype)


def _to_apply(p: jax.Array, target: jax.Array, remainder: Any, step: jax.Array) -> jax.Array:
    """The update from the bfloat16 weight to its new value; for another leaf the step itself.

    Computed from the stored remainder: otherwise XLA makes several passes for TPU where one is enough.
    """
    if not _is_bfloat16(p):
        return step
    return _number(_bits(target) - _as_bits(remainder)) - p.astype(jnp.float32)


def _nearest(x: jax.Array) -> jax.Array:
    """The nearest bfloat16, ties away from zero, so that what is left over fits 16 bits; infinities stay."""
    return _number((_bits(x) + 0x8000) & ~0xFFFF)


def _as_bits(remainder: jax.Array) -> jax.Array:
    """A remainder in units of the last bit of float32."""
    return remainder.astype(jnp.int32) << _dropped_bits(remainder)


def _dropped_bits(remainder: jax.Array) -> int:
    """How many of the 16 bits that bfloat16 drops the remainder does not store."""
    return 16 - 8 * remainder.dtype.itemsize


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _number(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
