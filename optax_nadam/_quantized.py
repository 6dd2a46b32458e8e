"""The 8-bit format of a moment: codes on a curve, and a scale for each row."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import export
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam._leaves import zeros_like
from optax_nadam._rounding import RandomBits, bits_of, number_of

MIN_SIZE = 1024  # elements; smaller leaves are not quantized
_ROW_SIZE = 64  # elements that a row has at least


class Curve(NamedTuple):
    """How codes stand for numbers: the largest code, a power, its inverse, and whether codes are signed."""

    max_code: float
    power: int
    root: Callable[[jax.Array], jax.Array]
    signed: bool


_CURVES = {
    jnp.dtype(jnp.int8): Curve(127.0, 2, jnp.sqrt, signed=True),
    jnp.dtype(jnp.uint8): Curve(255.0, 4, lambda x: jnp.sqrt(jnp.sqrt(x)), signed=False),
}


@functools.partial(export.register_namedtuple_serialization, serialized_name="optax_nadam.Quantized")
class Quantized(NamedTuple):
    r"""A moment of one byte an element: :math:`x_i = \operatorname{sign}(k_i)\, (|k_i| / K)^p\, s_{row(i)}`.

    The codes :math:`k` of a first moment are signed, with :math:`K = 127, p = 2`; those of a second moment are not,
    with :math:`K = 255, p = 4`. So both ``m`` and the root of ``v`` resolve small values beside large ones. A row
    spans the last axes, as few as hold 64 elements: most often only the last one. The field names are the format on
    disk and do not change.

    Attributes:
      codes: int8 or uint8, of the shape of the leaf.
      scale: bfloat16, the shape of the leaf without the axes of a row: the largest magnitude in the row, rounded up.
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the moment."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the scale, whose range is that of the moment."""
        return self.scale.dtype

    def decode(self, dtype: DTypeLike) -> jax.Array:
        """The numbers that the codes stand for."""
        curve = _CURVES[self.codes.dtype]
        root = self.codes.astype(dtype) / curve.max_code
        return root * jnp.abs(root) ** (curve.power - 1) * _over_rows(self.scale.astype(dtype), self.shape)


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree of moments stands for a leaf: a :class:`Quantized`, or what Flax nnx makes of one.

    nnx makes mappings of the NamedTuples in its variables. A mapping of codes and scale is recognised by the dtype of
    the codes, since a layer may have params of these names.
    """
    return isinstance(node, Quantized) or (
        isinstance(node, Mapping)
        and set(node) == set(Quantized._fields)
        and getattr(node["codes"], "dtype", None) in _CURVES
    )


def as_quantized(moments: Any) -> Any:
    """The moments with a :class:`Quantized` where Flax nnx has made a mapping of it."""
    return jax.tree.map(lambda x: Quantized(**x) if isinstance(x, Mapping) else x, moments, is_leaf=is_quantized)


def zero_quantized(param: Any, codes_dtype: DTypeLike) -> Quantized:
    """Codes and scales of zeros, sharded like the parameter."""
    codes = zeros_like(param, codes_dtype)
    return Quantized(codes, codes.max(_row_axes(codes.shape)).astype(jnp.bfloat16))


def quantize(value: jax.Array, like: Quantized, bits: RandomBits) -> Quantized:
    """Numbers in codes of the dtype of ``like``, stochastically rounded, unbiased.

    Codes of a second moment are at least 1: with v = 0 the next step would be as long as eps allows.
    """
    curve = _CURVES[like.codes.dtype]
    scale = _next_bfloat16(largest_of_rows(value))
    row_max = _over_rows(scale.astype(value.dtype), value.shape)
    fraction = jnp.where(row_max > 0, jnp.abs(value) / row_max, 0)
    below = jnp.floor(curve.max_code * curve.root(fraction))
    low, high = below**curve.power, (below + 1) ** curve.power
    threshold = (bits.draw(value.shape).astype(value.dtype) + 0.5) / 2**16
    code = below + (fraction * curve.max_code**curve.power - low > threshold * (high - low)).astype(value.dtype)
    signed = jnp.copysign(code, value) if curve.signed else jnp.maximum(code, 1)
    return Quantized(signed.astype(like.codes.dtype), scale)


def largest_of_rows(value: jax.Array) -> jax.Array:
    """The largest magnitude of each row."""
    return jnp.abs(value).max(_row_axes(value.shape))


def _next_bfloat16(x: jax.Array) -> jax.Array:
    """Numbers that are not negative, rounded up to bfloat16."""
    return number_of((bits_of(x.astype(jnp.float32)) + 0xFFFF) & ~0xFFFF).astype(jnp.bfloat16)


def _over_rows(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scales of the rows as an array that broadcasts against the leaf."""
    return jnp.expand_dims(scale, _row_axes(shape))


def _row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a row, which share a scale: the last ones, as few as hold 64 elements."""
    first = next(k for k in reversed(range(len(shape))) if math.prod(shape[k:]) >= _ROW_SIZE)
    return tuple(range(first, len(shape)))
