"""The formats of a moment: zeros in a format, ``encode`` into it, ``decode`` from it, and a step of the average."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.typing import DTypeLike

from optax_nadam._leaves import complex_like, compute_dtype, is_complex, zeros_like
from optax_nadam._quantized import Moment, decode_codes, encode_codes, is_worth_codes, zero_codes
from optax_nadam._rounding import RandomBits, round_to
from optax_nadam._tree import names_of

_FORMATS = (jnp.int8, jnp.bfloat16, jnp.float32, jnp.float64)
_NOT_A_FORMAT = (
    "{name} must be None, int8, bfloat16, float32 or float64, got {value!r}. In float16 the squares of"
    " gradients under 2e-4 are zero; use bfloat16: the same size, with the range of float32."
)

_NOT_A_PREFIX = (
    "{name} must be one format, a tree of formats with the structure of the params or the first levels of it, or a"
    " function of a leaf's path; this tree does not fit the params: {difference}."
)
_INJECTED = (
    "{name} is an array, {value!r}. optax.inject_hyperparams takes every callable for a schedule, and"
    ' jnp.bfloat16 is callable: write "bfloat16", or static_args=({name!r},).'
)


def parse_format(name: str, value: DTypeLike | None) -> jnp.dtype | None:
    """The dtype that a moment is stored in, or None for the one it is computed in."""
    if value is None:
        return None
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(_INJECTED.format(name=name, value=value))
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in _FORMATS:
        raise ValueError(_NOT_A_FORMAT.format(name=name, value=value))
    return dtype


class Formats:
    """The format of each leaf: one for all, a tree of formats that is a prefix of the params, or a function of a path.

    Raises:
      ValueError: a format that is not offered.
      TypeError: a format that is an array.
    """

    def __init__(self, name: str, value: Any) -> None:
        """Parses what the user gave as the argument ``name``."""
        self._name, self._is_function = name, callable(value) and not isinstance(value, type)
        if not self._is_function:
            value = jax.tree_util.tree_map_with_path(self._parse, value, is_leaf=_is_none)
        self._value = value

    def _parse(self, path: Any, value: Any) -> jnp.dtype | None:
        return parse_format(self._name + jax.tree_util.keystr(path), value)

    @property
    def any_8_bit(self) -> bool:
        """Whether a leaf may be stored in codes, whatever the params."""
        return self._is_function or any(map(is_8_bit, jax.tree.leaves(self._value)))

    def of(self, params: Any) -> list[jnp.dtype | None]:
        """The format of each leaf, in order."""
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if self._is_function:
            return [self._parse(path, self._value("/".join(names_of(path)))) for path in paths]
        if not paths:  # the params may be a placeholder, with a structure of its own
            return []
        found: list[jnp.dtype | None] = []

        def fill(dtype: jnp.dtype | None, part: Any) -> None:
            found.extend([dtype] * len(jax.tree.leaves(part)))

        try:
            jax.tree.map(fill, self._value, params, is_leaf=_is_none)
        except ValueError:
            raise ValueError(_NOT_A_PREFIX.format(name=self._name, difference=self._difference(paths))) from None
        return found

    def _difference(self, paths: list[Any]) -> str:
        """Which leaves have no format, and which formats no leaf."""
        leaves = [names_of(path) for path in paths]
        formats = [names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(self._value, is_leaf=_is_none)]
        without = [x for x in leaves if not any(x[: len(f)] == f for f in formats)]
        unused = [f for f in formats if not any(x[: len(f)] == f for x in leaves)]
        named = (("no format for", without), ("no leaf for", unused))
        texts = [f"{text} {', '.join('/'.join(x) for x in names[:10])}" for text, names in named if names]
        return "; ".join(texts) or "the containers are not the same"


def _is_none(x: Any) -> bool:
    return x is None


def zero_m(param: Any, dtype: DTypeLike | None) -> Moment:
    """The first moment before the first step, complex where the parameter is; complex moments are never 8-bit."""
    if is_8_bit(dtype) and not is_complex(param):
        return _zero_8_bit(param, jnp.int8)
    parts = compute_dtype(param) if dtype is None or is_8_bit(dtype) else dtype
    return Moment(zeros_like(param, complex_like(parts, param)))


def zero_v(param: Any, dtype: DTypeLike | None) -> Moment:
    """The second moment before the first step, always real."""
    if is_8_bit(dtype):
        return _zero_8_bit(param, jnp.uint8)
    return Moment(zeros_like(param, dtype or compute_dtype(param)))


def is_8_bit(dtype: DTypeLike | None) -> bool:
    """Whether a format is the 8-bit one."""
    return dtype is not None and jnp.dtype(dtype) == jnp.int8


def _zero_8_bit(param: Any, codes_dtype: DTypeLike) -> Moment:
    """Zeros in codes; of a leaf that is not worth them, zeros of the dtype it is computed in."""
    if not is_worth_codes(jnp.shape(param)):
        return Moment(zeros_like(param, compute_dtype(param)))
    return zero_codes(param, codes_dtype)


def average(
    stored: Moment, f: Callable[[jax.Array], jax.Array], grad: jax.Array, weight: jax.Array, bits: RandomBits
) -> tuple[jax.Array, Moment]:
    """The moment after one step, :math:`(1 - w) x + w f(g)`: the number to compute with, and what is stored.

    In bfloat16, the number to compute with is the stored one: otherwise XLA makes two passes on TPU where one is
    enough.

    Args:
      stored: the moment ``x``.
      f: what it is the average of, as a function of the gradient.
      grad: the gradient ``g``, in the dtype to compute in.
      weight: the weight ``w`` of this step, of real dtype.
      bits: for stochastic rounding, where the format is narrow.
    """

    def step(stored: Moment, grad: jax.Array) -> jax.Array:
        new = f(grad)
        return _lerp(decode(stored, new.dtype), new, weight)

    value = step(stored, grad)
    if stored.scales:
        return value, _encoded_once(step, stored, grad, bits)
    encoded = encode(value, stored, bits)
    return (decode(encoded, value.dtype) if stored.array.dtype == jnp.bfloat16 else value), encoded


def _encoded_once(
    step: Callable[[Moment, jax.Array], jax.Array], stored: Moment, grad: jax.Array, bits: RandomBits
) -> Moment:
    """An 8-bit moment after a step, of which XLA:CPU computes nothing again in the kernel of the update.

    There it is one of two branches; the other, of zeros, is never taken.
    """

    def encoded(stored: Moment, grad: jax.Array) -> Moment:
        return encode(step(stored, grad), stored, bits)

    def zeros(stored: Moment, grad: jax.Array) -> Moment:
        return zero_codes(step(stored, grad), stored.array.dtype)

    def behind_a_branch(stored: Moment, grad: jax.Array) -> Moment:
        return lax.switch((bits.seed < 0).astype(jnp.int32), [encoded, zeros], stored, grad)

    return lax.platform_dependent(stored, grad, cpu=behind_a_branch, default=encoded)


def _lerp(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """``(1 - weight) * old + weight * new``, computed from the nearer end.

    With two rounded weights, whose sum is 1e-8 from 1, a moment would in the long run be off by 1e-8 / weight.
    """
    w = weight.astype(old.dtype)
    return jnp.where(weight <= 0.5, old + w * (new - old), new + (1 - w) * (old - new))


# Outside jit each of the two is one program a shape, not one an operation; inside they leave no trace.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def decode(stored: Moment, dtype: DTypeLike) -> jax.Array:
    """The numbers of a moment, whatever its format."""
    return decode_codes(stored, dtype) if stored.scales else stored.array.astype(dtype)


def encode(value: jax.Array, like: Moment, bits: RandomBits) -> Moment:
    """Numbers in the format of another moment, stochastically rounded where that is narrow."""
    return _encode(value, bits.seed, bits.leaf, like.array.dtype, bool(like.scales), bits.high)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _encode(value: jax.Array, seed: jax.Array, leaf: jax.Array, dtype: jnp.dtype, in_codes: bool, high: bool) -> Moment:
    bits = RandomBits(seed, leaf, high)
    return encode_codes(value, dtype, bits) if in_codes else Moment(round_to(value, dtype, bits))
