"""compat.keras without Keras, beside recordings of it (tests/parity/record_keras.py).

============ =========================================================================================================
steps        those of the recorded Kerases; schedules count gradients; rows without gradient stay
configs      recorded ones are read, and written again without a change; what cannot be expressed names its change
checkpoints  every layout, by names or shapes, is read and written; a recorded Keras continues; nothing is guessed
warnings     point at the line that called the library
errors       name the argument as Keras does, and say what to do
============ =========================================================================================================
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import json
import pathlib
import re
import sys
import types
import zipfile
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import optax_nadam
from optax_nadam import NadamConfig, ScheduleConfig, nadam
from optax_nadam._config import product_after
from optax_nadam.compat import keras
from tests.compat.sources import trajectories
from tests.parity.problem import FEW, SHAPES, gap, problem, run

HERE = pathlib.Path(__file__).parent / "recordings"
RECORDED = json.loads((HERE / "keras.json").read_text())
ARRAYS = dict(np.load(HERE / "keras.npz"))
OLD = dict(np.load(HERE / "keras_old.npz"))
CASES = [(dialect, case) for dialect, cases in RECORDED["arguments"].items() for case in cases]
CONSTRUCTORS: dict[str, Any] = {"keras": keras.nadam, "tf_keras": keras.nadam, "legacy": keras.legacy_nadam}

# In units of the learning rate; measured at most 1.2e-4: one rounding of a float32 parameter above 1 at 1e-3.
CLOSE = 2.5e-4

KERAS: dict[str, Any] = RECORDED["configs"]["keras/defaults"]["config"]
TF_KERAS: dict[str, Any] = RECORDED["configs"]["tf_keras/defaults"]["config"]
LEGACY: dict[str, Any] = RECORDED["configs"]["legacy/defaults"]["config"]
KERAS_2 = {"lr": 0.002, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "schedule_decay": 0.004}
COSINE: dict[str, Any] = {"module": "keras.optimizers.schedules", "class_name": "CosineDecay", "registered_name": None}
COSINE |= {"config": {"initial_learning_rate": 0.1, "decay_steps": 10, "name": "CosineDecay"}}


def recorded_steps(trajectory):
    return {name: x[RECORDED["steps"]] for name, x in trajectory.items()}


# Constructors.


@functools.cache
def every_case():
    arguments = {case: RECORDED["arguments"][case[0]][case[1]] for case in CASES}
    return trajectories({case: CONSTRUCTORS[case[0]](**x) for case, x in arguments.items()}, *problem(0))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_recorded_steps(case):
    dialect, name = case
    learning_rate = RECORDED["arguments"][dialect][name].get("learning_rate", 1e-3)
    expected = {leaf: ARRAYS[f"{dialect}/{name}/{leaf}"] for leaf in SHAPES}
    assert gap(recorded_steps(every_case()[case]), expected, learning_rate) <= CLOSE


def test_legacy_is_nadam():
    params, grads = problem(1, shapes=FEW)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(), params, grads), run(nadam(), params, grads))


@pytest.mark.parametrize("make", [keras.nadam, keras.legacy_nadam])
def test_rate_is_an_array(make):
    params, grads = problem(2, steps=5, shapes=FEW)
    got, _ = run(make(jnp.float32(0.01)), params, grads)
    assert gap(got, run(make(0.01), params, grads)[0], 0.01) < 1e-6


MAKES: dict[str, Any] = {
    "nadam": lambda schedule: keras.nadam(schedule, gradient_accumulation_steps=4),
    "config": lambda schedule: keras.config_from(KERAS | {"gradient_accumulation_steps": 4}).build(schedule),
}


@pytest.mark.parametrize("make", MAKES)
def test_schedules_count_gradients(make):
    params, grads = problem(2, steps=12, shapes=FEW)
    schedule = ScheduleConfig("inverse_time_decay", {"initial_learning_rate": 0.1, "decay_steps": 1, "decay_rate": 0.5})
    got, _ = run(MAKES[make](schedule), params, grads)
    chex.assert_trees_all_equal(run(MAKES[make](schedule.build()), params, grads)[0], got)
    counts_steps = NadamConfig(momentum_decay=1.0, accumulate_steps=4)
    expected, _ = run(counts_steps.build(lambda count: schedule.build()(4 * count + 3)), params, grads)
    assert gap(got, expected, 0.1) < 1e-5


def test_lr_and_epsilon_0():
    params, grads = problem(2, steps=5, shapes=FEW)
    expected = run(keras.legacy_nadam(0.01), params, grads)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(0.5, lr=0.01, epsilon=0), params, grads), expected)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(0.01, epsilon=None), params, grads), expected)


@pytest.mark.filterwarnings("ignore:decay has no effect")
def test_decay_has_no_effect():
    params, grads = problem(2, steps=5, shapes=FEW)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(decay=0.5), params, grads), run(nadam(), params, grads))


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clips_of_0_are_off(name):
    assert keras.config_from(KERAS | {name: 0.0}) == keras.config_from(KERAS)


def test_sparse_rows():
    params = {"table": jnp.ones((3, 2)), "head": jnp.ones(2)}
    grads = [
        {"table": jnp.asarray([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]), "head": jnp.ones(2)},
        {"table": jnp.asarray([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), "head": jnp.zeros(2)},
    ]
    got, state = run(keras.legacy_nadam(0.1, sparse_rows={"table": True, "head": False}), params, grads)
    dense, dense_state = run(keras.legacy_nadam(0.1), params, grads)
    chex.assert_trees_all_equal(state, dense_state)
    moved = np.diff(got["table"], axis=0, prepend=np.ones((1, 3, 2))) != 0
    assert moved.tolist() == [[[True] * 2, [True] * 2, [False] * 2], [[True] * 2, [False] * 2, [False] * 2]]
    np.testing.assert_array_equal(got["table"][:, 0], dense["table"][:, 0])
    np.testing.assert_array_equal(got["head"], dense["head"])


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "text"),
    [
        (keras.nadam, {"beta_1": 1.0}, ValueError, r"beta_1 must be in \[0, 1\), got 1.0"),
        (keras.nadam, {"beta_2": -0.1}, ValueError, r"beta_2 must be in \[0, 1\), got -0.1"),
        (keras.nadam, {"epsilon": -1.0}, ValueError, r"epsilon must be .* not negative, got -1.0"),
        (keras.nadam, {"epsilon": "small"}, TypeError, r"epsilon must be a number, got 'small'"),
        (keras.nadam, {"learning_rate": float("nan")}, ValueError, r"learning_rate must be finite, got nan"),
        (keras.nadam, {"learning_rate": "fast"}, TypeError, r"learning_rate must be .* got 'fast'"),
        (keras.nadam, {"weight_decay": -0.1}, ValueError, r"weight_decay must be .* not negative, got -0.1"),
        (keras.nadam, {"clipnorm": -1.0}, ValueError, r"clipnorm must be .* positive, got -1.0"),
        (keras.nadam, {"clipvalue": -1.0}, ValueError, r"clipvalue must be .* positive, got -1.0"),
        (keras.nadam, {"global_clipnorm": -1.0}, ValueError, r"global_clipnorm must be .* positive, got -1.0"),
        (keras.nadam, {"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, r"only one of .* got clipnorm, clipvalue"),
        (keras.nadam, {"gradient_accumulation_steps": 1}, ValueError, r"gradient_accumulation_steps .* 2.* got 1"),
        (keras.nadam, {"gradient_accumulation_steps": 2.5}, TypeError, r"gradient_accumulation_steps must be a whole"),
        (keras.legacy_nadam, {"schedule_decay": -1.0}, ValueError, r"schedule_decay must be .* got -1.0"),
        (keras.legacy_nadam, {"clipnorm": 0.0}, ValueError, r"clipnorm must be .* positive, got 0.0"),
        (keras.legacy_nadam, {"clipnorm": 1.0, "global_clipnorm": 2.0}, ValueError, r"only one of clipnorm, global"),
        (keras.legacy_nadam, {"learning_rate": optax.constant_schedule(1.0)}, ValueError, r"not be a schedule"),
        (keras.legacy_nadam, {"lr": ScheduleConfig("piecewise_constant", {"boundaries": [], "values": [1]})},
         ValueError, r"not be a schedule"),
    ],
)  # fmt: skip
def test_bad_arguments(make, arguments, kind, text):
    with pytest.raises(kind, match=text):
        make(**arguments)


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (keras.nadam, {"use_ema": True}, r"optax_nadam cannot express use_ema=True.*incremental"),
        (keras.nadam, {"loss_scale_factor": 8.0}, r"loss_scale_factor=8.0.*Scale the loss"),
        (keras.legacy_nadam, {"sparse_rows": True, "clipvalue": 1.0}, r"express clipvalue=1.0.*slices"),
    ],
)
def test_argument_advice(make, arguments, text):
    with pytest.raises(ValueError, match=text) as error:
        make(**arguments)
    ((name, value),) = re.findall(r"pass (\w+)=(\w+)", str(error.value))
    make(**arguments | {name: ast.literal_eval(value)})


# Configs.


def in_float32(config):
    return {name: np.float32(x) if isinstance(x, float) else x for name, x in config.to_dict().items()}


@pytest.mark.parametrize("name", RECORDED["configs"])
def test_recorded_configs(name):
    recorded = RECORDED["configs"][name]
    before = copy.deepcopy(recorded)
    config = keras.config_from(recorded["config"])
    assert config.momentum_decay == (recorded["config"]["decay"] if name.startswith("legacy") else 1.0)
    assert config.rule == ("loss_scaled" if name == "keras/loss scaled" else "scheduled")
    if "serialized" in recorded:  # after training: float32 numbers
        assert in_float32(keras.config_from(recorded["serialized"])) == in_float32(config)
    assert recorded == before


def recorded_config(name):
    return keras.config_from(RECORDED["configs"][name]["config"])


def test_recorded_options():
    expected = NadamConfig(b1=0.8, b2=0.99, eps=1e-3, weight_decay=0.1, momentum_decay=1.0)
    assert dataclasses.replace(recorded_config("keras/decay"), learning_rate=1e-3) == expected
    fields = {"clipnorm": "clip_norm", "clipvalue": "clip_value", "global_clipnorm": "clip_global_norm"}
    for name, field in fields.items():
        assert getattr(recorded_config(f"keras/{name}"), field) == RECORDED["arguments"]["keras"][name][name]
    assert recorded_config("keras/accumulation").accumulate_steps == 3
    assert recorded_config("keras/accumulation").schedule_counts_gradients
    assert (recorded_config("legacy/clips").clip_norm, recorded_config("legacy/clips").clip_value) == (0.2, 0.1)
    cosine = {"initial_learning_rate": 0.1, "decay_steps": 10, "alpha": 0.0, "warmup_target": None, "warmup_steps": 0}
    assert recorded_config("keras/schedule").learning_rate == ScheduleConfig("cosine_decay", cosine)


def test_keras_2_configs():
    assert keras.config_from(KERAS_2) == NadamConfig(learning_rate=0.002, eps=1e-8)
    newer = {"learning_rate" if key == "lr" else key: value for key, value in KERAS_2.items()}
    expected = NadamConfig(learning_rate=0.002, eps=1e-8, momentum_decay=0.1)
    assert keras.config_from(newer | {"schedule_decay": 0.1}) == expected
    assert keras.config_from({"class_name": "Nadam", "config": KERAS_2 | {"epsilon": None}}).eps == 1e-7
    assert keras.config_from(KERAS_2 | {"epsilon": 0}).eps == 0
    assert keras.config_from(LEGACY | {"epsilon": 0}).eps == 1e-7


def test_tf_keras_prefers_norms():
    config = keras.config_from(TF_KERAS | {"clipnorm": 0.5, "clipvalue": 0.1})
    assert (config.clip_norm, config.clip_value) == (0.5, None)


def test_loss_scaled_dialects():
    for inner in (TF_KERAS, LEGACY):
        wrapped = {"inner_optimizer": {"class_name": "Custom>Nadam", "config": inner}, "dynamic": True}
        config = keras.config_from({"class_name": "LossScaleOptimizerV3", "config": wrapped})
        assert config == keras.config_from(inner)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (KERAS | {"amsgrad": True}, r"keras Nadam config has unknown keys amsgrad"),
        (TF_KERAS | {"mesh": 1}, r"tf_keras Nadam config has unknown keys mesh"),
        (LEGACY | {"weight_decay": 0.1}, r"legacy Nadam config has unknown keys weight_decay"),
        ({k: v for k, v in KERAS.items() if k not in ("beta_1", "epsilon")}, r"lacks beta_1, epsilon"),
        ({"learning_rate": 0.1}, r"one of the keys decay, schedule_decay, is_legacy_optimizer, loss_scale_factor"),
        ({"class_name": "Adam", "config": {}}, r"a Nadam or a LossScaleOptimizer, got 'Adam'"),
        ({"inner_optimizer": {"class_name": "Nadam", "config": KERAS}, "loss": 1}, r"LossScaleOptimizer .* keys loss"),
        (KERAS | {"use_ema": True}, r"use_ema=True.*incremental_update"),
        (KERAS | {"loss_scale_factor": 2.0}, r"loss_scale_factor=2.0"),
        (KERAS | {"clipnorm": 1.0, "clipvalue": 1.0}, r"only one of"),
        (TF_KERAS | {"clipnorm": 1.0, "global_clipnorm": 1.0}, r"only one of"),
        (LEGACY | {"clipnorm": 1.0, "global_clipnorm": 1.0}, r"only one of"),
        (KERAS_2 | {"clipnorm": 1.0}, r"clipnorm means two things.*global_clipnorm"),
        (LEGACY | {"learning_rate": COSINE}, r"must not be a schedule in the legacy Nadam, got 'CosineDecay'"),
        (KERAS | {"learning_rate": COSINE | {"class_name": "Warm"}}, r"one of the schedules Exp.*got 'Warm'"),
        (KERAS | {"learning_rate": COSINE | {"config": {"speed": 1}}}, r"schedule 'cosine_decay' .*do not fit"),
        (KERAS | {"beta_1": 2.0}, r"beta_1 must be in \[0, 1\), got 2.0"),
    ],
)  # fmt: skip
def test_bad_configs(config, text):
    with pytest.raises(ValueError, match=text):
        keras.config_from(config)


ROUND_TRIPS = [
    ("keras", NadamConfig(momentum_decay=1.0)),
    ("keras", NadamConfig(momentum_decay=1.0, learning_rate=0.3, b1=0.8, b2=0.9, eps=0.0, weight_decay=0.1)),
    ("keras", NadamConfig(momentum_decay=1.0, clip_norm=0.5, accumulate_steps=4, schedule_counts_gradients=True)),
    ("keras", NadamConfig(momentum_decay=1.0, clip_value=0.5, rule="loss_scaled")),
    ("keras", NadamConfig(momentum_decay=1.0, clip_global_norm=0.5)),
    ("tf_keras", NadamConfig(momentum_decay=1.0, weight_decay=0.1, clip_value=0.5)),
    ("legacy", NadamConfig()),
    ("legacy", NadamConfig(b1=0.8, b2=0.9, eps=1e-5, momentum_decay=0.3, clip_norm=0.5, clip_value=0.1)),
    ("legacy", NadamConfig(clip_global_norm=0.5, clip_value=0.1)),
]
START = {"initial_learning_rate": 1.0}
DECAY = START | {"decay_steps": 2}
SCHEDULES = {
    "ExponentialDecay": ScheduleConfig("exponential_decay", DECAY | {"decay_rate": 0.5}),
    "InverseTimeDecay": ScheduleConfig("inverse_time_decay", DECAY | {"decay_rate": 0.5}),
    "PolynomialDecay": ScheduleConfig("polynomial_decay", DECAY | {"cycle": True}),
    "PiecewiseConstantDecay": ScheduleConfig("piecewise_constant", {"boundaries": [3], "values": [1.0, 0.5]}),
    "CosineDecay": ScheduleConfig("cosine_decay", DECAY | {"warmup_target": 2.0}),
    "CosineDecayRestarts": ScheduleConfig("cosine_decay_restarts", START | {"first_decay_steps": 2}),
}


@pytest.mark.parametrize(("dialect", "config"), ROUND_TRIPS)
def test_roundtrip(dialect, config):
    through = json.loads(json.dumps(keras.config_to(config, dialect=dialect)))
    assert keras.config_from(through) == config


@pytest.mark.parametrize("dialect", ["keras", "tf_keras"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_roundtrip(name, dialect):
    config = NadamConfig(momentum_decay=1.0, learning_rate=SCHEDULES[name])
    theirs = keras.config_to(config, dialect=dialect)
    assert theirs["learning_rate"]["class_name"] == name
    assert keras.config_from(json.loads(json.dumps(theirs))) == config


INEXPRESSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("keras", {"momentum_decay": 0.004}, r"Keras 3 cannot express momentum_decay=0.004. It has 1.0 .*dialect='legacy'"),
    ("tf_keras", {"momentum_decay": 0.004}, r"tf_keras cannot express momentum_decay=0.004"),
    ("tf_keras", {"eps_root": 1e-3}, r"tf_keras cannot express eps_root=0.001. Leave it out, or do it"),
    ("keras", {"rule": "torch1"}, r"rule='torch1'. It follows 'scheduled' or 'loss_scaled': pass"),
    ("tf_keras", {"rule": "loss_scaled"}, r"rule='loss_scaled'. It follows 'scheduled': pass"),
    ("keras", {"clip_norm": 1.0, "clip_value": 1.0}, r"clip_value beside clip_norm=1.0. Only one"),
    ("tf_keras", {"clip_norm": 1.0, "clip_value": 1.0}, r"clip_value beside clip_norm=1.0. Only one"),
    ("legacy", {"clip_norm": 1.0, "clip_global_norm": 1.0}, r"clip_global_norm beside clip_norm=1.0"),
    ("keras", {"clip_norm": 1.0, "clip_global_norm": 1.0, "clip_value": 1.0}, r"global_norm=None, clip_value=None"),
    ("tf_keras", {"accumulate_steps": 2}, r"accumulate_steps=2"),
    ("keras", {"coupled_weight_decay": True, "weight_decay": 0.1}, r"coupled_weight_decay=True"),
    ("legacy", {"weight_decay": 0.1}, r"legacy Nadam cannot express weight_decay=0.1"),
    ("keras", {"clip_by_gradient_rms": 1.0}, r"Keras 3 cannot express clip_by_gradient_rms=1.0"),
    ("keras", {"m_dtype": "int8"}, r"Keras 3 cannot express m_dtype='int8'"),
    ("legacy", {"eps": 0.0}, r"eps=0.0. It makes 1e-7 of it"),
    ("legacy", {"learning_rate": SCHEDULES["CosineDecay"]}, r"learning_rate=ScheduleConfig.*is a number"),
    ("keras", {"learning_rate": SCHEDULES["CosineDecay"], "accumulate_steps": 2},
     r"schedule_counts_gradients=False. Its schedules count gradients: stretch"),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "fields", "text"), INEXPRESSIBLE)
def test_advice(dialect, fields, text):
    """The error of a config tells a change, after which there is no error."""
    config = NadamConfig(**{"momentum_decay": 1.0, **fields})
    with pytest.raises(ValueError, match=text) as error:
        keras.config_to(config, dialect=dialect)
    with pytest.raises(ValueError, match=text):
        keras.dump_state(fresh(), from_params, config=config, dialect=dialect)
    (changes,) = re.findall(r"pass dataclasses\.replace\(config, (.*?)\)", str(error.value))
    names_and_values = (change.split("=") for change in changes.split(", "))
    config = dataclasses.replace(config, **{name: ast.literal_eval(value) for name, value in names_and_values})
    keras.config_to(config, dialect=dialect)
    keras.dump_state(fresh(), from_params, config=config, dialect=dialect)


# Checkpoints.


class Variable:
    """Stands for a variable of theirs: a value with a name, or a path."""

    def __init__(self, value, **names):
        """Stores the value and the names."""
        self.value = np.asarray(value)
        self.__dict__.update(names)

    def __array__(self, dtype=None, copy=None):
        """The value."""
        return self.value


W = [(3, 2), (2,)]
COUNT = np.array(7)
RATE = np.float32(0.5)
M = [np.full(shape, 1.0 + i, np.float32) for i, shape in enumerate(W)]
V = [np.full(shape, 3.0 + i, np.float32) for i, shape in enumerate(W)]
EXTRA = [np.full(shape, 9.0, np.float32) for shape in W]
PAIRS = [M[0], V[0], M[1], V[1]]
KERAS_CONFIG = NadamConfig(momentum_decay=1.0, learning_rate=0.5)
PRODUCT, LEGACY_PRODUCT = (np.float32(product_after(7, config)) for config in (KERAS_CONFIG, NadamConfig()))


def to_params(weights):
    return {"kernel": jnp.asarray(weights[0]).T, "bias": jnp.asarray(weights[1])}


def from_params(params):
    return [params["kernel"].T, params["bias"]]


def fresh(tx=None):
    return (nadam() if tx is None else tx).init(to_params(M))


WRAPPER = [np.array(0), np.float32(0), np.array(3), np.float32(32768)]
LAYOUTS: dict[str, tuple[list[Any], Any]] = {
    "legacy": ([COUNT, LEGACY_PRODUCT, *M, *V], None),
    "keras 2.2": ([COUNT, *M, *V], NadamConfig()),
    "tf_keras": ([COUNT, *PAIRS], KERAS_CONFIG),
    "tf_keras, averages": ([COUNT, *EXTRA, *PAIRS], KERAS_CONFIG),
    "keras": ([COUNT, RATE, *PAIRS, PRODUCT], None),
    "keras, schedule": ([COUNT, *PAIRS, PRODUCT], None),
    "keras, averages": ([COUNT, RATE, *EXTRA, *PAIRS, PRODUCT], KERAS_CONFIG),
    "keras, averages and schedule": ([COUNT, *EXTRA, *PAIRS, PRODUCT], KERAS_CONFIG),
    "keras 3.0": ([COUNT, RATE, PRODUCT, *PAIRS], None),
    "keras 3.0, schedule": ([COUNT, PRODUCT, *PAIRS], None),
    "keras 3.0, averages": ([COUNT, RATE, *EXTRA, PRODUCT, *PAIRS], KERAS_CONFIG),
    "loss scaled": ([*WRAPPER, COUNT, RATE, *PAIRS], dataclasses.replace(KERAS_CONFIG, rule="loss_scaled")),
    "loss scaled, schedule": ([*WRAPPER, COUNT, *PAIRS], dataclasses.replace(KERAS_CONFIG, rule="loss_scaled")),
}
WITHOUT_PRODUCT = {"keras 2.2", "tf_keras", "tf_keras, averages"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    arrays, config = LAYOUTS[layout]
    warned = pytest.warns(UserWarning, match="computed from 7 steps")
    tx = nadam(optax.constant_schedule(0.5)) if "schedule" in layout else None
    with warned if layout in WITHOUT_PRODUCT else contextlib.nullcontext():
        state = keras.load_state(fresh(tx), arrays, to_params, config=config)
    lost = layout in WITHOUT_PRODUCT or layout.startswith("loss scaled")
    product = product_after(7, config) if lost else LEGACY_PRODUCT if layout == "legacy" else PRODUCT
    chex.assert_trees_all_equal(keras.get_weights(state, from_params), [np.array(7), np.float32(product), *M, *V])


def test_dialect_chooses():
    m = [np.full(2, 1.0, np.float32), np.full(2, 2.0, np.float32)]
    v = [np.full(2, 3.0, np.float32), np.full(2, 4.0, np.float32)]
    state = nadam().init([m[0], m[1]])
    for dialect, arrays in (("legacy", [COUNT, *m, *v]), ("tf_keras", [COUNT, m[0], v[0], m[1], v[1]])):
        with pytest.raises(ValueError, match=r"one layout: Keras 2.2.*tf_keras.*dialect='legacy' or 'tf_keras'"):
            keras.load_state(state, arrays, list, config=NadamConfig())
        with pytest.warns(UserWarning, match="computed from 7"):
            loaded = keras.load_state(state, arrays, list, config=NadamConfig(), dialect=dialect)
        chex.assert_trees_all_equal(keras.get_weights(loaded, list)[2:], [*m, *v])


def variables(arrays, names, attribute="name"):
    return [Variable(x, **{attribute: name}) for x, name in zip(arrays, names, strict=True)]


LEGACY_NAMES = [f"Nadam/{name}:0" for name in ("iter", "momentum_cache", "d/b/m", "d/b/v", "d/k/m", "d/k/v")]
KERAS_NAMES = ["n/iteration", "n/learning_rate", "n/k_momentum", "n/k_velocity", "n/b_momentum", "n/b_velocity"]
KERAS_2_NAMES = [f"training/Nadam/{name}:0" for name in ("iterations", "m_schedule", "m_0", "m_1", "v_0", "v_1")]
TF_KERAS_NAMES = ["iteration:0", "Nadam/m/m/k:0", "Nadam/m/v/b:0", "Nadam/v/m/k:0", "Nadam/v/v/b:0"]
WRAPPED_NAMES = ["w/iteration", "w/learning_rate", "w/step_counter", "w/dynamic_scale", *KERAS_NAMES]
NAMES: dict[str, tuple[list[str], list[Any], str | None]] = {  # and a warning where the product is not stored
    "legacy": (LEGACY_NAMES, [COUNT, PRODUCT, *PAIRS], None),
    "keras 2.3": (KERAS_2_NAMES, [COUNT, PRODUCT, *M, *V], None),
    "keras": ([*KERAS_NAMES, "n/variable"], [COUNT, RATE, *PAIRS, PRODUCT], None),
    "tf_keras": (TF_KERAS_NAMES, [COUNT, *M, *V], "once per variable"),
    "loss scaled": (WRAPPED_NAMES, [*WRAPPER, COUNT, RATE, *PAIRS], r"LossScaleOptimizer.*rule='loss_scaled'"),
    "unknown": ([f"Variable_{i}:0" for i in range(6)], [COUNT, PRODUCT, *M, *V], None),
}


@pytest.mark.parametrize("attribute", ["name", "path"])
@pytest.mark.parametrize("kind", NAMES)
def test_names(kind, attribute):
    names, arrays, warning = NAMES[kind]
    with pytest.warns(UserWarning, match=warning) if warning else contextlib.nullcontext():
        state = keras.load_state(fresh(), variables(arrays, names, attribute), to_params, config=KERAS_CONFIG)
    product = np.float32(product_after(7, KERAS_CONFIG)) if warning else PRODUCT
    chex.assert_trees_all_equal(keras.get_weights(state, from_params), [np.array(7), product, *M, *V])


def test_missing_name():
    """Names tell what is missing."""
    with pytest.raises(ValueError, match="lacks the second moment of"):
        keras.load_state(fresh(), variables([COUNT, PRODUCT, *PAIRS], LEGACY_NAMES)[:-1], to_params)


def test_keras_before_3_10():
    arrays = [OLD[f"variable/{i}"] for i in range(9)]
    params = [OLD[f"before/{i}"] for i in range(3)]
    grads = [[OLD[f"grad/{step}/{i}"] for i in range(3)] for step in range(10)]
    tx = keras.nadam(0.01, weight_decay=0.1)
    got, _ = run(tx, params, grads, keras.load_state(tx.init(params), arrays, list))
    expected = [np.stack([OLD[f"after/{step}/{i}"] for step in range(10)]) for i in range(3)]
    assert gap(dict(enumerate(got)), dict(enumerate(expected)), 0.01) <= 1e-4


@pytest.mark.parametrize("dialect", ["keras", "tf_keras", "legacy"])
def test_recorded_states(dialect):
    stored = [ARRAYS[f"{dialect}/state/{i}"] for i in range(sum(k.startswith(f"{dialect}/state") for k in ARRAYS))]
    config = keras.config_from(RECORDED["configs"][f"{dialect}/defaults"]["config"])
    params, grads = problem(0)
    _, state = run(config.build(), params, grads)

    def in_order(tree):
        return [tree[name] for name in SHAPES]

    mine = keras.dump_state(state, in_order, dialect=dialect, config=config)
    for x, y in zip(mine, stored, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        # Their 1 - beta_2, in float32, is off by 1.3e-5, which the debiasing undoes.
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def test_accumulation_counts_gradients():
    config = dataclasses.replace(KERAS_CONFIG, accumulate_steps=4)
    product = np.float32(product_after(3, config))
    arrays = [np.array(12), RATE, *EXTRA, *PAIRS, product]
    state = keras.load_state(fresh(config.build()), arrays, to_params, config=config)
    assert int(optax.tree.get(state, "mini_step")) == 0
    back = keras.dump_state(state, from_params, dialect="keras", config=config)
    chex.assert_trees_all_equal(back, [np.array(12, np.int32), RATE, *[0 * x for x in EXTRA], *PAIRS, product])
    assert int(optax_nadam.get_state(state).count) == 3
    arrays[0] = np.array(13)
    with pytest.raises(ValueError, match=r"after 13 gradients, in the middle of accumulating 4.*multiple of 4"):
        keras.load_state(fresh(config.build()), arrays, to_params, config=config)
    _, state = config.build().update(to_params(M), state, to_params(M))
    with pytest.raises(ValueError, match="no step has used yet"):
        keras.get_weights(state, from_params)
    with pytest.raises(ValueError, match="no step has used yet"):
        keras.load_state(state, LAYOUTS["legacy"][0], to_params)


def test_no_accumulators():
    config = dataclasses.replace(KERAS_CONFIG, accumulate_steps=4)
    state = keras.load_state(fresh(config.build()), LAYOUTS["keras"][0], to_params, config=config)
    assert int(optax_nadam.get_state(state).count) == 7


def test_named_accumulators():
    names = ["n/iteration", "n/k_gradient_accumulator", "n/b_gradient_accumulator", *KERAS_NAMES[2:], "variable"]
    source = variables([np.array(12), *EXTRA, *PAIRS, PRODUCT], names, "path")
    with pytest.raises(ValueError, match="accumulated gradients, but config has accumulate_steps=1"):
        keras.load_state(fresh(), source, to_params, config=KERAS_CONFIG)


def test_schedule_counters():
    tx = optax.chain(optax.clip(1.0), keras.nadam(optax.linear_schedule(1.0, 0.0, 10)))
    state = keras.load_state(fresh(tx), LAYOUTS["keras, schedule"][0], to_params)
    assert [int(x) for _, x in optax.tree.get_all_with_path(state, "count")] == [7, 7]


def test_old_state_is_kept():
    old = fresh()
    keras.load_state(old, LAYOUTS["legacy"][0], to_params)
    chex.assert_trees_all_equal(old, fresh())


def test_order_of_weights():
    """Ten and more layers of one shape, whose names sort in another order: ``layer_10`` before ``layer_2``."""
    names = [f"layer_{i}" for i in range(12)]
    params, grads = problem(6, steps=10, shapes=dict.fromkeys(names, (3,)))
    tx = keras.legacy_nadam()
    _, state = run(tx, params, grads)

    def in_order(tree):
        return [tree[name] for name in names]

    def as_tree(weights):
        return dict(zip(names, weights, strict=True))

    weights = keras.get_weights(state, in_order)
    chex.assert_trees_all_equal(weights[2:14], in_order(optax_nadam.get_state(state).m))
    chex.assert_trees_all_equal(keras.set_weights(tx.init(params), weights, as_tree), state)
    backward = [*weights[:2], *weights[13:1:-1], *weights[:13:-1]]
    turned = keras.set_weights(tx.init(params), backward, lambda weights: as_tree(weights[::-1]))
    chex.assert_trees_all_equal(turned, state)


def load_with(layout, **changes):
    config = dataclasses.replace(KERAS_CONFIG, **changes)
    return keras.load_state(fresh(), LAYOUTS[layout][0], to_params, config=config)


WARNINGS: dict[str, tuple[Any, str]] = {
    "decay": (lambda: keras.legacy_nadam(decay=0.5), r"decay has no effect .*: pass schedule_decay instead\."),
    "product": (lambda: load_with("tf_keras"), r"computed from 7 steps, b1=0.9 .*once per variable"),
    "loss scaled": (lambda: load_with("loss scaled"), r"LossScaleOptimizer.*rule='loss_scaled'"),
    "learning rate": (lambda: load_with("keras", learning_rate=0.25), r"learning rate is 0.5, the config's 0.25"),
}


@pytest.mark.parametrize("kind", WARNINGS)
def test_warnings(kind):
    call, text = WARNINGS[kind]
    with pytest.warns(UserWarning, match=text) as record:
        call()
    assert [x.filename for x in record] == [__file__]


def test_no_warning():
    load_with("keras")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([COUNT, PRODUCT, *M, V[0]], r"fit no known layout. Expected one of: .*\[iterations, product, \*m, \*v\]"),
        ([COUNT, PRODUCT, M[0], M[1], V[1], V[0]], r"shapes \(\), \(\), \(3, 2\), \(2,\), \(2,\), \(3, 2\), fit no"),
        ([], r"fit no known layout"),
        ([np.array(-1), PRODUCT, *M, *V], r"iterations must be whole and not negative, got -1"),
        ([np.array(1.5), PRODUCT, *M, *V], r"iterations must be whole and not negative, got 1.5"),
        ([COUNT, *M, *V], r"config is needed: Nadam of Keras stores no product of the momenta"),
        (LAYOUTS["keras, averages"][0], r"config is needed: .* or averages"),
        (5, r"source must be a path, a list of arrays or variables, or a mapping .* got 5"),
        ([COUNT, PRODUCT, M[1], M[0].T, V[1], V[0].T], r"m"),
    ],
)
def test_bad_checkpoints(arrays, text):
    with pytest.raises(ValueError, match=text):
        keras.load_state(fresh(), arrays, to_params)


LEGACY_WEIGHTS = LAYOUTS["legacy"][0]
BAD_CALLS: list[tuple[Any, str]] = [
    (lambda: keras.load_state(fresh(), LEGACY_WEIGHTS, to_params, dialect="torch"), r"dialect must be one .* 'torch'"),
    (lambda: keras.load_state(fresh(), LEGACY_WEIGHTS, to_params, dialect="tf_keras"),
     r"fit no known layout. Expected one of: tf_keras"),
    (lambda: keras.load_state(fresh(), variables(LEGACY_WEIGHTS, LEGACY_NAMES), to_params, dialect="tf_keras"),
     r"fit no known layout. Expected one of: tf_keras"),
    (lambda: keras.load_state(fresh(), keras.read(LEGACY_WEIGHTS), to_params, dialect="legacy"), r"belongs to read"),
    (lambda: keras.config_to(NadamConfig(), dialect="torch"), r"one of 'keras', 'tf_keras', 'legacy', got 'torch'"),
    (lambda: keras.dump_state(fresh(), from_params, dialect="torch"), r"dialect must be one of .* got 'torch'"),
    (lambda: keras.dump_state(fresh(), from_params), r"config is needed for dialect='keras'"),
    (lambda: keras.set_weights(fresh(), LEGACY_WEIGHTS[:2], to_params), r"of shapes \(\), \(\), fit no known layout"),
    (lambda: keras.set_weights(fresh(), LEGACY_WEIGHTS[:5], to_params), r"fit no known layout"),
    (lambda: keras.set_weights(fresh(), [np.array(-1), *LEGACY_WEIGHTS[1:]], to_params), r"not negative, got -1"),
    (lambda: keras.get_weights(optax.sgd(0.1).init(jnp.ones(2)), list), r"one ScaleByNadamState, but holds 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), BAD_CALLS)
def test_bad_calls(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_h5py_is_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for path in (HERE / "keras_old.keras", tmp_path / "model.h5"):
        with pytest.raises(ImportError, match="needs the package h5py: pip install h5py"):
            keras.load_state(fresh(), path, to_params)


def test_bad_archive(tmp_path):
    path = tmp_path / "other.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"is no .keras file: it lacks metadata.json, model.weights.h5"):
        keras.load_state(fresh(), path, to_params)


def test_config_in_a_file(monkeypatch, tmp_path):
    """A ``.keras`` file stores the config, from which the product is computed that tf_keras does not store."""
    arrays = {"optimizer/vars": {str(i): x for i, x in enumerate(LAYOUTS["tf_keras"][0])}}
    h5py = types.SimpleNamespace(File=lambda *_: contextlib.nullcontext(arrays))
    monkeypatch.setitem(sys.modules, "h5py", h5py)
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.15.0"}))
        archive.writestr("config.json", json.dumps({"compile_config": {"optimizer": TF_KERAS | {"beta_1": 0.8}}}))
        archive.writestr("model.weights.h5", b"")
    with pytest.warns(UserWarning, match="computed from 7 steps, b1=0.8"):
        keras.load_state(fresh(), tmp_path / "model.keras", to_params)


def test_dump_loss_scaled():
    config = dataclasses.replace(KERAS_CONFIG, rule="loss_scaled")
    state = keras.load_state(fresh(), LAYOUTS["loss scaled"][0], to_params, config=config)
    got = keras.dump_state(state, from_params, dialect="keras", config=config)
    chex.assert_trees_all_equal(got, [np.array(7, np.int32), RATE, *PAIRS])


def test_dtypes():
    arrays = [np.array(7.0), np.float64(LEGACY_PRODUCT), *(x.astype(np.float16) for x in (*M, *V))]
    state = keras.load_state(fresh(), arrays, to_params)
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(fresh())]
