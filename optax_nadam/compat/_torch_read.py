"""A checkpoint of torch's or timm's read into one record: names, steps, moments and groups, parameter by parameter.

``{"state": {id: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}, "param_groups": [{"params": [id, ...], ...}]}``
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat._account import check_entries, check_parameter, parse_number, parse_steps
from optax_nadam.compat._checkpoint import Checkpoint, Group, Label, Parameter
from optax_nadam.compat._common import as_numpy, check_keys, listed, without
from optax_nadam.compat._match import PREFIXES
from optax_nadam.compat._torch_files import Opened, opened
from optax_nadam.compat._torch_schedules import check_log, schedules_of

_MISSING = (
    "state of parameter {label!r} lacks {missing}: it was not written by {optimizer}. compat.torch reads NAdam, Adam"
    " and AdamW; compat.timm NAdamW and NAdamLegacy of timm, and AlgoPerf's for torch."
)
_SHARDED = (
    "state of parameter {label!r} holds a DTensor, one shard of an array. Save what torch.distributed.checkpoint."
    "state_dict.get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)) returns."
)
_ALPHABETICAL = (
    "names are in alphabetical order ({first!r} before {second!r}), as the keys of model.safetensors are, but the"
    " checkpoint has the order of the optimizer: pass names=[n for n, _ in model.named_parameters()], of several groups"
    " one group after another (the Trainer of transformers has those that decay first). If the alphabetical order is"
    " the optimizer's, leave names out: to_params then gets a list."
)
_INSIDE_FIRST = (
    "names have {inside!r} before {own!r}, but model.named_parameters() has the parameters of a module before those of"
    " the modules inside it; trainer.get_decay_parameter_names has not. Of two groups, with and without decay, pass"
    " sorted((n for n, _ in model.named_parameters()), key=lambda n: n not in decay). If this order is the optimizer's,"
    " leave names out: to_params then gets a list."
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
_NO_PARAMS = "param_groups[{index}] lacks the key 'params': pass the groups of optimizer.state_dict(), with all keys."
_OTHER_NAMES = (
    "names must be those that the checkpoint stores, in their order: at place {index} they are {given!r} and"
    " {stored!r}. Leave names out: to_params then gets each array under its stored name."
)
_NO_SCHEDULER = (
    "the learning rate had a schedule (groups have 'initial_lr'), which is not in the optimizer's checkpoint. Pass"
    " scheduler=scheduler.state_dict() to read (for those of transformers also lr_scheduler_type= and its arguments),"
    " or learning_rate=, a function of the steps, to from_groups or config_from."
)
_NO_STATE_OF_SCHEDULER = (
    "read got {given}, but there is no scheduler in the source. Pass scheduler=, what scheduler.state_dict() returned,"
    " or lr_scheduler_type=, a schedule of transformers."
)
_IGNORED = "{keys}=1.0 is ignored: the groups are those of {optimizer}, which has no product of momenta."
_CLIP = "the Trainer clips by global norm, max_grad_norm=1.0 by default: optax_nadam.clip_by_global_norm"
_LOSS = "the loss (the Trainer divides its sum by the number of labels that are not -100, before they are shifted)"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an optimizer stores for each parameter.

    Attributes:
      optimizer: its name in the texts of errors.
      product: the key of the product of the momenta; None where it stores none.
      parse: makes the config of a group.
      version: the releases that write it.
      python_numbers: whether step and product are Python numbers rather than arrays.
      ignored: keys of an entry that are not its own, of which the caller is warned.
    """

    optimizer: str
    product: str | None
    parse: Callable[[Mapping[str, Any], Any], NadamConfig]
    version: str
    python_numbers: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def scalars(self) -> tuple[str, ...]:
        """The keys of the numbers that are stored for a parameter, the step first."""
        return ("step",) if self.product is None else ("step", self.product)


class Request(NamedTuple):
    """What the caller says of the schedule: see :func:`optax_nadam.compat.torch.read`."""

    scheduler: Mapping[str, Any] | None = None
    steps_per_epoch: int | None = None
    lr_scheduler_type: str | None = None
    arguments: Mapping[str, Any] = {}


NOTHING = Request()


def whole(param_groups: Any) -> Any:
    """The checkpoint, or one without a state around parameter groups alone."""
    alone = isinstance(param_groups, Sequence) and not isinstance(param_groups, str)
    return {"state": {}, "param_groups": param_groups} if alone else param_groups


def read(
    source: Any,
    choose: Callable[[Sequence[Mapping[str, Any]]], Layout],
    names: Sequence[str] | None,
    weights: Mapping[str, Any] | Sequence[Any] | None,
    request: Request = NOTHING,
) -> Checkpoint:
    """What a checkpoint holds, accounted for.

    Args:
      source: a path, a checkpoint, or one that was read before.
      choose: the layout of these groups.
      names: as in :func:`optax_nadam.compat.torch.load_state`.
      weights: likewise.
      request: what the caller says of the schedule.
    """
    if isinstance(source, Checkpoint):
        if names is not None or weights is not None or request != NOTHING:
            raise ValueError(
                "names, weights and arguments about the scheduler belong to the first read: this checkpoint was read"
                " already."
            )
        return source
    found = opened(source, "optimizer")
    groups = list(found.optimizer["param_groups"])
    layout = choose(groups)
    labels, ids = labels_of(groups, names)
    state = _by_id(found.optimizer["state"], ids)
    check_entries(layout.optimizer, state, ids)
    if ignored := {key for entry in state.values() for key in layout.ignored if entry.get(key) == 1.0}:
        validation.warn(_IGNORED.format(keys=", ".join(ignored), optimizer=layout.optimizer))
        state = {i: without(entry, ignored) for i, entry in state.items()}
    parameters = {label: _parameter(label, state.get(i), layout) for label, i in zip(labels, ids, strict=True)}
    beside = _weights_beside(found.weights, parameters)
    given = (beside or {}) if weights is None else _parse_weights(weights, parameters)
    checkpoint = _checkpoint(layout, found, _groups(groups, labels), parameters, given, request)
    return dataclasses.replace(checkpoint, stored_weights=beside)


def _by_id(state: Mapping[Any, Any], ids: Sequence[Any]) -> Mapping[Any, Any]:
    """The state by the ids of the groups. JSON and torch.distributed.checkpoint turn its keys into text, not those."""
    if all(isinstance(i, int) for i in ids) and all(isinstance(key, str) and key.isdigit() for key in state):
        return {int(key): entry for key, entry in state.items()}
    return state


def _groups(groups: Sequence[Mapping[str, Any]], labels: Sequence[Label]) -> list[Group]:
    rest = iter(labels)
    return [
        Group(without(group, ("params", "param_names")), tuple(itertools.islice(rest, len(group["params"]))))
        for group in groups
    ]


def _checkpoint(
    layout: Layout,
    found: Opened,
    groups: list[Group],
    parameters: Mapping[Label, Parameter | None],
    weights: Mapping[Any, Any],
    request: Request,
) -> Checkpoint:
    """The record, with the schedule where there is one."""
    version = ", ".join(filter(None, (layout.version, found.version)))
    notes = (f"gradient clipping ({_CLIP})", _LOSS) if "Trainer" in found.version else ("gradient clipping",)
    parts = (layout.optimizer, version, parameters, tuple(groups), layout.parse, weights)
    checkpoint = Checkpoint(*parts, notes=notes)
    try:
        schedules = _schedules(checkpoint, found, request)
    except ValueError as error:
        if request != NOTHING:
            raise
        return dataclasses.replace(checkpoint, unread_schedule=str(error))
    with_schedules = tuple(g._replace(schedule=schedule) for g, schedule in zip(groups, schedules, strict=True))
    return dataclasses.replace(checkpoint, groups=with_schedules)


def _schedules(checkpoint: Checkpoint, found: Opened, request: Request) -> Sequence[ScheduleConfig | None]:
    """The schedule of each group, from the scheduler's state or from its name."""
    options = [group.options for group in checkpoint.groups]
    scheduler, count = request.scheduler or found.scheduler, checkpoint.count
    if scheduler is None and request.lr_scheduler_type is not None:
        scheduler = _lambda_lr(options, count)
    if scheduler is None:
        if request != NOTHING:
            raise ValueError(_NO_STATE_OF_SCHEDULER.format(given=", ".join(_given(request))))
        if any("initial_lr" in group for group in options):
            raise ValueError(_NO_SCHEDULER)
        return [None] * len(options)
    arguments = dict(request.arguments)
    if request.lr_scheduler_type is not None and found.steps is not None:
        arguments.setdefault("num_training_steps", found.steps)
    schedules = schedules_of(scheduler, options, count, request.steps_per_epoch, request.lr_scheduler_type, arguments)
    check_log(schedules[0], found.logged)
    return schedules


def _given(request: Request) -> list[str]:
    """The names of what the caller says of a schedule."""
    return [*(["steps_per_epoch"] if request.steps_per_epoch is not None else []), *request.arguments]


def _lambda_lr(options: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """The state of the scheduler that transformers makes, as far as groups tell it."""
    rates = [group.get("lr") for group in options]
    base = [group.get("initial_lr", group.get("lr")) for group in options]
    return {"base_lrs": base, "_last_lr": rates, "last_epoch": count, "lr_lambdas": [None] * len(options)}


def labels_of(groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> tuple[list[Any], list[Any]]:
    """A name, or else a position, for each parameter, and the ids that the checkpoint knows them by."""
    for index in [index for index, group in enumerate(groups) if "params" not in group]:
        raise ValueError(_NO_PARAMS.format(index=index))
    ids = [i for group in groups for i in group["params"]]
    stored = _stored_names(groups, ids)
    if names is None:
        return stored or list(range(len(ids))), ids
    _check_names(names, len(ids))
    if not stored:
        _check_order(names)
        rest = iter(names)
        for group in groups:
            _check_modules(itertools.islice(rest, len(group["params"])))
    for index, (given, name) in enumerate(zip(names, stored or names, strict=True)):
        if _bare(given) != _bare(name):
            raise ValueError(_OTHER_NAMES.format(index=index, given=given, stored=name))
    return list(names), ids


def _stored_names(groups: Sequence[Mapping[str, Any]], ids: list[Any]) -> list[str]:
    """The names in a checkpoint; ids are names already where torch.distributed has written it."""
    if groups and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
        _check_names(names, len(ids))
        return names
    return ids if ids and all(isinstance(i, str) for i in ids) else []


def _bare(name: str) -> str:
    """A name without what wrappers of the model put into it."""
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name


def _check_names(names: Sequence[str], expected: int) -> None:
    """Rejects names of another number, and equal ones."""
    if len(names) != expected:
        raise ValueError(
            f"names must be the names of the {expected} parameters of the checkpoint, got {len(names)}."
            " model.named_parameters() has them, tied ones once."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names must differ, got {', '.join(twice)} more than once.")


def _check_order(names: Sequence[str]) -> None:
    """Rejects the order of a file that sorts its keys."""
    if list(names) == sorted(names):
        for first, second in itertools.pairwise(names):
            if _natural(first) > _natural(second) or _bias_and_weight(first, second):
                raise ValueError(_ALPHABETICAL.format(first=first, second=second))


def _check_modules(names: Iterable[str]) -> None:
    """Rejects, in a group, a parameter of a module after one of a module inside it."""
    inside: dict[str, str] = {}  # by the modules around it
    for name in names:
        module = name.rpartition(".")[0]
        if module in inside:
            raise ValueError(_INSIDE_FIRST.format(inside=inside[module], own=name))
        while module:
            module = module.rpartition(".")[0]
            inside.setdefault(module, name)


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
    parameter = Parameter(
        step=parse_steps(f"the step of parameter {label!r}", entry["step"]),
        product=None
        if layout.product is None
        else parse_number(f"{layout.product} of parameter {label!r}", entry[layout.product]),
        dtype=_dtype_of(entry[layout.product or "step"]),
        m=as_numpy(entry["exp_avg"]),
        v=as_numpy(entry["exp_avg_sq"]),
    )
    check_parameter(label, parameter)
    return parameter


def _dtype_of(scalar: Any) -> Any:
    """The dtype of a tensor or an array; float32 for a Python number."""
    return jnp.dtype(str(getattr(scalar, "dtype", "float32")).removeprefix("torch."))


def _weights_beside(weights: Any, parameters: Mapping[Label, Parameter | None]) -> Mapping[Any, Any] | None:
    """The weights of the parameters that are stored beside them, where they have all of their names."""
    if weights is None or not parameters or not all(label in weights for label in parameters):
        return None
    found = {label: as_numpy(weights[label]) for label in parameters}
    _check_weights(found, parameters)
    return found


def _parse_weights(weights: Any, parameters: Mapping[Label, Parameter | None]) -> Mapping[Any, Any]:
    """The model's own arrays by label; their shapes are those of the moments."""
    if not isinstance(weights, Mapping):
        if len(weights) != len(parameters):
            raise ValueError(f"weights must be the {len(parameters)} parameters of the checkpoint, got {len(weights)}.")
        weights = dict(zip(parameters, weights, strict=True))
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
