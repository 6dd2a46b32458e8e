"""compat.keras beside recordings of the real Kerases (tests/parity/record_keras.py), and its errors."""

import contextlib
import copy
import dataclasses
import json
import pathlib
import sys
import warnings
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
from tests.parity.problem import SHAPES, gap, problem, run

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


@pytest.mark.lenient("optax.MultiSteps mixes dtypes")
@pytest.mark.parametrize(("dialect", "case"), CASES)
def test_parameters_follow_the_recorded(dialect, case):
    arguments = RECORDED["arguments"][dialect][case]
    expected = {name: ARRAYS[f"{dialect}/{case}/{name}"] for name in SHAPES}
    params, grads = problem(0)
    got, _ = run(CONSTRUCTORS[dialect](**arguments), params, grads)
    assert gap(recorded_steps(got), expected, arguments.get("learning_rate", 1e-3)) <= CLOSE


def test_legacy_is_the_library_s_own_nadam():
    params, grads = problem(1)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(), params, grads), run(nadam(), params, grads))


@pytest.mark.parametrize("make", [keras.nadam, keras.legacy_nadam])
def test_the_learning_rate_may_be_an_array(make):
    params, grads = problem(2, steps=5)
    got, _ = run(make(jnp.float32(0.01)), params, grads)
    assert gap(got, run(make(0.01), params, grads)[0], 0.01) < 1e-6


@pytest.mark.lenient("optax.MultiSteps mixes dtypes")
def test_an_optax_schedule_counts_steps_and_ours_gradients():
    params, grads = problem(2, steps=12)
    arguments = {"initial_learning_rate": 0.1, "decay_steps": 1, "decay_rate": 0.5}
    by_gradients, _ = run(
        keras.nadam(ScheduleConfig("inverse_time_decay", arguments), gradient_accumulation_steps=3), params, grads
    )
    by_steps, _ = run(
        keras.nadam(lambda count: 0.1 / (1 + 0.5 * (3 * count + 2)), gradient_accumulation_steps=3), params, grads
    )
    assert gap(by_gradients, by_steps, 0.1) < 1e-5


def test_lr_and_epsilon_0_are_those_of_the_original():
    params, grads = problem(2, steps=5)
    expected = run(keras.legacy_nadam(0.01), params, grads)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(0.5, lr=0.01, epsilon=0), params, grads), expected)
    chex.assert_trees_all_equal(run(keras.legacy_nadam(0.01, epsilon=None), params, grads), expected)


def test_decay_is_without_effect_and_says_so():
    with pytest.warns(UserWarning, match="decay has no effect.*schedule_decay"):
        tx = keras.legacy_nadam(decay=0.5)
    params, grads = problem(2, steps=5)
    chex.assert_trees_all_equal(run(tx, params, grads), run(nadam(), params, grads))


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clips_of_0_are_off_in_keras_3(name):
    assert keras.config_from(KERAS | {name: 0.0}) == keras.config_from(KERAS)


def test_rows_without_gradient_stay_while_their_moments_decay():
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
        (keras.nadam, {"use_ema": True}, ValueError, r"optax_nadam cannot express use_ema=True.*incremental"),
        (keras.nadam, {"loss_scale_factor": 8.0}, ValueError, r"loss_scale_factor=8.0.*Scale the loss"),
        (keras.nadam, {"gradient_accumulation_steps": 1}, ValueError, r"gradient_accumulation_steps .* 2.* got 1"),
        (keras.nadam, {"gradient_accumulation_steps": 2.5}, TypeError, r"gradient_accumulation_steps must be a whole"),
        (keras.legacy_nadam, {"schedule_decay": -1.0}, ValueError, r"schedule_decay must be .* got -1.0"),
        (keras.legacy_nadam, {"clipnorm": 0.0}, ValueError, r"clipnorm must be .* positive, got 0.0"),
        (keras.legacy_nadam, {"clipnorm": 1.0, "global_clipnorm": 2.0}, ValueError, r"only one of clipnorm, global"),
        (keras.legacy_nadam, {"learning_rate": optax.constant_schedule(1.0)}, ValueError, r"not be a schedule"),
        (keras.legacy_nadam, {"lr": ScheduleConfig("piecewise_constant", {"boundaries": [], "values": [1]})},
         ValueError, r"not be a schedule"),
        (keras.legacy_nadam, {"sparse_rows": True, "clipvalue": 1.0}, ValueError, r"express clipvalue=1.0.*slices"),
    ],
)  # fmt: skip
def test_bad_arguments(make, arguments, kind, text):
    with pytest.raises(kind, match=text):
        make(**arguments)


# Configs.


def in_float32(config):
    return {name: np.float32(x) if isinstance(x, float) else x for name, x in config.to_dict().items()}


@pytest.mark.parametrize("name", RECORDED["configs"])
def test_recorded_configs_and_their_serialized_form(name):
    recorded = RECORDED["configs"][name]
    before = copy.deepcopy(recorded)
    config = keras.config_from(recorded["config"])
    assert config.momentum_decay == (recorded["config"]["decay"] if name.startswith("legacy") else 1.0)
    assert config.rule == ("loss_scaled" if name == "keras/loss scaled" else "scheduled")
    if "serialized" in recorded:  # after training: float32 numbers
        assert in_float32(keras.config_from(recorded["serialized"])) == in_float32(config)
    assert recorded == before


def test_recorded_options_reach_the_config():
    config = keras.config_from(RECORDED["configs"]["keras/decay"]["config"])
    assert dataclasses.replace(config, learning_rate=0.01) == NadamConfig(
        learning_rate=0.01, b1=0.8, b2=0.99, eps=1e-3, weight_decay=0.1, momentum_decay=1.0
    )
    for name, field in {
        "clipnorm": "clip_norm",
        "clipvalue": "clip_value",
        "global_clipnorm": "clip_global_norm",
    }.items():
        config = keras.config_from(RECORDED["configs"][f"keras/{name}"]["config"])
        assert getattr(config, field) == RECORDED["arguments"]["keras"][name][name]
    assert keras.config_from(RECORDED["configs"]["keras/accumulation"]["config"]).accumulate_steps == 3
    assert keras.config_from(RECORDED["configs"]["legacy/clips"]["config"]).clip_norm == 0.2
    assert keras.config_from(RECORDED["configs"]["legacy/clips"]["config"]).clip_value == 0.1
    assert keras.config_from(RECORDED["configs"]["keras/schedule"]["config"]).learning_rate == ScheduleConfig(
        "cosine_decay",
        {"initial_learning_rate": 0.1, "decay_steps": 10, "alpha": 0.0, "warmup_target": None, "warmup_steps": 0},
    )


def test_configs_of_keras_2():
    assert keras.config_from(KERAS_2) == NadamConfig(learning_rate=0.002, eps=1e-8)
    newer = {"learning_rate" if key == "lr" else key: value for key, value in KERAS_2.items()}
    assert keras.config_from(newer | {"schedule_decay": 0.1}) == NadamConfig(
        learning_rate=0.002, eps=1e-8, momentum_decay=0.1
    )
    assert keras.config_from({"class_name": "Nadam", "config": KERAS_2 | {"epsilon": None}}).eps == 1e-7
    assert keras.config_from(KERAS_2 | {"epsilon": 0}).eps == 0
    assert keras.config_from(LEGACY | {"epsilon": 0}).eps == 1e-7


def test_tf_keras_prefers_a_norm_to_the_value():
    config = keras.config_from(TF_KERAS | {"clipnorm": 0.5, "clipvalue": 0.1})
    assert (config.clip_norm, config.clip_value) == (0.5, None)


def test_loss_scaling_around_other_dialects_stores_the_product():
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
    ("keras", NadamConfig(momentum_decay=1.0, clip_norm=0.5, accumulate_steps=4)),
    ("keras", NadamConfig(momentum_decay=1.0, clip_value=0.5, rule="loss_scaled")),
    ("keras", NadamConfig(momentum_decay=1.0, clip_global_norm=0.5)),
    ("tf_keras", NadamConfig(momentum_decay=1.0, weight_decay=0.1, clip_value=0.5)),
    ("legacy", NadamConfig(b1=0.8, b2=0.9, eps=1e-5, momentum_decay=0.3, clip_norm=0.5, clip_value=0.1)),
    ("legacy", NadamConfig(clip_global_norm=0.5, clip_value=0.1)),
]
SCHEDULES = {
    "ExponentialDecay": ScheduleConfig(
        "exponential_decay", {"initial_learning_rate": 1.0, "decay_steps": 2, "decay_rate": 0.5}
    ),
    "InverseTimeDecay": ScheduleConfig(
        "inverse_time_decay", {"initial_learning_rate": 1.0, "decay_steps": 2, "decay_rate": 0.5}
    ),
    "PolynomialDecay": ScheduleConfig(
        "polynomial_decay", {"initial_learning_rate": 1.0, "decay_steps": 2, "cycle": True}
    ),
    "PiecewiseConstantDecay": ScheduleConfig("piecewise_constant", {"boundaries": [3], "values": [1.0, 0.5]}),
    "CosineDecay": ScheduleConfig(
        "cosine_decay", {"initial_learning_rate": 1.0, "decay_steps": 2, "warmup_target": 2.0}
    ),
    "CosineDecayRestarts": ScheduleConfig(
        "cosine_decay_restarts", {"initial_learning_rate": 1.0, "first_decay_steps": 2}
    ),
}


@pytest.mark.parametrize(("dialect", "config"), ROUND_TRIPS)
def test_round_trips_are_exact(dialect, config):
    through = json.loads(json.dumps(keras.config_to(config, dialect=dialect)))
    assert keras.config_from(through) == config


@pytest.mark.parametrize("dialect", ["keras", "tf_keras"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_round_trip_under_keras_names(name, dialect):
    config = NadamConfig(momentum_decay=1.0, learning_rate=SCHEDULES[name])
    theirs = keras.config_to(config, dialect=dialect)
    assert theirs["learning_rate"]["class_name"] == name
    assert keras.config_from(json.loads(json.dumps(theirs))) == config


@pytest.mark.parametrize(
    ("config", "dialect", "text"),
    [
        (NadamConfig(), "keras", r"Keras 3 cannot express momentum_decay=0.004. It has 1.0 .*schedule_decay"),
        (
            NadamConfig(momentum_decay=1.0, eps_root=1e-3),
            "tf_keras",
            r"tf_keras cannot express eps_root=0.001. Do it around",
        ),
        (
            NadamConfig(momentum_decay=1.0, rule="torch1"),
            "keras",
            r"rule='torch1'. It follows 'scheduled' or 'loss_scaled'",
        ),
        (
            NadamConfig(momentum_decay=1.0, rule="loss_scaled"),
            "tf_keras",
            r"rule='loss_scaled'. It follows 'scheduled'\.",
        ),
        (
            NadamConfig(momentum_decay=1.0, clip_norm=1.0, clip_value=1.0),
            "keras",
            r"clip_value beside clip_norm=1.0. Only one",
        ),
        (
            NadamConfig(momentum_decay=1.0, clip_norm=1.0, clip_value=1.0),
            "tf_keras",
            r"clip_value beside clip_norm=1.0. Only one",
        ),
        (NadamConfig(momentum_decay=1.0, accumulate_steps=2), "tf_keras", r"accumulate_steps=2"),
        (
            NadamConfig(momentum_decay=1.0, coupled_weight_decay=True, weight_decay=0.1),
            "keras",
            r"coupled_weight_decay=True",
        ),
        (NadamConfig(learning_rate_decay=0.1), "legacy", r"legacy Nadam cannot express learning_rate_decay=0.1"),
        (NadamConfig(weight_decay=0.1), "legacy", r"legacy Nadam cannot express weight_decay=0.1"),
        (
            NadamConfig(clip_by_gradient_rms=1.0, momentum_decay=1.0),
            "keras",
            r"Keras 3 cannot express clip_by_gradient_rms=1.0",
        ),
        (NadamConfig(clip_norm=1.0, clip_global_norm=1.0), "legacy", r"clip_global_norm beside clip_norm=1.0"),
        (NadamConfig(eps=0.0), "legacy", r"eps=0.0. It makes 1e-7 of it"),
        (NadamConfig(learning_rate=SCHEDULES["CosineDecay"]), "legacy", r"learning_rate=ScheduleConfig.*is a number"),
        (NadamConfig(), "torch", r"dialect must be one of 'keras', 'tf_keras', 'legacy', got 'torch'"),
    ],
)
def test_what_a_dialect_cannot_express(config, dialect, text):
    with pytest.raises(ValueError, match=text):
        keras.config_to(config, dialect=dialect)
    with pytest.raises(ValueError, match=text):
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
PRODUCT, RATE = np.float32(0.125), np.float32(0.5)
M = [np.full(shape, 1.0 + i, np.float32) for i, shape in enumerate(W)]
V = [np.full(shape, 3.0 + i, np.float32) for i, shape in enumerate(W)]
EXTRA = [np.full(shape, 9.0, np.float32) for shape in W]
PAIRS = [M[0], V[0], M[1], V[1]]
KERAS_CONFIG = NadamConfig(momentum_decay=1.0, learning_rate=0.5)


def to_params(weights):
    return {"kernel": jnp.asarray(weights[0]).T, "bias": jnp.asarray(weights[1])}


def from_params(params):
    return [params["kernel"].T, params["bias"]]


def fresh(tx=None):
    return (nadam() if tx is None else tx).init(to_params(M))


WRAPPER = [np.array(0), np.float32(0), np.array(3), np.float32(32768)]
LAYOUTS: dict[str, tuple[list[Any], Any]] = {
    "legacy": ([COUNT, PRODUCT, *M, *V], None),
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
def test_every_layout_of_plain_arrays(layout):
    arrays, config = LAYOUTS[layout]
    warned = pytest.warns(UserWarning, match="computed from 7 steps")
    with warned if layout in WITHOUT_PRODUCT else contextlib.nullcontext():
        state = keras.load_state(fresh(), arrays, to_params, config=config)
    lost = layout in WITHOUT_PRODUCT or layout.startswith("loss scaled")
    product = product_after(7, config) if lost else PRODUCT
    chex.assert_trees_all_equal(
        keras.get_weights(state, from_params), [np.array(7), np.asarray(product, np.float32), *M, *V]
    )


def test_a_layout_is_chosen_by_the_dialect_where_shapes_do_not_tell():
    m = [np.full(2, 1.0, np.float32), np.full(2, 2.0, np.float32)]
    v = [np.full(2, 3.0, np.float32), np.full(2, 4.0, np.float32)]
    state = nadam().init([m[0], m[1]])
    for dialect, arrays in (("legacy", [COUNT, *m, *v]), ("tf_keras", [COUNT, m[0], v[0], m[1], v[1]])):
        with pytest.raises(
            ValueError, match=r"more than one layout: Keras 2.2.*tf_keras.*dialect='legacy' or 'tf_keras'"
        ):
            keras.load_state(state, arrays, list, config=NadamConfig())
        with pytest.warns(UserWarning, match="computed from 7"):
            loaded = keras.load_state(state, arrays, list, config=NadamConfig(), dialect=dialect)
        chex.assert_trees_all_equal(keras.get_weights(loaded, list)[2:], [*m, *v])


LEGACY_NAMES = [
    "Nadam/iter:0",
    "Nadam/momentum_cache:0",
    "Nadam/d/b/m:0",
    "Nadam/d/b/v:0",
    "Nadam/d/k/m:0",
    "Nadam/d/k/v:0",
]


def test_arrays_are_found_by_name():
    by_weight = [M[0], V[0], M[1], V[1]]
    cases = {
        "legacy": (LEGACY_NAMES, [COUNT, PRODUCT, *by_weight]),
        "keras 2.3": (
            [
                "Nadam/iterations:0",
                "Nadam/m_schedule:0",
                *(f"training/Nadam/{x}:0" for x in ("m_0", "m_1", "v_0", "v_1")),
            ],
            [COUNT, PRODUCT, *M, *V],
        ),
        "keras": (
            [
                "n/iteration",
                "n/learning_rate",
                "n/k_momentum",
                "n/k_velocity",
                "n/b_momentum",
                "n/b_velocity",
                "n/variable",
            ],
            [COUNT, RATE, *by_weight, PRODUCT],
        ),
    }
    for names, arrays in cases.values():
        for attribute in ("name", "path"):
            variables = [Variable(x, **{attribute: name}) for x, name in zip(arrays, names, strict=True)]
            state = keras.load_state(fresh(), variables, to_params)
            chex.assert_trees_all_equal(keras.get_weights(state, from_params), [np.array(7), PRODUCT, *M, *V])


def test_names_of_tf_keras_and_of_a_wrapper():
    names = ["iteration:0", "Nadam/m/m/k:0", "Nadam/m/v/b:0", "Nadam/v/m/k:0", "Nadam/v/v/b:0"]
    variables = [Variable(x, name=name) for x, name in zip([COUNT, *M, *V], names, strict=True)]
    with pytest.warns(UserWarning, match="once per variable"):
        state = keras.load_state(fresh(), variables, to_params, config=KERAS_CONFIG)
    chex.assert_trees_all_equal(keras.get_weights(state, from_params)[2:], [*M, *V])
    names = ["w/iteration", "w/learning_rate", "w/step_counter", "w/dynamic_scale", "n/iteration", "n/learning_rate"]
    names += ["n/k_momentum", "n/k_velocity", "n/b_momentum", "n/b_velocity"]
    arrays = [*WRAPPER, COUNT, RATE, *PAIRS]
    variables = [Variable(x, path=name) for x, name in zip(arrays, names, strict=True)]
    with pytest.warns(UserWarning, match=r"LossScaleOptimizer.*rule='loss_scaled'"):
        state = keras.load_state(fresh(), variables, to_params, config=KERAS_CONFIG)
    expected = np.float32(product_after(7, KERAS_CONFIG))
    chex.assert_trees_all_equal(keras.get_weights(state, from_params), [np.array(7), expected, *M, *V])


def test_names_of_which_one_is_missing_are_followed_by_the_search_by_shapes():
    variables = [Variable(x, name=name) for x, name in zip([COUNT, PRODUCT, *PAIRS], LEGACY_NAMES, strict=True)]
    with pytest.raises(ValueError, match="fit no known layout"):
        keras.load_state(fresh(), variables[:-1], to_params)


def test_names_that_tell_nothing_are_followed_by_the_search_by_shapes():
    variables = [Variable(x, name=f"Variable_{i}:0") for i, x in enumerate([COUNT, PRODUCT, *M, *V])]
    state = keras.load_state(fresh(), variables, to_params)
    chex.assert_trees_all_equal(keras.get_weights(state, from_params), [np.array(7), PRODUCT, *M, *V])


def test_the_recorded_keras_before_3_10_continues_alike():
    variables = [OLD[f"variable/{i}"] for i in range(9)]
    params = [OLD[f"before/{i}"] for i in range(3)]
    grads = [[OLD[f"grad/{step}/{i}"] for i in range(3)] for step in range(10)]
    tx = keras.nadam(0.01, weight_decay=0.1)
    got, _ = run(tx, params, grads, keras.load_state(tx.init(params), variables, list))
    expected = [np.stack([OLD[f"after/{step}/{i}"] for step in range(10)]) for i in range(3)]
    assert gap(dict(enumerate(got)), dict(enumerate(expected)), 0.01) <= 1e-4


@pytest.mark.parametrize("dialect", ["keras", "tf_keras", "legacy"])
def test_recorded_states_are_those_we_reach(dialect):
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


@pytest.mark.lenient("optax.MultiSteps mixes dtypes")
def test_accumulation_counts_gradients():
    config = dataclasses.replace(KERAS_CONFIG, accumulate_steps=4)
    arrays = [np.array(12), RATE, *EXTRA, *PAIRS, PRODUCT]
    state = keras.load_state(fresh(config.build()), arrays, to_params, config=config)
    assert int(optax.tree.get(state, "mini_step")) == 0
    back = keras.dump_state(state, from_params, dialect="keras", config=config)
    chex.assert_trees_all_equal(back, [np.array(12, np.int32), RATE, *[0 * x for x in EXTRA], *PAIRS, PRODUCT])
    assert int(optax_nadam.get_state(state).count) == 3
    arrays[0] = np.array(13)
    with pytest.raises(ValueError, match=r"after 13 gradients, in the middle of accumulating 4.*multiple of 4"):
        keras.load_state(fresh(config.build()), arrays, to_params, config=config)
    _, state = config.build().update(to_params(M), state, to_params(M))
    with pytest.raises(ValueError, match="no step has used yet"):
        keras.get_weights(state, from_params)
    with pytest.raises(ValueError, match="no step has used yet"):
        keras.load_state(state, LAYOUTS["legacy"][0], to_params)


def test_a_checkpoint_without_accumulators_has_counted_steps():
    config = dataclasses.replace(KERAS_CONFIG, accumulate_steps=4)
    state = keras.load_state(fresh(config.build()), LAYOUTS["keras"][0], to_params, config=config)
    assert int(optax_nadam.get_state(state).count) == 7


def test_accumulators_by_name_need_a_config_that_accumulates():
    names = ["n/iteration", "n/k_gradient_accumulator", "n/b_gradient_accumulator", "n/k_momentum", "n/k_velocity"]
    names += ["n/b_momentum", "n/b_velocity", "variable"]
    arrays = [np.array(12), *EXTRA, *PAIRS, PRODUCT]
    variables = [Variable(x, path=name) for x, name in zip(arrays, names, strict=True)]
    with pytest.raises(ValueError, match="accumulated gradients, but config has accumulate_steps=1"):
        keras.load_state(fresh(), variables, to_params, config=KERAS_CONFIG)


def test_states_in_wrappers_and_counters_of_schedules():
    tx = optax.chain(optax.clip(1.0), keras.nadam(optax.linear_schedule(1.0, 0.0, 10)))
    state = keras.load_state(fresh(tx), LAYOUTS["keras, schedule"][0], to_params)
    assert [int(x) for _, x in optax.tree.get_all_with_path(state, "count")] == [7, 7]


def test_loading_leaves_the_old_state_as_it_was():
    old = fresh()
    keras.load_state(old, LAYOUTS["legacy"][0], to_params)
    chex.assert_trees_all_equal(old, fresh())


def test_weights_there_and_back_in_the_order_of_the_functions():
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


def test_a_changed_learning_rate_is_reported_where_the_state_is_loaded():
    config = dataclasses.replace(KERAS_CONFIG, learning_rate=0.25)
    with pytest.warns(UserWarning, match=r"learning rate is 0.5, the config's 0.25") as warned:
        keras.load_state(fresh(), LAYOUTS["keras"][0], to_params, config=config)
    assert [x.filename for x in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.load_state(fresh(), LAYOUTS["keras"][0], to_params, config=KERAS_CONFIG)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([COUNT, PRODUCT, *M, V[0]], r"fit no known layout. Expected one of: .*\[iterations, product, \*m, \*v\]"),
        ([COUNT, PRODUCT, M[0], M[1], V[1], V[0]], r"shapes \(\), \(\), \(3, 2\), \(2,\), \(2,\), \(3, 2\), fit no"),
        ([], r"fit no known layout"),
        ([np.array(-1), PRODUCT, *M, *V], r"iterations must be whole and not negative, got -1"),
        ([np.array(1.5), PRODUCT, *M, *V], r"iterations must be whole and not negative, got 1.5"),
        ([COUNT, *M, *V], r"config is needed: this Keras checkpoint stores no product of the momenta"),
        (LAYOUTS["keras, averages"][0], r"config is needed: .* or averages"),
        (5, r"source must be a path, a list of arrays or variables, or a mapping .* got 5"),
        ([COUNT, PRODUCT, M[1], M[0].T, V[1], V[0].T], r"m"),
    ],
)
def test_bad_checkpoints(arrays, text):
    with pytest.raises(ValueError, match=text):
        keras.load_state(fresh(), arrays, to_params)


def test_bad_calls():
    with pytest.raises(ValueError, match=r"dialect must be one of .* got 'torch'"):
        keras.load_state(fresh(), LAYOUTS["legacy"][0], to_params, dialect="torch")
    with pytest.raises(ValueError, match=r"fit no known layout. Expected one of: tf_keras"):
        keras.load_state(fresh(), LAYOUTS["legacy"][0], to_params, dialect="tf_keras")
    variables = [Variable(x, name=name) for x, name in zip([COUNT, PRODUCT, *PAIRS], LEGACY_NAMES, strict=True)]
    with pytest.raises(ValueError, match="fit no known layout"):
        keras.load_state(fresh(), variables, to_params, dialect="tf_keras")
    with pytest.raises(ValueError, match=r"dialect must be one of .* got 'torch'"):
        keras.dump_state(fresh(), from_params, dialect="torch")
    with pytest.raises(ValueError, match="config is needed for dialect='keras'"):
        keras.dump_state(fresh(), from_params, dialect="keras")
    for count in (2, 5):
        with pytest.raises(ValueError, match=rf"weights must be \[iterations, .*\*v\], got {count} arrays"):
            keras.set_weights(fresh(), LAYOUTS["legacy"][0][:count], to_params)
    with pytest.raises(ValueError, match=r"iterations must be whole and not negative, got -1"):
        keras.set_weights(fresh(), [np.array(-1), *LAYOUTS["legacy"][0][1:]], to_params)
    with pytest.raises(ValueError, match="must hold one ScaleByNadamState, but holds 0"):
        keras.get_weights(optax.sgd(0.1).init(jnp.ones(2)), list)


def test_files_need_h5py_and_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for path in (HERE / "keras_old.keras", tmp_path / "model.h5"):
        with pytest.raises(ImportError, match="needs the package h5py: pip install h5py"):
            keras.load_state(fresh(), path, to_params)


def test_an_archive_that_is_no_model(tmp_path):
    path = tmp_path / "other.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"is no .keras file: it lacks metadata.json, model.weights.h5"):
        keras.load_state(fresh(), path, to_params)


def test_the_loss_scaled_rule_is_dumped_without_product():
    config = dataclasses.replace(KERAS_CONFIG, rule="loss_scaled")
    state = keras.load_state(fresh(), LAYOUTS["loss scaled"][0], to_params, config=config)
    got = keras.dump_state(state, from_params, dialect="keras", config=config)
    chex.assert_trees_all_equal(got, [np.array(7, np.int32), RATE, *PAIRS])


def test_dtypes_are_those_of_the_state():
    arrays = [np.array(7.0), np.float64(0.125), *(x.astype(np.float16) for x in (*M, *V))]
    state = keras.load_state(fresh(), arrays, to_params)
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(fresh())]
