"""Learning rate schedules as data: a name and arguments that build an Optax schedule.

Schedules of Optax are called; those it does not have (unlimited restarts, cycles, inverse time) are written here. A
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
    ============================= ====================================================================================

    The names of the arguments, and what they mean, are those of ``keras.optimizers.schedules``. Two configs with equal
    arguments are equal and have the same hash, so a config may be a static argument of ``jax.jit``.

    Attributes:
      name: one of the names above.
      arguments: the schedule's arguments by name: numbers, booleans, None, and sequences of numbers.

    Raises:
      ValueError: an unknown name, or an argument that is unknown or missing.

    Examples:
      >>> import optax_nadam
      >>> halving = optax_nadam.ScheduleConfig("piecewise_constant", {"boundaries": [9], "values": [0.1, 0.05]})
      >>> [f"{halving.build()(count):.2f}" for count in (0, 9, 10)]
      ['0.10', '0.10', '0.05']
      >>> tx = optax_nadam.nadam(halving)

    Source: https://keras.io/api/optimizers/learning_rate_schedules/
    """

    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks the name and the arguments' names; sequences become tuples."""
        validation.check_choice("name of a schedule", self.name, SCHEDULES)
        plain = {key: tuple(x) if isinstance(x, list) else x for key, x in self.arguments.items()}
        object.__setattr__(self, "arguments", plain)
        try:
            inspect.signature(SCHEDULES[self.name]).bind(**plain)
        except TypeError as error:
            raise ValueError(f"schedule {self.name!r} got arguments that do not fit: {error}.") from None

    def __hash__(self) -> int:
        """Equal for equal configs."""
        return hash((self.name, frozenset(self.arguments.items())))

    def build(self) -> optax.Schedule:
        """The schedule as a function of the steps taken so far."""
        return SCHEDULES[self.name](**self.arguments)

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The learning rate after ``count`` steps: a config is a schedule itself."""
        return self.build()(count)


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
    initial_learning_rate: float, decay_steps: Any, decay_rate: float, staircase: bool = False
) -> optax.Schedule:
    """The initial learning rate times ``decay_rate ** (count / decay_steps)``; with ``staircase``, whole powers."""
    return optax.exponential_decay(initial_learning_rate, decay_steps, decay_rate, staircase=staircase)


def inverse_time_decay(
    initial_learning_rate: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> optax.Schedule:
    """The initial learning rate over ``1 + decay_rate * count / decay_steps``; with ``staircase``, whole quotients."""

    def schedule(count: ArrayLike) -> jax.Array:
        periods = jnp.asarray(count, float) / decay_steps
        return initial_learning_rate / (1 + decay_rate * (jnp.floor(periods) if staircase else periods))

    return schedule


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

    def schedule(count: ArrayLike) -> jax.Array:
        periods = jnp.asarray(count, float) / decay_steps
        done = periods / jnp.maximum(1.0, jnp.ceil(periods)) if cycle else jnp.minimum(periods, 1.0)
        return end_learning_rate + (initial_learning_rate - end_learning_rate) * (1 - done) ** power

    return schedule


def piecewise_constant(boundaries: Sequence[int], values: Sequence[float]) -> optax.Schedule:
    """The first value up to and including the first boundary, then the next."""
    constants = [optax.constant_schedule(value) for value in values]
    return optax.join_schedules(constants, [boundary + 1 for boundary in boundaries])


def cosine_decay(
    initial_learning_rate: float,
    decay_steps: Any,
    alpha: float = 0.0,
    warmup_target: float | None = None,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Half a cosine down to ``alpha`` times its start, after a linear rise to ``warmup_target`` if given."""
    if warmup_target is None:
        return optax.cosine_decay_schedule(initial_learning_rate, decay_steps, alpha)
    warmup = optax.linear_schedule(initial_learning_rate, warmup_target, max(1, warmup_steps))
    return optax.join_schedules(
        [warmup, optax.cosine_decay_schedule(warmup_target, decay_steps, alpha)], [warmup_steps]
    )


def cosine_decay_restarts(
    initial_learning_rate: float, first_decay_steps: float, t_mul: float = 2.0, m_mul: float = 1.0, alpha: float = 0.0
) -> optax.Schedule:
    """Cosines, each ``t_mul`` times as long and ``m_mul`` times as high as the one before."""

    def schedule(count: ArrayLike) -> jax.Array:
        periods = jnp.asarray(count, float) / first_decay_steps
        if t_mul == 1:
            restarts = jnp.floor(periods)
            done = periods - restarts
        else:
            restarts = jnp.floor(jnp.log(1 - periods * (1 - t_mul)) / math.log(t_mul))
            done = (periods - (1 - t_mul**restarts) / (1 - t_mul)) / t_mul**restarts
        cosine = 0.5 * m_mul**restarts * (1 + jnp.cos(math.pi * done))
        return initial_learning_rate * ((1 - alpha) * cosine + alpha)

    return schedule


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    schedule.__name__: schedule
    for schedule in (
        exponential_decay,
        inverse_time_decay,
        polynomial_decay,
        piecewise_constant,
        cosine_decay,
        cosine_decay_restarts,
    )
}
