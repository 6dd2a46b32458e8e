"""Keras' checkpoints of every version and kind, read into one record and written from one state."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optax_nadam._config import NadamConfig, product_after
from optax_nadam._quantized import is_quantized
from optax_nadam._state import get_state
from optax_nadam.compat import _keras_config as configs
from optax_nadam.compat._common import Checkpoint, as_numpy, get_numbers, rule_of
from optax_nadam.compat._keras_files import Stored
from optax_nadam.compat._keras_roles import Roles, by_names, by_shapes
from optax_nadam.compat._keras_sources import read_source

_ACCUMULATED = (
    "config is needed: the checkpoint holds accumulated gradients or averages. Pass"
    " config=config_from(optimizer.get_config())."
)
_IN_THE_MIDDLE = (
    "the checkpoint was saved after {gradients} gradients, in the middle of accumulating {steps} for a step; save it"
    " after a multiple of {steps}."
)
_NO_WEIGHTS = (
    "source does not tell which of its weights are trainable, and in which order. Load the model with Keras, and take"
    " model.trainable_variables."
)
_NO_HYPERPARAMETERS = (
    "source does not hold all hyperparameters. A model's .h5 and .keras file does, and a TensorFlow checkpoint of the"
    " legacy Nadam whose learning rate is a number or a variable, not a function; else make a NadamConfig, or pass"
    " optimizer.get_config() to config_from."
)
_NO_BETA = (
    "config is needed: tf.contrib's Nadam stores its steps as a power of beta1, and no hyperparameters. Pass config=,"
    " a NadamConfig with rule='eps_hat'."
)
_NO_POWER = "the checkpoint's beta1_power={power!r} is not a power of config.b1={b1!r}."
_NO_STEP = "the checkpoint's beta1_power has vanished and it has no global_step, so that its steps are not known."
_VANISHED = 1e-30
_COMPUTED = (
    "the checkpoint stores no product of the momenta; it was computed from {count} steps, b1={config.b1} and"
    " momentum_decay={config.momentum_decay}, with which the run must have begun.{aside}"
)
_IN_FIT = (
    " tf_keras inside fit() multiplies it about once per variable and step: a run is continued exactly only after some"
    " tens of steps, when the product has vanished there and here."
)
_LOSS_SCALED = (
    "the checkpoint is that of a LossScaleOptimizer. Under JAX, Keras 3 loses the product of the momenta at every step"
    " there, which is rule='loss_scaled'; with config.rule={rule!r} the steps are shorter from now on."
)
# A smaller product changes no step by as much: its terms are 1 - P.
_SMALL = 1e-6
_OTHER_LEARNING_RATE = (
    "the checkpoint's learning rate is {theirs!r}, the config's {ours!r}; the optimizer continues with its own."
)


def read(opt_state: Any, source: Any, config: NadamConfig | None, dialect: str | None) -> Checkpoint:
    """The checkpoint in a source, from which an optimizer state is to continue; called by the public function."""
    check_between_steps(opt_state)
    stored = read_source(source, dialect)
    roles = by_names(stored) or by_shapes(stored, _size(opt_state))
    if config is None and stored.config and (roles.product is None or roles.accumulates is not False):
        config = configs.config_from(stored.config)
    product, learning_rate = (
        None if i is None else stored.arrays[i].item() for i in (roles.product, roles.learning_rate)
    )
    count = _steps_taken(_iterations(stored, roles, config), roles.accumulates, config)
    m, v = (_as_weights(stored, roles, [stored.arrays[i] for i in indices]) for indices in (roles.m, roles.v))
    found = Checkpoint("this Keras checkpoint", count, product, m, v, config)
    for note in _notes(roles.dialect, found, learning_rate):
        warnings.warn(note, stacklevel=3)
    return found


def read_weights(source: Any) -> Any:
    """The model's trainable weights in a source, as ``to_params`` gets the moments in it."""
    stored = read_source(source)
    roles = by_names(stored)
    if roles is None or roles.weights is None:
        raise ValueError(_NO_WEIGHTS)
    return _as_weights(stored, roles, [stored.values[i] for i in roles.weights])


def read_config(source: Any) -> NadamConfig:
    """The hyperparameters in a source."""
    stored = read_source(source)
    if not stored.config:
        raise ValueError(_NO_HYPERPARAMETERS)
    return configs.config_from(stored.config)


def _as_weights(stored: Stored, roles: Roles, arrays: list[np.ndarray]) -> Any:
    """Arrays, one for each weight, in the form in which ``to_params`` gets them: by name, or in order."""
    if stored.keys is None or roles.weights is None:
        return arrays
    return {stored.keys[i]: array for i, array in zip(roles.weights, arrays, strict=True)}


def _size(opt_state: Any) -> int:
    """How many numbers the params have, by which one of two layouts that fit is chosen."""
    return sum(math.prod(m.shape) for m in jax.tree.leaves(get_state(opt_state).m, is_quantized))


def _iterations(stored: Stored, roles: Roles, config: NadamConfig | None) -> Any:
    """The number of gradients seen, which tf.contrib's Nadam stores as a power of beta1."""
    value = stored.arrays[roles.iterations].item()
    if not str(stored.names[roles.iterations]).endswith("beta1_power"):
        return value
    if config is None:
        raise ValueError(_NO_BETA)
    if value < _VANISHED:
        return _global_step(stored)
    count = math.log(value) / math.log(config.b1) - 1 if config.b1 else 0.5
    if abs(count - round(count)) > 0.1:
        raise ValueError(_NO_POWER.format(power=value, b1=config.b1))
    return round(count)


def _global_step(stored: Stored) -> Any:
    """The step counter of TensorFlow 1, which is the only one where the power has vanished."""
    if "global_step" not in stored.names:
        raise ValueError(_NO_STEP)
    return stored.arrays[stored.names.index("global_step")].item()


def _steps_taken(iterations: Any, accumulates: bool | None, config: NadamConfig | None) -> int:
    """Steps of the gradients seen: several make one step where they are accumulated."""
    if iterations < 0 or iterations != int(iterations):
        raise ValueError(f"the number of iterations must be whole and not negative, got {iterations!r}.")
    if accumulates is False:
        return int(iterations)
    if config is None:
        raise ValueError(_ACCUMULATED)
    steps = config.accumulate_steps
    if accumulates and steps == 1:
        raise ValueError("the checkpoint holds accumulated gradients, but config has accumulate_steps=1.")
    if iterations % steps:
        raise ValueError(_IN_THE_MIDDLE.format(gradients=int(iterations), steps=steps))
    return int(iterations) // steps


def _notes(dialect: str, found: Checkpoint, learning_rate: float | None) -> Iterator[str]:
    """What the user should know of a checkpoint: what is not in it, and what differs from the config."""
    config = found.config
    if config is None:
        return
    if found.product is None:
        yield from _product_notes(dialect, found.count, config)
    ours = config.learning_rate
    if learning_rate is not None and isinstance(ours, float) and np.float32(ours) != np.float32(learning_rate):
        yield _OTHER_LEARNING_RATE.format(theirs=learning_rate, ours=ours)


def _product_notes(dialect: str, count: int, config: NadamConfig) -> Iterator[str]:
    """What follows from a product that is not in the checkpoint, where steps depend on it."""
    rule = rule_of(config)
    if not (rule.momentum_schedule and rule.running_product):
        return
    if dialect == "keras":
        yield _LOSS_SCALED.format(rule=config.rule)
    elif product_after(count, config) > _SMALL:
        yield _COMPUTED.format(count=count, config=config, aside=_IN_FIT if dialect == "tf_keras" else "")


def from_weights(opt_state: Any, weights: Sequence[Any]) -> Checkpoint:
    """The checkpoint in the weights of a legacy Nadam, ``[iterations, momentum_cache, *m, *v]``."""
    check_between_steps(opt_state)
    arrays = [as_numpy(x) for x in weights]
    of_each, left_over = divmod(len(arrays) - 2, 2)
    if of_each < 1 or left_over:
        raise ValueError(f"weights must be [iterations, momentum_cache, *m, *v], got {len(arrays)} arrays.")
    count = _steps_taken(arrays[0].item(), False, None)
    return Checkpoint("the weights", count, arrays[1].item(), arrays[2 : 2 + of_each], arrays[2 + of_each :])


def to_weights(opt_state: Any, from_params: Callable[[Any], Sequence[Any]]) -> list[np.ndarray]:
    """The weights of a legacy Nadam, ``[iterations, momentum_cache, *m, *v]``."""
    count, product, m, v = _numbers_in_order(opt_state, from_params)
    return [np.asarray(count, np.int64), product, *m, *v]


def write(
    opt_state: Any, from_params: Callable[[Any], Sequence[Any]], config: NadamConfig | None, dialect: str
) -> list[np.ndarray]:
    """The arrays of a dialect's optimizer, in its order."""
    configs.check_dialect(dialect)
    if config is not None:
        configs.check_config(config, dialect)
    if dialect == "legacy":
        return to_weights(opt_state, from_params)
    count, product, m, v = _numbers_in_order(opt_state, from_params)
    pairs = [x for pair in zip(m, v, strict=True) for x in pair]
    if dialect == "tf_keras":
        return [np.asarray(count, np.int64), *pairs]
    if config is None:
        raise ValueError("config is needed for dialect='keras', to know which arrays it stores.")
    steps = config.accumulate_steps
    learning_rate = [np.asarray(config.learning_rate, np.float32)] if isinstance(config.learning_rate, float) else []
    accumulators = [np.zeros_like(x) for x in m] if steps > 1 else []
    behind = [product] if rule_of(config).running_product else []
    return [np.asarray(count * steps, np.int32), *learning_rate, *accumulators, *pairs, *behind]


def _numbers_in_order(
    opt_state: Any, from_params: Callable[[Any], Sequence[Any]]
) -> tuple[int, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Steps taken, product, and moments in the order of their weights."""
    check_between_steps(opt_state)
    state = get_numbers(opt_state)
    m, v = ([as_numpy(x) for x in from_params(tree)] for tree in (state.m, state.v))
    return int(state.count), as_numpy(state.mu_product), m, v


def check_between_steps(opt_state: Any) -> None:
    """Rejects a state that has accumulated gradients."""
    if int(optax.tree.get(opt_state, "mini_step", 0)):
        raise ValueError("opt_state holds accumulated gradients that no step has used yet; take it after a step.")
