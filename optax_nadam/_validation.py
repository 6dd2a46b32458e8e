"""Every check and every error text.

A check on hyperparameters runs when an optimizer is built; a check on trees while ``init`` or ``update`` is
traced: before any number changes, and at no cost in the compiled step. Traced values cannot be checked.
"""

import math
import numbers
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from optax_nadam._moments import dtype_of, is_complex
from optax_nadam._quantized import is_quantized
from optax_nadam._rules import RULES, Hyperparameters, Rule, is_number

_NOT_A_NUMBER = (
    "{name} must be a number or a scalar array, got {value!r}. To schedule it, wrap the optimizer in"
    " optax.inject_hyperparams."
)
_NOT_A_RATE = "learning_rate must be a number, an array or a schedule, got {value!r}."
_MOMENT_DTYPE = (
    "{name} must be None, int8, bfloat16, float32 or float64, got {value!r}. In float16 the squares of"
    " gradients under 2e-4 are zero; bfloat16 is as small and has the range of float32."
)
_FLOAT16 = (
    "{leaf} has dtype float16; compensated keeps what rounding to bfloat16 drops. Cast it to bfloat16 or float32."
)
_REMAINDER = (
    "{leaf} is {got}, but this state of compensated was made for a leaf that is {expected}. Pass the params that go"
    " with the state, or call init again."
)
_NOT_AN_ARRAY = "{leaf} is {value!r}; a leaf must be an array, or None to leave it out."
_NOT_INEXACT = (
    "{leaf} has dtype {dtype}; Nadam updates floating-point and complex leaves only. Leave it out with"
    " optax.masked or optax.partition, or filter it (equinox.filter, flax.nnx.Param)."
)
_STRUCTURE = (
    "{name} differ in structure from the params this optimizer state was made for: {difference}. Pass the"
    " tree that init was called on, or call init again."
)
_SHAPE = (
    "{leaf} has shape {got}, but this optimizer state was made for shape {expected}. Shapes are not"
    " broadcast; if the params changed, call init again."
)
_COMPLEX = (
    "{leaf} has dtype {got}, but this optimizer state was made for a {expected} leaf. Real and complex"
    " leaves do not mix; if the params changed, call init again."
)
_STATE = (
    "{name} got a state that belongs to another optimizer: {got} where it keeps {expected}. Pass the state"
    " that this optimizer's own init made."
)


def check_number(name: str, value: Any) -> None:
    """Rejects what is neither a number nor a scalar array."""
    if is_number(value):
        return
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(_NOT_A_NUMBER.format(name=name, value=value))
    if value.shape:
        raise ValueError(f"{name} must be a number or a scalar array, got an array of shape {value.shape}.")


def check_decay(name: str, value: Any) -> None:
    """Rejects a Python number outside [0, 1)."""
    check_number(name, value)
    if is_number(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
    """Rejects a Python number that is negative, infinite or NaN."""
    check_number(name, value)
    if is_number(value) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}.")


def check_hyperparameters(h: Hyperparameters) -> None:
    """Rejects hyperparameters out of range."""
    check_decay("b1", h.b1)
    check_decay("b2", h.b2)
    check_not_negative("eps", h.eps)
    check_not_negative("eps_root", h.eps_root)
    check_not_negative("momentum_decay", h.momentum_decay)


def check_learning_rate(value: Any) -> None:
    """Rejects what is not a finite number, an array or a schedule. A negative rate ascends, as in Optax."""
    if callable(value):
        return
    if not (is_number(value) or isinstance(value, jax.Array | np.ndarray)):
        raise TypeError(_NOT_A_RATE.format(value=value))
    check_finite("learning_rate", value)


def check_finite(name: str, value: Any) -> None:
    """Rejects a Python number that is infinite or NaN."""
    if is_number(value) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Rejects a Python number that is not positive and finite."""
    check_number(name, value)
    if is_number(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value!r}.")


def check_plain(name: str, value: Any, kind: type) -> None:
    """Rejects a field of a config that is not plain data of its kind."""
    accepted = {float: numbers.Real, int: numbers.Integral}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        described = {float: "a number", int: "a whole number", bool: "True or False", str: "a string"}[kind]
        raise TypeError(f"{name} must be {described}, got {value!r}.")


def check_names(what: str, got: Collection[str], expected: Collection[str]) -> None:
    """Rejects a mapping that lacks a name or has one too many."""
    missing, unknown = _only_in(expected, got), _only_in(got, expected)
    if missing or unknown:
        raise ValueError(f"{what} fields do not fit: {_both('missing', missing, 'unknown', unknown)}.")


def accept(name: str, value: Any) -> None:
    """Takes every value."""


def check_rule(name: str, value: Any) -> None:
    """Rejects what is neither a rule nor the name of one."""
    if not isinstance(value, Rule) and not (isinstance(value, str) and value in RULES):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, RULES))}, got {value!r}.")


def check_moment_dtype(name: str, value: Any) -> None:
    """Rejects a dtype that a moment cannot be kept in."""
    try:
        offered = value is None or jnp.dtype(value) in (jnp.int8, jnp.bfloat16, jnp.float32, jnp.float64)
    except TypeError:
        offered = False
    if not offered:
        raise ValueError(_MOMENT_DTYPE.format(name=name, value=value))


def check_remainder_dtype(name: str, value: Any) -> None:
    """Rejects a dtype that a remainder cannot be kept in."""
    try:
        offered = jnp.dtype(value) in (jnp.int8, jnp.int16)
    except TypeError:
        offered = False
    if not offered:
        raise ValueError(f"{name} must be int8 or int16, got {value!r}.")


def check_not_float16(name: str, tree: Any) -> None:
    """Rejects leaves of float16."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if dtype_of(leaf) == jnp.float16:
            raise TypeError(_FLOAT16.format(leaf=_place(name, tree, index)))


def check_leaves(name: str, tree: Any) -> None:
    """Rejects leaves that are not arrays of a floating-point or complex dtype."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        try:
            dtype = dtype_of(leaf)
        except TypeError:
            raise TypeError(_NOT_AN_ARRAY.format(leaf=_place(name, tree, index), value=leaf)) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(_NOT_INEXACT.format(leaf=_place(name, tree, index), dtype=dtype))


def check_state(name: str, state: Any, expected: type) -> None:
    """Rejects the state of another optimizer."""
    if not isinstance(state, expected):
        raise ValueError(_STATE.format(name=name, got=type(state).__name__, expected=expected.__name__))


def check_chain_state(name: str, state: Any, first: type, length: int) -> None:
    """Rejects the state of another chain than one of this length with ``first`` in front."""
    got = tuple(type(link).__name__ for link in state) if isinstance(state, tuple) else type(state).__name__
    if not isinstance(state, tuple) or len(state) != length or not isinstance(state[0], first):
        expected = f"{length} states, {first.__name__} in front"
        raise ValueError(_STATE.format(name=name, got=got, expected=expected))


def check_like_state(name: str, tree: Any, moments: Any) -> None:
    """Rejects a tree that does not fit the moments, leaf by leaf."""
    _check_structure(name, tree, moments)
    check_leaves(name, tree)
    _check_shapes(name, tree, moments)
    for index, (leaf, m) in enumerate(_pairs(tree, moments)):
        if is_complex(leaf) != is_complex(m):
            place, kind = _place(name, tree, index), "complex" if is_complex(m) else "real"
            raise TypeError(_COMPLEX.format(leaf=place, got=dtype_of(leaf), expected=kind))


def check_same_shapes(name: str, tree: Any, params: Any) -> None:
    """Rejects a tree of another structure than the params, or of other shapes."""
    _check_structure(name, tree, params)
    _check_shapes(name, tree, params)


def check_remainder(params: Any, remainder: Any) -> None:
    """Rejects params that are missing or are not those whose remainder it is."""
    if params is None:
        raise ValueError("compensated needs params: call update(grads, state, params).")
    structure: Any = jax.tree.structure(params)
    try:
        kept = structure.flatten_up_to(remainder)
    except (ValueError, TypeError) as error:
        raise ValueError(_STRUCTURE.format(name="params", difference=error)) from None
    for index, (p, r) in enumerate(zip(jax.tree.leaves(params), kept, strict=True)):
        expected = (jnp.bfloat16, r.shape) if hasattr(r, "shape") else None
        got = (p.dtype, p.shape) if p.dtype == jnp.bfloat16 else None
        if got != expected:
            wanted = f"bfloat16 of shape {r.shape}" if expected else "not bfloat16"
            place = _place("params", params, index)
            raise ValueError(_REMAINDER.format(leaf=place, got=f"{p.dtype} of shape {p.shape}", expected=wanted))


def _check_structure(name: str, tree: Any, like: Any) -> None:
    got: Any = jax.tree.structure(tree)
    if got != jax.tree.structure(like, is_quantized):
        raise ValueError(_STRUCTURE.format(name=name, difference=_difference(tree, like)))


def _check_shapes(name: str, tree: Any, like: Any) -> None:
    for index, (leaf, other) in enumerate(_pairs(tree, like)):
        if jnp.shape(leaf) != other.shape:
            place = _place(name, tree, index)
            raise ValueError(_SHAPE.format(leaf=place, got=jnp.shape(leaf), expected=other.shape))


def _pairs(tree: Any, like: Any) -> Iterator[tuple[Any, Any]]:
    return zip(jax.tree.leaves(tree), jax.tree.leaves(like, is_quantized), strict=True)


def _place(name: str, tree: Any, index: int) -> str:
    """The leaf as one would write it in Python; found only when there is something to report."""
    path, _ = jax.tree_util.tree_leaves_with_path(tree)[index]
    return name + jax.tree_util.keystr(path)


def _difference(tree: Any, moments: Any) -> str:
    """What one tree has and the other has not."""
    got, expected = (
        [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t, is_leaf=is_quantized)]
        for t in (tree, moments)
    )
    missing, extra = _only_in(expected, got), _only_in(got, expected)
    containers = f"{jax.tree.structure(tree)} in place of {jax.tree.structure(moments, is_leaf=is_quantized)}"
    return _both("missing", missing, "unexpected", extra) or containers


def _only_in(names: Collection[str], others: Collection[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _both(first: str, firsts: list[str], second: str, seconds: list[str]) -> str:
    """``first a, b; second c``, leaving out what is empty."""
    named = ((first, firsts), (second, seconds))
    return "; ".join(f"{word} {', '.join(names)}" for word, names in named if names)
