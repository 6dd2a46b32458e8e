"""NadamConfig: JSON, errors, and what it builds."""

import dataclasses
import functools
import json
import re
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, ScheduleConfig, nadam, nadamw
from optax_nadam._rules import RULES
from tests.reference import Nadam

EVERY_FIELD_CHANGED = NadamConfig(
    learning_rate=0.02,
    b1=0.85,
    b2=0.99,
    eps=1e-6,
    eps_root=1e-12,
    momentum_decay=0.5,
    rule="dozat2016",
    weight_decay=0.1,
    coupled_weight_decay=True,
    clip_value=0.9,
    clip_norm=1.5,
    clip_global_norm=2.0,
    weight_decay_peak_learning_rate=0.5,
    clip_by_gradient_rms=1.0,
    cautious=True,
    maximize=True,
    complex_as_real=True,
    accumulate_steps=2,
    schedule_counts_gradients=True,
    m_dtype="float32",
    v_dtype="float32",
)


def run(tx, params, grads):
    """The parameters after each step."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


def problem(rng, steps=20):
    params = {"a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.asarray(rng.normal(size=5), jnp.float32)}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), jnp.float32), params)
    return params, grads


def test_the_example_changes_every_field():
    for field in dataclasses.fields(NadamConfig):
        assert getattr(EVERY_FIELD_CHANGED, field.name) != field.default, field.name


@pytest.mark.parametrize("config", [NadamConfig(), EVERY_FIELD_CHANGED], ids=["defaults", "all changed"])
def test_it_survives_json(config):
    assert NadamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_of_all_kinds_become_python_floats():
    numbers: dict[str, Any] = {"learning_rate": 1, "b2": np.float32(0.5), "clip_norm": np.int64(3)}
    config = NadamConfig(**numbers)
    assert [type(x) for x in (config.learning_rate, config.b2, config.clip_norm)] == [float] * 3
    assert config == NadamConfig(learning_rate=1.0, b2=0.5, clip_norm=3.0)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NadamConfig().b1 = 0.5


def test_unknown_and_missing_names_are_rejected_by_name():
    fields = NadamConfig().to_dict()
    with pytest.raises(ValueError, match=r"NadamConfig.*unknown beta_1"):
        NadamConfig.from_dict(fields | {"beta_1": 0.9})
    del fields["b1"], fields["cautious"]
    with pytest.raises(ValueError, match=r"NadamConfig.*missing b1, cautious"):
        NadamConfig.from_dict(fields)
    old = {
        "warmup" if name == "momentum_schedule" else name: x for name, x in dataclasses.asdict(RULES["flux"]).items()
    }
    with pytest.raises(ValueError, match=r"Rule fields do not fit: missing momentum_schedule; unknown warmup"):
        NadamConfig.from_dict(NadamConfig().to_dict() | {"rule": old})


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("learning_rate", optax.constant_schedule(1.0), TypeError, "must be a number"),
        ("learning_rate", jnp.float32(1.0), TypeError, "must be a number"),
        ("learning_rate", float("inf"), ValueError, "must be finite"),
        ("b1", None, TypeError, "must be a number, got None"),
        ("b1", True, TypeError, "must be a number, got True"),
        ("eps", "1e-7", TypeError, "must be a number, got '1e-7'"),
        ("rule", 3, ValueError, "must be one of 'scheduled', "),
        ("coupled_weight_decay", 1, TypeError, "must be True or False, got 1"),
        ("weight_decay", -1.0, ValueError, "must be finite and not negative, got -1.0"),
        ("schedule_counts_gradients", 1, TypeError, "must be True or False, got 1"),
        ("clip_value", 0.0, ValueError, "must be finite and positive, got 0.0"),
        ("clip_norm", -1.0, ValueError, "must be finite and positive, got -1.0"),
        ("clip_global_norm", float("nan"), ValueError, "must be finite and positive, got nan"),
        ("m_dtype", "float16", ValueError, "must be None, int8, bfloat16, float32 or float64, got 'float16'"),
        ("v_dtype", jnp.float32, TypeError, "must be a string"),
    ],
)
def test_bad_fields(name, value, kind, text):
    with pytest.raises(kind, match=f"{name} .*{re.escape(text)}"):
        NadamConfig(**{name: value})


def test_the_default_builds_nadam_and_weight_decay_nadamw(rng):
    params, grads = problem(rng)
    chex.assert_trees_all_equal(run(NadamConfig().build(), params, grads), run(nadam(), params, grads))
    decayed = NadamConfig(weight_decay=0.1, learning_rate=0.1)
    chex.assert_trees_all_equal(run(decayed.build(), params, grads), run(nadamw(0.1, weight_decay=0.1), params, grads))


def test_every_hyperparameter_reaches_the_update(rng):
    params, grads = problem(rng)
    h: dict[str, Any] = {
        "b1": 0.85,
        "b2": 0.99,
        "eps": 1e-3,
        "eps_root": 1e-3,
        "momentum_decay": 0.5,
        "rule": "dozat2016",
    }
    got = run(NadamConfig(learning_rate=0.02, **h).build(), params, grads)
    for name in params:
        updates, *_ = Nadam(**h).updates(np.asarray(grads[name], np.float64))
        expected = np.asarray(params[name], np.float64) - 0.02 * np.cumsum(updates, axis=0)
        np.testing.assert_allclose(got[name], expected, atol=2e-6)


def test_clips_come_by_value_then_by_leaf_then_globally(rng):
    params, grads = problem(rng)
    grads = jax.tree.map(lambda g: 3 * g, grads)

    def clipped(g):
        g = {name: np.clip(np.asarray(x, np.float64), -0.9, 0.9) for name, x in g.items()}
        g = {name: x * min(1, 1.5 / np.linalg.norm(x)) for name, x in g.items()}
        total = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        return {name: x * min(1, 2.0 / total) for name, x in g.items()}

    by_hand = [clipped(jax.tree.map(lambda g, t=t: g[t], grads)) for t in range(20)]
    by_hand = jax.tree.map(lambda *g: jnp.asarray(np.stack(g), jnp.float32), *by_hand)
    got = run(NadamConfig(clip_value=0.9, clip_norm=1.5, clip_global_norm=2.0).build(), params, grads)
    chex.assert_trees_all_close(got, run(nadam(), params, by_hand), atol=1e-6)


def test_clip_by_norm_leaves_small_gradients_and_zeros_alone():
    tx = NadamConfig(clip_norm=5.0).build()
    for g in (jnp.zeros(3), jnp.asarray([3.0, 0.0, 4.0]), jnp.asarray([300.0, -300.0, 0.0], jnp.float16)):
        _, state = tx.update(g, tx.init(g))
        expected = 0.1 * g.astype(jnp.float32) * min(1.0, 5.0 / max(5.0, float(jnp.linalg.norm(g.astype(float)))))
        np.testing.assert_allclose(optax.tree.get(state, "m"), expected, rtol=1e-3)


@pytest.mark.parametrize("coupled", [True, False])
def test_weight_decay_is_coupled_or_not(rng, coupled):
    params, grads = problem(rng, 1)
    got = run(NadamConfig(weight_decay=0.5, coupled_weight_decay=coupled).build(), params, grads)
    for name, p in params.items():
        p, g = np.asarray(p, np.float64), np.asarray(grads[name], np.float64)
        u, *_ = Nadam().updates(g + 0.5 * p * coupled)
        np.testing.assert_allclose(got[name][0], p - 1e-3 * (u[0] + 0.5 * p * (not coupled)), atol=2e-7)


def test_coupled_weight_decay_is_that_of_torch():
    got = run(
        NadamConfig(learning_rate=0.01, eps=1e-8, weight_decay=0.1, coupled_weight_decay=True).build(),
        jnp.float32(1.0),
        jnp.asarray([0.5, -0.25, 0.1]),
    )
    # torch.optim.NAdam(lr=.01, weight_decay=.1) on the same gradients, in float32.
    np.testing.assert_allclose(got, [0.98943549, 0.99137628, 0.98747730], atol=2e-7)


@pytest.mark.parametrize("counts_gradients", [False, True])
def test_what_a_schedule_counts(counts_gradients):
    """The field decides, not the type of the schedule or the place where it is given."""
    schedule = ScheduleConfig("inverse_time_decay", {"initial_learning_rate": 1, "decay_steps": 1, "decay_rate": 1})
    config = NadamConfig(
        learning_rate=schedule, b1=0.0, eps=0.0, accumulate_steps=4, schedule_counts_gradients=counts_gradients
    )
    counted = 4 * np.arange(3) + 3 if counts_gradients else np.arange(3)
    for tx in (config.build(), config.build(schedule), config.build(schedule.build())):
        params = run(tx, jnp.float32(0.0), jnp.ones(12))[3::4]
        np.testing.assert_allclose(jnp.diff(params, prepend=0.0), -1 / (1 + counted), rtol=1e-5)


def test_build_takes_a_mask(rng):
    params, grads = problem(rng, steps=3)
    config = NadamConfig(weight_decay=0.5, clip_global_norm=0.1, accumulate_steps=3)
    got = run(config.build(0.1, mask={"a": True, "b": False}), params, grads)
    for name, decay in (("a", 0.5), ("b", 0.0)):
        other = run(dataclasses.replace(config, weight_decay=decay).build(0.1), params, grads)
        np.testing.assert_array_equal(got[name], other[name])
    with pytest.raises(ValueError, match="mask chooses the leaves that have weight decay, but weight_decay is 0"):
        NadamConfig().build(mask=lambda params: True)


def test_schedules_and_rules_survive_json():
    rule = dataclasses.replace(RULES["undebiased"], power=0.25)
    schedule = ScheduleConfig("cosine_decay", {"initial_learning_rate": 0.1, "decay_steps": 10})
    config = NadamConfig(learning_rate=schedule, rule=rule)
    assert NadamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configs_are_static_arguments_of_jit():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def learning_rate(config):
        traces.append(config)
        return config.learning_rate.build()(3)

    def make(values, kind):
        schedule = ScheduleConfig("piecewise_constant", {"boundaries": kind([3]), "values": kind(values)})
        return NadamConfig(learning_rate=schedule, rule=RULES["flux"])

    assert learning_rate(make([1, 0.5], list)) == learning_rate(make([1.0, 0.5], tuple)) == 1
    assert learning_rate(make([0.25, 0.5], list)) == 0.25
    assert len(traces) == 2


@pytest.mark.lenient("Optax's schedules mix dtypes")
def test_a_schedule_reaches_the_update(rng):
    params, grads = problem(rng)
    schedule = ScheduleConfig("exponential_decay", {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.5})
    expected = run(nadam(optax.exponential_decay(0.1, 5, 0.5)), params, grads)
    chex.assert_trees_all_equal(run(NadamConfig(learning_rate=schedule).build(), params, grads), expected)
    chex.assert_trees_all_equal(run(NadamConfig().build(schedule.build()), params, grads), expected)


def test_maximize_negates_the_gradient_before_coupled_decay(rng):
    params, grads = problem(rng)
    config = NadamConfig(weight_decay=0.5, coupled_weight_decay=True)
    down = run(config.build(), params, jax.tree.map(jnp.negative, grads))
    chex.assert_trees_all_equal(run(dataclasses.replace(config, maximize=True).build(), params, grads), down)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.lenient("Optax's schedules mix dtypes")
def test_a_peak_learning_rate_makes_weight_decay_fall_with_the_square_of_the_rate(schedule):
    halving = ScheduleConfig("piecewise_constant", {"boundaries": [0], "values": [0.5, 0.25]})
    config = NadamConfig(
        learning_rate=halving if schedule else 0.25, weight_decay=0.1, weight_decay_peak_learning_rate=1.0, b1=0.0
    )
    p = run(config.build(), jnp.float32(2.0), jnp.zeros(2))
    rates = (0.5, 0.25) if schedule else (0.25, 0.25)
    expected = 2.0 * np.cumprod([1 - 0.1 * rate**2 for rate in rates])
    np.testing.assert_allclose(p, expected, rtol=1e-6)


@pytest.mark.lenient("Optax's wrapper mixes dtypes")
def test_complex_as_real_treats_the_parts_separately(rng):
    parts = rng.normal(size=(2, 10, 3))
    grads = jnp.asarray(parts[0] + 1j * parts[1], jnp.complex64)
    got = run(NadamConfig(learning_rate=0.1, complex_as_real=True).build(), jnp.zeros(3, jnp.complex64), grads)
    for part, of_got in zip(parts, (got.real, got.imag), strict=True):
        updates, *_ = Nadam().updates(part)
        np.testing.assert_allclose(of_got, -0.1 * np.cumsum(updates, axis=0), atol=1e-5)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_accumulate_steps_is_a_positive_whole_number(value):
    with pytest.raises((TypeError, ValueError), match=f"accumulate_steps must be .*got {value!r}"):
        NadamConfig(accumulate_steps=value)
