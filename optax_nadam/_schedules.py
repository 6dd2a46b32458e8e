"""Learning rate schedules as data: a name and arguments, that build an Optax schedule.

What Optax has is called; what it has not (restarts without end, cycles, inverse time) is written here. A schedule
maps the steps taken so far, 0 at first, to the learning rate.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate schedule by name.

    Attributes:
      name: one of the schedules of this module.
      arguments: its arguments by name, plain data.

    Raises:
      ValueError: an unknown name, or an argument that the schedule does not have or lacks.
    """

    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks the name and the arguments' names."""
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {self.name!r}.")
        try:
            inspect.signature(SCHEDULES[self.name]).bind(**self.arguments)
        except TypeError as error:
            raise ValueError(f"schedule {self.name!r} got arguments that do not fit: {error}.") from None

    def build(self) -> optax.Schedule:
        """The schedule as a function of the steps taken."""
        return SCHEDULES[self.name](**self.arguments)


def exponential_decay(
    initial_learning_rate: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> optax.Schedule:
    """The initial rate times ``decay_rate ** (count / decay_steps)``; a staircase takes whole powers."""
    return optax.exponential_decay(initial_learning_rate, decay_steps, decay_rate, staircase=staircase)


def inverse_time_decay(
    initial_learning_rate: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> optax.Schedule:
    """The initial rate over ``1 + decay_rate * count / decay_steps``; a staircase takes whole quotients."""

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
    """From the initial rate to the end rate as ``(1 - count / decay_steps) ** power``.

    With ``cycle`` the decay is stretched to the next multiple of ``decay_steps`` each time it has ended.
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
    decay_steps: float,
    alpha: float = 0.0,
    warmup_target: float | None = None,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Half a cosine from the initial rate to ``alpha`` times it, after a linear rise to ``warmup_target`` if given."""
    if warmup_target is None:
        return optax.cosine_decay_schedule(initial_learning_rate, decay_steps, alpha)
    warmup = optax.linear_schedule(initial_learning_rate, warmup_target, max(1, warmup_steps))
    return optax.join_schedules(
        [warmup, optax.cosine_decay_schedule(warmup_target, decay_steps, alpha)], [warmup_steps]
    )


def cosine_decay_restarts(
    initial_learning_rate: float, first_decay_steps: float, t_mul: float = 2.0, m_mul: float = 1.0, alpha: float = 0.0
) -> optax.Schedule:
    """Cosines from the initial rate, each ``t_mul`` times as long and ``m_mul`` times as high as the one before."""

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
