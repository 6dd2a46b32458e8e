"""compat.keras on checkpoints that are read by name, without TensorFlow, beside recordings of what wrote them.

============ ========================================================================================
recordings   weights, moments and hyperparameters are those of the recorded runs, which continue
names        decide which moment is whose, in whatever order; equal names keep theirs
guesses      are not made: what names do not decide is an error, which says what to pass
packages     are needed for the files that they read, and not otherwise
============ ========================================================================================
"""

import json
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import chex
import numpy as np
import pytest

import optax_nadam
from optax_nadam import NadamConfig
from optax_nadam.compat import _keras_read, keras
from tests.compat.test_keras import COUNT, LAYOUTS, LEGACY_PRODUCT, PRODUCT, Variable
from tests.parity.problem import gap, run

HERE = pathlib.Path(__file__).parent / "recordings"
NAMES = json.loads((HERE / "keras_named.json").read_text())
ARRAYS = dict(np.load(HERE / "keras_named.npz"))
LEARNING_RATE = 0.01
# At a learning rate of 0.01 a float32 parameter below 4 rounds by 1.2e-5; measured at most 3.6e-5 after eight steps.
CLOSE = 1e-4
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
CONFIGS = {
    "legacy": NadamConfig(learning_rate=LEARNING_RATE),
    "tf_keras": NadamConfig(learning_rate=LEARNING_RATE, momentum_decay=1.0),
    "tf.keras Saver": NadamConfig(learning_rate=LEARNING_RATE, momentum_decay=0.02),
    "tf.contrib Saver": NadamConfig(learning_rate=LEARNING_RATE, eps=1e-8, rule="eps_hat"),
    "state tree": NadamConfig(learning_rate=LEARNING_RATE, momentum_decay=1.0),
}


def split(numbers, shapes):
    """One long array as several."""
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
    return [x.reshape(shape) for x, shape in zip(np.split(numbers, ends[:-1]), shapes, strict=True)]


def source_of(case) -> dict[str, Any]:
    """The recorded checkpoint, in alphabetical order."""
    shapes = NAMES[case]["shapes"]
    return dict(sorted(zip(shapes, split(ARRAYS[f"{case}/source"].astype(np.float32), shapes.values()), strict=True)))


def steps_of(case, part):
    """The recorded gradients, or weights, of the steps after: by the name under which we have the weights."""
    order = NAMES[case]["order"]
    keys = [name.removesuffix(VALUE).removeprefix("trainable_variables/") for name in order]
    shapes = [NAMES[case]["shapes"][name] for name in order]
    return [dict(zip(keys, split(x, shapes), strict=True)) for x in ARRAYS[f"{case}/{part}"]]


def nested(flat):
    """Mappings in mappings."""
    tree: dict[str, Any] = {}
    for name, x in flat.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = x
    return tree


def graph_of(case, full_names=None):
    """The object graph of a recorded checkpoint of tf_keras, as far as it is read."""
    order = NAMES[case]["order"]
    names = full_names or [f"layer{i}/team/kernel" for i in range(len(order))]
    leaves = [node([variable(name, key)]) for key, name in zip(order, names, strict=True)]
    for i, name in enumerate(names):
        for j, slot in enumerate("mv"):
            full_name = f"Nadam/{slot}/{name}" if i % 2 else f"{slot}/{name}"  # with the optimizer's scope or without
            leaves.append(node([variable(full_name, f"optimizer/_variables/{2 * i + j + 1}{VALUE}")]))
    count = len(order)
    lists = [node([], {str(i): count + 2 * i + j for i in range(count)}) for j in (0, 1)]
    return [*leaves, *lists, node([], {"_momentums": len(leaves), "_velocities": len(leaves) + 1})]


def variable(full_name, key):
    return SimpleNamespace(full_name=full_name, checkpoint_key=key)


def node(attributes, children: dict[str, int] | None = None):
    items = (children or {}).items()
    children_of = [SimpleNamespace(local_name=name, node_id=node_id) for name, node_id in items]
    return SimpleNamespace(attributes=attributes, children=children_of)


@pytest.fixture
def graph(monkeypatch):
    """Puts a graph in the place of what TensorFlow would parse."""

    def put(*arguments):
        monkeypatch.setattr(_keras_read, "_nodes", lambda graph: graph_of(*arguments))
        return source_of(arguments[0]) | {"_CHECKPOINTABLE_OBJECT_GRAPH": b"parsed by TensorFlow"}

    return put


def largest_difference(case, source):
    """From the source alone: weights, moments, and the steps after."""
    config = CONFIGS[case]
    weights = keras.read_weights(source, config=config)
    tx, params = config.build(), dict(weights)
    state = keras.load_state(tx.init(params), source, lambda weights: dict(weights), config=config)
    grads, after = steps_of(case, "grads"), steps_of(case, "after")
    assert sorted(weights) == sorted(grads[0])
    got, _ = run(tx, {name: x.astype(np.float32) for name, x in params.items()}, grads, state)
    return max(gap({k: x[i] for k, x in got.items()}, after[i], LEARNING_RATE) for i in range(len(after)))


@pytest.mark.parametrize("case", [case for case in CONFIGS if case != "tf_keras"])
def test_mapping(case):
    assert largest_difference(case, source_of(case)) <= CLOSE


def test_nested_mapping():
    assert largest_difference("state tree", nested(source_of("state tree"))) <= CLOSE


def test_numbered_moments(graph):
    assert largest_difference("tf_keras", graph("tf_keras")) <= CLOSE


def test_read_config():
    for case in ("legacy", "tf.keras Saver"):
        assert keras.read_config(source_of(case)) == CONFIGS[case]
    for source in (source_of("state tree"), LAYOUTS["legacy"][0]):
        with pytest.raises(ValueError, match=r"does not hold all hyperparameters.*config_from"):
            keras.read_config(source)


def loaded(source, config, **arguments):
    weights = {name: np.zeros((3, 3), np.float32) for name in ("a", "b")}
    return keras.load_state(config.build().init(weights), source, dict, config=config, **arguments)


def test_no_guesses(graph):
    with pytest.raises(ValueError, match=r"numbers its moments \(optimizer/_variables/1.*lacks '_CHECKPOINTABLE_OBJ"):
        loaded(source_of("tf_keras"), CONFIGS["tf_keras"])
    with pytest.raises(ValueError, match=r"10 weights that the moment 'm/dense/kernel' may .*optimizer.variables"):
        loaded(graph("tf_keras", ["dense/kernel"] * 10), CONFIGS["tf_keras"])


def test_packages_are_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for folder in ("directory", "saved/variables", "backup/chief", "orbax/3/pytree", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("prefix.index", "directory/checkpoint", "saved/saved_model.pb", "backup/chief/checkpoint"):
        (tmp_path / file).touch()
    for name in ("prefix", "directory", "saved", "backup"):
        with pytest.raises(ImportError, match="needs the package tensorflow: pip install tensorflow"):
            keras.read_weights(tmp_path / name)
    with pytest.raises(ImportError, match="needs the package tensorflow:"):
        keras.read_weights(source_of("tf_keras") | {"_CHECKPOINTABLE_OBJECT_GRAPH": b""})
    with pytest.raises(ImportError, match="needs the package orbax-checkpoint: pip install"):
        keras.read_weights(tmp_path / "orbax")
    with pytest.raises(ValueError, match="empty is a directory without a known checkpoint"):
        keras.read_weights(tmp_path / "empty")


def test_keras_backup(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "latest.weights.h5").touch()
    with pytest.raises(ImportError, match="needs the package h5py"):
        keras.read_weights(tmp_path)


def saver(**changes):
    """A small checkpoint of tf.keras' Nadam in TensorFlow 1."""
    ones = np.ones((3, 3), np.float32)
    arrays = {name: i * ones for i, name in enumerate(["a", "b", "N/a/m", "N/b/m", "N/a/v", "N/b/v"])}
    return arrays | {"N/iter": COUNT, "N/momentum_cache": PRODUCT} | changes


def test_any_order():
    config = NadamConfig()
    for source in (saver(), dict(reversed(saver().items()))):
        state = optax_nadam.get_state(loaded(source, config))
        assert (int(state.count), float(state.mu_product)) == (7, float(PRODUCT))
        chex.assert_trees_all_equal(state.m, {"a": source["N/a/m"], "b": source["N/b/m"]})
        chex.assert_trees_all_equal(state.v, {"a": source["N/a/v"], "b": source["N/b/v"]})


def test_longest_name():
    source: dict[str, Any] = {
        name: np.full(2, i, np.float32) for i, name in enumerate(["b", "a/b", "N/b/m", "N/b/v", "N/a/b/m"])
    }
    source |= {"N/a/b/v": np.full(2, 9, np.float32), "N/iter": COUNT, "N/momentum_cache": PRODUCT}
    tx = optax_nadam.nadam()
    state = keras.load_state(tx.init(keras.read_weights(source)), source, dict)
    chex.assert_trees_all_equal(optax_nadam.get_state(state).m, {"b": source["N/b/m"], "a/b": source["N/a/b/m"]})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"w": np.ones(3)}, "holds no optimizer state under names that are known; its names begin with 'w'"),
        ({}, "its names begin with no optimizer's arrays"),
        ({k: x for k, x in saver().items() if k != "N/b/v"}, "lacks the second moment of 'N/b'"),
        ({k: x for k, x in saver().items() if k != "b"}, "has moments of 'N/b', but no weight of that name"),
        (saver(**{"other/iter": COUNT}), "more than one optimizer: iterations may be 'N/iter', 'other/iter'"),
        (saver(**{"N/iter": np.array(-1)}), "iterations must be whole and not negative, got -1"),
        (
            {"trainable_variables": {"a": {"b_c": 1}, "a_b": {"c": 1}}, "optimizer_variables": {}},
            "has two weights, 'a/b_c' and 'a_b/c', whose moments have one name",
        ),
    ],
)
def test_bad_mappings(source, text):
    with pytest.raises(ValueError, match=text):
        loaded(source, NadamConfig())


def test_mapping_of_dialect():
    with pytest.raises(ValueError, match="names that are known"):
        loaded(saver(), NadamConfig(), dialect="keras")
    loaded(saver(), NadamConfig(), dialect="legacy")


def test_wrapped_optimizer():
    """The scalars of a LossScaleOptimizer, which sorts before the optimizer or after it, are not the optimizer's."""
    inner = {
        "iteration": np.array(7),
        "learning_rate": np.float32(1e-3),
        "k_momentum": np.ones(2),
        "k_velocity": np.ones(2),
    }
    wrapper = {"iteration": np.array(9), "step_counter": np.array(1), "dynamic_scale": np.float32(8)}
    config = NadamConfig(momentum_decay=1.0, rule="loss_scaled")
    for name in ("a_wrapper", "z_wrapper"):
        source = {"trainable_variables": {"k": np.zeros(2)}, "optimizer_variables": {name: wrapper, "nadam": inner}}
        state = keras.load_state(config.build().init({"k": np.zeros(2)}), source, dict, config=config)
        assert int(optax_nadam.get_state(state).count) == 7


def contrib(power, **others):
    ones = np.ones((3, 3), np.float32)
    slots = dict.fromkeys(("a", "b", "a/Adam", "a/Adam_1", "b/Adam", "b/Adam_1"), ones)
    return slots | {"beta1_power": np.float32(power), "beta2_power": np.float32(0.9)} | others


def test_tf_contrib_steps():
    config = CONFIGS["tf.contrib Saver"]
    for count in (0, 1, 10, 600):
        power = np.cumprod(np.full(count + 1, 0.9, np.float32), dtype=np.float32)[-1]
        assert int(optax_nadam.get_state(loaded(contrib(power), config)).count) == count
    vanished = contrib(0.0, global_step=np.array(5000))
    assert int(optax_nadam.get_state(loaded(vanished, config)).count) == 5000
    with pytest.raises(ValueError, match="beta1_power has vanished and it has no global_step"):
        loaded(contrib(0.0), config)
    with pytest.raises(ValueError, match=r"beta1_power=0.5 is not a power of config.b1=0.9"):
        loaded(contrib(0.5), config)
    with pytest.raises(ValueError, match=r"config is needed: tf.contrib's Nadam stores its steps as a power"):
        keras.load_state(config.build().init({}), contrib(0.9), dict)


EQUAL_NAMES = {
    "legacy": ["N/iter:0", "N/momentum_cache:0", *["N/Variable/m:0"] * 3, *["N/Variable/v:0"] * 3],
    "tf_keras": ["iteration:0", *["N/m/Variable:0", "N/v/Variable:0"] * 3],
    "keras": [
        "n/iteration",
        "n/learning_rate",
        *["n/dense_kernel_momentum", "n/dense_kernel_velocity"] * 3,
        "variable",
    ],
}


@pytest.mark.filterwarnings("ignore:the checkpoint stores no product")
@pytest.mark.parametrize("dialect", EQUAL_NAMES)
def test_equal_names(dialect):
    m, v = ([np.full(2, i, np.float32) for i in range(first, first + 3)] for first in (1, 4))
    pairs = [x for pair in zip(m, v, strict=True) for x in pair]
    arrays: dict[str, list[Any]] = {
        "legacy": [COUNT, LEGACY_PRODUCT, *m, *v],
        "tf_keras": [COUNT, *pairs],
        "keras": [COUNT, np.float32(1e-3), *pairs, PRODUCT],
    }
    variables = [Variable(x, name=name) for x, name in zip(arrays[dialect], EQUAL_NAMES[dialect], strict=True)]
    config = NadamConfig(momentum_decay=0.004 if dialect == "legacy" else 1.0)
    state = optax_nadam.get_state(keras.load_state(config.build().init(m), variables, list, config=config))
    chex.assert_trees_all_equal((state.m, state.v), (m, v))


def test_lists_have_no_weights():
    with pytest.raises(
        ValueError, match=r"does not tell which of its weights are trainable.*take its trainable parameters"
    ):
        keras.read_weights(LAYOUTS["legacy"][0])


@pytest.mark.parametrize(("count", "warned"), [(15, True), (16, True), (18, False), (1000, False)])
def test_vanished_product(count, warned, recwarn):
    """At psi = .004 the product is 6.4e-6 after 15 steps and 5.4e-7 after 18."""
    moments = [np.ones(2, np.float32)] * 2
    tx, config = optax_nadam.nadam(), NadamConfig()
    keras.load_state(tx.init(moments[:1]), [np.array(count), *moments], list, config=config, dialect="legacy")
    assert ["no product" in str(x.message) for x in recwarn] == [True] * warned
    assert all(x.filename == __file__ for x in recwarn)
