"""Learning rate schedulers of torch and transformers, read from their ``state_dict()`` into schedules as data.

torch writes no class name: the keys tell the scheduler. What it stores besides, its last learning rates, is compared
with what the schedule gives.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_nadam import _validation as validation
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat._common import as_number, without

_BOOKKEEPING = frozenset(
    str.split("base_lrs last_epoch verbose _step_count _get_lr_called_within_step _is_initial _last_lr")
)
_MOMENTUM = frozenset(str.split("cycle_momentum use_beta1"))
_FUNCTION = "pass a function of the optimizer's steps as learning_rate instead."
_SOURCE = (
    "scheduler_state must be what scheduler.state_dict() of torch.optim.lr_scheduler returned, got {got}. From a"
    " checkpoint of Lightning, pass checkpoint['lr_schedulers'][0]; of transformers' Trainer, torch.load of its"
    " scheduler.pt."
)
_UNKNOWN = "scheduler_state has the keys {keys}, which are those of none of {known}; " + _FUNCTION
_PLATEAU = (
    "scheduler_state is of ReduceLROnPlateau, whose rate follows a metric: chain optax.contrib.reduce_on_plateau after"
    " the optimizer."
)
_NO_FORMULA = (
    "scheduler_state is of LambdaLR or MultiplicativeLR, which store no formula. If transformers made it, pass"
    " lr_scheduler_type=, one of {names}, and its arguments; otherwise " + _FUNCTION
)
_NO_LAMBDA = (
    "lr_scheduler_type={name!r} is for a LambdaLR of transformers, but scheduler_state has {number} of them; {way}"
)
_ARGUMENTS = "the arguments of lr_scheduler_type={name!r} do not fit: {error}. They are {signature}."
_LR_INIT = (
    "groups of different learning rates need lr_init=, the lr that the optimizer itself was given: lr_end and min_lr"
    " are in proportion to it."
)
_CHAINED = (
    "scheduler_state is of ChainedScheduler with a {kind} that is no factor of the others' rate{why}; " + _FUNCTION
)
_ACCOUNT = (
    "scheduler_state stores the learning rate {stored} of group {group} at its step {count}, but its schedule gives"
    " {computed}. Its type or an argument is not the run's, or the rate was changed by hand: correct it, or "
    + _FUNCTION
)
_LOGGED = (
    "the schedule gives the learning rate {computed} at step {step}, but trainer_state.json has {rate}: its type or an"
    " argument is not the run's, or the rate was changed by hand. Correct it, or " + _FUNCTION
)
_GROUP_RATE = (
    "param_groups[{group}] has lr {lr}, but scheduler_state stores {stored} as the last: they are of different"
    " moments, or the rate was changed by hand. Pass both from one checkpoint, or " + _FUNCTION
)
_COUNTS = (
    "scheduler_state counts {epochs} steps, but the optimizer took {count}{each}. For a scheduler that stepped once an"
    " epoch, pass steps_per_epoch=, the optimizer's steps in an epoch. accelerate steps its scheduler once per process:"
    " leave count out, and pass learning_rate=lambda n: schedule(processes * n)."
)


class _Run(NamedTuple):
    """What a schedule of one group depends on besides the scheduler's state."""

    place: int
    group: Mapping[str, Any] | None
    name: str | None
    arguments: Mapping[str, Any]


_Translator = Callable[[Mapping[str, Any], float, _Run], ScheduleConfig]


def schedule_from(
    scheduler_state: Mapping[str, Any],
    *,
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    count: int | None = None,
    steps_per_epoch: int | None = None,
    lr_scheduler_type: str | None = None,
    **arguments: Any,
) -> ScheduleConfig:
    """The schedule of a torch scheduler, from its checkpoint: the first group's rate as a function of the steps taken.

    Read are ``ConstantLR``, ``LinearLR``, ``StepLR``, ``MultiStepLR``, ``ExponentialLR``, ``PolynomialLR``,
    ``CosineAnnealingLR``, ``CosineAnnealingWarmRestarts``, ``OneCycleLR``, ``SequentialLR``, ``ChainedScheduler``, and
    the ``LambdaLR`` that ``transformers.get_scheduler`` makes, whose type and arguments are needed. The schedule is the
    whole one, from step 0 on and past the end as torch continues there. It gives the rate that the checkpoint stores as
    the last one within 1e-5, otherwise there is an error.

    Args:
      scheduler_state: what ``scheduler.state_dict()`` returned in torch 2, also after ``torch.load`` or JSON. Of
        Lightning, ``checkpoint["lr_schedulers"][0]``; of transformers' Trainer, the file ``scheduler.pt``.
      param_groups: the optimizer's ``param_groups``, or its whole checkpoint; ``OneCycleLR`` keeps its rates there.
        Where given, their ``lr`` must be the last rate that the scheduler stores.
      count: the optimizer steps taken, with which the scheduler's steps must agree; None where they are not known.
      steps_per_epoch: the optimizer steps in an epoch, for a scheduler that stepped at the end of each; None for one
        that stepped with the optimizer.
      lr_scheduler_type: for a ``LambdaLR`` of transformers: ``"linear"``, ``"cosine"``, ``"cosine_with_restarts"``,
        ``"polynomial"``, ``"constant"``, ``"constant_with_warmup"``, ``"inverse_sqrt"``, ``"cosine_with_min_lr"`` or
        ``"warmup_stable_decay"``.
      **arguments: those of ``transformers.get_scheduler``, ``num_warmup_steps`` and ``num_training_steps``, and those
        of the type, with its defaults; and ``lr_init``, the optimizer's own ``lr``, where ``"polynomial"`` or
        ``min_lr`` need it and groups differ in theirs.

    Returns:
      The schedule as data. It can be the ``learning_rate`` of any optimizer here.

    Raises:
      ValueError: another scheduler, or a combination that is not a function of the step alone; a formula that is not
        stored; ``count``, ``param_groups`` or the stored rates do not agree with the schedule.
      TypeError: a number is not a number.

    Examples:
      >>> from optax_nadam import compat
      >>> state = {"T_max": 10, "eta_min": 0.0, "base_lrs": [0.1], "last_epoch": 5, "_last_lr": [0.05]}
      >>> schedule = compat.torch.schedule_from(state, count=5000, steps_per_epoch=1000)
      >>> [f"{schedule(count):.2f}" for count in (0, 999, 5000, 10000)]
      ['0.10', '0.10', '0.05', '0.00']

    Source: ``torch/optim/lr_scheduler.py`` of torch 2.13 and ``transformers/optimization.py`` of transformers 5.
    """
    return schedules_of(scheduler_state, param_groups, count, steps_per_epoch, lr_scheduler_type, arguments)[0]


def schedules_of(
    scheduler_state: Mapping[str, Any],
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    count: int | None,
    steps_per_epoch: int | None = None,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[ScheduleConfig]:
    """The schedule of each group, as :func:`schedule_from`."""
    _check_source(scheduler_state)
    _check_name(scheduler_state, name, arguments or {})
    groups = _groups(param_groups, len(_first(scheduler_state, "base_lrs")))
    runs = [_Run(i, group, name, arguments or {}) for i, group in enumerate(groups)]
    schedules = [_translate(scheduler_state, run) for run in runs]
    _check_account(scheduler_state, schedules, groups)
    _check_counts(_first(scheduler_state, "last_epoch"), count, steps_per_epoch)
    return schedules if steps_per_epoch is None else [_per_epoch(x, steps_per_epoch) for x in schedules]


def _check_source(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(_SOURCE.format(got=type(state).__name__))
    if "patience" in state:
        raise ValueError(_PLATEAU)
    if not all(any(key in part for part in _parts(state)) for key in ("base_lrs", "last_epoch", "_last_lr")):
        raise ValueError(_SOURCE.format(got=f"the keys {sorted(map(str, state))[:10]}"))


def _check_name(state: Mapping[str, Any], name: str | None, arguments: Mapping[str, Any]) -> None:
    """Rejects a name where there is no LambdaLR to name, or several, and a LambdaLR without."""
    number = sum("lr_lambdas" in part for part in _parts(state))
    if number and name is None:
        raise ValueError(_NO_FORMULA.format(names=", ".join(map(repr, _TRANSFORMERS))))
    if name is None and arguments:
        raise ValueError(
            f"{', '.join(arguments)} are arguments of a transformers schedule: pass lr_scheduler_type= too."
        )
    if name is not None:
        validation.check_choice("lr_scheduler_type", name, _TRANSFORMERS)
        if number != 1:
            raise ValueError(_NO_LAMBDA.format(name=name, number=number, way=_FUNCTION if number else "leave it out."))


def _parts(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A state and those inside it."""
    return [state, *itertools.chain(*(_parts(part) for part in state.get("_schedulers", ())))]


def _first(state: Mapping[str, Any], key: str) -> Any:
    """An entry of a state, or of the first scheduler inside it where it has none itself."""
    return next(part[key] for part in _parts(state) if key in part)


def _groups(param_groups: Any, number: int) -> Sequence[Mapping[str, Any] | None]:
    if param_groups is None:
        return [None] * number
    groups = list(param_groups["param_groups"] if isinstance(param_groups, Mapping) else param_groups)
    if len(groups) != number:
        raise ValueError(f"param_groups are {len(groups)}, but scheduler_state is of an optimizer with {number}.")
    return groups


def _check_account(
    state: Mapping[str, Any], schedules: Sequence[ScheduleConfig], groups: Sequence[Mapping[str, Any] | None]
) -> None:
    """Rejects a schedule that does not give the last rates that the state stores, which groups have too."""
    count, rates = _first(state, "last_epoch"), [as_number(lr) for lr in state["_last_lr"]]
    bases = [as_number(lr) for lr in _first(state, "base_lrs")]
    for i, (schedule, group, base, stored) in enumerate(zip(schedules, groups, bases, rates, strict=True)):
        computed = _value(schedule, count)
        if not math.isclose(computed, stored, rel_tol=1e-5, abs_tol=1e-6 * abs(base)):
            raise ValueError(_ACCOUNT.format(stored=stored, group=i, count=count, computed=computed))
        lr = stored if group is None else as_number(group.get("lr", stored))
        if not math.isclose(lr, stored, rel_tol=1e-5, abs_tol=1e-6 * abs(base)):
            raise ValueError(_GROUP_RATE.format(group=i, lr=lr, stored=stored))


def check_log(schedule: ScheduleConfig, logged: Sequence[tuple[int, float]]) -> None:
    """Rejects a schedule that does not give up to twenty logged rates, before or after the scheduler's step."""
    for step, rate in logged[:: 1 + len(logged) // 20]:
        computed = [_value(schedule, count) for count in (step - 1, step)]
        largest = max(rate for _, rate in logged)
        if not any(math.isclose(x, rate, rel_tol=1e-5, abs_tol=1e-6 * largest) for x in computed):
            raise ValueError(_LOGGED.format(computed=computed[0], step=step, rate=rate))


def _value(schedule: ScheduleConfig, count: int) -> float:
    return float(np.asarray(schedule(count)))


def _check_counts(epochs: int, count: int | None, steps_per_epoch: int | None) -> None:
    """Rejects a scheduler whose steps are neither the optimizer's nor its epochs."""
    if steps_per_epoch is not None:
        validation.parse_positive_int("steps_per_epoch", steps_per_epoch)
    if count is not None and epochs != validation.parse_count("count", count) // (steps_per_epoch or 1):
        each = "" if steps_per_epoch is None else f", {steps_per_epoch} in an epoch"
        raise ValueError(_COUNTS.format(epochs=epochs, count=count, each=each))


def _translate(state: Mapping[str, Any], run: _Run, base: float | None = None) -> ScheduleConfig:
    """The schedule of a scheduler, with a base rate in place of its own if given."""
    _, translator = _kind(state)
    own = as_number(_first(state, "base_lrs")[run.place])
    return translator(state, own if base is None else base, run)


def _kind(state: Mapping[str, Any]) -> tuple[str, _Translator]:
    """A scheduler's name and translator, by its keys."""
    keys = set(state) - _BOOKKEEPING - _MOMENTUM
    for kind, (own, translator) in _KINDS.items():
        if keys == set(own.split()):
            return kind, translator
    raise ValueError(_UNKNOWN.format(keys=", ".join(sorted(keys)) or "of no scheduler", known=", ".join(_KINDS)))


def _polynomial(start: float, steps: float, end: float, power: float = 1.0) -> ScheduleConfig:
    """From start to end, and constant after."""
    if steps <= 0:
        return _constant(start)
    arguments = {"initial_learning_rate": start, "decay_steps": steps, "end_learning_rate": end, "power": power}
    return ScheduleConfig("polynomial_decay", arguments)


def _cosine(start: float, steps: float, end: float) -> ScheduleConfig:
    """From start to end and back again."""
    if steps <= 0:
        return _constant(start)
    arguments = {"initial_learning_rate": start, "half_period": steps, "end_learning_rate": end}
    return ScheduleConfig("cosine_annealing", arguments)


def _steps(boundaries: Sequence[float], values: Sequence[float]) -> ScheduleConfig:
    """Constants, each from its boundary on."""
    return ScheduleConfig("piecewise_constant", {"boundaries": [x - 1 for x in boundaries], "values": values})


def _constant(value: float) -> ScheduleConfig:
    return _steps([], [value])


def _exponential(base: float, steps: float, gamma: float, *, staircase: bool) -> ScheduleConfig:
    arguments = {"initial_learning_rate": base, "decay_steps": steps, "decay_rate": gamma, "staircase": staircase}
    return ScheduleConfig("exponential_decay", arguments)


def _joined(schedules: Sequence[ScheduleConfig], boundaries: Sequence[float]) -> ScheduleConfig:
    return ScheduleConfig("joined", {"schedules": schedules, "boundaries": boundaries})


def _product(schedules: Sequence[ScheduleConfig]) -> ScheduleConfig:
    return ScheduleConfig("product", {"schedules": schedules})


def _per_epoch(schedule: ScheduleConfig, steps_per_epoch: int) -> ScheduleConfig:
    return ScheduleConfig("per_epoch", {"schedule": schedule, "steps_per_epoch": steps_per_epoch})


def _multi_step(state: Mapping[str, Any], base: float, run: _Run) -> ScheduleConfig:
    """Its milestones are a Counter, whose keys JSON turns into strings."""
    times = sorted((int(float(milestone)), number) for milestone, number in state["milestones"].items())
    powers = itertools.accumulate((number for _, number in times), initial=0)
    return _steps([milestone for milestone, _ in times], [base * state["gamma"] ** power for power in powers])


def _warm_restarts(state: Mapping[str, Any], base: float, run: _Run) -> ScheduleConfig:
    if state["T_cur"] != int(state["T_cur"]):
        raise ValueError(f"scheduler_state stepped by fractions of an epoch, T_cur={state['T_cur']!r}: {_FUNCTION}")
    if state["eta_min"] and not base:
        raise ValueError(f"a learning rate of 0 that rises to eta_min={state['eta_min']!r} cannot be read: {_FUNCTION}")
    names = {"initial_learning_rate": base, "first_decay_steps": state["T_0"], "t_mul": state["T_mult"]}
    alpha = state["eta_min"] / base if state["eta_min"] else 0.0
    return ScheduleConfig("cosine_decay_restarts", {**names, "alpha": alpha})


def _one_cycle(state: Mapping[str, Any], base: float, run: _Run) -> ScheduleConfig:
    """Pieces between rates that stand in the group; the last one has a step more than its end."""
    if run.group is None or "max_lr" not in run.group:
        raise ValueError("OneCycleLR keeps its rates in the optimizer: pass param_groups=optimizer.param_groups.")
    ends = [phase["end_step"] for phase in state["_schedule_phases"]]
    lengths = [end - start for start, end in itertools.pairwise([0.0, *ends])]
    rates = [[as_number(run.group[x[key]]) for key in ("start_lr", "end_lr")] for x in state["_schedule_phases"]]
    if state["_anneal_func_type"] == "cos":
        pieces = [_cosine(start, length, end) for (start, end), length in zip(rates, lengths, strict=True)]
    else:
        pieces = [_line(start, length, end) for (start, end), length in zip(rates, lengths, strict=True)]
    return _joined(pieces, ends[:-1])


def _line(start: float, steps: float, end: float) -> ScheduleConfig:
    """From start to end and one step further: OneCycleLR takes as many steps as there are rates."""
    return _polynomial(start, steps + 1, start + (end - start) * (steps + 1) / steps) if steps > 0 else _constant(start)


def _sequential(state: Mapping[str, Any], base: float, run: _Run) -> ScheduleConfig:
    return _joined([_translate(part, run) for part in state["_schedulers"]], state["_milestones"])


def _chained(state: Mapping[str, Any], base: float, run: _Run) -> ScheduleConfig:
    """The product of schedulers that each multiply the rate that they find."""
    parts = state["_schedulers"]
    if len(parts) == 1:
        return _translate(parts[0], run)
    for part in parts:
        if _kind(part)[0] not in _FACTORS or part.get("eta_min"):
            raise ValueError(_CHAINED.format(kind=_kind(part)[0], why=" with eta_min" if part.get("eta_min") else ""))
    factors = [_translate(part, run, base=1.0) for part in parts]
    _check_bottoms(parts, factors)
    return _product([_translate(parts[0], run), *factors[1:]])


def _check_bottoms(parts: Sequence[Mapping[str, Any]], factors: Sequence[ScheduleConfig]) -> None:
    """Rejects a cosine whose others are not back at the base rate when it has fallen to 0: it rises from there."""
    for i, part in enumerate(parts):
        others = _product([*factors[:i], *factors[i + 1 :]])
        if "T_max" in part and not math.isclose(_value(others, part["T_max"]), 1.0, rel_tol=1e-5):
            raise ValueError(
                _CHAINED.format(kind=_kind(part)[0], why=" after T_max, where the others are below theirs")
            )


def _of_transformers(state: Mapping[str, Any], base: float, run: _Run) -> ScheduleConfig:
    """A formula that transformers gave to a LambdaLR."""
    assert run.name is not None
    function = _TRANSFORMERS[run.name]
    signature = inspect.signature(function)
    unused = {"num_warmup_steps", "num_training_steps"} - set(signature.parameters)  # get_scheduler takes them for all
    arguments = without(run.arguments, unused)
    if "lr_init" in signature.parameters and arguments.get("lr_init") is None:
        arguments["lr_init"] = base if len({as_number(lr) for lr in state["base_lrs"]}) == 1 else None
    try:
        bound = signature.bind(base, **arguments)
    except TypeError as error:
        known = ", ".join(str(x) for x in [*signature.parameters.values()][1:])
        raise ValueError(_ARGUMENTS.format(name=run.name, error=error, signature=known)) from None
    _check_numbers(bound.arguments)
    return function(*bound.args, **bound.kwargs)


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _TYPES and value is not None:
            check = validation.check_positive if name == "num_cycles" else validation.check_finite
            validation.check_static(name, value)
            check(name, value)


def _warmed_up(base: float, warmup: float, then: ScheduleConfig) -> ScheduleConfig:
    """A linear rise from 0, then another schedule."""
    return _joined([_polynomial(0.0, warmup, base), then], [warmup]) if warmup else then


def _of_base(rate: float, base: float, lr_init: float | None) -> float:
    """A rate that is given for the optimizer, for a group."""
    if lr_init is None:
        raise ValueError(_LR_INIT)
    return rate * (base / lr_init)


def _constant_with_warmup(base: float, num_warmup_steps: float) -> ScheduleConfig:
    return _warmed_up(base, num_warmup_steps, _constant(base))


def _linear(base: float, num_warmup_steps: float, num_training_steps: float) -> ScheduleConfig:
    steps = num_training_steps - num_warmup_steps
    return _warmed_up(base, num_warmup_steps, _polynomial(base if steps > 0 else 0.0, steps, 0.0))


def _cosine_with_warmup(
    base: float, num_warmup_steps: float, num_training_steps: float, num_cycles: float = 0.5
) -> ScheduleConfig:
    return _waves(base, num_warmup_steps, num_training_steps, num_cycles, 0.0)


def _waves(base: float, warmup: float, training: float, cycles: float, end: float) -> ScheduleConfig:
    return _warmed_up(base, warmup, _cosine(base, max(1, training - warmup) / (2 * cycles), end))


def _waves_to_minimum(
    base: float,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    lr_init: float | None = None,
) -> ScheduleConfig:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(f"one of min_lr and min_lr_rate is needed, got {min_lr!r} and {min_lr_rate!r}.")
    end = base * min_lr_rate if min_lr is None else _of_base(min_lr, base, lr_init)  # type: ignore[operator]
    return _waves(base, num_warmup_steps, num_training_steps, num_cycles, end)


def _hard_restarts(
    base: float, num_warmup_steps: float, num_training_steps: float, num_cycles: float = 1
) -> ScheduleConfig:
    """A piece for each cycle, since their length in steps may be a fraction."""
    steps = max(1, num_training_steps - num_warmup_steps)
    cycles, length = math.ceil(num_cycles), steps / num_cycles
    starts = [i * steps / num_cycles for i in range(cycles)]
    pieces = _joined([_cosine(base, length, 0.0)] * cycles + [_constant(0.0)], [*starts[1:], steps])
    return _warmed_up(base, num_warmup_steps, pieces)


def _to_power(
    base: float,
    num_warmup_steps: float,
    num_training_steps: float,
    lr_end: float = 1e-7,
    power: float = 1.0,
    lr_init: float | None = None,
) -> ScheduleConfig:
    fall = _polynomial(base, num_training_steps - num_warmup_steps, _of_base(lr_end, base, lr_init), power)
    return _warmed_up(base, num_warmup_steps, fall)


def _inverse_sqrt(base: float, num_warmup_steps: float, timescale: float | None = None) -> ScheduleConfig:
    scale = (num_warmup_steps or 10_000) if timescale is None else timescale
    fall = ScheduleConfig("inverse_sqrt", {"initial_learning_rate": base, "timescale": scale})
    return _warmed_up(base, num_warmup_steps, fall)


def _warmup_stable_decay(
    base: float,
    num_warmup_steps: float,
    num_decay_steps: float,
    num_training_steps: float | None = None,
    num_stable_steps: float | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
) -> ScheduleConfig:
    validation.check_choice("warmup_type", warmup_type, _TYPES["warmup_type"])
    validation.check_choice("decay_type", decay_type, _TYPES["decay_type"])
    low = base * min_lr_ratio
    rise = _TYPES["warmup_type"][warmup_type](low, num_warmup_steps, base)
    fall = _TYPES["decay_type"][decay_type](base, num_decay_steps, low, num_cycles)
    stable = _stable_steps(num_training_steps, num_stable_steps, num_warmup_steps + num_decay_steps)
    boundaries = itertools.accumulate([num_warmup_steps, stable, num_decay_steps])
    return _joined([rise, _constant(base), fall, _constant(low)], list(boundaries))


def _stable_steps(training: float | None, stable: float | None, others: float) -> float:
    """As given, or what the others leave."""
    if stable is None and training is None:
        raise ValueError("one of num_training_steps and num_stable_steps is needed, got neither.")
    return training - others if stable is None else stable  # type: ignore[operator]


def _root(start: float, steps: float, end: float) -> ScheduleConfig:
    """From start to end as 1 - sqrt."""
    arguments = {"initial_learning_rate": start, "decay_steps": steps, "end_learning_rate": end}
    return ScheduleConfig("one_minus_sqrt", arguments) if steps > 0 else _constant(start)


_TYPES: dict[str, dict[str, Callable[..., ScheduleConfig]]] = {
    "warmup_type": {
        "linear": _polynomial,
        "cosine": _cosine,
        "1-sqrt": lambda start, steps, end: _polynomial(start, steps, end, power=0.5),
    },
    "decay_type": {
        "linear": lambda start, steps, end, cycles: _polynomial(start, steps, end),
        "cosine": lambda start, steps, end, cycles: _cosine(start, steps / (2 * cycles), end),
        "1-sqrt": lambda start, steps, end, cycles: _root(start, steps, end),
    },
}
# By the name that transformers.get_scheduler takes: the formula with its arguments and defaults, after a base rate.
_TRANSFORMERS: dict[str, Callable[..., ScheduleConfig]] = {
    "linear": _linear,
    "cosine": _cosine_with_warmup,
    "cosine_with_restarts": _hard_restarts,
    "polynomial": _to_power,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _waves_to_minimum,
    "warmup_stable_decay": _warmup_stable_decay,
}
# By the scheduler: the keys that it alone has, and its translator.
_KINDS: dict[str, tuple[str, _Translator]] = {
    "ConstantLR": (
        "factor total_iters",
        lambda state, base, run: _steps([state["total_iters"]], [base * state["factor"], base]),
    ),
    "LinearLR": (
        "start_factor end_factor total_iters",
        lambda state, base, run: _polynomial(
            base * state["start_factor"], state["total_iters"], base * state["end_factor"]
        ),
    ),
    "StepLR": (
        "step_size gamma",
        lambda state, base, run: _exponential(base, state["step_size"], state["gamma"], staircase=True),
    ),
    "MultiStepLR": ("milestones gamma", _multi_step),
    "ExponentialLR": ("gamma", lambda state, base, run: _exponential(base, 1, state["gamma"], staircase=False)),
    "PolynomialLR": (
        "total_iters power",
        lambda state, base, run: _polynomial(base, state["total_iters"], 0.0, state["power"]),
    ),
    "CosineAnnealingLR": ("T_max eta_min", lambda state, base, run: _cosine(base, state["T_max"], state["eta_min"])),
    "CosineAnnealingWarmRestarts": ("T_0 T_i T_mult eta_min T_cur", _warm_restarts),
    "OneCycleLR": ("total_steps _schedule_phases _anneal_func_type", _one_cycle),
    "SequentialLR": ("_schedulers _milestones", _sequential),
    "ChainedScheduler": ("_schedulers", _chained),
    "LambdaLR": ("lr_lambdas", _of_transformers),
}
# Those that multiply the rate that they find.
_FACTORS = frozenset(str.split("ConstantLR LinearLR StepLR MultiStepLR ExponentialLR PolynomialLR CosineAnnealingLR"))
