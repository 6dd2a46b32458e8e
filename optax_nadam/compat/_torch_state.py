"""From a checkpoint of torch's or timm's into an optimizer state, and back."""

import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._load import put_counters
from optax_nadam._state import ScaleByNadamState, convert_moments, get_state
from optax_nadam._tree import is_masked, map_parts, nodes_of
from optax_nadam.compat._common import Checkpoint, get_numbers, load_nadam
from optax_nadam.compat._torch_leaves import (
    Label,
    Placeholder,
    as_pairs,
    call,
    listed,
    merged,
    select,
    tagged,
    tags_in,
    the_tag,
)
from optax_nadam.compat._torch_sources import Layout, Parameter, Source, labels_of

_BEHIND = (
    "the parameters differ in the steps they took: {differences}. One Nadam counts for all of its parameters. Pass"
    " mismatch='largest' to take the largest step and its product of momenta for all, with the moments as they are (and"
    " zero for what never stepped); or build the optimizer with from_groups(source, to_params), which has a Nadam for"
    " each kind of parameter group and leaves alone what never stepped."
)
_NO_SHAPE = (
    "{labels} never stepped, so that source does not hold the shape of the moments. Pass weights, the model's own"
    " arrays as to_params takes them."
)
_COMPLEX = (
    "opt_state has complex moments, but {optimizer} treats the two parts of a complex number as separate numbers. Build"
    " the optimizer with complex_as_real=True, as compat.torch.nadam and compat.timm.nadamw do."
)
_UNNAMED_GROUPS = (
    "from_params returned arrays by name, but param_groups are several without param_names. Return a list in the order"
    " of the optimizer's parameters, group after group, or add param_names to each group."
)
_NO_TAG = -1


def load_state(
    opt_state: Any,
    source: Source,
    to_params: Callable[[Any], Any],
    *,
    config_from: Callable[[Mapping[str, Any]], NadamConfig],
    config: NadamConfig | None,
    mismatch: str,
) -> Any:
    """The optimizer state that continues from a checkpoint, each Nadam in it from its own parameters."""
    validation.check_choice("mismatch", mismatch, ("raise", "largest"))
    _check_real(opt_state, source.layout)
    owned = _owned(opt_state, source, to_params)

    @functools.cache
    def tree(moment: str) -> Any:
        return call(to_params, _moments(source, moment))

    def load_part(part: Any) -> Any:
        like, parameters = get_state(part), owned(part)
        if not any(parameters.values()):
            return _fresh(part, source.layout)
        step, product = _progress(parameters, mismatch)
        _check_shapes(parameters, source.weights)
        stepped = next(label for label, parameter in parameters.items() if parameter)
        own = config_from(source.groups[source.group_of[stepped]]) if product is None and config is None else None
        found = Checkpoint(source.layout.optimizer, step, product, tree("m"), tree("v"), own)
        return load_nadam(part, found.mapped(lambda moments: as_pairs(select("m", moments, like.m))), config)

    largest = max((p.step for p in source.parameters.values() if p is not None), default=0)
    return put_counters(map_parts(load_part, opt_state, ScaleByNadamState), largest)


def _fresh(part: Any, layout: Layout) -> Any:
    """The part of an optimizer state as it is before the first step."""
    m, v = jax.tree.map(jnp.zeros_like, (get_numbers(part).m, get_numbers(part).v))
    return load_nadam(part, Checkpoint(layout.optimizer, 0, 1.0, m, v), None)


def _owned(
    opt_state: Any, source: Source, to_params: Callable[[Any], Any]
) -> Callable[[Any], Mapping[Label, Parameter | None]]:
    """For a part of the optimizer state, the parameters that its Nadam has: all where no leaf of it is masked."""
    if not _any_masked(nodes_of(opt_state, ScaleByNadamState)):
        return lambda part: source.parameters
    # The group, and whether a step was taken.
    tags = {label: 1 + 2 * source.group_of[label] + (p is not None) for label, p in source.parameters.items()}
    others = {label: _NO_TAG for label in source.weights if label not in tags}
    tree = call(to_params, tagged(tags | others, source.shapes()))

    def owned(part: Any) -> Mapping[Label, Parameter | None]:
        leaves = jax.tree.leaves(select("m", tree, get_state(part).m))
        own = set().union(*(tags_in(leaf, {_NO_TAG, *tags.values()}) for leaf in leaves))
        return {label: parameter for label, parameter in source.parameters.items() if tags[label] in own}

    return owned


def _moments(source: Source, moment: str) -> dict[Label, Any]:
    """One moment of each parameter; zero where no step was taken, a placeholder where the shape is not known."""
    # Copies: torch updates in place what an optimizer's state_dict() shows.
    known = {label: np.array(getattr(p, moment)) for label, p in source.parameters.items() if p is not None}
    zeros = {label: np.zeros(x.shape, np.float32) for label, x in source.weights.items() if label not in known}
    unknown = {label: Placeholder(0) for label in source.parameters if label not in known and label not in zeros}
    arrays = known | zeros | unknown
    return {label: arrays[label] for label in dict.fromkeys((*source.parameters, *zeros))}


def _check_shapes(parameters: Mapping[Label, Parameter | None], weights: Mapping[Label, Any]) -> None:
    """Rejects parameters that never stepped and whose shape is not known."""
    unknown = [label for label, parameter in parameters.items() if parameter is None and label not in weights]
    if unknown:
        raise ValueError(_NO_SHAPE.format(labels=listed(unknown)))


def _progress(parameters: Mapping[Label, Parameter | None], mismatch: str) -> tuple[int, float | None]:
    """The step and the product that stand for all parameters: of the largest step, in the widest dtype."""
    largest = max((p for p in parameters.values() if p), key=lambda p: (p.step, jnp.finfo(p.dtype).bits))
    apart = {label: p for label, p in parameters.items() if p is None or not _same(p, largest)}
    if apart and mismatch == "raise":
        raise ValueError(_BEHIND.format(differences=_described(apart, len(parameters) - len(apart), largest)))
    return largest.step, largest.product


def _same(p: Parameter, largest: Parameter) -> bool:
    """Whether two parameters took the same steps. torch rounds each product to the dtype of its parameter."""
    if p.step != largest.step or p.product is None or largest.product is None:
        return p.step == largest.step
    dtype = jnp.finfo(p.dtype)
    rtol = max(1e-4, p.step * float(dtype.eps) / 2)
    return bool(np.isclose(p.product, largest.product, rtol=rtol, atol=max(1e-9, float(dtype.smallest_normal))))


def _described(apart: Mapping[Label, Parameter | None], others: int, largest: Parameter) -> str:
    def text(p: Parameter | None) -> str:
        return "none" if p is None else f"{p.step}" + ("" if p.product is None else f" (product {p.product:.6g})")

    kinds: dict[str, list[Label]] = {}
    for label, parameter in apart.items():
        kinds.setdefault(text(parameter), []).append(label)
    behind = "; ".join(f"{listed(labels)} took {kind}" for kind, labels in kinds.items())
    return f"{behind}; {others} others took {text(largest)}"


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    groups: Sequence[Mapping[str, Any]],
    *,
    layout: Layout,
    as_tensor: Callable[[np.ndarray], Any] | None,
) -> dict[str, Any]:
    """The checkpoint of an optimizer state; see :func:`optax_nadam.compat.torch.dump_state`.

    Of the groups, a single one without ``params`` gets all parameters.
    """
    _check_real(opt_state, layout)
    states = list(nodes_of(convert_moments(opt_state, m_dtype=None, v_dtype=None), ScaleByNadamState))
    m, v = (
        _by_label(from_params(merged([getattr(state, moment) for state in states], Placeholder(0))))
        for moment in ("m", "v")
    )
    owners = _owners(states, from_params, m)
    groups = _filled(groups, list(m))
    labels, ids = _dumped_labels(groups, list(m))
    tensor = as_tensor or (lambda array: array)
    entries = {
        i: {
            **_dumped_scalars(states[owners[label] - 1], layout, tensor),
            "exp_avg": tensor(np.array(m[label])),
            "exp_avg_sq": tensor(np.array(v[label])),
        }
        for label, i in zip(labels, ids, strict=True)
        if owners[label] != _NO_TAG
    }
    return {"state": entries, "param_groups": groups}


def _owners(
    states: Sequence[ScaleByNadamState], from_params: Callable[[Any], Any], labels: Mapping[Label, Any]
) -> Mapping[Label, int]:
    """For each parameter the number of its Nadam, from 1, and ``_NO_TAG`` where none has it."""
    if not _any_masked(states):
        return dict.fromkeys(labels, 1)
    tags = [jax.tree.map(lambda x, i=i: jnp.full(x.shape, i), state.m) for i, state in enumerate(states, 1)]
    found = _by_label(from_params(merged(tags, Placeholder(_NO_TAG))))
    known = {_NO_TAG, *range(1, len(states) + 1)}
    return {label: the_tag(f"parameter {label!r}", x, known) for label, x in found.items()}


def groups_to_dump(
    config: NadamConfig | None,
    param_groups: Sequence[Mapping[str, Any]] | None,
    config_to: Callable[[NadamConfig], dict[str, Any]],
) -> Sequence[Mapping[str, Any]]:
    """The groups of a checkpoint that is to be written, of which one argument or the other tells."""
    if (config is None) == (param_groups is None):
        raise ValueError(
            "dump_state needs either config, for one group of all parameters, or param_groups, the groups of the"
            f" optimizer that continues; got {'neither' if config is None else 'both'}."
        )
    return [config_to(config)] if param_groups is None else param_groups  # type: ignore[arg-type]  # one is given


def _dumped_scalars(state: ScaleByNadamState, layout: Layout, tensor: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Step and product, in arrays of their own for each parameter, since torch updates them in place."""
    if layout.python_numbers:
        return dict(zip(layout.scalars, (int(state.count), float(state.mu_product)), strict=False))
    arrays = np.array(state.count, np.float32), np.array(state.mu_product)
    return {key: tensor(array) for key, array in zip(layout.scalars, arrays, strict=False)}


def _by_label(arrays: Any) -> dict[Any, np.ndarray]:
    """What ``from_params`` returned, by name or by position."""
    if not isinstance(arrays, Mapping | Sequence):
        raise TypeError(f"from_params must return a dict or a list of arrays, got {type(arrays).__name__}.")
    return dict(arrays if isinstance(arrays, Mapping) else enumerate(arrays))


def _filled(groups: Sequence[Mapping[str, Any]], labels: list[Label]) -> list[dict[str, Any]]:
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


def _any_masked(states: Iterable[ScaleByNadamState]) -> bool:
    """Whether a Nadam has not all of the leaves."""
    return any(is_masked(node) for state in states for node in jax.tree.leaves(state.m, is_leaf=is_masked))


def _check_real(opt_state: Any, layout: Layout) -> None:
    """Rejects a state without a Nadam, and one with complex moments."""
    states = list(nodes_of(opt_state, ScaleByNadamState)) or [get_state(opt_state)]
    if any(jnp.iscomplexobj(leaf) for state in states for leaf in jax.tree.leaves(state.m)):
        raise ValueError(_COMPLEX.format(optimizer=layout.optimizer))
