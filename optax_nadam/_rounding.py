"""Stochastic rounding: unbiased, without state of its own, and the same on any number of devices."""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike


class RandomBits(NamedTuple):
    r"""16 random bits for each element of a leaf: a function of its position, the leaf's number and a seed only.

    .. math::

      h(i \oplus h(s + h(l)))

    with the row-major index :math:`i` in the whole leaf, however that is sharded, the number :math:`l` of the leaf in
    its tree, and the seed :math:`s`. :math:`h` is a bijection of 32-bit numbers in which every bit depends on every
    other (Wellons, `Prospecting for Hash Functions <https://nullprogram.com/blog/2018/07/31/>`_, 2018), so no two
    elements of a leaf have the same 32 bits. They make two draws of 16.

    Step :math:`t` rounds ``m`` with the low half and ``v`` with the high half of the bits of seed :math:`t`, and
    weights with the low half of those of seed :math:`-t`.

    Attributes:
      seed: an integer, shape ``()``.
      leaf: an integer, shape ``()``.
      high: whether these are the high half.
    """

    seed: jax.Array
    leaf: jax.Array
    high: bool

    @classmethod
    def for_m(cls, step: ArrayLike, leaf: ArrayLike) -> "RandomBits":
        """The bits that round the first moment."""
        return cls(jnp.asarray(step), jnp.asarray(leaf), high=False)

    @classmethod
    def for_v(cls, step: ArrayLike, leaf: ArrayLike) -> "RandomBits":
        """The bits that round the second moment."""
        return cls(jnp.asarray(step), jnp.asarray(leaf), high=True)

    @classmethod
    def for_weights(cls, step: ArrayLike, leaf: ArrayLike) -> "RandomBits":
        """The bits that round the weights."""
        return cls(-jnp.asarray(step), jnp.asarray(leaf), high=False)

    def draw(self, shape: tuple[int, ...]) -> jax.Array:
        """The bits of a leaf of this shape, as uint32 numbers below 2**16."""
        index = jnp.zeros(shape, jnp.uint32)
        for axis in range(len(shape)):
            stride = math.prod(shape[axis + 1 :]) % 2**32
            index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        seed = self.seed.astype(jnp.uint32) + _hash(self.leaf.astype(jnp.uint32))
        hashed = _hash(index ^ _hash(seed))
        return (hashed >> 16) if self.high else (hashed & 0xFFFF)


def _hash(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.custom_jvp
def without_derivative(x: jax.Array) -> jax.Array:
    """What is to be rounded: the same numbers, but an error where a derivative is taken through them."""
    return x


@without_derivative.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "Stochastic rounding has no derivative: that of 8-bit and bfloat16 moments and of compensated weights is lost"
        " in it. To differentiate through update, store moments in float32 (m_dtype=None, v_dtype=None) and train"
        " float32 weights; to keep them out of the derivative, apply jax.lax.stop_gradient to gradients and state."
    )


def round_to(value: jax.Array, dtype: DTypeLike, bits: RandomBits) -> jax.Array:
    """Numbers in another dtype; in bfloat16 stochastically rounded, unbiased.

    Rounded to the nearest, a moment would not change where a step changes it by less than half a unit in the last
    place: at b2 = .999 ``v`` would never decay.
    """
    if dtype != jnp.bfloat16:
        return value.astype(dtype)
    # A float32 is a bfloat16 and 16 more bits: adding 16 random bits carries with a probability proportional to them.
    sum_of_bits = bits_of(without_derivative(value).astype(jnp.float32)) + bits.draw(value.shape).astype(jnp.int32)
    return number_of(sum_of_bits & ~0xFFFF).astype(dtype)


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32 numbers as int32, to be added to; of every NaN those of the same one.

    The NaN of an NVIDIA GPU is 0x7fffffff, from which a sum carries into the sign: it would be zero.
    """
    return jnp.where(jnp.isnan(x), 0x7FC00000, lax.bitcast_convert_type(x, jnp.int32))


def number_of(bits: jax.Array) -> jax.Array:
    """The float32 numbers of int32 bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)
