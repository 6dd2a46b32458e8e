"""The parameter groups of ``torch.optim.NAdam``, and the config that each makes."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat._common import as_number, cannot_express, check_expressible, check_keys, config_of, rule_of

SIDE = "torch.optim.NAdam"
NAMES = {"learning_rate": "lr", "b1": "betas[0]", "b2": "betas[1]"}
# Written into groups by torch and by learning rate schedulers, and read by no optimizer's step.
BOOKKEEPING = (
    "params",
    "param_names",
    "name",
    "initial_lr",
    "swa_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
    "lr_scale",
)
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum_decay")
_EXECUTION = {"foreach": None, "capturable": False, "differentiable": False}
_KEYS = (*_NUMBERS, "decoupled_weight_decay", "maximize", *_EXECUTION)
_EXPRESSIBLE = (
    "learning_rate",
    "b1",
    "b2",
    "eps",
    "momentum_decay",
    "rule",
    "weight_decay",
    "coupled_weight_decay",
    "maximize",
    "complex_as_real",
)
_LEAVE_OUT = "Do it around the optimizer, and leave it out with dataclasses.replace."
_DIFFERENTIABLE = (
    "The differentiable step of torch 2.0 was another; pass rule='scheduled' for that of every other torch 2."
)


def fields(
    *,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    momentum_decay: Any,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> dict[str, Any]:
    """Our fields, but for the learning rate and the rule, of the arguments of NAdam."""
    return {
        **beta_fields(betas),
        "eps": eps,
        "momentum_decay": momentum_decay,
        "weight_decay": weight_decay,
        "coupled_weight_decay": not decoupled_weight_decay,
        "maximize": maximize,
        "complex_as_real": True,
    }


def beta_fields(betas: Any) -> dict[str, Any]:
    """Our two fields of torch's pair of decays."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}.")
    return {"b1": as_number(betas[0]), "b2": as_number(betas[1])}


def check_lr(lr: Any) -> None:
    """Rejects a negative number, which torch does not take."""
    if validation.is_number(lr):
        validation.check_not_negative("lr", lr)


def config_from(group: Mapping[str, Any], rule: str | None) -> NadamConfig:
    """The config of a parameter group."""
    group = read_group(f"the {SIDE} group", group, _KEYS, _NUMBERS)
    if rule not in (None, "scheduled", "torch1"):
        raise ValueError(f"rule must be None, 'scheduled' or 'torch1', got {rule!r}.")
    found = fields(
        **{name: group[name] for name in _NUMBERS if name != "lr"},
        decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        maximize=group.get("maximize", False),
    )
    return config_of(NAMES, {"learning_rate": group["lr"], "rule": rule or _rule_by_keys(group), **found})


def read_group(what: str, group: Mapping[str, Any], known: Collection[str], required: Iterable[str]) -> dict[str, Any]:
    """A group with its numbers as Python numbers, if it has the keys that it must have and no unknown one."""
    check_keys(what, group, (*known, *BOOKKEEPING), required)
    check_lr(as_number(group["lr"]))
    return {name: value if name in ("params", "betas") else as_number(value) for name, value in group.items()}


def _rule_by_keys(group: Mapping[str, Any]) -> str:
    """The rule of the version that wrote a group: 1.12 brought ``foreach``, 2.0 ``differentiable``, 2.1 the others."""
    if group.get("differentiable") and "capturable" not in group:
        raise cannot_express("optax_nadam", "differentiable", True, _DIFFERENTIABLE)
    return "scheduled" if "differentiable" in group or group.get("foreach") else "torch1"


def config_to(config: NadamConfig) -> dict[str, Any]:
    """The arguments of NAdam, which are the keys of a group too."""
    check_config(config, SIDE, _EXPRESSIBLE)
    if rule_of(config) != RULES["scheduled"]:
        raise cannot_express(SIDE, "rule", config.rule, "It follows 'scheduled' since torch 2.0.")
    return {
        **shared_keys(config),
        "momentum_decay": config.momentum_decay,
        "decoupled_weight_decay": not config.coupled_weight_decay,
        "maximize": config.maximize,
        **_EXECUTION,
    }


def shared_keys(config: NadamConfig) -> dict[str, Any]:
    """The keys that the groups of torch's and timm's optimizers share."""
    return {
        "lr": config.learning_rate,
        "betas": (config.b1, config.b2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def check_config(config: NadamConfig, side: str, expressible: Collection[str]) -> None:
    """Rejects a config with what an optimizer of this kind lacks."""
    check_expressible(config, side, expressible, _LEAVE_OUT)
    if isinstance(config.learning_rate, ScheduleConfig):
        raise cannot_express(side, "learning_rate", config.learning_rate, "Use a scheduler of torch beside it.")
    if config.learning_rate < 0:
        raise cannot_express(side, "learning_rate", config.learning_rate, "It takes no lr below 0; set maximize.")
