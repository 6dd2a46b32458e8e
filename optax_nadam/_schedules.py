"""Learning rate schedules as data: a name and arguments that build an Optax schedule.

Schedules of Optax are called; those it does not have (restarts at any count, cycles, inverse time) are written here. A
schedule maps the steps taken so far, 0 at first, to the learning rate.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike

from optax_nadam import _validation as validation

_NOT_A_NUMBER_OR_SCHEDULE = (
    "{name} must be a number, a scalar array, an optax.Schedule or an optax_nadam.ScheduleConfig, got {value!r}."
)
_NOT_DATA = (
    "schedule {schedule!r} got {name}={value!r}; it must be {kind}. Use numbers, not tensors. A"
    " function of the steps can be passed as learning_rate itself."
)
_MOST_RESTARTS = 10_000  # of unequal cosines; the rate then stays at the last one's end
_MOST_STEPS = 2**31  # of an optimizer's counter


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A learning rate schedule as data: a name and arguments. It is accepted wherever a learning rate is.

    ============================= ====================================================================================
    name                          arguments
    ============================= ====================================================================================
    ``exponential_decay``         ``initial_learning_rate, decay_steps, decay_rate, staircase=False``
    ``inverse_time_decay``        ``initial_learning_rate, decay_steps, decay_rate, staircase=False``
    ``polynomial_decay``          ``initial_learning_rate, decay_steps, end_learning_rate=1e-4, power=1.0, cycle=False``
    ``piecewise_constant``        ``boundaries, values``
    ``cosine_decay``              ``initial_learning_rate, decay_steps, alpha=0.0, warmup_target=None, warmup_steps=0``
    ``cosine_decay_restarts``     ``initial_learning_rate, first_decay_steps, t_mul=2.0, m_mul=1.0, alpha=0.0``
    ``cosine_annealing``          ``initial_learning_rate, half_period, end_learning_rate=0.0``
    ``inverse_sqrt``              ``initial_learning_rate, timescale``
    ``one_minus_sqrt``            ``initial_learning_rate, decay_steps, end_learning_rate=0.0``
    ``joined``                    ``schedules, boundaries``
    ``product``                   ``schedules``
    ``per_epoch``                 ``schedule, steps_per_epoch``
    ============================= ====================================================================================

    The first six, and the names of their arguments, are those of ``keras.optimizers.schedules``. Then:
    ``cosine_annealing`` is a cosine that falls for ``half_period`` steps, rises as long, and so on, as torch's
    ``CosineAnnealingLR``; ``inverse_sqrt`` is the initial rate over ``sqrt(1 + count / timescale)``;
    ``one_minus_sqrt`` falls from the initial to the end rate as ``1 - sqrt(count / decay_steps)``, and stays there.
    ``joined`` follows its schedules one after the other, as ``optax.join_schedules``, each from 0 at its boundary;
    ``product`` multiplies them; ``per_epoch`` holds a schedule of epochs, so that the rate changes at the end of each.
    A schedule inside another is a config too, or the dict of its ``name`` and ``arguments``. Boundaries may be
    fractions. Two configs with equal arguments are equal and have the same hash, so a config may be a static argument
    of ``jax.jit``.

    Attributes:
      name: one of the names above.
      arguments: the schedule's arguments by name: numbers, booleans, None, configs, and sequences of numbers or
        configs.

    Raises:
      ValueError: an unknown name; an argument that is unknown or missing; a number that is not finite, or out of range.
      TypeError: an argument of another type.

    Examples:
      >>> import optax_nadam
      >>> halving = optax_nadam.ScheduleConfig("piecewise_constant", {"boundaries": [9], "values": [0.1, 0.05]})
      >>> [f"{halving.build()(count):.2f}" for count in (0, 9, 10)]
      ['0.10', '0.10', '0.05']
      >>> tx = optax_nadam.nadam(halving)

      A linear rise, then a cosine of epochs:

      >>> rise = optax_nadam.ScheduleConfig(
      ...     "polynomial_decay", {"initial_learning_rate": 0.0, "decay_steps": 5, "end_learning_rate": 0.1})
      >>> cosine = optax_nadam.ScheduleConfig("cosine_annealing", {"initial_learning_rate": 0.1, "half_period": 20})
      >>> both = optax_nadam.ScheduleConfig("joined", {"schedules": [rise, cosine], "boundaries": [5]})
      >>> schedule = optax_nadam.ScheduleConfig("per_epoch", {"schedule": both, "steps_per_epoch": 1000})
      >>> [f"{schedule(count):.2f}" for count in (0, 999, 1000, 5000, 25000)]
      ['0.00', '0.00', '0.02', '0.10', '0.00']

    Source: https://keras.io/api/optimizers/learning_rate_schedules/, ``torch/optim/lr_scheduler.py`` of torch 2.13 and
    ``transformers/optimization.py``.
    """

    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks the name and the arguments, which become plain: tuples, Python numbers, and configs."""
        validation.check_choice("name of a schedule", self.name, SCHEDULES)
        signature = inspect.signature(SCHEDULES[self.name])
        try:
            signature.bind(**self.arguments)
        except TypeError as error:
            raise ValueError(f"schedule {self.name!r} got arguments that do not fit: {error}.") from None
        kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        plain = {key: _parse_argument(self.name, key, kinds[key], value) for key, value in self.arguments.items()}
        object.__setattr__(self, "arguments", plain)
        self.build()

    def __hash__(self) -> int:
        """Equal for equal configs."""
        return hash((self.name, frozenset(self.arguments.items())))

    def build(self) -> optax.Schedule:
        """The schedule as a function of the steps taken so far."""
        return SCHEDULES[self.name](**self.arguments)

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The learning rate after ``count`` steps: a config is a schedule itself."""
        return self.build()(count)


def _is_number(value: Any) -> bool:
    return validation.is_number(value) and not isinstance(value, bool)


def _is_config(value: Any) -> bool:
    return isinstance(value, ScheduleConfig) or (isinstance(value, Mapping) and set(value) == {"name", "arguments"})


def _all(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(is_one, value))


# What an argument may be, by its annotation.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", _is_number),
    float | None: ("a number or None", lambda value: value is None or _is_number(value)),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    Sequence[float]: ("a sequence of numbers", _all(_is_number)),
    ScheduleConfig: ("a ScheduleConfig", _is_config),
    Sequence[ScheduleConfig]: ("a sequence of ScheduleConfigs", _all(_is_config)),
}


def _parse_argument(schedule: str, name: str, annotation: Any, value: Any) -> Any:
    kind, fits = _KINDS[annotation]
    if not fits(value):
        raise TypeError(_NOT_DATA.format(schedule=schedule, name=name, value=value, kind=kind))
    return _plain(f"{name} of schedule {schedule!r}", value)


def _plain(name: str, value: Any) -> Any:
    """A value as Python's own, hashable and ready for JSON."""
    if isinstance(value, Mapping):
        return ScheduleConfig(**value)
    if isinstance(value, list | tuple):
        return tuple(_plain(name, x) for x in value)
    if validation.is_number(value):
        validation.check_finite(name, value)
    return value.item() if isinstance(value, np.generic) else value


def parse_learning_rate(value: Any) -> optax.ScalarOrSchedule:
    """A finite number, a scalar array, or a schedule that returns scalars. A negative one ascends, as in Optax."""
    return _parse("learning_rate", value, validation.check_finite)


def parse_weight_decay(value: Any) -> optax.ScalarOrSchedule:
    """A number that is not negative, a scalar array, or a schedule that returns scalars."""
    return _parse("weight_decay", value, validation.check_not_negative)


def _parse(name: str, value: Any, check: Callable[[str, Any], None]) -> Any:
    if isinstance(value, ScheduleConfig):
        return value.build()
    if callable(value):
        return _scalar_valued(name, value)
    if not (validation.is_number(value) or isinstance(value, jax.Array | np.ndarray)):
        raise TypeError(_NOT_A_NUMBER_OR_SCHEDULE.format(name=name, value=value))
    check(name, value)
    return value


def _scalar_valued(name: str, schedule: optax.Schedule) -> optax.Schedule:
    """The schedule, with a check that its values are scalars: an array would broadcast scalar params."""

    def scalar_valued(count: ArrayLike) -> ArrayLike:
        value = schedule(count)
        validation.check_scalar(f"what the {name.replace('_', ' ')} schedule returns", value)
        return value

    return scalar_valued


def exponential_decay(
    initial_learning_rate: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> optax.Schedule:
    """The initial learning rate times ``decay_rate ** (count / decay_steps)``; with ``staircase``, whole powers."""
    validation.check_positive("decay_steps", decay_steps)
    return lambda count: initial_learning_rate * _power(decay_rate, _periods(count, decay_steps, staircase))


def inverse_time_decay(
    initial_learning_rate: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> optax.Schedule:
    """The initial learning rate over ``1 + decay_rate * count / decay_steps``; with ``staircase``, whole quotients."""
    validation.check_positive("decay_steps", decay_steps)
    return lambda count: initial_learning_rate / (1 + decay_rate * _periods(count, decay_steps, staircase))


def _periods(count: ArrayLike, steps: float, whole: bool = False) -> jax.Array:
    count = jnp.asarray(count, float)
    return count // steps if whole else count / steps


def _power(base: float, exponent: jax.Array) -> jax.Array:
    """``base ** exponent`` with the logarithm in double precision: 0.9999 in float32 is off by 2e-5 in 1000 steps."""
    return jnp.exp(math.log(base) * exponent) if base > 0 else jnp.power(base, exponent)


def polynomial_decay(
    initial_learning_rate: float,
    decay_steps: float,
    end_learning_rate: float = 1e-4,
    power: float = 1.0,
    cycle: bool = False,
) -> optax.Schedule:
    """From the initial to the end learning rate as ``(1 - count / decay_steps) ** power``.

    With ``cycle`` the decay is stretched to the next multiple of ``decay_steps`` each time it ends.
    """
    validation.check_positive("decay_steps", decay_steps)

    def schedule(count: ArrayLike) -> jax.Array:
        periods = _periods(count, decay_steps)
        done = periods / jnp.maximum(1.0, jnp.ceil(periods)) if cycle else jnp.minimum(periods, 1.0)
        return end_learning_rate + (initial_learning_rate - end_learning_rate) * (1 - done) ** power

    return schedule


def piecewise_constant(boundaries: Sequence[float], values: Sequence[float]) -> optax.Schedule:
    """The first value up to and including the first boundary, then the next; one value for a constant."""
    _check_pieces("values", values, boundaries)
    constants = [optax.constant_schedule(value) for value in values]
    return optax.join_schedules(constants, [math.floor(boundary) + 1 for boundary in boundaries])


def _check_pieces(name: str, pieces: Sequence[Any], boundaries: Sequence[float]) -> None:
    if len(pieces) != len(boundaries) + 1:
        raise ValueError(f"{name} must be one more than boundaries, got {len(pieces)} and {len(boundaries)}.")


def cosine_decay(
    initial_learning_rate: float,
    decay_steps: float,
    alpha: float = 0.0,
    warmup_target: float | None = None,
    warmup_steps: float = 0,
) -> optax.Schedule:
    """Half a cosine down to ``alpha`` times its start, after a linear rise to ``warmup_target`` if given."""
    steps: Any = decay_steps
    if warmup_target is None:
        return optax.cosine_decay_schedule(initial_learning_rate, steps, alpha)
    decay = optax.cosine_decay_schedule(warmup_target, steps, alpha)
    return _join([polynomial_decay(initial_learning_rate, max(1, warmup_steps), warmup_target), decay], [warmup_steps])


def _join(schedules: Sequence[optax.Schedule], boundaries: Sequence[Any]) -> optax.Schedule:
    """Optax's, which is for whole boundaries; a count is a float before it meets a fraction."""
    joined_at = optax.join_schedules(schedules, boundaries)
    if all(isinstance(boundary, int) for boundary in boundaries):
        return joined_at
    return lambda count: joined_at(jnp.asarray(count, float))


def cosine_decay_restarts(
    initial_learning_rate: float, first_decay_steps: float, t_mul: float = 2.0, m_mul: float = 1.0, alpha: float = 0.0
) -> optax.Schedule:
    """Cosines, each ``t_mul`` times as long and ``m_mul`` times as high as the one before."""
    validation.check_positive("first_decay_steps", first_decay_steps)
    validation.check_positive("t_mul", t_mul)
    starts, lengths = _cosines(first_decay_steps, t_mul)

    def schedule(count: ArrayLike) -> jax.Array:
        count = jnp.asarray(count, float)
        if t_mul == 1:
            restarts, since = jnp.divmod(count, first_decay_steps)
            done = since / first_decay_steps
        else:
            index = jnp.searchsorted(jnp.asarray(starts[1:], float), count, side="right")
            since = count - jnp.asarray(starts, float)[index]
            restarts, done = index.astype(float), jnp.minimum(since / jnp.asarray(lengths, float)[index], 1.0)
        cosine = 0.5 * _power(m_mul, restarts) * (1 + jnp.cos(math.pi * done))
        return initial_learning_rate * ((1 - alpha) * cosine + alpha)

    return schedule


def _cosines(first_decay_steps: float, t_mul: float) -> tuple[list[float], list[float]]:
    """The counts at which the cosines start, and their lengths: a logarithm in float32 is off by one at a restart."""
    starts, lengths = [0.0], [float(first_decay_steps)]
    while t_mul != 1 and starts[-1] + lengths[-1] < _MOST_STEPS and len(starts) < _MOST_RESTARTS:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * t_mul)
    return starts, lengths


def cosine_annealing(
    initial_learning_rate: float, half_period: float, end_learning_rate: float = 0.0
) -> optax.Schedule:
    """A cosine from the initial to the end learning rate in half a period, and back again, without end."""
    validation.check_positive("half_period", half_period)

    def schedule(count: ArrayLike) -> jax.Array:
        done = jnp.asarray(count, float) % (2 * half_period) / half_period
        return end_learning_rate + (initial_learning_rate - end_learning_rate) * (1 + jnp.cos(math.pi * done)) / 2

    return schedule


def inverse_sqrt(initial_learning_rate: float, timescale: float) -> optax.Schedule:
    """The initial learning rate over ``sqrt(1 + count / timescale)``."""
    validation.check_positive("timescale", timescale)
    return lambda count: initial_learning_rate / jnp.sqrt(1 + jnp.maximum(_periods(count, timescale), 0.0))


def one_minus_sqrt(initial_learning_rate: float, decay_steps: float, end_learning_rate: float = 0.0) -> optax.Schedule:
    """From the initial to the end learning rate as ``1 - sqrt(count / decay_steps)``."""
    validation.check_positive("decay_steps", decay_steps)
    fall = initial_learning_rate - end_learning_rate
    return lambda count: initial_learning_rate - fall * jnp.sqrt(jnp.clip(_periods(count, decay_steps), 0.0, 1.0))


def joined(schedules: Sequence[ScheduleConfig], boundaries: Sequence[float]) -> optax.Schedule:
    """One schedule after the other, each as a function of the steps since its boundary."""
    _check_pieces("schedules", schedules, boundaries)
    return _join([schedule.build() for schedule in schedules], boundaries)


def product(schedules: Sequence[ScheduleConfig]) -> optax.Schedule:
    """The product of the schedules."""
    factors = [schedule.build() for schedule in schedules]
    return lambda count: math.prod(factor(count) for factor in factors)


def per_epoch(schedule: ScheduleConfig, steps_per_epoch: float) -> optax.Schedule:
    """A schedule as a function of the epochs ended so far."""
    validation.parse_positive_int("steps_per_epoch", steps_per_epoch)
    of_epochs = schedule.build()
    return lambda count: of_epochs(jnp.asarray(count) // steps_per_epoch)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    schedule.__name__: schedule
    for schedule in (
        exponential_decay,
        inverse_time_decay,
        polynomial_decay,
        piecewise_constant,
        cosine_decay,
        cosine_decay_restarts,
        cosine_annealing,
        inverse_sqrt,
        one_minus_sqrt,
        joined,
        product,
        per_epoch,
    )
}
