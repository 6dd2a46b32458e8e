"""The hyperparameters of Keras' Nadams: three dialects, told apart by their keys, and the config that each makes."""

from collections.abc import Mapping
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat._common import cannot_express, check_expressible, check_keys, config_of, rule_of, without

SIDES = {"keras": "Keras 3", "tf_keras": "tf_keras", "legacy": "tf.keras' legacy Nadam"}
NAMES = {
    "b1": "beta_1",
    "b2": "beta_2",
    "eps": "epsilon",
    "momentum_decay": "schedule_decay",
    "clip_norm": "clipnorm",
    "clip_value": "clipvalue",
    "clip_global_norm": "global_clipnorm",
    "accumulate_steps": "gradient_accumulation_steps",
}
_SCHEDULES = {
    "ExponentialDecay": "exponential_decay",
    "InverseTimeDecay": "inverse_time_decay",
    "PolynomialDecay": "polynomial_decay",
    "PiecewiseConstantDecay": "piecewise_constant",
    "CosineDecay": "cosine_decay",
    "CosineDecayRestarts": "cosine_decay_restarts",
}

_REQUIRED = ("learning_rate", "beta_1", "beta_2", "epsilon")
_CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")
_NO_FIELDS = ("learning_rate", "name", "ema_momentum", "ema_overwrite_frequency", "jit_compile", "is_legacy_optimizer")
_SHARED = (*_REQUIRED, *_CLIPS, "name")
_NEW = (*_SHARED, "weight_decay", "use_ema", "ema_momentum", "ema_overwrite_frequency")
_KEYS = {
    "keras": (*_NEW, "loss_scale_factor", "gradient_accumulation_steps"),
    "tf_keras": (*_NEW, "jit_compile", "is_legacy_optimizer"),
    "legacy": (*_SHARED, "decay", "schedule_decay", "is_legacy_optimizer"),
}
_WRAPPER_KEYS = {*_KEYS["keras"], *_KEYS["tf_keras"]} - set(_REQUIRED)
_WRAPPER_KEYS |= {"inner_optimizer", "initial_scale", "dynamic_growth_steps", "dynamic"}
# The first of these keys that a config has tells its dialect.
_MARKS = {
    "decay": "legacy",
    "schedule_decay": "legacy",
    "is_legacy_optimizer": "tf_keras",
    "loss_scale_factor": "keras",
}

# Without effect on Keras' side: it has no complex leaves, and a weight decay of 0 is neither coupled nor decoupled.
_EXPRESSIBLE = {"learning_rate", "b1", "b2", "eps", "momentum_decay", "rule", "complex_as_real"}
_EXPRESSIBLE |= {"clip_norm", "clip_value", "clip_global_norm"}
_ALSO_EXPRESSIBLE = {"keras": {"weight_decay", "accumulate_steps"}, "tf_keras": {"weight_decay"}, "legacy": set[str]()}

_OURS = "optax_nadam"
_NO_EMA = "Average the params with optax.incremental_update, and leave it out."
_NO_SCALE = "Scale the loss and divide the gradients by the same factor, or leave out both."
_ONE_CLIP = "Only one of them can be set; leave the others out of the config."
_TWO_MEANINGS = (
    "clipnorm means two things in a Nadam config without a name: Keras up to 2.3 clips by the norm of all gradients"
    " (write global_clipnorm), tf.keras each by its own (add a name)."
)


def fields(
    dialect: str,
    *,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
    weight_decay: Any = None,
    clipnorm: Any = None,
    clipvalue: Any = None,
    global_clipnorm: Any = None,
    use_ema: Any = False,
    loss_scale_factor: Any = None,
    gradient_accumulation_steps: Any = None,
) -> dict[str, Any]:
    """Our fields, but for the learning rate, of the arguments of a Keras 3 or tf_keras Nadam."""
    if use_ema:
        raise cannot_express(_OURS, "use_ema", use_ema, _NO_EMA)
    if loss_scale_factor is not None:
        raise cannot_express(_OURS, "loss_scale_factor", loss_scale_factor, _NO_SCALE)
    steps = gradient_accumulation_steps or None
    if steps is not None and steps < 2:
        raise ValueError(f"gradient_accumulation_steps must be at least 2, or None, got {steps!r}.")
    return {
        "b1": beta_1,
        "b2": beta_2,
        "eps": epsilon,
        "momentum_decay": 1.0,
        "weight_decay": 0.0 if weight_decay is None else weight_decay,
        "accumulate_steps": steps or 1,
        "schedule_counts_gradients": steps is not None,
        **_one_clip(dialect, {"clip_norm": clipnorm, "clip_global_norm": global_clipnorm, "clip_value": clipvalue}),
    }


def _one_clip(dialect: str, clips: Mapping[str, Any]) -> dict[str, Any]:
    """The clip in force: of a norm and the value tf_keras takes the norm; Keras 3 does not allow more than one."""
    given = [name for name in clips if clips[name] is not None]
    if len(given) > 1 and (dialect == "keras" or "clip_value" not in given):
        raise ValueError(f"only one of {', '.join(_CLIPS)} can be set, got {', '.join(NAMES[x] for x in given)}.")
    in_force = [name for name in given if not _is_zero(clips[name])]
    return {name: clips[name] for name in in_force[:1]}


def legacy_fields(
    *,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
    schedule_decay: Any,
    clipnorm: Any = None,
    clipvalue: Any = None,
    global_clipnorm: Any = None,
) -> dict[str, Any]:
    """Our fields, but for the learning rate, of the arguments of a legacy Nadam; an epsilon of 0 becomes 1e-7."""
    if clipnorm is not None and global_clipnorm is not None:
        got = f"clipnorm={clipnorm!r} and global_clipnorm={global_clipnorm!r}"
        raise ValueError(f"only one of clipnorm, global_clipnorm can be set, got {got}.")
    return {
        "b1": beta_1,
        "b2": beta_2,
        "eps": 1e-7 if epsilon is None or _is_zero(epsilon) else epsilon,
        "momentum_decay": schedule_decay,
        "clip_norm": clipnorm,
        "clip_value": clipvalue,
        "clip_global_norm": global_clipnorm,
    }


def _is_zero(value: Any) -> bool:
    """Whether a value is the number 0; an array is not compared."""
    return validation.is_number(value) and value == 0


def config_from(config: Mapping[str, Any]) -> NadamConfig:
    """The config in what ``get_config()`` or ``serialize`` of a Keras Nadam returns, or of a wrapper around one."""
    config = _unwrapped(config)
    if "inner_optimizer" not in config:
        return config_of(NAMES, _all_fields(dialect_of(config), config))
    check_keys("the LossScaleOptimizer config", config, _WRAPPER_KEYS)
    inner = _unwrapped(config["inner_optimizer"])
    rule = "loss_scaled" if dialect_of(inner) == "keras" else "scheduled"
    return config_of(NAMES, {**_all_fields(dialect_of(inner), inner), "rule": rule})


def _unwrapped(config: Any) -> Mapping[str, Any]:
    """The config in ``{"class_name": ..., "config": ...}``, or the config itself."""
    if "class_name" not in config:
        return config
    kind = str(config["class_name"]).rpartition(">")[2].lower()
    if kind != "nadam" and not kind.startswith("lossscaleoptimizer"):
        raise ValueError(f"config must be that of a Nadam or a LossScaleOptimizer, got {config['class_name']!r}.")
    return config["config"]


def dialect_of(config: Mapping[str, Any]) -> str:
    """The dialect of a config."""
    for mark, dialect in _MARKS.items():
        if mark in config:
            return dialect
    raise ValueError(f"config must have one of the keys {', '.join(_MARKS)}, which tell its dialect; got {config!r}.")


def _all_fields(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of a config."""
    config = {"learning_rate" if key == "lr" else key: value for key, value in config.items()}
    check_keys(f"the {dialect} Nadam config", config, _KEYS[dialect], _REQUIRED)
    others = _legacy_fields_of(config) if dialect == "legacy" else fields(dialect, **without(config, _NO_FIELDS))
    return {"learning_rate": _learning_rate_from(config["learning_rate"], dialect), **others}


def _legacy_fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of a config of tf.keras, or of Keras up to 2.3, which has no name and allows an epsilon of 0."""
    is_keras_2 = "name" not in config
    if is_keras_2 and config.get("clipnorm") is not None:
        raise ValueError(_TWO_MEANINGS)
    decay = config["schedule_decay"] if "schedule_decay" in config else config["decay"]
    found = legacy_fields(schedule_decay=decay, **without(config, (*_NO_FIELDS, "decay", "schedule_decay")))
    return {**found, "eps": 0.0} if is_keras_2 and _is_zero(config["epsilon"]) else found


def _learning_rate_from(learning_rate: Any, dialect: str) -> Any:
    """The number or the schedule in a config."""
    if not isinstance(learning_rate, Mapping):
        return learning_rate
    kind = learning_rate.get("class_name")
    if kind not in _SCHEDULES:
        known = ", ".join(_SCHEDULES)
        raise ValueError(f"learning_rate must be a number or one of the schedules {known}, got {kind!r}.")
    if dialect == "legacy":
        raise ValueError(f"learning_rate must not be a schedule in the legacy Nadam, got {kind!r}.")
    return ScheduleConfig(_SCHEDULES[kind], without(learning_rate["config"], ["name"]))


def config_to(config: NadamConfig, dialect: str) -> dict[str, Any]:
    """The dict from which ``from_config`` of a dialect's Nadam makes the optimizer."""
    check_config(config, dialect)
    shared = {
        "learning_rate": _learning_rate_to(config.learning_rate),
        "beta_1": config.b1,
        "beta_2": config.b2,
        "epsilon": config.eps,
        "clipnorm": config.clip_norm,
        "clipvalue": config.clip_value,
        "global_clipnorm": config.clip_global_norm,
    }
    if dialect == "legacy":
        given = {key: value for key, value in shared.items() if value is not None}
        return {"name": "Nadam", **given, "schedule_decay": config.momentum_decay}
    shared |= {"weight_decay": config.weight_decay or None}
    shared |= {"use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None}
    if dialect == "tf_keras":
        return {"name": "Nadam", **shared, "jit_compile": True, "is_legacy_optimizer": False}
    steps = config.accumulate_steps if config.accumulate_steps > 1 else None
    nadam = {"name": "nadam", **shared, "loss_scale_factor": None, "gradient_accumulation_steps": steps}
    return nadam if rule_of(config).running_product else _loss_scaled(nadam)


def _loss_scaled(nadam: dict[str, Any]) -> dict[str, Any]:
    """The config of a LossScaleOptimizer around a Nadam."""
    inner = {"module": "keras.optimizers", "class_name": "Nadam", "config": nadam, "registered_name": None}
    return {"name": "loss_scale_optimizer", "inner_optimizer": inner}


def _learning_rate_to(learning_rate: float | ScheduleConfig) -> Any:
    """The number, or the schedule as Keras serializes it."""
    if not isinstance(learning_rate, ScheduleConfig):
        return learning_rate
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    return {
        "module": "keras.optimizers.schedules",
        "class_name": names[learning_rate.name],
        "config": {name: list(x) if isinstance(x, tuple) else x for name, x in learning_rate.arguments.items()},
        "registered_name": None,
    }


def check_config(config: NadamConfig, dialect: str) -> None:
    """Rejects a dialect that does not exist, and a config that it cannot express."""
    check_dialect(dialect)
    side = SIDES[dialect]
    without_effect = set() if config.weight_decay else {"coupled_weight_decay"}
    check_expressible(config, side, _EXPRESSIBLE | _ALSO_EXPRESSIBLE[dialect] | without_effect)
    if config.accumulate_steps > 1 and isinstance(config.learning_rate, ScheduleConfig):
        _check_counts_gradients(config, side)
    _check_rule(config, dialect)
    _check_clips(config, dialect)
    if dialect == "legacy":
        _check_legacy(config)


def check_dialect(dialect: str) -> None:
    """Rejects a dialect that does not exist."""
    validation.check_choice("dialect", dialect, SIDES)


def _check_rule(config: NadamConfig, dialect: str) -> None:
    """Rejects another rule than the dialect's, or another rise of the momentum."""
    rules = ("scheduled", "loss_scaled") if dialect == "keras" else ("scheduled",)
    if rule_of(config) not in [RULES[rule] for rule in rules]:
        advice = f"It follows {' or '.join(map(repr, rules))}."
        raise cannot_express(SIDES[dialect], "rule", config.rule, advice)
    if dialect != "legacy" and config.momentum_decay != 1:
        advice = (
            "It has 1.0 and no argument for it: pass dataclasses.replace(config, momentum_decay=1.0), or"
            " dialect='legacy', which has schedule_decay."
        )
        raise cannot_express(SIDES[dialect], "momentum_decay", config.momentum_decay, advice)


def _check_counts_gradients(config: NadamConfig, side: str) -> None:
    """Rejects a schedule of the steps taken, where several gradients make a step."""
    if not config.schedule_counts_gradients:
        advice = "Its schedules count gradients: stretch the schedule, and pass schedule_counts_gradients=True."
        raise cannot_express(side, "schedule_counts_gradients", False, advice)


def _check_clips(config: NadamConfig, dialect: str) -> None:
    """Rejects two clips where the dialect has one at a time; the legacy Nadam has a value beside a norm."""
    clips = ["clip_norm", "clip_global_norm", *(["clip_value"] if dialect != "legacy" else [])]
    given = [name for name in clips if getattr(config, name) is not None]
    if len(given) > 1:
        raise cannot_express(SIDES[dialect], f"{given[1]} beside {given[0]}", getattr(config, given[1]), _ONE_CLIP)


def _check_legacy(config: NadamConfig) -> None:
    """Rejects a schedule and an epsilon of 0, which the legacy Nadam does not have."""
    if isinstance(config.learning_rate, ScheduleConfig):
        advice = "Its learning rate is a number; set it during the run."
        raise cannot_express(SIDES["legacy"], "learning_rate", config.learning_rate, advice)
    if not config.eps:
        raise cannot_express(SIDES["legacy"], "eps", config.eps, "It makes 1e-7 of it.")
