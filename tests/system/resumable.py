"""A training that continues from its last checkpoint: the program that ``test_crash.py`` kills.

A small network that learns from another. The inputs of a step are a function of its number alone, so that a step
taken again is the same step.
"""

import functools
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import numpy as jnp

import optax_nadam

STEPS = 300
SAVE_EVERY = 5
BATCH_SIZE = 32
HIDDEN = 32
TEACHER = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)


class Training(NamedTuple):
    """Everything that changes from step to step."""

    params: optax.Params
    opt_state: optax.OptState


def optimizer() -> optax.GradientTransformationExtraArgs:
    """Clipped gradients, a schedule, weight decay; the product of these momenta still counts at the last step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, STEPS // 10, STEPS)
    nadamw = optax_nadam.nadamw(schedule, b1=0.98, momentum_decay=10.0, weight_decay=1e-2)
    return optax.chain(optax.clip_by_global_norm(1.0), nadamw)


@jax.jit
def initial() -> Training:
    """The training before its first step."""
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": jax.random.normal(first, (64, HIDDEN)) / 8, "bias": jnp.zeros(HIDDEN)},
        "logits": {"kernel": jax.random.normal(second, (HIDDEN, 10)) / 8, "bias": jnp.zeros(10)},
    }
    return Training(params, optimizer().init(params))


def batch(step: int) -> list[np.ndarray]:
    """The inputs of a step, and which of ten numbers that another, linear, network gives for each is the largest."""
    inputs = np.random.default_rng(step).normal(size=(BATCH_SIZE, 64)).astype(np.float32)
    return [inputs, np.argmax(inputs @ TEACHER, axis=1).astype(np.int32)]


def loss(params: dict[str, dict[str, jax.Array]], inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of the network."""
    hidden = jax.nn.relu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = hidden @ params["logits"]["kernel"] + params["logits"]["bias"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@functools.partial(jax.jit, donate_argnums=0)
def take_step(training: Training, inputs: jax.Array, labels: jax.Array) -> Training:
    """One step, into the buffers of the last: a checkpoint still being written must not notice."""
    params, opt_state = training
    updates, opt_state = optimizer().update(jax.grad(loss)(params, inputs, labels), opt_state, params)
    return Training(optax.apply_updates(params, updates), opt_state)


def as_bytes(training: Training) -> dict[str, bytes]:
    """All that it has learned, by name."""
    return {jax.tree_util.keystr(path): x.tobytes() for path, x in jax.tree.leaves_with_path(training)}


def run(folder: Path, parent: Connection, pause_at: int, last: int) -> None:
    """Trains from the last checkpoint to a step and tells of every step, as a process of its own.

    Paused before the end, it waits to be killed, or for its parent to be gone. At the end it tells the bytes of all
    that it has learned.
    """
    jax.config.update("jax_platforms", "cpu")  # where a program that is compiled again gives the same bits
    options = ocp.CheckpointManagerOptions(save_interval_steps=SAVE_EVERY, max_to_keep=3)
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = manager.latest_step() or 0
        target = ocp.args.StandardRestore(jax.eval_shape(initial))
        training = manager.restore(done, args=target) if done else initial()
        parent.send(("resumed", done))
        for step in range(done + 1, pause_at + 1):
            training = take_step(training, *batch(step))
            parent.send(("stepped", step))
            manager.save(step, args=ocp.args.StandardSave(training))
        if pause_at < last:
            parent.recv()
    parent.send(("finished", as_bytes(jax.device_get(training))))
