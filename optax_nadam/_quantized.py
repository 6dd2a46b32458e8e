"""The 8-bit format of a moment: codes on a curve, and a scale for each row and each column."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam._leaves import zeros_like
from optax_nadam._rounding import RandomBits, without_derivative

MIN_SIZE = 1024  # elements; smaller leaves are not quantized
SEGMENT = 128  # elements of a vector that share a scale
_LARGEST_SCALES = 0.5  # bytes of scales a parameter that a moment may have


class Curve(NamedTuple):
    """How codes stand for numbers: the largest code, the one that stands for NaN, a power, and its inverse."""

    max_code: float
    nan_code: int
    power: int
    root: Callable[[jax.Array], jax.Array]


CURVES = {
    jnp.dtype(jnp.int8): Curve(127.0, -128, 2, jnp.sqrt),
    jnp.dtype(jnp.uint8): Curve(254.0, 255, 4, lambda x: jnp.sqrt(jnp.sqrt(x))),
}


class Moment(NamedTuple):
    """A moment of a leaf as it is stored: an array of its shape, and the scales of its codes if it holds codes.

    What codes stand for is at ``QuantizedNadamState``. Moments are in lists only, in no tree.

    Attributes:
      array: the numbers, of any dtype, or codes, int8 or uint8.
      scales: float32; rows and columns, or the segments of a vector; empty where ``array`` holds the numbers.
    """

    array: jax.Array
    scales: tuple[jax.Array, ...] = ()

    @property
    def dtype(self) -> jnp.dtype:
        """A dtype with the range of the moment: that of the numbers, or of the scales."""
        return self.scales[0].dtype if self.scales else self.array.dtype


def is_worth_codes(shape: tuple[int, ...]) -> bool:
    """Whether a leaf of this shape is large enough, and its scales small enough beside it, to be stored in codes."""
    size = math.prod(shape)
    return size >= MIN_SIZE and 4 * sum(math.prod(s) for s in scale_shapes(shape)) <= _LARGEST_SCALES * size


def number_of_scales(array: Any) -> int:
    """How many arrays of scales belong to an array: none where it holds no codes."""
    return len(scale_shapes(array.shape)) if array.dtype in CURVES else 0


def scale_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the scales of a leaf."""
    if len(shape) == 1:
        return [(-(-shape[0] // SEGMENT),)]
    return [shape[:axis] + shape[axis + 1 :] for axis in _axes(shape)]


def _axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The axes along which rows and columns run: the last one, and the longest other one, the later of equal ones."""
    column = max(range(len(shape) - 1), key=lambda axis: (shape[axis], axis))
    return len(shape) - 1, column


def zero_codes(param: Any, codes_dtype: DTypeLike) -> Moment:
    """Codes and scales of zeros, sharded like the parameter."""
    codes = zeros_like(param, codes_dtype)
    return Moment(codes, _largest(codes.astype(jnp.float32)))


def encode_codes(value: jax.Array, codes_dtype: jnp.dtype, bits: RandomBits) -> Moment:
    """Numbers in codes, stochastically rounded, unbiased; those that are not finite in the code of NaN.

    Codes of a second moment are at least 1: with v = 0 the next step would be as long as eps allows.
    """
    curve, value = CURVES[codes_dtype], without_derivative(value)
    magnitude = jnp.abs(value) if curve.nan_code < 0 else value
    is_finite = magnitude < jnp.inf
    scales = _largest(jnp.where(is_finite, magnitude, 0))
    scale = _of_each(scales, value.shape).astype(value.dtype)
    fraction = jnp.where(scale > 0, magnitude / scale, 0)
    below = jnp.floor(curve.max_code * curve.root(fraction))
    low, high = below**curve.power, (below + 1) ** curve.power
    threshold = (bits.draw(value.shape).astype(value.dtype) + 0.5) / 2**16
    code = below + (fraction * curve.max_code**curve.power - low > threshold * (high - low)).astype(value.dtype)
    signed = jnp.copysign(code, value) if curve.nan_code < 0 else jnp.maximum(code, 1)
    return Moment(jnp.where(is_finite, signed, curve.nan_code).astype(codes_dtype), scales)


def decode_codes(moment: Moment, dtype: DTypeLike) -> jax.Array:
    """The numbers that codes stand for."""
    codes, curve = moment.array, CURVES[moment.array.dtype]
    root = codes.astype(dtype) * (1 / curve.max_code)
    fraction = root * jnp.abs(root) if curve.power == 2 else root**curve.power
    scale = _of_each(moment.scales, codes.shape).astype(dtype)
    return jnp.where(codes == curve.nan_code, jnp.nan, fraction * scale)


def _largest(magnitude: jax.Array) -> tuple[jax.Array, ...]:
    """The largest of each row and of each column, or of each segment of a vector."""
    if magnitude.ndim == 1:
        padded = jnp.pad(magnitude, (0, -magnitude.size % SEGMENT))
        return (padded.reshape(-1, SEGMENT).max(1).astype(jnp.float32),)
    row, column = _axes(magnitude.shape)
    columns = lax.platform_dependent(
        magnitude,
        cuda=lambda x: _largest_of_windows(x, column).max(column),
        default=lambda x: x.max(column),
    )
    return magnitude.max(row).astype(jnp.float32), columns.astype(jnp.float32)


def _largest_of_windows(x: jax.Array, axis: int) -> jax.Array:
    """The largest of every few along an axis: without this stage XLA writes ``x`` itself to the memory of a GPU.

    At most 32, and so few that the result has enough elements to keep all of a GPU busy.
    """
    window = [max(1, min(32, x.size >> 15)) if i == axis else 1 for i in range(x.ndim)]
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.max, window, window, "SAME")


def _of_each(scales: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """The scale of each element, as an array that broadcasts against the leaf."""
    if len(shape) == 1:
        return jnp.broadcast_to(scales[0][:, None], (scales[0].size, SEGMENT)).reshape(-1)[: shape[0]]
    rows, columns = (jnp.expand_dims(s, axis) for s, axis in zip(scales, _axes(shape), strict=True))
    return jnp.minimum(rows, columns)
