"""Moments of a byte an element: codes on a curve, and a scale for each row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam._rounding import Chance


class Law(NamedTuple):
    """How codes stand for numbers: the largest code, the power and the root that undoes it, whether there is a sign."""

    top: float
    power: int
    root: Callable[[jax.Array], jax.Array]
    signed: bool


_LAWS = {
    jnp.dtype(jnp.int8): Law(127.0, 2, jnp.sqrt, signed=True),
    jnp.dtype(jnp.uint8): Law(255.0, 4, lambda x: jnp.sqrt(jnp.sqrt(x)), signed=False),
}


class Quantized(NamedTuple):
    r"""A moment of one byte an element: :math:`x_i = \operatorname{sign}(k_i)\, (|k_i| / K)^p\, s_{row(i)}`.

    The codes :math:`k` of a first moment are signed, with :math:`K = 127, p = 2`; those of a second moment are not,
    with :math:`K = 255, p = 4`. So both ``m`` and the root of ``v`` keep small values beside large ones. A row is as
    many of the last axes as it takes to hold 64 elements, most often the last one. The field names are the format
    on disk and do not change.

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

    def decoded(self, dtype: DTypeLike) -> jax.Array:
        """The numbers that the codes stand for."""
        law = _LAWS[self.codes.dtype]
        root = self.codes.astype(dtype) / law.top
        return root * jnp.abs(root) ** (law.power - 1) * _on_rows(self.scale.astype(dtype), self.shape)


SMALLEST = 1024  # elements of a leaf for which it pays
_ROW = 64  # elements of a row, at least


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree of moments stands for a leaf."""
    return isinstance(node, Quantized)


def encoded(value: jax.Array, like: Quantized, chance: Chance) -> Quantized:
    """Codes of one or the other neighbour, by chance, right in the mean.

    A second moment is never rounded to zero: under the root, that would let the next step be as long as eps allows.
    """
    law = _LAWS[like.codes.dtype]
    scale = _next_bfloat16(jnp.abs(value).max(_row_axes(value.shape)))
    whole = _on_rows(scale.astype(value.dtype), value.shape)
    share = jnp.where(whole > 0, jnp.abs(value) / whole, 0)
    below = jnp.floor(law.top * law.root(share))
    low, high = below**law.power, (below + 1) ** law.power
    threshold = (chance.bits(value.shape).astype(value.dtype) + 0.5) / 2**16
    code = below + (share * law.top**law.power - low > threshold * (high - low)).astype(value.dtype)
    signed = jnp.copysign(code, value) if law.signed else jnp.maximum(code, 1)
    return Quantized(signed.astype(like.codes.dtype), scale)


def zero_scale(codes: jax.Array) -> jax.Array:
    """The scales of zeros, laid out like the codes."""
    return codes.max(_row_axes(codes.shape)).astype(jnp.bfloat16)


def _next_bfloat16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is not less, of numbers that are not negative."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + jnp.uint32(0xFFFF)
    return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _on_rows(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A scale of every row as an array that broadcasts against the leaf."""
    return jnp.expand_dims(scale, _row_axes(shape))


def _row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a scale is for: as many of the last as hold 64 elements."""
    first = next(k for k in reversed(range(len(shape))) if math.prod(shape[k:]) >= _ROW)
    return tuple(range(first, len(shape)))
