"""How a moment is kept between steps: its format, its first value, its next one.

A moment is an array of its own dtype, or :class:`Quantized`: a byte for each element and a scale for each row.
"""

from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam._quantized import SMALLEST, Quantized, encoded, zero_scale
from optax_nadam._rounding import Chance, rounded


def dtype_of(leaf: Any) -> jnp.dtype:
    """The dtype of an array, an abstract array or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_complex(leaf: Any) -> bool:
    """Whether a leaf has imaginary parts."""
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.complexfloating))


def real_dtype(*leaves: Any) -> jnp.dtype:
    """The dtype an update is computed in: float64 where a leaf has 64-bit parts, else float32."""
    wide = any(jnp.finfo(dtype_of(leaf)).bits == 64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def with_parts(real: DTypeLike, leaf: Any) -> jnp.dtype:
    """The dtype whose parts are ``real`` and that is complex where the leaf is."""
    if not is_complex(leaf):
        return jnp.dtype(real)
    return jnp.dtype(jnp.complex128 if jnp.dtype(real) == jnp.float64 else jnp.complex64)


Moment = jax.Array | Quantized


def zero_m(param: Any, dtype: DTypeLike | None) -> Moment:
    """The first moment before the first step, complex where the parameter is."""
    if _is_byte(dtype) and not is_complex(param):
        return _codes(param, jnp.int8)
    parts = real_dtype(param) if dtype is None or _is_byte(dtype) else dtype
    return zeros_like(param, with_parts(parts, param))


def zero_v(param: Any, dtype: DTypeLike | None) -> Moment:
    """The second moment before the first step, always real."""
    return _codes(param, jnp.uint8) if _is_byte(dtype) else zeros_like(param, dtype or real_dtype(param))


def _is_byte(dtype: DTypeLike | None) -> bool:
    return dtype is not None and jnp.dtype(dtype) == jnp.int8


def _codes(param: Any, dtype: DTypeLike) -> Moment:
    """Codes and scales laid out like the parameter; leaves too small for it to pay stay whole."""
    if jnp.size(param) < SMALLEST:
        return zeros_like(param, real_dtype(param))
    codes = zeros_like(param, dtype)
    return Quantized(codes, zero_scale(codes))


def zeros_like(param: Any, dtype: DTypeLike) -> jax.Array:
    """Zeros sharded like the parameter.

    Under jit a constant has no sharding and would land on one device, and leaves that share it would share one
    layout. So there it is reckoned from the parameter: no number is less than itself.
    """
    if not isinstance(param, jax.core.Tracer):
        return jnp.zeros_like(param, dtype=dtype)
    real = jnp.real(param)
    return (real < real).astype(dtype)


def averaged(kept: Moment, new: jax.Array, weight: jax.Array, chance: Chance) -> tuple[jax.Array, Moment]:
    """The moment after one step, :math:`(1 - w) x + w y`, to reckon with and as it is to be kept.

    What is narrow is reckoned with as it is kept: else XLA would make two passes for TPU where it makes one.

    Args:
      kept: the moment ``x``.
      new: what is averaged, ``y``, in the dtype to compute in.
      weight: its weight ``w``, of real dtype.
      chance: rounds what is narrow.
    """
    value = _lerp(decoded(kept, new.dtype), new, weight)
    stored = kept_like(value, kept, chance)
    return (decoded(stored, new.dtype) if _is_narrow(kept) else value), stored


def _lerp(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """``(1 - weight) * old + weight * new``, reckoned from the nearer end.

    Written with two rounded weights, their sum is off one by 1e-8, and in the long run a moment by 1e-8 / weight.
    """
    w = weight.astype(old.dtype)
    return jnp.where(weight <= 0.5, old + w * (new - old), new + (1 - w) * (old - new))


def decoded(kept: Moment, dtype: DTypeLike) -> jax.Array:
    """The numbers of a moment, whatever it is kept in."""
    return kept.decoded(dtype) if isinstance(kept, Quantized) else kept.astype(dtype)


def kept_like(value: jax.Array, like: Moment, chance: Chance) -> Moment:
    """Numbers in the format of another moment, by chance up or down where that is narrow."""
    return encoded(value, like, chance) if isinstance(like, Quantized) else rounded(value, like.dtype, chance)


def _is_narrow(kept: Moment) -> bool:
    return kept.dtype == jnp.bfloat16
