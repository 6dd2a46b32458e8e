"""How a moment is kept between steps: its dtype and its first value."""

from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike


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


def zero_m(param: Any, dtype: DTypeLike | None) -> jax.Array:
    """The first moment before the first step, complex where the parameter is."""
    return _zeros_like(param, with_parts(dtype or real_dtype(param), param))


def zero_v(param: Any, dtype: DTypeLike | None) -> jax.Array:
    """The second moment before the first step, always real."""
    return _zeros_like(param, dtype or real_dtype(param))


def _zeros_like(param: Any, dtype: DTypeLike) -> jax.Array:
    """Zeros sharded like the parameter.

    Under jit a constant has no sharding and would land on one device, and leaves that share it would share one
    layout. So there it is reckoned from the parameter: no number is less than itself.
    """
    if not isinstance(param, jax.core.Tracer):
        return jnp.zeros_like(param, dtype=dtype)
    real = jnp.real(param)
    return (real < real).astype(dtype)
