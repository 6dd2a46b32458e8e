"""Parameter groups of timm's ``NAdamW`` and ``NAdamLegacy``, and the configs that they make."""

from collections.abc import Mapping
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam.compat._common import as_number, cannot_express, config_of, rule_of
from optax_nadam.compat._torch_config import NAMES as TORCH_NAMES
from optax_nadam.compat._torch_config import SHARED_FIELDS, check_fields, check_group, numbers_of, pair, parse_lr

NADAMW, LEGACY = "timm.optim.NAdamW", "timm.optim.NAdamLegacy"
NAMES = {
    **TORCH_NAMES,
    "weight_decay_peak_learning_rate": "max_lr_snapshot",
    "clip_by_gradient_rms": "clipping_threshold",
    "cautious": "caution",
}
LEGACY_NAMES = {**TORCH_NAMES, "momentum_decay": "schedule_decay"}
_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_CHOICES = {
    "caution": False,
    "corrected_weight_decay": False,
    "maximize": False,
    "max_lr_snapshot": None,
    "clipping_threshold": None,
}
_EXECUTION = {"foreach": None, "capturable": False}
_LEGACY_FIELDS = (*SHARED_FIELDS, "complex_as_real")
_NADAMW_FIELDS = (*_LEGACY_FIELDS, "weight_decay_peak_learning_rate", "clip_by_gradient_rms", "cautious", "maximize")


def fields(
    betas: Any,
    eps: Any,
    weight_decay: Any,
    caution: Any,
    corrected_weight_decay: Any,
    maximize: Any,
    clipping_threshold: Any,
    max_lr_snapshot: Any,
) -> dict[str, Any]:
    """The fields of the config that these arguments of ``NAdamW`` choose."""
    validation.check_bool("corrected_weight_decay", corrected_weight_decay)
    return {
        **pair(betas),
        "eps": eps,
        "rule": "simplified",
        "weight_decay": weight_decay,
        "weight_decay_peak_learning_rate": max_lr_snapshot if corrected_weight_decay else None,
        "clip_by_gradient_rms": clipping_threshold,
        "cautious": caution,
        "maximize": maximize,
        "complex_as_real": True,
    }


def legacy_fields(betas: Any, eps: Any, weight_decay: Any, schedule_decay: Any) -> dict[str, Any]:
    """The fields of the config that these arguments of ``NAdamLegacy`` choose."""
    return {
        **pair(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": schedule_decay,
        "coupled_weight_decay": True,
    }


def is_legacy(group: Mapping[str, Any]) -> bool:
    """Whether a group is one of ``NAdamLegacy``."""
    return "schedule_decay" in group


def config_from(group: Mapping[str, Any]) -> NadamConfig:
    """The config of a parameter group of either optimizer."""
    return _legacy_config(group) if is_legacy(group) else _nadamw_config(group)


def _legacy_config(group: Mapping[str, Any]) -> NadamConfig:
    known = (*_NUMBERS, "schedule_decay")
    check_group(f"{LEGACY} group", group, known, known)
    filled = {name: as_number(group[name]) for name in known}
    return config_of(LEGACY_NAMES, {"learning_rate": parse_lr(filled.pop("lr")), **legacy_fields(**filled)})


def _nadamw_config(group: Mapping[str, Any]) -> NadamConfig:
    what, known = f"{NADAMW} group", (*_NUMBERS, *_CHOICES, *_EXECUTION)
    # Other optimizers of timm have groups with the numbers alone.
    check_group(what, group, (*_NUMBERS, "maximize", "capturable"), known)
    if group.get("corrected_weight_decay") and group.get("max_lr_snapshot") is None:
        raise ValueError(f"{what} with corrected_weight_decay lacks max_lr_snapshot: add the lr it was made with.")
    filled = {name: as_number(group.get(name, _CHOICES.get(name))) for name in (*_NUMBERS, *_CHOICES)}
    return config_of(NAMES, {"learning_rate": parse_lr(filled.pop("lr")), **fields(**filled)})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """The parameter group of ``NAdamW`` for the rule ``simplified``, and of ``NAdamLegacy`` for ``scheduled``."""
    rule = rule_of(config)
    if rule == RULES["simplified"]:
        return _nadamw_group(config)
    if rule == RULES["scheduled"]:
        return _legacy_group(config)
    advice = f"{NADAMW} follows 'simplified', {LEGACY} 'scheduled'."
    raise cannot_express("timm", "rule", config.rule, advice)


def _nadamw_group(config: NadamConfig) -> dict[str, Any]:
    check_fields(config, NADAMW, _NADAMW_FIELDS)
    _check_decay(config, NADAMW, coupled=False)
    peak = config.weight_decay_peak_learning_rate
    return {
        **numbers_of(config),
        "caution": config.cautious,
        "corrected_weight_decay": peak is not None,
        "max_lr_snapshot": config.learning_rate if peak is None else peak,
        "maximize": config.maximize,
        **_EXECUTION,
        "clipping_threshold": config.clip_by_gradient_rms,
    }


def _legacy_group(config: NadamConfig) -> dict[str, Any]:
    check_fields(config, LEGACY, _LEGACY_FIELDS)
    _check_decay(config, LEGACY, coupled=True)
    return {**numbers_of(config), "schedule_decay": config.momentum_decay}


def _check_decay(config: NadamConfig, optimizer: str, coupled: bool) -> None:
    """Rejects weight decay of the other kind."""
    if config.weight_decay and config.coupled_weight_decay != coupled:
        advice = "It adds weight decay to the gradient." if coupled else "It adds no weight decay to the gradient."
        raise cannot_express(optimizer, "coupled_weight_decay", config.coupled_weight_decay, advice)
