"""Schedules as data.

- Values follow the formulas, within 1e-5, for every name and argument; unknown ones are refused.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from optax_nadam import ScheduleConfig

pytestmark = pytest.mark.lenient("Optax's schedules mix dtypes")
COUNTS = np.arange(60)


def half_cosine(done):
    return 0.5 * (1 + math.cos(math.pi * done))


def restarted(count, t_mul, m_mul):
    length, start, height = 10.0, 0.0, 1.0
    while count >= start + length:
        start, length, height = start + length, length * t_mul, height * m_mul
    return height * half_cosine((count - start) / length)


DECAY: dict[str, Any] = {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8}
CASES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "exponential_decay": (DECAY, lambda t: 0.5 * 0.8 ** (t / 7)),
    "exponential_decay, staircase": (DECAY | {"staircase": True}, lambda t: 0.5 * 0.8 ** (t // 7)),
    "inverse_time_decay": (DECAY, lambda t: 0.5 / (1 + 0.8 * t / 7)),
    "inverse_time_decay, staircase": (DECAY | {"staircase": True}, lambda t: 0.5 / (1 + 0.8 * (t // 7))),
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
def test_values_by_formula(case):
    """A config is a schedule itself, and builds one."""
    arguments, formula = CASES[case]
    config = ScheduleConfig(case.split(",")[0], arguments)
    expected = [formula(int(t)) for t in COUNTS]
    for schedule in (config, config.build()):
        np.testing.assert_allclose(jax.vmap(schedule)(COUNTS), expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("linear", {}, r"name of a schedule must be one of 'exponential_decay'.*got 'linear'"),
        ("cosine_decay", {"decay_steps": 1}, r"schedule 'cosine_decay' got arguments that do not fit.*initial_lea"),
        ("exponential_decay", DECAY | {"rate": 1.0}, r"schedule 'exponential_decay'.*rate"),
    ],
)
def test_unknown_arguments(name, arguments, text):
    with pytest.raises(ValueError, match=text):
        ScheduleConfig(name, arguments)
