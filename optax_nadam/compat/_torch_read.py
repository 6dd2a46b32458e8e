"""A checkpoint of torch's or timm's read into one record: names, steps, moments and groups, parameter by parameter.

``{"state": {id: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}, "param_groups": [{"params": [id, ...], ...}]}``
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

from optax_nadam.compat._common import as_numpy, check_keys, without

Label = str | int

_SOURCE = (
    "source must be what {optimizer}.state_dict() returns, with the keys 'state' and 'param_groups', got {got}. From a"
    " checkpoint of several parts, pass the optimizer's: checkpoint['optimizer'], or"
    " checkpoint['optimizer_states'][0] of Lightning."
)
_MISSING = "state of parameter {label!r} lacks {missing}: it was not written by {optimizer}."
_SHARDED = (
    "state of parameter {label!r} holds a DTensor, one shard of an array. Save what torch.distributed.checkpoint."
    "state_dict.get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)) returns."
)
_ALPHABETICAL = (
    "names are in alphabetical order ({first!r} before {second!r}), as the keys of model.safetensors are, but the"
    " checkpoint has the order of the optimizer: pass names=[n for n, _ in model.named_parameters()]. If that is the"
    " order there, leave names out: to_params then gets a list."
)
_OTHER_SHAPE = (
    "the moments of {label!r} have shape {got}, but its weights {expected}: names are not in the order of the"
    " optimizer's parameters (group after group), or weights are of another model."
)
_WEIGHTS_LACK = (
    "weights lack {labels}, which the checkpoint has moments of; they have {extra} besides. weights must have every"
    " parameter under the name that model.named_parameters() gives it. Of tied parameters (one tensor under two names)"
    " that is the first name; a file may have another."
)
_TIED = (
    "weights have equal arrays under {extra!r} and {label!r}, of which the checkpoint has moments of the second only:"
    " they are tied. Leave {extra!r} out of weights, and let to_params take {label!r} for the leaf that they share."
)
_NO_SHAPE = (
    "{labels} never stepped, so that source does not hold the shape of the moments. Pass weights, the model's own"
    " arrays as to_params takes them."
)
_NO_STATE = (
    "parameter groups do not hold the shapes of {labels}, which groups of several kinds need. Pass the whole checkpoint"
    " of a run that took a step, or weights, the model's own arrays as to_params takes them."
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an optimizer stores for each parameter.

    Attributes:
      optimizer: its name in the texts of errors.
      product: the key of the product of the momenta; None where it stores none.
      python_numbers: whether step and product are Python numbers rather than arrays.
    """

    optimizer: str
    product: str | None
    python_numbers: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        """The keys of the numbers that are stored for a parameter, the step first."""
        return ("step",) if self.product is None else ("step", self.product)


class Parameter(NamedTuple):
    """What is stored for a parameter that took a step.

    Attributes:
      step: steps taken.
      product: the product of the momenta, or None where it is not stored.
      dtype: the dtype in which the product is stored.
      m: first moment.
      v: second moment.
    """

    step: int
    product: float | None
    dtype: Any
    m: np.ndarray
    v: np.ndarray


class Source(NamedTuple):
    """A checkpoint.

    Attributes:
      layout: what its optimizer stores.
      groups: its parameter groups.
      group_of: for each parameter, by name or by position, the index of its group.
      parameters: what is stored for it; None where it took no step.
      weights: the model's own arrays by name or position, where the user gave them.
    """

    layout: Layout
    groups: Sequence[Mapping[str, Any]]
    group_of: dict[Label, int]
    parameters: dict[Label, Parameter | None]
    weights: Mapping[Label, Any]

    @property
    def stepped(self) -> dict[Label, Parameter]:
        """What is stored for the parameters that took a step."""
        return {label: p for label, p in self.parameters.items() if p is not None}

    @property
    def steps(self) -> int:
        """The largest number of steps that a parameter took."""
        return max((p.step for p in self.stepped.values()), default=0)

    @property
    def frozen(self) -> list[Label]:
        """The parameters that took no step where others did, and those that the optimizer does not have."""
        untrained = [label for label, p in self.parameters.items() if p is None] if self.stepped else []
        return [*untrained, *(label for label in self.weights if label not in self.parameters)]

    @property
    def shapes(self) -> dict[Label, tuple[int, ...]]:
        """The shapes of all parameters, those of the optimizer first.

        Raises:
          ValueError: neither the checkpoint nor the weights have one of them.
        """
        known = {label: tuple(x.shape) for label, x in self.weights.items()}
        known |= {label: p.m.shape for label, p in self.stepped.items()}
        unknown = [label for label in self.parameters if label not in known]
        if unknown:
            raise ValueError((_NO_SHAPE if self.stepped else _NO_STATE).format(labels=listed(unknown)))
        return {label: known[label] for label in (self.parameters | known)}

    def moments(self, name: str) -> dict[Label, np.ndarray]:
        """Copies of the moments ``m`` or ``v`` of all parameters, zero where no step was taken.

        Copies, since torch updates in place what an optimizer's state_dict() shows.
        """
        stepped = {label: np.array(getattr(p, name)) for label, p in self.stepped.items()}
        return {label: stepped.get(label, np.zeros(shape, np.float32)) for label, shape in self.shapes.items()}


def whole(param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The checkpoint, or one without a state around parameter groups alone."""
    return param_groups if isinstance(param_groups, Mapping) else {"state": {}, "param_groups": param_groups}


def nested(source: Any, optimizer: str) -> Mapping[str, Any]:
    """A checkpoint as ``{"state": ..., "param_groups": ...}``, which may be flattened to ``state.<name>.<key>``."""
    if isinstance(source, Mapping):
        if {"state", "param_groups"} <= set(source):
            return source
        if source and all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in source):
            return _unflattened(source)
    got = f"the keys {sorted(map(str, source))[:10]}" if isinstance(source, Mapping) else type(source).__name__
    raise ValueError(_SOURCE.format(optimizer=optimizer, got=got))


def _unflattened(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """What torch.distributed wrote with ``flatten_optimizer_state_dict=True``, in its usual form."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for path, value in source.items():
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        parts[part].setdefault(name, {})[key] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, options in parts["param_groups"].items():
        own = without(options, ("params", "param_names"))
        groups.setdefault(repr(sorted(own.items())), {**own, "params": []})["params"].append(name)
    return {"state": parts["state"], "param_groups": list(groups.values())}


def read(
    source: Any,
    layout: Layout,
    names: Sequence[str] | None,
    weights: Mapping[str, Any] | Sequence[Any] | None,
) -> Source:
    """What a checkpoint stores for each parameter."""
    source = nested(source, layout.optimizer)
    state, groups = source["state"], list(source["param_groups"])
    labels, ids = labels_of(groups, names)
    parameters = {label: _parameter(label, state.get(i), layout) for label, i in zip(labels, ids, strict=True)}
    group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
    known = _parse_weights(weights, parameters)
    return Source(layout, groups, dict(zip(labels, group_of, strict=True)), parameters, known)


def labels_of(groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> tuple[list[Any], list[Any]]:
    """A name, or else a position, for each parameter, and the ids that the checkpoint knows them by."""
    ids = [i for group in groups for i in group["params"]]
    if names is not None:
        _check_names(names, len(ids))
        return list(names), ids
    if groups and all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]], ids
    # Ids are names already where torch.distributed has written the checkpoint.
    return (ids if ids and all(isinstance(i, str) for i in ids) else list(range(len(ids)))), ids


def _check_names(names: Sequence[str], expected: int) -> None:
    if len(names) != expected:
        raise ValueError(f"names must name the {expected} parameters of the checkpoint, got {len(names)} names.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names must differ, got {', '.join(twice)} more than once.")
    if list(names) == sorted(names):
        for first, second in itertools.pairwise(names):
            if _natural(first) > _natural(second) or _bias_and_weight(first, second):
                raise ValueError(_ALPHABETICAL.format(first=first, second=second))


def _natural(name: str) -> list[Any]:
    """A key that sorts numbers in names as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", name)]


def _bias_and_weight(first: str, second: str) -> bool:
    """Whether a bias comes before the weight of its layer, which no layer of torch's makes in this order."""
    (layer, _, one), (other, _, two) = first.rpartition("."), second.rpartition(".")
    return layer == other and (one, two) == ("bias", "weight")


def _parameter(label: Label, entry: Mapping[str, Any] | None, layout: Layout) -> Parameter | None:
    if not entry:
        return None
    expected = (*layout.scalars, "exp_avg", "exp_avg_sq")
    missing = [key for key in expected if key not in entry]
    if missing:
        raise ValueError(_MISSING.format(label=label, missing=", ".join(missing), optimizer=layout.optimizer))
    check_keys(f"state of parameter {label!r}", entry, expected)
    if any(hasattr(value, "full_tensor") for value in entry.values()):
        raise ValueError(_SHARDED.format(label=label))
    return Parameter(
        step=int(as_numpy(entry["step"])),
        product=None if layout.product is None else float(as_numpy(entry[layout.product])),
        dtype=_dtype_of(entry[layout.product or "step"]),
        m=as_numpy(entry["exp_avg"]),
        v=as_numpy(entry["exp_avg_sq"]),
    )


def _dtype_of(scalar: Any) -> Any:
    """The dtype of a tensor or an array; float32 for a Python number."""
    return jnp.dtype(str(getattr(scalar, "dtype", "float32")).removeprefix("torch."))


def _parse_weights(
    weights: Mapping[str, Any] | Sequence[Any] | None, parameters: Mapping[Label, Parameter | None]
) -> Mapping[Any, Any]:
    """The model's own arrays by label; their shapes are those of the moments."""
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        if len(weights) != len(parameters):
            raise ValueError(f"weights must be the {len(parameters)} parameters of the checkpoint, got {len(weights)}.")
        weights = dict(zip(parameters, weights, strict=True))  # type: ignore[arg-type]  # labels may be positions
    elif any(isinstance(label, int) for label in parameters):
        raise ValueError(
            "weights are by name, but the checkpoint does not name its parameters: pass names=[n for n, _ in"
            " model.named_parameters()] too."
        )
    _check_weights(weights, parameters)
    return weights


def _check_weights(weights: Mapping[Any, Any], parameters: Mapping[Label, Parameter | None]) -> None:
    """Rejects weights of other names or shapes than the checkpoint's, and tied ones."""
    extra = [label for label in weights if label not in parameters]
    lacking = [label for label in parameters if label not in weights]
    if lacking:
        raise ValueError(_WEIGHTS_LACK.format(labels=listed(lacking), extra=listed(extra) or "nothing"))
    for label, parameter in parameters.items():
        expected = tuple(weights[label].shape)
        if parameter is not None and parameter.m.shape != expected:
            raise ValueError(_OTHER_SHAPE.format(label=label, got=parameter.m.shape, expected=expected))
    for label in extra:
        for other in _equal_to(weights[label], weights, parameters):
            raise ValueError(_TIED.format(extra=label, label=other))


def _equal_to(array: Any, weights: Mapping[Any, Any], labels: Iterable[Label]) -> Iterable[Label]:
    """The parameters of equal values, but for constants, which untrained arrays may share."""
    values = as_numpy(array)
    if not values.size or (values == values.flat[0]).all():
        return
    for label in labels:
        if weights[label].shape == array.shape and np.array_equal(as_numpy(weights[label]), values):
            yield label


def listed(labels: Collection[Label]) -> str:
    """Some labels for the text of an error."""
    shown = ", ".join(map(repr, list(labels)[:5]))
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"
