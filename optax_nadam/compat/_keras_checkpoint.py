"""The checkpoint that the arrays of a Keras optimizer make, and what it lacks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig, product_after
from optax_nadam.compat._account import check_parameter, parse_number, parse_steps
from optax_nadam.compat._checkpoint import Checkpoint, Group, Label, Parameter
from optax_nadam.compat._common import rule_of
from optax_nadam.compat._keras_read import Stored
from optax_nadam.compat._keras_roles import Roles

_ACCUMULATED = (
    "config is needed: the checkpoint holds accumulated gradients or averages. Pass"
    " config=config_from(optimizer.get_config()); with use_ema, which no step uses,"
    " config_from({**optimizer.get_config(), 'use_ema': False})."
)
_IN_THE_MIDDLE = (
    "the checkpoint was saved after {gradients} gradients, in the middle of accumulating {steps} for a step; save it"
    " after a multiple of {steps}."
)
_NO_BETA = (
    "config is needed: tf.contrib's Nadam stores its steps as a power of beta1, and no hyperparameters. Pass config=,"
    " a NadamConfig with rule='eps_hat'."
)
_NO_POWER = "the checkpoint's beta1_power={power!r} is not a power of config.b1={b1!r}."
_NO_STEP = "the checkpoint's beta1_power has vanished and it has no global_step, so its number of steps is unknown."
_NO_PRODUCT = (
    "source has {got:.6g} where the product of the momenta would be; after {count} steps it is {expected:.6g} with"
    " b1={config.b1} and momentum_decay={config.momentum_decay}. If it is of a Nadam with other hyperparameters, pass"
    " config=, or the variables themselves, which have names; else it is of another optimizer, and this number may be"
    " its learning rate."
)
_OTHER_WEIGHT = (
    "the weight {label!r} has shape {weight}, its moments {moment}: they are not of the same layer. Pass the checkpoint"
    " as it was written."
)
_COMPUTED = (
    "the checkpoint stores no product of the momenta; it was computed from {count} steps, b1={config.b1} and"
    " momentum_decay={config.momentum_decay}, which must be those of the whole run.{aside}"
)
_IN_FIT = (
    " tf_keras inside fit() multiplies it about once per variable and step: a run is continued exactly only after some"
    " tens of steps, when the product has vanished there and here."
)
_LOSS_SCALED = (
    "the checkpoint is that of a LossScaleOptimizer. Under JAX, Keras 3 loses the product of the momenta at every step"
    " there, which is rule='loss_scaled'; with config.rule={rule!r} the steps are shorter from now on."
)
_OTHER_LEARNING_RATE = (
    "the checkpoint's learning rate is {theirs!r}, the config's {ours!r}; the optimizer continues with its own."
)
_VANISHED = 1e-30
_SMALL = 1e-6  # a smaller product P changes no step by as much: the step depends on 1 - P

VERSIONS = {
    "keras": "Keras 3",
    "tf_keras": "tf_keras, TensorFlow from 2.11",
    "legacy": "TensorFlow up to 2.10, tf_keras legacy, Keras 2",
}
_NOTE = "exclude_from_weight_decay (pass mask= to build), constraints, repeated ids of an Embedding"
_DECAYS = {"keras": 1.0, "tf_keras": 1.0, "legacy": 0.004}
_Parse = Callable[[Mapping[str, Any], Any], NadamConfig]


def checkpoint_of(
    stored: Stored, roles: Roles, config: NadamConfig | None, parse: _Parse, *, is_named: bool
) -> Checkpoint:
    """The checkpoint that the arrays make.

    Args:
      stored: the source.
      roles: which of its arrays is what.
      config: the hyperparameters, where they are known.
      parse: makes them of what is stored.
      is_named: whether names tell the roles, or shapes.
    """
    count = _steps(_iterations(stored, roles, config), roles.accumulates, config)
    product, learning_rate = (
        None if i is None else parse_number(f"the {name}", stored.arrays[i])
        for name, i in (("product of the momenta", roles.product), ("learning rate", roles.learning_rate))
    )
    if product is not None and not is_named:
        _check_product(product, count, config or NadamConfig(momentum_decay=_DECAYS[roles.dialect]))
    labels = _labels(stored, roles)
    moments = zip(labels, roles.m, roles.v, strict=True)
    parameters = {x: Parameter(count, product, np.float32, stored.arrays[i], stored.arrays[j]) for x, i, j in moments}
    for label, parameter in parameters.items():
        check_parameter(label, parameter)
    values = None
    if roles.weights is not None:
        values = {x: stored.values[i] for x, i in zip(labels, roles.weights, strict=True)}
        for label in [x for x, weight in values.items() if weight.shape != parameters[x].m.shape]:
            shapes = values[label].shape, parameters[label].m.shape
            raise ValueError(_OTHER_WEIGHT.format(label=label, weight=shapes[0], moment=shapes[1]))
    return Checkpoint(
        "Nadam of Keras",
        VERSIONS[roles.dialect],
        parameters,
        (Group(stored.config or {}, tuple(labels)),),
        parse,
        stored_weights=values,
        learning_rate=learning_rate,
        notes=(_NOTE,) if stored.config else (_NOTE, "clips (clipnorm and the others)"),
    )


def _labels(stored: Stored, roles: Roles) -> list[Label]:
    """The names by which ``to_params`` gets the weights, or else positions."""
    if stored.keys is None or roles.weights is None:
        return list(range(len(roles.m)))
    return [stored.keys[i] for i in roles.weights]


def _iterations(stored: Stored, roles: Roles, config: NadamConfig | None) -> int:
    """The number of gradients seen. tf.contrib's is a power of beta1, or global_step once the power has vanished."""
    value = parse_number("the number of iterations", stored.arrays[roles.iterations])
    if not str(stored.names[roles.iterations]).endswith("beta1_power"):
        return parse_steps("the number of iterations", value)
    if config is None:
        raise ValueError(_NO_BETA)
    if 0 <= value < _VANISHED:
        if "global_step" not in stored.names:
            raise ValueError(_NO_STEP)
        return parse_steps("global_step", stored.arrays[stored.names.index("global_step")])
    if not 0 < value <= 1:
        raise ValueError(_NO_POWER.format(power=value, b1=config.b1))
    count = math.log(value) / math.log(config.b1) - 1 if config.b1 else 0.5
    if abs(count - round(count)) > 0.1:
        raise ValueError(_NO_POWER.format(power=value, b1=config.b1))
    return parse_steps("the number of steps in beta1_power", round(count))


def _steps(gradients: int, accumulates: bool | None, config: NadamConfig | None) -> int:
    """The number of steps for so many gradients: several make one step where they are accumulated."""
    if accumulates is False:
        return gradients
    if config is None:
        raise ValueError(_ACCUMULATED)
    if accumulates and config.accumulate_steps == 1:
        raise ValueError("the checkpoint holds accumulated gradients, but config has accumulate_steps=1.")
    steps, left_over = divmod(gradients, config.accumulate_steps)
    if left_over:
        raise ValueError(_IN_THE_MIDDLE.format(gradients=gradients, steps=config.accumulate_steps))
    return steps


def _check_product(product: float, count: int, config: NadamConfig) -> None:
    """Rejects another optimizer's number in the place of the product, which only its shape tells."""
    expected = product_after(count, config)
    if not np.isclose(product, expected, rtol=1e-2, atol=_SMALL / 10):
        raise ValueError(_NO_PRODUCT.format(got=product, count=count, expected=expected, config=config))


def warn_of_differences(found: Checkpoint, config: NadamConfig) -> None:
    """Warns of a learning rate that differs, and of a product that is not in the checkpoint and matters."""
    ours, theirs = config.learning_rate, found.learning_rate
    if isinstance(ours, float) and theirs is not None and np.float32(ours) != np.float32(theirs):
        validation.warn(_OTHER_LEARNING_RATE.format(theirs=theirs, ours=ours))
    rule = rule_of(config)
    if found.product is not None or not (rule.momentum_schedule and rule.running_product):
        return
    if found.version == VERSIONS["keras"]:
        validation.warn(_LOSS_SCALED.format(rule=config.rule))
    elif product_after(found.count, config) > _SMALL:
        aside = _IN_FIT if found.version == VERSIONS["tf_keras"] else ""
        validation.warn(_COMPUTED.format(count=found.count, config=config, aside=aside))
