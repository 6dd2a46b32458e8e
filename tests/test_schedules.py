"""Schedules as data: their values by the formulas, and their errors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import ScheduleConfig

pytestmark = pytest.mark.lenient("Optax's schedules mix dtypes")
COUNTS = np.arange(0, 60)


def half_cosine(done):
    return 0.5 * (1 + math.cos(math.pi * done))


def restarted(count, t_mul, m_mul):
    length, start, height = 10.0, 0.0, 1.0
    while count >= start + length:
        start, length, height = start + length, length * t_mul, height * m_mul
    return height * half_cosine((count - start) / length)


CASES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "exponential_decay": (
        {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8},
        lambda t: 0.5 * 0.8 ** (t / 7),
    ),
    "exponential_decay, staircase": (
        {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8, "staircase": True},
        lambda t: 0.5 * 0.8 ** (t // 7),
    ),
    "inverse_time_decay": (
        {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8},
        lambda t: 0.5 / (1 + 0.8 * t / 7),
    ),
    "inverse_time_decay, staircase": (
        {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8, "staircase": True},
        lambda t: 0.5 / (1 + 0.8 * (t // 7)),
    ),
    "polynomial_decay": (
        {"initial_learning_rate": 0.5, "decay_steps": 20, "end_learning_rate": 0.1, "power": 2.0},
        lambda t: 0.1 + 0.4 * (1 - min(t, 20) / 20) ** 2,
    ),
    "polynomial_decay, cycle": (
        {"initial_learning_rate": 0.5, "decay_steps": 20, "end_learning_rate": 0.1, "power": 1.0, "cycle": True},
        lambda t: 0.1 + 0.4 * (1 - t / (20 * max(1, math.ceil(t / 20)))),
    ),
    "piecewise_constant": (
        {"boundaries": [10, 30], "values": [0.5, 0.0, 0.1]},
        lambda t: 0.5 if t <= 10 else 0.0 if t <= 30 else 0.1,
    ),
    "cosine_decay": (
        {"initial_learning_rate": 0.5, "decay_steps": 40, "alpha": 0.1},
        lambda t: 0.5 * (0.9 * half_cosine(min(t, 40) / 40) + 0.1),
    ),
    "cosine_decay, warmup": (
        {"initial_learning_rate": 0.1, "decay_steps": 40, "alpha": 0.1, "warmup_target": 0.5, "warmup_steps": 8},
        lambda t: 0.1 + 0.4 * t / 8 if t < 8 else 0.5 * (0.9 * half_cosine(min(t - 8, 40) / 40) + 0.1),
    ),
    "cosine_decay_restarts": (
        {"initial_learning_rate": 0.5, "first_decay_steps": 10, "m_mul": 0.7, "alpha": 0.1},
        lambda t: 0.5 * (0.9 * restarted(t, 2.0, 0.7) + 0.1),
    ),
    "cosine_decay_restarts, same length": (
        {"initial_learning_rate": 0.5, "first_decay_steps": 10, "t_mul": 1.0},
        lambda t: 0.5 * restarted(t, 1.0, 1.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_follow_the_formula(case):
    arguments, formula = CASES[case]
    schedule = ScheduleConfig(case.split(",")[0], arguments).build()
    got = [float(schedule(jnp.int32(t))) for t in COUNTS]
    np.testing.assert_allclose(got, [formula(int(t)) for t in COUNTS], rtol=1e-5, atol=2e-7)


def test_unknown_schedules_and_arguments_are_rejected():
    with pytest.raises(ValueError, match=r"name of a schedule must be one of 'exponential_decay'.*got 'linear'"):
        ScheduleConfig("linear", {})
    with pytest.raises(ValueError, match=r"schedule 'cosine_decay' got arguments that do not fit.*decay_steps"):
        ScheduleConfig("cosine_decay", {"initial_learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"schedule 'cosine_decay'.*rate"):
        ScheduleConfig("cosine_decay", {"initial_learning_rate": 0.1, "decay_steps": 10, "rate": 1.0})


def test_a_config_is_a_schedule_itself():
    config = ScheduleConfig("exponential_decay", {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.5})
    for count in (0, 5, 12):
        np.testing.assert_array_equal(config(count), config.build()(count))
