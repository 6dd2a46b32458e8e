"""The state of Optax's Adam and Nadam, and of AlgoPerf's Nadam, which has the same fields."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from optax_nadam import _validation as validation
from optax_nadam._state import nodes_of
from optax_nadam.compat._common import Checkpoint, get_numbers

FIELDS = optax.ScaleByAdamState._fields  # count, mu, nu
_NOT_ONE = (
    "source must hold one ScaleByAdamState, the state of optax.adam, adamw, nadam or nadamw and of AlgoPerf's nadamw,"
    " but holds {found}."
)


def read(source: Any) -> Checkpoint:
    """The one such state in an optimizer state, at any depth."""
    found = [node for node in nodes_of(source, (tuple, Mapping)) if _is_adam(node)]
    if len(found) != 1:
        raise ValueError(_NOT_ONE.format(found=len(found)))
    (adam,) = found
    count, m, v = (adam[name] if isinstance(adam, Mapping) else getattr(adam, name) for name in FIELDS)
    return Checkpoint("a ScaleByAdamState", validation.parse_count("count", count), None, m, v)


def write(opt_state: Any, from_params: Callable[[Any], Any]) -> optax.ScaleByAdamState:
    """The state of Optax's Adam with the numbers of ours."""
    state = get_numbers(opt_state)
    return optax.ScaleByAdamState(count=state.count, mu=from_params(state.m), nu=from_params(state.v))


def _is_adam(node: Any) -> bool:
    """Whether a node is Optax's state, AlgoPerf's of the same name and fields, or what Orbax restores of either.

    Orbax without a target restores NamedTuples as dicts of their fields. A layer may have params of these names, but
    then its ``count`` is not an integer.
    """
    if isinstance(node, Mapping):
        return set(node) == set(FIELDS) and np.issubdtype(np.asarray(node["count"]).dtype, np.integer)
    same_name = type(node).__name__ == optax.ScaleByAdamState.__name__
    return same_name and getattr(node, "_fields", None) == FIELDS
