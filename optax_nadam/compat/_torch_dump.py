"""From an optimizer state to a checkpoint of torch's or timm's."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from optax_nadam._state import KINDS, ScaleByNadamState, convert_moments, get_state
from optax_nadam._tree import nodes_of
from optax_nadam.compat._checkpoint import Label
from optax_nadam.compat._common import listed
from optax_nadam.compat._match import NO_TAG, any_masked, filled, merged, the_tag
from optax_nadam.compat._torch_read import Layout, labels_of

_COMPLEX = (
    "opt_state has complex moments, but {optimizer} treats the two parts of a complex number as separate numbers. Build"
    " the optimizer with complex_as_real=True, as compat.torch.nadam and compat.timm.nadamw do."
)
_UNNAMED_GROUPS = (
    "from_params returned arrays by name, but param_groups are several without param_names. Return a list in the order"
    " of the optimizer's parameters, group after group, or add param_names to each group."
)
_ONE_OF_TWO = (
    "dump_state needs either config, for one group of all parameters, or param_groups, the groups of the optimizer that"
    " continues; got {got}."
)


def groups_to_dump(
    group: Mapping[str, Any] | None, param_groups: Sequence[Mapping[str, Any]] | None
) -> Sequence[Mapping[str, Any]]:
    """The groups of a checkpoint that is to be written: one of all parameters, or those that the user gave."""
    if group is not None and param_groups is None:
        return [group]
    if group is None and param_groups is not None:
        return param_groups
    raise ValueError(_ONE_OF_TWO.format(got="neither" if group is None else "both"))


def dump(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    groups: Sequence[Mapping[str, Any]],
    layout: Layout,
    params: Any,
    as_tensor: Callable[[np.ndarray], Any] | None,
) -> dict[str, Any]:
    """The checkpoint of an optimizer state; of its groups, a single one without ``params`` gets all parameters."""
    check_real(opt_state, layout.optimizer)
    states = list(nodes_of(convert_moments(opt_state, m_dtype=None, v_dtype=None), ScaleByNadamState))
    m, v = (_dumped([getattr(state, name) for state in states], from_params, params, 0.0) for name in ("m", "v"))
    owners = _owners(states, from_params, params, m)
    whole = _with_parameters(groups, list(m))
    labels, ids = _dumped_labels(whole, list(m))
    tensor = as_tensor or (lambda array: array)
    entries = {
        i: {
            **_dumped_scalars(states[owners[label] - 1], layout, tensor),
            "exp_avg": tensor(np.array(m[label])),
            "exp_avg_sq": tensor(np.array(v[label])),
        }
        for label, i in zip(labels, ids, strict=True)
        if owners[label] != NO_TAG
    }
    return {"state": entries, "param_groups": whole}


def _dumped(trees: list[Any], from_params: Callable[[Any], Any], params: Any, rest: float) -> dict[Any, np.ndarray]:
    """What ``from_params`` makes of the moments of all Nadams, by name or by position; ``rest`` is what none has."""
    arrays = from_params(merged(trees if params is None else [*trees, filled(params, rest)]))
    if not isinstance(arrays, Mapping | Sequence):
        raise TypeError(f"from_params must return a dict or a list of arrays, got {type(arrays).__name__}.")
    return dict(arrays if isinstance(arrays, Mapping) else enumerate(arrays))


def _owners(
    states: Sequence[ScaleByNadamState], from_params: Callable[[Any], Any], params: Any, labels: Mapping[Label, Any]
) -> Mapping[Label, int]:
    """For each parameter the number of its Nadam, from 1, and ``NO_TAG`` where none has it."""
    if not any(any_masked(state.m) for state in states):
        return dict.fromkeys(labels, 1)
    tags = [filled(state.m, tag) for tag, state in enumerate(states, 1)]
    found = _dumped(tags, from_params, params, NO_TAG)
    known = {NO_TAG, *range(1, len(states) + 1)}
    return {label: the_tag(f"parameter {label!r}", x, known) for label, x in found.items()}


def _dumped_scalars(state: ScaleByNadamState, layout: Layout, tensor: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Step and product, in arrays of their own for each parameter, since torch updates them in place."""
    if layout.python_numbers:
        return dict(zip(layout.scalars, (int(state.count), float(state.mu_product)), strict=False))
    arrays = np.array(state.count, np.float32), np.array(state.mu_product)
    return {key: tensor(array) for key, array in zip(layout.scalars, arrays, strict=False)}


def _with_parameters(groups: Sequence[Mapping[str, Any]], labels: list[Label]) -> list[dict[str, Any]]:
    """The groups, of which a single one without parameters gets all, with their names where there are any."""
    if len(groups) != 1 or "params" in groups[0]:
        return [dict(group) for group in groups]
    named = all(isinstance(label, str) for label in labels)
    return [{**groups[0], "params": list(range(len(labels))), **({"param_names": labels} if named else {})}]


def _dumped_labels(groups: list[dict[str, Any]], labels: list[Label]) -> tuple[list[Label], list[Any]]:
    """For each parameter of the groups the label that ``from_params`` gave it, and its id."""
    wanted, ids = labels_of(groups, None)
    if len(labels) != len(ids):
        raise ValueError(f"from_params must return the {len(ids)} parameters of param_groups, got {len(labels)}.")
    if any(isinstance(label, numbers.Integral) for label in (*wanted, *labels)):
        if len(groups) > 1 and all(isinstance(label, str) for label in labels):
            raise ValueError(_UNNAMED_GROUPS)
        return labels, ids
    if set(wanted) != set(labels):
        lacking = listed([label for label in wanted if label not in labels])
        raise ValueError(f"from_params must return the parameters that param_groups names; {lacking} are not there.")
    return wanted, ids


def check_real(opt_state: Any, optimizer: str) -> None:
    """Rejects a state without a Nadam, and one with complex moments."""
    states = list(nodes_of(opt_state, KINDS)) or [get_state(opt_state)]
    if any(jnp.iscomplexobj(leaf) for state in states for leaf in jax.tree.leaves(state.m)):
        raise ValueError(_COMPLEX.format(optimizer=optimizer))
