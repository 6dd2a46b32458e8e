"""Rounding by chance: right in the mean, with nothing kept from step to step, and the same on any devices."""

import math
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.typing import DTypeLike


class Chance(NamedTuple):
    r"""Which way to round, for each element: a function of its position and the step alone.

    .. math::

      h(i \oplus h(t))

    with the row-major index :math:`i` in the whole leaf, however that is sharded, and the step :math:`t`. :math:`h` is
    a bijection of 32-bit numbers in which every bit depends on every other (Wellons, `Prospecting for Hash Functions
    <https://nullprogram.com/blog/2018/07/31/>`_, 2018), so no two elements of a leaf have the same bits. They make
    two draws of 16.

    Attributes:
      step: counted from 1, shape ``()``.
      draw: 0 or 1.
    """

    step: jax.Array
    draw: int

    def bits(self, shape: tuple[int, ...]) -> jax.Array:
        """16 random bits for each element, uint32."""
        index = jnp.zeros(shape, jnp.uint32)
        for axis in range(len(shape)):
            stride = math.prod(shape[axis + 1 :]) % 2**32
            index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        hashed = _hashed(index ^ _hashed(self.step.astype(jnp.uint32)))
        return (hashed >> 16) if self.draw else (hashed & 0xFFFF)


def _hashed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def rounded(value: jax.Array, dtype: DTypeLike, chance: Chance) -> jax.Array:
    """Numbers in another dtype; in bfloat16 one or the other neighbour, by chance, right in the mean.

    Rounded to the nearest, a moment would stand still where a step changes it by less than half a unit in the last
    place: at b2 = .999 ``v`` would never fall.
    """
    if dtype != jnp.bfloat16:
        return value.astype(dtype)
    # A float32 is a bfloat16 and 16 bits more: adding as many random ones carries in proportion to what they hold.
    bits = lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32) + chance.bits(value.shape)
    return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype)
