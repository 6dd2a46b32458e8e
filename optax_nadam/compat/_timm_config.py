"""The parameter groups of timm's ``NAdamW`` and ``NAdamLegacy``, and the config that each makes."""

from collections.abc import Mapping
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam.compat import _torch_config as torch_configs
from optax_nadam.compat._common import cannot_express, check_keys, config_of, rule_of

NADAMW, LEGACY = "timm.optim.NAdamW", "timm.optim.NAdamLegacy"
NAMES = {
    **torch_configs.NAMES,
    "cautious": "caution",
    "weight_decay_peak_learning_rate": "max_lr_snapshot",
    "clip_update_rms": "clipping_threshold",
}
LEGACY_NAMES = {**torch_configs.NAMES, "momentum_decay": "schedule_decay"}
_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_EXECUTION = {"foreach": None, "capturable": False}
_KEYS = (
    *_NUMBERS,
    *("caution", "corrected_weight_decay", "maximize", "max_lr_snapshot", "clipping_threshold"),
    *_EXECUTION,
)
_SHARED = ("learning_rate", "b1", "b2", "eps", "momentum_decay", "rule", "weight_decay", "complex_as_real")
_NADAMW_EXPRESSIBLE = (*_SHARED, "weight_decay_peak_learning_rate", "clip_update_rms", "cautious", "maximize")


def fields(
    *,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    caution: bool,
    corrected_weight_decay: bool,
    max_lr_snapshot: Any,
    maximize: bool,
    clipping_threshold: Any,
) -> dict[str, Any]:
    """Our fields, but for the learning rate, of the arguments of NAdamW."""
    return {
        **torch_configs.beta_fields(betas),
        "eps": eps,
        "rule": "simplified",
        "weight_decay": weight_decay,
        "weight_decay_peak_learning_rate": max_lr_snapshot if corrected_weight_decay else None,
        "clip_update_rms": clipping_threshold,
        "cautious": caution,
        "maximize": maximize,
        "complex_as_real": True,
    }


def legacy_fields(*, betas: Any, eps: Any, weight_decay: Any, schedule_decay: Any) -> dict[str, Any]:
    """Our fields, but for the learning rate, of the arguments of NAdamLegacy."""
    return {
        **torch_configs.beta_fields(betas),
        "eps": eps,
        "momentum_decay": schedule_decay,
        "weight_decay": weight_decay,
        "coupled_weight_decay": True,
    }


def peak_lr(lr: Any, corrected_weight_decay: bool, max_lr_snapshot: Any) -> Any:
    """The largest lr, which timm takes to be the first where it is not given."""
    if not corrected_weight_decay or max_lr_snapshot is not None:
        return max_lr_snapshot
    if not validation.is_number(lr):
        raise ValueError(f"max_lr_snapshot must be the largest lr where lr is no number, got lr={lr!r}.")
    return lr


def is_legacy(group: Mapping[str, Any]) -> bool:
    """Whether a group is one of NAdamLegacy."""
    return "schedule_decay" in group


def config_from(group: Mapping[str, Any]) -> NadamConfig:
    """The config of a parameter group of either optimizer."""
    return _config_from_legacy(group) if is_legacy(group) else _config_from_nadamw(group)


def _config_from_legacy(group: Mapping[str, Any]) -> NadamConfig:
    keys = (*_NUMBERS, "schedule_decay")
    group = torch_configs.read_group(f"the {LEGACY} group", group, keys, keys)
    found = legacy_fields(**{name: group[name] for name in keys if name != "lr"})
    return config_of(LEGACY_NAMES, {"learning_rate": group["lr"], **found})


def _config_from_nadamw(group: Mapping[str, Any]) -> NadamConfig:
    what = f"the {NADAMW} group"
    # Other optimizers of timm have groups with the numbers alone.
    group = torch_configs.read_group(what, group, _KEYS, (*_NUMBERS, "maximize", "capturable"))
    corrected = group.get("corrected_weight_decay", False)
    if corrected:
        check_keys(f"{what} with corrected_weight_decay", group, group, ("max_lr_snapshot",))
    found = fields(
        **{name: group[name] for name in _NUMBERS if name != "lr"},
        caution=group.get("caution", False),
        corrected_weight_decay=corrected,
        max_lr_snapshot=group.get("max_lr_snapshot"),
        maximize=group["maximize"],
        clipping_threshold=group.get("clipping_threshold"),
    )
    return config_of(NAMES, {"learning_rate": group["lr"], **found})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """The group of NAdamW for the rule ``simplified``, and of NAdamLegacy for ``scheduled``."""
    if rule_of(config) == RULES["simplified"]:
        return _nadamw_group(config)
    if rule_of(config) == RULES["scheduled"]:
        return _legacy_group(config)
    advice = f"{NADAMW} follows 'simplified', {LEGACY} 'scheduled'."
    raise cannot_express("timm", "rule", config.rule, advice)


def _nadamw_group(config: NadamConfig) -> dict[str, Any]:
    without_effect = () if config.weight_decay else ("coupled_weight_decay",)
    torch_configs.check_config(config, NADAMW, (*_NADAMW_EXPRESSIBLE, *without_effect))
    peak = config.weight_decay_peak_learning_rate
    return {
        **torch_configs.shared_keys(config),
        "caution": config.cautious,
        "corrected_weight_decay": peak is not None,
        "max_lr_snapshot": config.learning_rate if peak is None else peak,
        "maximize": config.maximize,
        **_EXECUTION,
        "clipping_threshold": config.clip_update_rms,
    }


def _legacy_group(config: NadamConfig) -> dict[str, Any]:
    torch_configs.check_config(config, LEGACY, (*_SHARED, "coupled_weight_decay"))
    if config.weight_decay and not config.coupled_weight_decay:
        raise cannot_express(LEGACY, "coupled_weight_decay", False, "It adds weight decay to the gradient.")
    return {**torch_configs.shared_keys(config), "schedule_decay": config.momentum_decay}
