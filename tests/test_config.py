"""NadamConfig: JSON, errors, and what it builds.

- A config is plain data: frozen, hashable, the same after JSON, with every field checked by name.
- Defaults build ``nadam``, and weight decay ``nadamw``, bit for bit; all other fields do what the formula says.
"""

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

from optax_nadam import NadamConfig, ScheduleConfig, get_state, nadam, nadamw
from optax_nadam._rules import RULES
from tests.helpers import descend
from tests.reference import Nadam

EVERY_FIELD_CHANGED = NadamConfig(
    learning_rate=ScheduleConfig("cosine_decay", {"initial_learning_rate": 0.1, "decay_steps": 10}),
    b1=0.85,
    b2=0.99,
    eps=1e-6,
    eps_root=1e-12,
    momentum_decay=0.5,
    rule=dataclasses.replace(RULES["undebiased"], power=0.25),
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
    m_dtype={"embed": None, "blocks": ["int8", "bfloat16"]},
    v_dtype="float32",
)


def path(tx, params, grads):
    """The parameters after each step."""
    return descend(tx, params, grads)[1]


def problem(rng, steps=20):
    params = {"a": rng.normal(size=(4, 3)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
    grads = jax.tree.map(lambda p: rng.normal(size=(steps, *p.shape)).astype(np.float32), params)
    return params, grads


def float64(x):
    return np.asarray(x, np.float64)


def test_json():
    for field in dataclasses.fields(NadamConfig):
        assert getattr(EVERY_FIELD_CHANGED, field.name) != field.default, field.name
    for config in (NadamConfig(), EVERY_FIELD_CHANGED, NadamConfig(rule="dozat2016")):
        again = NadamConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert hash(again) == hash(config)


def test_formats_by_leaf():
    """In dicts and lists, which the config keeps as its own."""
    given: dict[Any, Any] = {"embed": None, "blocks": ("int8", {0: "bfloat16"})}
    config = NadamConfig(m_dtype=given, v_dtype="int8")
    given["embed"] = "no format"
    assert config.m_dtype == {"embed": None, "blocks": ["int8", {"0": "bfloat16"}]}
    assert config == NadamConfig(m_dtype=config.m_dtype, v_dtype="int8")
    assert hash(config) != hash(dataclasses.replace(config, m_dtype={"embed": None, "blocks": "int8"}))
    leaf = jnp.ones((32, 32))
    state = get_state(config.build().init({"embed": leaf, "blocks": [leaf, {"0": leaf}]}))
    assert [x.dtype for x in jax.tree.leaves(state.m)] == ["int8", "bfloat16", "float32"]


def test_kinds_of_numbers():
    """Those of all kinds become Python floats."""
    numbers: dict[str, Any] = {"learning_rate": 1, "b2": np.float32(0.5), "clip_norm": np.int64(3)}
    config = NadamConfig(**numbers)
    assert [type(x) for x in (config.learning_rate, config.b2, config.clip_norm)] == [float] * 3
    assert config == NadamConfig(learning_rate=1.0, b2=0.5, clip_norm=3.0)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NadamConfig().b1 = 0.5


def test_unknown_names():
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
        ("v_dtype", jnp.float32, TypeError, "must be a string, None, or a dict or list of such"),
        ("v_dtype", lambda path: "int8", TypeError, "must be a string"),
        ("accumulate_steps", 0, ValueError, "must be finite and positive, got 0"),
        ("accumulate_steps", 1.5, TypeError, "must be a whole number, got 1.5"),
    ],
)
def test_bad_fields(name, value, kind, text):
    with pytest.raises(kind, match=f"{name} .*{re.escape(text)}"):
        NadamConfig(**{name: value})


@pytest.mark.parametrize(("kind", "value"), [(ValueError, "int4"), (TypeError, 8)])
def test_bad_format_of_a_leaf(kind, value):
    with pytest.raises(kind, match=rf"m_dtype\['blocks'\]\[1\]\['w'\] must be .*got {value!r}"):
        NadamConfig(m_dtype={"blocks": [None, {"w": value}]})


def test_default_is_nadam(rng):
    """They build ``nadam``, and with weight decay ``nadamw``."""
    params, grads = problem(rng)
    chex.assert_trees_all_equal(path(NadamConfig().build(), params, grads), path(nadam(), params, grads))
    decayed = NadamConfig(weight_decay=0.1, learning_rate=0.1).build()
    chex.assert_trees_all_equal(path(decayed, params, grads), path(nadamw(0.1, weight_decay=0.1), params, grads))


def test_every_hyperparameter(rng):
    """Every one of them reaches the update."""
    params, grads = problem(rng)
    h: dict[str, Any] = {"b1": 0.85, "b2": 0.99, "eps": 1e-3, "eps_root": 1e-3, "momentum_decay": 0.5}
    got = path(NadamConfig(learning_rate=0.02, rule="dozat2016", **h).build(), params, grads)
    for name in params:
        updates, *_ = Nadam("dozat2016", **h).updates(float64(grads[name]))
        expected = float64(params[name]) - 0.02 * np.cumsum(updates, axis=0)
        np.testing.assert_allclose(got[name], expected, atol=2e-6)


def test_order_of_clips(rng):
    """By value, then by leaf, then globally; small gradients and zeros stay."""
    params, grads = problem(rng)
    grads = {name: g * np.float32(np.linspace(0, 3, 20)).reshape(-1, *[1] * (g.ndim - 1)) for name, g in grads.items()}
    clipped = {name: np.clip(float64(x), -0.9, 0.9).reshape(20, -1) for name, x in grads.items()}

    def at_most(limit, norm):
        return np.minimum(1, limit / np.maximum(norm, 1e-30))[:, None]

    clipped = {name: x * at_most(1.5, np.linalg.norm(x, axis=1)) for name, x in clipped.items()}
    total = np.sqrt(sum(np.sum(x**2, axis=1) for x in clipped.values()))
    assert 0 < np.mean(total > 2.0) < 1
    by_hand = {name: np.float32(x * at_most(2.0, total)) for name, x in clipped.items()}
    by_hand = jax.tree.map(lambda x, g: x.reshape(g.shape), by_hand, grads)
    got = path(NadamConfig(clip_value=0.9, clip_norm=1.5, clip_global_norm=2.0).build(), params, grads)
    chex.assert_trees_all_close(got, path(nadam(), params, by_hand), atol=1e-6)


def test_mask_of_decay(rng):
    params, grads = problem(rng, steps=3)
    config = NadamConfig(weight_decay=0.5, clip_global_norm=0.1, accumulate_steps=3)
    got = path(config.build(0.1, mask={"a": True, "b": False}), params, grads)
    for name, decay in (("a", 0.5), ("b", 0.0)):
        other = path(dataclasses.replace(config, weight_decay=decay).build(0.1), params, grads)
        np.testing.assert_array_equal(got[name], other[name])
    with pytest.raises(ValueError, match="mask chooses the leaves that have weight decay, but weight_decay is 0"):
        NadamConfig().build(mask=lambda params: True)


@pytest.mark.parametrize("counts_gradients", [False, True])
def test_what_schedule_counts(counts_gradients):
    """What it counts is up to the field, not to its type or to the place where it is given."""
    schedule = ScheduleConfig("inverse_time_decay", {"initial_learning_rate": 1, "decay_steps": 1, "decay_rate": 1})
    config = NadamConfig(
        learning_rate=schedule, b1=0.0, eps=0.0, accumulate_steps=4, schedule_counts_gradients=counts_gradients
    )
    counted = 4 * np.arange(3) + 3 if counts_gradients else np.arange(3)
    for tx in (config.build(), config.build(schedule), config.build(schedule.build())):
        params = path(tx, jnp.float32(0.0), jnp.ones(12))[3::4]
        np.testing.assert_allclose(jnp.diff(params, prepend=0.0), -1 / (1 + counted), rtol=1e-5)


def test_static_argument_of_jit():
    """Of jit, which traces once for equal configs."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def learning_rate(config):
        traces.append(config)
        return config.learning_rate.build()(3)

    def make(values, kind):
        schedule = ScheduleConfig("piecewise_constant", {"boundaries": kind([3]), "values": kind(values)})
        return NadamConfig(learning_rate=schedule, rule=RULES["flux"])

    assert hash(make([1, 0.5], list)) == hash(make([1.0, 0.5], tuple))
    assert learning_rate(make([1, 0.5], list)) == learning_rate(make([1.0, 0.5], tuple)) == 1
    assert learning_rate(make([0.25, 0.5], list)) == 0.25
    assert len(traces) == 2


def test_maximize_before_decay(rng):
    """It negates the gradient before coupled decay."""
    params, grads = problem(rng)
    config = NadamConfig(weight_decay=0.5, coupled_weight_decay=True)
    down = path(config.build(), params, jax.tree.map(np.negative, grads))
    chex.assert_trees_all_equal(path(dataclasses.replace(config, maximize=True).build(), params, grads), down)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.lenient("Optax's schedules mix dtypes")
def test_decay_peak(schedule):
    """With a peak learning rate, weight decay falls with the square of the rate."""
    halving = ScheduleConfig("piecewise_constant", {"boundaries": [0], "values": [0.5, 0.25]})
    config = NadamConfig(
        learning_rate=halving if schedule else 0.25, weight_decay=0.1, weight_decay_peak_learning_rate=0.5, b1=0.0
    )
    rates = (0.5, 0.25) if schedule else (0.25, 0.25)
    expected = 2.0 * np.cumprod([1 - 0.1 * rate**2 / 0.5 for rate in rates])
    np.testing.assert_allclose(path(config.build(), jnp.float32(2.0), jnp.zeros(2)), expected, rtol=1e-6)
