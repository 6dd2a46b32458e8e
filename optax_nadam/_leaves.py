"""Properties of one array: its dtype, the dtype to compute in, zeros sharded like it."""

from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike


def dtype_of(leaf: Any) -> jnp.dtype:
    """The dtype that JAX gives an array, an abstract array or a Python number: no 64 bits unless x64 is enabled."""
    dtype: Any = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    canonical: Any = jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    return canonical


def is_complex(leaf: Any) -> bool:
    """Whether a leaf has imaginary parts."""
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.complexfloating))


def compute_dtype(*leaves: Any) -> jnp.dtype:
    """The real dtype that an update is computed in: float64 where a leaf has 64-bit parts, else float32."""
    wide = any(jnp.finfo(dtype_of(leaf)).bits == 64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def complex_like(dtype: DTypeLike, leaf: Any) -> jnp.dtype:
    """A real dtype, or where the leaf is complex the complex dtype with such parts."""
    if not is_complex(leaf):
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.complex128 if jnp.dtype(dtype) == jnp.float64 else jnp.complex64)


def abs_squared(x: jax.Array) -> jax.Array:
    """The square of the magnitude of each element, real."""
    return jnp.real(x * jnp.conj(x))


def zeros_like(param: Any, dtype: DTypeLike) -> jax.Array:
    """Zeros sharded like the parameter.

    Under jit a constant has no sharding and would be put on one device, and leaves that share it would share one
    sharding. So there the zeros are computed from the parameter: no number is less than itself.
    """
    if not isinstance(param, jax.core.Tracer):
        return jnp.zeros_like(param, dtype=dtype)
    real = jnp.real(param)
    return (real < real).astype(dtype)


def in_device_memory(x: Any) -> Any:
    """The array in the memory that its devices compute in, to which what lies in host memory must be moved first."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or x.sharding.memory_kind is None:
        return x
    device: Any = next(iter(x.sharding.device_set))
    return _in_memory(device.default_memory().kind, x)


def in_memory_of(like: Any, x: jax.Array) -> jax.Array:
    """The array, computed from ``like``, in the kind of memory that ``like`` is in."""
    if isinstance(x, jax.core.Tracer) or not isinstance(like, jax.Array) or like.sharding.memory_kind is None:
        return x
    return _in_memory(like.sharding.memory_kind, x)


def _in_memory(kind: str, x: jax.Array) -> jax.Array:
    """The array in a kind of memory of its own devices; one that is there already stays as free to move as it was."""
    return x if x.sharding.memory_kind == kind else jax.device_put(x, x.sharding.with_memory_kind(kind))


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array with the sharding and the memory kind of ``like``, where that is committed to its devices."""
    if isinstance(like, jax.core.Tracer) or not getattr(like, "committed", False):
        return x
    return jax.device_put(x, like.sharding)
