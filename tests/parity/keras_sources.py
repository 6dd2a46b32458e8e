"""Runs of the real Kerases and TensorFlows, stopped and saved in every way that there is."""

import functools
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

with warnings.catch_warnings():  # what they say while they are imported is no business of ours
    warnings.simplefilter("ignore")
    import keras
    import tensorflow as tf
    import tf_keras

import jax
import numpy as np

BEFORE, AFTER = 25, 8
LEARNING_RATE = 0.01
tf1 = tf.compat.v1


class Run(NamedTuple):
    """A run that was saved.

    Attributes:
      source: what was saved.
      weights: the values of the trainable weights when it was saved, in order.
      grads: gradients of the steps after that, a list of arrays each.
      after: the weights after each of these steps.
    """

    source: Any
    weights: list[np.ndarray]
    grads: list[list[np.ndarray]]
    after: list[list[np.ndarray]]


def run(step: Callable[[Any], None], values: Callable[[], list[np.ndarray]], save: Callable[[], Any], seed=5) -> Run:
    """Takes steps, saves, and takes the steps after."""
    rng = np.random.default_rng(seed)

    def gradients():
        return [rng.normal(size=x.shape).astype(np.float32) for x in values()]

    for _ in range(BEFORE):
        step(gradients())
    source, weights = save(), values()
    grads, after = [gradients() for _ in range(AFTER)], []
    for g in grads:
        step(g)
        after.append(values())
    return Run(source, weights, grads, after)


def model_of(package):
    """Layers of equal shapes whose names sort in another order; one nested, one frozen, one with statistics."""
    layers = package.layers
    nested = package.Sequential([layers.Dense(3, name="inside")], name="nested")
    frozen = layers.Dense(3, name="frozen", trainable=False)
    last = [
        layers.BatchNormalization(name="statistics"),
        layers.Dense(3, name="dense_10"),
        layers.Dense(3, name="dense_2"),
    ]
    model = package.Sequential([package.Input((3,)), layers.Dense(3, name="z"), nested, frozen, *last])
    rng = np.random.default_rng(3)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def tensorflow_run(dialect, save) -> Run:
    """A run of tf_keras, saved by a function of model and optimizer."""
    make = {"legacy": tf_keras.optimizers.legacy.Nadam, "tf_keras": tf_keras.optimizers.Nadam}[dialect]
    model, optimizer = model_of(tf_keras), make(LEARNING_RATE)
    model.compile(optimizer, "mse")
    variables = model.trainable_variables

    def step(grads):
        optimizer.apply_gradients(zip(map(tf.constant, grads), variables, strict=True))

    return run(step, lambda: [x.numpy() for x in variables], lambda: save(model, optimizer))


def keras_run(save, **arguments) -> Run:
    """A run of Keras 3, saved by a function of the model."""
    model = model_of(keras)
    model.compile(keras.optimizers.Nadam(LEARNING_RATE, **arguments), "mse")
    variables = model.trainable_variables
    model.optimizer.build(variables)
    apply = jax.jit(model.optimizer.stateless_apply)

    def step(grads):
        state = model.optimizer.variables
        values, new = apply([x.value for x in state], grads, [x.value for x in variables])
        for variable, value in zip([*variables, *state], [*values, *new], strict=True):
            variable.assign(value)

    return run(step, lambda: [np.array(x.value) for x in variables], lambda: save(model))


def graph_run(make, path) -> Run:
    """A run in a graph of TensorFlow 1, with an optimizer that a function makes, saved by a Saver."""
    shapes = {"z/kernel": (3, 3), "z/bias": (3,), "a/kernel": (3, 3), "a/bias": (3,)}
    rng = np.random.default_rng(3)
    with tf.Graph().as_default(), tf1.Session() as session:
        variables = [
            tf1.get_variable(name, initializer=rng.normal(size=shape).astype(np.float32), use_resource=True)
            for name, shape in shapes.items()
        ]
        inputs = [tf1.placeholder(tf.float32, x.shape) for x in variables]
        op = make(list(zip(inputs, variables, strict=True)))
        session.run(tf1.global_variables_initializer())
        return run(
            lambda grads: session.run(op, dict(zip(inputs, grads, strict=True))),
            lambda: session.run(variables),
            lambda: tf1.train.Saver().save(session, str(path / "saver")),
        )


def graph_nadam(pairs):
    """A step of tf.keras' Nadam in a graph, in the scope that ``fit`` gives it."""
    with tf1.name_scope("training"):
        return tf_keras.optimizers.legacy.Nadam(LEARNING_RATE, schedule_decay=0.02).apply_gradients(pairs)


def nesterov_step(optimizer, grad, var):
    """One variable's step of tf.contrib's Nadam: Adam's own kernel with ``use_nesterov``."""
    beta1_power, beta2_power = optimizer._get_beta_accumulators()
    return tf.raw_ops.ResourceApplyAdam(
        var=var.handle,
        m=optimizer.get_slot(var, "m").handle,
        v=optimizer.get_slot(var, "v").handle,
        beta1_power=beta1_power,
        beta2_power=beta2_power,
        lr=optimizer._lr_t,
        beta1=optimizer._beta1_t,
        beta2=optimizer._beta2_t,
        epsilon=optimizer._epsilon_t,
        grad=grad,
        use_nesterov=True,
    )


def contrib_nadam(pairs):
    """A step of tf.contrib's NadamOptimizer, a subclass of Adam that was removed with TensorFlow 2."""
    optimizer = tf1.train.AdamOptimizer(LEARNING_RATE, name="Nadam")
    optimizer._resource_apply_dense = functools.partial(nesterov_step, optimizer)
    return optimizer.apply_gradients(pairs, tf1.train.get_or_create_global_step())


def tensors(path):
    """All tensors of a TensorFlow checkpoint by name."""
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def by_checkpoint(path):
    """Saves with ``tf.train.Checkpoint``; the prefix."""
    return lambda model, optimizer: tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(path / "checkpoint"))


def by_callback(make, path):
    """Saves with a callback at the end of an epoch; the path that the callback was given."""

    def save(model, *_):
        callback = make()
        callback.set_model(model)
        callback.set_params({"epochs": 2, "steps": 1, "verbose": 0})
        callback.on_train_begin()
        callback.on_epoch_begin(0)
        callback.on_epoch_end(0, {})
        callback.on_train_end()
        return path

    return save


def by_method(name, path):
    """Saves with a method of the model."""

    def save(model, *_):
        getattr(model, name)(str(path))
        return path

    return save


def tensorflow_savers(path) -> dict[str, Callable[[Any, Any], Any]]:
    """Every way in which tf_keras puts an optimizer into a TensorFlow checkpoint."""
    callbacks = tf_keras.callbacks
    return {
        "tf.train.Checkpoint": by_checkpoint(path),
        "directory": lambda *run: by_checkpoint(path)(*run) and path,
        "save_weights": by_method("save_weights", path / "weights"),
        "SavedModel": by_method("save", path / "saved"),
        "ModelCheckpoint": by_callback(
            lambda: callbacks.ModelCheckpoint(str(path / "weights"), save_weights_only=True), path / "weights"
        ),
        "BackupAndRestore": by_callback(lambda: callbacks.BackupAndRestore(str(path), delete_checkpoint=False), path),
        "mapping": lambda *run: tensors(by_checkpoint(path)(*run)),
    }


def restored_by_orbax(directory):
    """The tree that Orbax restores, without a target, from the one step in a directory."""
    import orbax.checkpoint as ocp

    (step,) = (path for path in directory.iterdir() if path.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(step / "pytree")


def keras_savers(path) -> dict[str, Callable[[Any], Any]]:
    """Every way in which Keras 3 stores an optimizer by name."""
    orbax = by_callback(lambda: keras.callbacks.OrbaxCheckpoint(directory=str(path), save_freq="epoch"), path)
    return {
        "get_state_tree": lambda model: model.get_state_tree(),
        "OrbaxCheckpoint": orbax,
        "restored by Orbax": lambda model: restored_by_orbax(orbax(model)),
    }


def savers_in_order(dialect, path) -> dict[str, Callable[..., Any]]:
    """Every source that has an order in place of names."""
    files = {"legacy": [".h5"], "tf_keras": [".h5", ".keras", ".weights.h5"], "keras": [".h5", ".keras", ".weights.h5"]}
    savers: dict[str, Callable[..., Any]] = {
        kind: by_method("save_weights" if kind == ".weights.h5" else "save", path / f"model{kind}")
        for kind in files[dialect]
    }
    savers["variables"] = lambda model, *_: list(variables_of(model.optimizer))
    if dialect == "legacy":
        savers["get_weights"] = lambda model, optimizer: optimizer.get_weights()
    if dialect == "keras":
        savers["BackupAndRestore"] = by_callback(
            lambda: keras.callbacks.BackupAndRestore(str(path), delete_checkpoint=False), path
        )
    return savers


def every_saver(dialect, folder) -> dict[tuple[str, str], Callable[..., Any]]:
    """All of them, by name or in order, each with a folder of its own; ``.h5`` is last, for it alters the model."""
    by_name = keras_savers if dialect == "keras" else tensorflow_savers
    makes = {("by name", kind): by_name(folder())[kind] for kind in by_name(pathlib.Path())}
    in_order = list(savers_in_order(dialect, pathlib.Path()))
    in_order = sorted(in_order, key=".h5".__eq__)  # Keras 3 forgets the arguments of the optimizer when it writes one
    return makes | {("in order", kind): savers_in_order(dialect, folder())[kind] for kind in in_order}


class Frozen:
    """A variable at one moment, with its name."""

    def __init__(self, variable):
        """Copies it."""
        self.path = getattr(variable, "path", None) or variable.name
        self.value = np.array(getattr(variable, "value", variable) if hasattr(variable, "path") else variable.numpy())

    def __array__(self, dtype=None, copy=None):
        """The value."""
        return self.value


def variables_of(optimizer):
    """The optimizer's variables, which later steps do not change."""
    variables = optimizer.weights if isinstance(optimizer, tf_keras.optimizers.legacy.Nadam) else optimizer.variables
    return [Frozen(x) for x in variables]
