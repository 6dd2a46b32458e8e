"""The state of Optax's Adam and Nadam, and of AlgoPerf's Nadam, which has the same fields."""

from collections.abc import Callable
from typing import Any

import optax

from optax_nadam import _validation as validation
from optax_nadam._state import nodes_of
from optax_nadam.compat._common import Checkpoint, get_numbers

_NOT_ONE = (
    "source must hold one ScaleByAdamState, the state of optax.adam, adamw, nadam or nadamw and of AlgoPerf's nadamw,"
    " but holds {found}."
)


def read(source: Any) -> Checkpoint:
    """The one such state in an optimizer state, at any depth."""
    found = [node for node in nodes_of(source, tuple) if _is_adam(node)]
    if len(found) != 1:
        raise ValueError(_NOT_ONE.format(found=len(found)))
    (adam,) = found
    count = validation.parse_count("count", adam.count)
    return Checkpoint("a ScaleByAdamState", count, None, adam.mu, adam.nu)


def write(opt_state: Any, from_params: Callable[[Any], Any]) -> optax.ScaleByAdamState:
    """The state of Optax's Adam with the numbers of ours."""
    state = get_numbers(opt_state)
    return optax.ScaleByAdamState(count=state.count, mu=from_params(state.m), nu=from_params(state.v))


def _is_adam(node: Any) -> bool:
    """Whether a node is Optax's state, or AlgoPerf's of the same name and fields."""
    same_name = type(node).__name__ == optax.ScaleByAdamState.__name__
    return same_name and getattr(node, "_fields", None) == optax.ScaleByAdamState._fields
