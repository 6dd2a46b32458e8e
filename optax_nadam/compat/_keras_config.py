"""What Keras' configs say, and how: the words of its three dialects, told apart and put into ours and back."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import optax

from optax_nadam._config import NadamConfig
from optax_nadam._schedules import Schedule
from optax_nadam.compat._common import unsupported, without

_THEIRS = {
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
STEP = {"learning_rate", "beta_1", "beta_2", "epsilon"}
_CLIPS = {"clipnorm", "clipvalue", "global_clipnorm"}
_EMA = {"use_ema", "ema_momentum", "ema_overwrite_frequency"}
ACCEPTED = {
    "keras": {"name", "weight_decay", "loss_scale_factor", "gradient_accumulation_steps"} | STEP | _CLIPS | _EMA,
    "tf_keras": {"name", "weight_decay", "jit_compile", "is_legacy_optimizer"} | STEP | _CLIPS | _EMA,
    "legacy": {"name", "decay", "schedule_decay", "is_legacy_optimizer"} | STEP | _CLIPS,
    "loss scale": {"name", "inner_optimizer", "initial_scale", "dynamic_growth_steps", "dynamic", "weight_decay"}
    | {"jit_compile", "is_legacy_optimizer", "loss_scale_factor", "gradient_accumulation_steps"}
    | _CLIPS
    | _EMA,
}
_SAID = {
    "keras": {"weight_decay", "accumulate_steps", "rule"},
    "tf_keras": {"weight_decay"},
    "legacy": {"momentum_decay"},
}
_NO_EMA = "Keep the average beside the params with optax.incremental_update."
_NO_SCALE = "Scale the loss and divide the gradients by the same factor, or leave out both."


def build(learning_rate: Any, fields: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """The optimizer of these fields; a learning rate that is no plain data goes past the config."""
    if isinstance(learning_rate, numbers.Real | Schedule):
        return checked(learning_rate=learning_rate, **fields).build()
    return checked(**fields).build(learning_rate)


def checked(**fields: Any) -> NadamConfig:
    """The config, its errors in Keras' words."""
    try:
        return NadamConfig(**fields)
    except (ValueError, TypeError) as error:
        name, _, rule = str(error).partition(" ")
        raise type(error)(f"{_THEIRS.get(name, name)} {rule}") from None


def keras_fields(config: Mapping[str, Any], dialect: str) -> dict[str, Any]:
    """Our fields, but for the learning rate, from the arguments of a Keras 3 or tf_keras Nadam."""
    if config.get("use_ema"):
        raise unsupported(dialect, "use_ema", config["use_ema"], _NO_EMA)
    if config.get("loss_scale_factor") is not None:
        raise unsupported(dialect, "loss_scale_factor", config["loss_scale_factor"], _NO_SCALE)
    steps = config.get("gradient_accumulation_steps") or None
    if steps is not None and steps < 2:
        raise ValueError(f"gradient_accumulation_steps must be at least 2, or None, got {steps!r}.")
    return {
        "b1": config["beta_1"],
        "b2": config["beta_2"],
        "eps": config["epsilon"],
        "momentum_decay": 1.0,
        "weight_decay": config.get("weight_decay") or 0.0,
        "accumulate_steps": steps or 1,
        **_one_clip(config, dialect),
    }


def _one_clip(config: Mapping[str, Any], dialect: str) -> dict[str, Any]:
    """The clip that is in force: tf_keras takes a norm for preference, Keras 3 allows no more than one."""
    ours = {"clipnorm": "clip_norm", "global_clipnorm": "clip_global_norm", "clipvalue": "clip_value"}
    given = [name for name in ours if config.get(name) is not None]
    if len(given) > 1 and (dialect == "keras" or "clipvalue" not in given):
        raise ValueError(f"only one of {', '.join(ours)} can be set, got {', '.join(given)}.")
    in_force = [name for name in given if config[name]]
    return {ours[name]: config[name] for name in in_force[:1]}


def legacy_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields, but for the learning rate, from the arguments or the config of a legacy Nadam."""
    if config.get("clipnorm") is not None and "name" not in config:
        raise ValueError(
            "clipnorm means two things in a Nadam config without a name: Keras up to 2.3 clips by the norm of all"
            " gradients (write global_clipnorm), tf.keras each by its own (add a name)."
        )
    if config.get("clipnorm") is not None and config.get("global_clipnorm") is not None:
        raise ValueError(
            f"only one of clipnorm, global_clipnorm can be set, got clipnorm={config['clipnorm']!r} and"
            f" global_clipnorm={config['global_clipnorm']!r}."
        )
    epsilon = config["epsilon"]
    return {
        "b1": config["beta_1"],
        "b2": config["beta_2"],
        "eps": 1e-7 if epsilon is None or (epsilon == 0 and "name" in config) else epsilon,
        "momentum_decay": config["schedule_decay"] if "schedule_decay" in config else config["decay"],
        "clip_norm": config.get("clipnorm"),
        "clip_value": config.get("clipvalue"),
        "clip_global_norm": config.get("global_clipnorm"),
    }


def unwrapped(wrapper: Any) -> Mapping[str, Any]:
    """The config in ``{"class_name": ..., "config": ...}``, or the config itself."""
    if "class_name" not in wrapper:
        return wrapper
    kind = str(wrapper["class_name"]).rpartition(">")[2].lower()
    if kind != "nadam" and not kind.startswith("lossscaleoptimizer"):
        raise ValueError(f"config must be that of a Nadam or a LossScaleOptimizer, got {wrapper['class_name']!r}.")
    return wrapper["config"]


def dialect_of(config: Mapping[str, Any]) -> str:
    """The dialect that a config is in."""
    marks = {"decay": "legacy", "schedule_decay": "legacy", "is_legacy_optimizer": "tf_keras"}
    marks["loss_scale_factor"] = "keras"
    for mark, dialect in marks.items():
        if mark in config:
            return dialect
    raise ValueError(f"config must have one of the keys {', '.join(marks)}, which tell its dialect; got {config!r}.")


def rate_from(rate: Any, dialect: str) -> Any:
    """The learning rate or schedule in a config."""
    if not isinstance(rate, Mapping):
        return rate
    kind = rate.get("class_name")
    if kind not in _SCHEDULES:
        known = ", ".join(_SCHEDULES)
        raise ValueError(f"learning_rate must be a number or one of the schedules {known}, got {kind!r}.")
    if dialect == "legacy":
        raise ValueError(f"learning_rate must not be a schedule in the legacy Nadam, got {kind!r}.")
    return Schedule(_SCHEDULES[kind], without(rate["config"], ["name"]))


def rate_to(rate: float | Schedule) -> Any:
    """The learning rate, or the schedule as Keras serializes it."""
    if not isinstance(rate, Schedule):
        return rate
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    return {
        "module": "keras.optimizers.schedules",
        "class_name": names[rate.name],
        "config": dict(rate.arguments),
        "registered_name": None,
    }


def check_said(config: NadamConfig, dialect: str) -> None:
    """Rejects fields that a dialect has no word for."""
    plain = NadamConfig(momentum_decay=0.004 if dialect == "legacy" else 1.0)
    # complex_as_real is silent: it changes nothing for real leaves, and Keras has no other.
    said = {"complex_as_real", "learning_rate", "b1", "b2", "eps", "clip_norm", "clip_value", "clip_global_norm"}
    said |= _SAID[dialect] | (set() if config.weight_decay else {"coupled_weight_decay"})
    clips = [name for name in ("clip_norm", "clip_value", "clip_global_norm") if getattr(config, name) is not None]
    problems = [
        f"{field.name}={getattr(config, field.name)!r} (only {getattr(plain, field.name)!r})"
        for field in dataclasses.fields(config)
        if field.name not in said and getattr(config, field.name) != getattr(plain, field.name)
    ]
    if config.rule not in ("scheduled", "loss_scaled") and "rule" in said:
        problems.append(f"rule={config.rule!r} (only 'scheduled' or 'loss_scaled')")
    if len(clips) > 1 and (dialect != "legacy" or "clip_value" not in clips or len(clips) > 2):
        problems.append(f"{' beside '.join(clips)}")
    if dialect == "legacy" and isinstance(config.learning_rate, Schedule):
        problems.append("learning_rate as a schedule")
    if dialect == "legacy" and not config.eps:
        problems.append("eps=0.0 (it becomes 1e-7)")
    if problems:
        raise ValueError(f"a {dialect} Nadam config cannot say {', '.join(problems)}.")
