"""Schedules as data.

- Values follow the formulas, within 1e-5, for every name and argument; also after many steps, and at each restart.
- Configs inside configs are data too; what is not, or is unknown, is refused.
"""

import dataclasses
import json
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


def config(name, **arguments):
    return ScheduleConfig(name, arguments)


RISE = config("polynomial_decay", initial_learning_rate=0.0, decay_steps=10, end_learning_rate=0.5)
FALL = config("inverse_sqrt", initial_learning_rate=0.5, timescale=4)
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
    "piecewise_constant, fractions": (
        {"boundaries": [9.5, 30.0], "values": [0.5, 0.0, 0.1]},
        lambda t: 0.5 if t <= 9 else 0.0 if t <= 30 else 0.1,
    ),
    "piecewise_constant, one value": ({"boundaries": [], "values": [0.5]}, lambda t: 0.5),
    "cosine_annealing": (
        {"initial_learning_rate": 0.5, "half_period": 12.5, "end_learning_rate": 0.1},
        lambda t: 0.1 + 0.4 * half_cosine(t / 12.5),
    ),
    "inverse_sqrt": ({"initial_learning_rate": 0.5, "timescale": 4}, lambda t: 0.5 / math.sqrt(1 + t / 4)),
    "one_minus_sqrt": (
        {"initial_learning_rate": 0.5, "decay_steps": 40, "end_learning_rate": 0.1},
        lambda t: 0.5 - 0.4 * math.sqrt(min(t, 40) / 40),
    ),
    "joined": (
        {"schedules": [RISE, FALL], "boundaries": [7.5]},
        lambda t: 0.05 * t if t < 7.5 else 0.5 / math.sqrt(1 + (t - 7.5) / 4),
    ),
    "product": (
        {"schedules": (RISE, FALL, FALL)},
        lambda t: 0.05 * min(t, 10) * 0.25 / (1 + t / 4),
    ),
    "per_epoch": ({"schedule": RISE, "steps_per_epoch": 7}, lambda t: 0.05 * min(t // 7, 10)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_by_formula(case):
    """A config is a schedule itself, and builds one."""
    arguments, formula = CASES[case]
    schedule_config = ScheduleConfig(case.split(",")[0], arguments)
    expected = [formula(int(t)) for t in COUNTS]
    for schedule in (schedule_config, schedule_config.build()):
        with jax.debug_nans(True):  # pieces that are not used yet are computed too
            got = jax.vmap(schedule)(COUNTS)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("t_mul", [1, 2, 3])
def test_every_restart(t_mul):
    """Up to a million steps, counted in whole numbers: a logarithm, even in float64, is off by one at some."""
    first, counts = 10, np.arange(10**6 + 1)
    starts = np.cumsum([0] + [first * t_mul**n for n in range(10**5 + 1 if t_mul == 1 else 20)])
    restarts = np.searchsorted(starts, counts, side="right") - 1
    expected = 0.5 * (1 + np.cos(np.pi * (counts - starts[restarts]) / (first * t_mul**restarts)))
    schedule = config("cosine_decay_restarts", initial_learning_rate=1.0, first_decay_steps=first, t_mul=t_mul)
    np.testing.assert_allclose(jax.jit(schedule.build())(counts), expected, rtol=0, atol=3e-7)


def test_slow_decay():
    """A decay rate near 1 is not rounded to float32, which would be off by 1e-4 in the end."""
    counts = np.arange(0, 10**5, 500)
    schedule = config("exponential_decay", initial_learning_rate=1.0, decay_steps=1, decay_rate=0.9999)
    np.testing.assert_allclose(jax.jit(schedule.build())(counts), 0.9999**counts, rtol=0, atol=3e-7)


def test_nested_configs_are_data():
    inner = config("joined", schedules=[RISE, FALL], boundaries=np.array([7.5, 0.0])[:1].tolist())
    outer = config("per_epoch", schedule=inner, steps_per_epoch=np.int64(3))
    back = ScheduleConfig(**json.loads(json.dumps(dataclasses.asdict(outer))))
    assert back == outer
    assert hash(back) == hash(outer)
    assert back != config("per_epoch", schedule=RISE, steps_per_epoch=3)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("linear", {}, r"name of a schedule must be one of 'exponential_decay'.*got 'linear'"),
        ("cosine_decay", {"decay_steps": 1}, r"schedule 'cosine_decay' got arguments that do not fit.*initial_lea"),
        ("exponential_decay", DECAY | {"rate": 1.0}, r"schedule 'exponential_decay'.*rate"),
        ("exponential_decay", DECAY | {"decay_steps": 0}, r"decay_steps must be finite and positive, got 0"),
        (
            "exponential_decay",
            DECAY | {"decay_rate": math.nan},
            r"decay_rate of schedule 'exp.*must be finite, got nan",
        ),
        ("piecewise_constant", {"boundaries": [1, 2], "values": [1.0]}, r"values must be one more .* got 1 and 2"),
        ("joined", {"schedules": [RISE], "boundaries": [1]}, r"schedules must be one more than boundaries, got 1"),
    ],
    ids=["name", "missing", "unknown", "zero", "not finite", "too few values", "too few schedules"],
)
def test_arguments_that_do_not_fit(name, arguments, text):
    with pytest.raises(ValueError, match=text):
        ScheduleConfig(name, arguments)


TENSOR = {"class_name": "__tensor__", "config": {"value": 7.0}}


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("exponential_decay", DECAY | {"decay_steps": TENSOR}, r"decay_steps=\{'class.*a number. Use numbers"),
        ("exponential_decay", DECAY | {"decay_rate": "0.5"}, r"decay_rate='0.5'; it must be a number"),
        ("exponential_decay", DECAY | {"staircase": 1}, r"staircase=1; it must be True or False"),
        ("exponential_decay", DECAY | {"decay_rate": True}, r"decay_rate=True; it must be a number"),
        ("exponential_decay", DECAY | {"decay_rate": jax.ShapeDtypeStruct((), "f4")}, r"it must be a number"),
        ("piecewise_constant", {"boundaries": 3, "values": [1]}, r"boundaries=3; it must be a sequence of numbers"),
        ("piecewise_constant", {"boundaries": [RISE], "values": [1]}, r"boundaries=\[Sched.*a sequence of numbers"),
        (
            "product",
            {"schedules": [abs]},
            r"schedules=\[<built-in.*a sequence of ScheduleConfigs.*function of the steps",
        ),
        ("per_epoch", {"schedule": 0.1, "steps_per_epoch": 3}, r"schedule=0.1; it must be a ScheduleConfig"),
        ("per_epoch", {"schedule": RISE, "steps_per_epoch": 1.5}, r"steps_per_epoch must be a whole number, got 1.5"),
    ],
    ids=["tensor", "string", "flag", "bool", "array", "number", "schedules", "function", "rate", "fraction"],
)
def test_arguments_of_other_types(name, arguments, text):
    with pytest.raises(TypeError, match=text):
        ScheduleConfig(name, arguments)
