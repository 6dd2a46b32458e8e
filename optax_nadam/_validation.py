"""The checks that several modules share, and their error texts; any other check is in the module of what it checks.

Hyperparameters are checked when an optimizer is built, trees while ``init`` or ``update`` is traced: before any number
changes, and at no cost in the compiled step. Traced values cannot be checked.
"""

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Any, TypeGuard

import jax
import numpy as np
from jax import numpy as jnp

from optax_nadam._leaves import dtype_of, is_complex

_NOT_A_NUMBER = (
    "{name} must be a number or a scalar array, got {value!r}. To schedule it, wrap the optimizer in"
    " optax.inject_hyperparams."
)
_NARROW = (
    "{name} has dtype {dtype}, too narrow near 1: in bfloat16 0.999 is 1. Pass hyperparam_dtype=jnp.float32 to"
    " optax.inject_hyperparams, or an array of float32."
)
_NOT_STATIC = "{name} must be a number, got {value!r}. Under optax.inject_hyperparams, name it in static_args."
_NOT_AN_ARRAY = "{leaf} is {value!r}; a leaf must be an array, or None to leave it out."
_NOT_A_STATE_ARRAY = (
    "{name} got a state in which {leaf} is {value!r}, not an array. Make arrays of what comes from JSON or"
    " MessagePack: jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, tx.init(params))."
)
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
    "{name} got the state of another optimizer: {got} in place of {expected}. Pass the state that this optimizer's own"
    " init made."
)


def warn(text: str) -> None:
    """Warns at the line of the user's code that called the library, through however many functions of the library."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("optax_nadam."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a hyperparameter is a Python or NumPy number: a constant, which can be checked."""
    return isinstance(value, numbers.Real)


def check_number(name: str, value: Any) -> None:
    """Rejects what is neither a number nor a scalar array."""
    if is_number(value):
        return
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(_NOT_A_NUMBER.format(name=name, value=value))
    check_scalar(name, value)


def check_scalar(name: str, value: Any) -> None:
    """Rejects an array with axes."""
    if jnp.shape(value):
        raise ValueError(f"{name} must be a number or a scalar array, got an array of shape {jnp.shape(value)}.")


def check_decay(name: str, value: Any) -> None:
    """Rejects a Python number outside [0, 1), and an array of a dtype too narrow for numbers near 1."""
    check_number(name, value)
    if not is_number(value) and jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
        raise TypeError(_NARROW.format(name=name, dtype=value.dtype))
    if is_number(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
    """Rejects a Python number that is negative, infinite or NaN."""
    check_number(name, value)
    if is_number(value) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Rejects a Python number that is not positive and finite."""
    check_number(name, value)
    if is_number(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value!r}.")


def check_finite(name: str, value: Any) -> None:
    """Rejects a Python number that is infinite or NaN."""
    check_number(name, value)
    if is_number(value) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")


def parse_count(name: str, value: Any) -> int:
    """A number of steps, as a Python integer."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}.") from None
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}.")
    return count


def parse_positive_int(name: str, value: Any) -> int:
    """A whole number of at least 1, as a Python integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    check_positive(name, value)
    return int(value)


def check_static(name: str, value: Any) -> None:
    """Rejects an array where only a Python number can be used."""
    if not is_number(value):
        raise TypeError(_NOT_STATIC.format(name=name, value=value))


def check_bool(name: str, value: Any) -> None:
    """Rejects what is not a Python boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Rejects what is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_names(what: str, got: Collection[str], expected: Collection[str]) -> None:
    """Rejects a mapping with a missing or an unknown name."""
    missing, unknown = _only_in(expected, got), _only_in(got, expected)
    if missing or unknown:
        raise ValueError(f"{what} fields do not fit: {_both('missing', missing, 'unknown', unknown)}.")


def check_leaves(name: str, tree: Any) -> None:
    """Rejects leaves that are not arrays of a floating-point or complex dtype."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        try:
            dtype = dtype_of(leaf)
        except TypeError:
            raise TypeError(_NOT_AN_ARRAY.format(leaf=place(name, tree, index), value=leaf)) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(_NOT_INEXACT.format(leaf=place(name, tree, index), dtype=dtype))


def check_state(name: str, state: Any, expected: type | tuple[type, ...]) -> None:
    """Rejects the state of another optimizer."""
    if not isinstance(state, expected):
        first = expected[0] if isinstance(expected, tuple) else expected
        raise ValueError(_STATE.format(name=name, got=type(state).__name__, expected=first.__name__))


def check_arrays(name: str, state: Any) -> None:
    """Rejects a state with Python numbers in place of arrays."""
    for index, leaf in enumerate(jax.tree.leaves(state)):
        if not hasattr(leaf, "dtype"):
            raise TypeError(_NOT_A_STATE_ARRAY.format(name=name, leaf=place("state", state, index), value=leaf))


def check_like_moments(name: str, tree: Any, moments: Any) -> None:
    """Rejects a tree that does not fit the moments, leaf by leaf."""
    check_structure(name, tree, moments)
    check_leaves(name, tree)
    check_shapes(name, tree, moments)
    for index, (leaf, m) in enumerate(_pairs(tree, moments)):
        if is_complex(leaf) != is_complex(m):
            kind = "complex" if is_complex(m) else "real"
            raise TypeError(_COMPLEX.format(leaf=place(name, tree, index), got=dtype_of(leaf), expected=kind))


def check_structure(name: str, tree: Any, like: Any) -> None:
    """Rejects a tree whose structure is not that of the params, or of their moments."""
    got: Any = jax.tree.structure(tree)
    if got != jax.tree.structure(like):
        raise wrong_structure(name, _difference(tree, like))


def wrong_structure(name: str, difference: Any) -> ValueError:
    """The error for a tree whose structure is not that of the params."""
    return ValueError(_STRUCTURE.format(name=name, difference=difference))


def check_shapes(name: str, tree: Any, like: Any) -> None:
    """Rejects a tree with a leaf of another shape."""
    for index, (leaf, other) in enumerate(_pairs(tree, like)):
        if jnp.shape(leaf) != other.shape:
            raise ValueError(_SHAPE.format(leaf=place(name, tree, index), got=jnp.shape(leaf), expected=other.shape))


def place(name: str, tree: Any, index: int) -> str:
    """A leaf's path in Python syntax; computed for an error only."""
    path, _ = jax.tree_util.tree_leaves_with_path(tree)[index]
    return name + jax.tree_util.keystr(path)


def _pairs(tree: Any, like: Any) -> Iterator[tuple[Any, Any]]:
    return zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)


def _difference(tree: Any, moments: Any) -> str:
    """The leaves that only one of the trees has; where there are none, both structures."""
    got, expected = (
        [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (tree, moments)
    )
    missing, extra = _only_in(expected, got), _only_in(got, expected)
    containers = f"{jax.tree.structure(tree)} in place of {jax.tree.structure(moments)}"
    return _both("missing", missing, "unexpected", extra) or containers


def _only_in(names: Collection[str], others: Collection[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _both(first: str, firsts: list[str], second: str, seconds: list[str]) -> str:
    """``first a, b; second c``, leaving out what is empty."""
    named = ((first, firsts), (second, seconds))
    return "; ".join(f"{word} {_listed(names)}" for word, names in named if names)


def _listed(names: list[str]) -> str:
    """At most ten names, separated by commas."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
