"""Parameter groups of ``torch.optim.NAdam``, what they share with timm's, and the configs that they make."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat._common import (
    as_number,
    cannot_express,
    check_expressible,
    check_keys,
    config_of,
    rule_of,
    without,
)

OPTIMIZER = "torch.optim.NAdam"
NAMES = {"learning_rate": "lr", "b1": "betas[0]", "b2": "betas[1]"}
# What config_to can write for any optimizer of torch's making.
SHARED_FIELDS = ("learning_rate", "b1", "b2", "eps", "momentum_decay", "rule", "weight_decay", "coupled_weight_decay")
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum_decay")
_CHOICES = ("decoupled_weight_decay", "maximize")
_EXECUTION = {"foreach": None, "capturable": False, "differentiable": False}
# So large that the momentum is b1 from the first step on.
_NO_WARMUP = 1e4

# Written into groups by torch and by learning rate schedulers; no optimizer's step reads it.
_BOOKKEEPING = frozenset(
    {"params", "param_names", "name", "initial_lr", "swa_lr", "max_lr", "min_lr", "lr_scale", "base_momentum"}
    | {"max_momentum"}
)
# Hyperparameters of the optimizers of torch and timm: a group that has one, and no use for it, is not a Nadam's.
_HYPERPARAMETERS = frozenset(
    [
        "adjust_lr_fn",
        "alpha",
        "always_adapt",
        "amsgrad",
        "beta2_cap",
        "beta2_decay",
        "beta3",
        "betas",
        "bias_correction",
        "capturable",
        "caution",
        "centered",
        "clipping_threshold",
        "corrected_weight_decay",
        "d",
        "dampening",
        "decay_rate",
        "decoupled",
        "decoupled_decay",
        "decoupled_weight_decay",
        "delta",
        "differentiable",
        "eps",
        "eps_scale",
        "etas",
        "fixed_decay",
        "foreach",
        "fused",
        "gamma",
        "grad_averaging",
        "initial_accumulator_value",
        "lambd",
        "lr_decay",
        "lr_in_momentum",
        "max_grad_norm",
        "max_lr_snapshot",
        "maximize",
        "momentum",
        "momentum_decay",
        "mu_dtype",
        "nesterov",
        "no_prox",
        "ns_coefficients",
        "ns_steps",
        "rectify",
        "rho",
        "schedule_decay",
        "step_sizes",
        "t0",
        "history_size",
        "line_search_fn",
        "max_eval",
        "max_iter",
        "tolerance_change",
        "tolerance_grad",
        "trust_clip",
        "use_muon",
        "wd_ratio",
        "weight_decouple",
    ]
)
_CYCLED = (
    "{what} has {keys}: OneCycleLR has cycled betas[0], which is constant here. The config has its value of now,"
    " {b1!r}; give the scheduler cycle_momentum=False to compare runs."
)


def check_group(what: str, group: Mapping[str, Any], required: Iterable[str], known: Collection[str]) -> None:
    """Rejects a group of another optimizer, and warns of what is in a group besides hyperparameters."""
    others = set(group) - set(known) - _BOOKKEEPING - _HYPERPARAMETERS
    check_keys(what, without(group, {*others, *(_BOOKKEEPING - {*known})}), known, required)
    if others:
        warnings.warn(
            f"{what} has keys that are ignored: {', '.join(sorted(others))}. torch's optimizer does not read them"
            " either; if a subclass of it does, do the same here.",
            stacklevel=2,
        )
    cycled = sorted({"base_momentum", "max_momentum"} & set(group))
    if cycled:
        warnings.warn(_CYCLED.format(what=what, keys=" and ".join(cycled), b1=group["betas"][0]), stacklevel=2)


def pair(betas: Any) -> dict[str, Any]:
    """The two decays as fields of a config."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}.")
    return {"b1": as_number(betas[0]), "b2": as_number(betas[1])}


def parse_lr(lr: Any) -> Any:
    """A learning rate, which is not negative where it is a number."""
    if validation.is_number(lr):
        validation.check_not_negative("lr", lr)
    return lr


def fields(
    betas: Any, eps: Any, weight_decay: Any, momentum_decay: Any, decoupled_weight_decay: Any, maximize: Any
) -> dict[str, Any]:
    """The fields of the config that these arguments of ``torch.optim.NAdam`` choose."""
    validation.check_bool("decoupled_weight_decay", decoupled_weight_decay)
    return {
        **pair(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": momentum_decay,
        "coupled_weight_decay": not decoupled_weight_decay,
        "maximize": maximize,
        "complex_as_real": True,
    }


def config_from(group: Mapping[str, Any], rule: str | None) -> NadamConfig:
    """The config of a parameter group."""
    check_group(f"{OPTIMIZER} group", group, _NUMBERS, (*_NUMBERS, *_CHOICES, *_EXECUTION))
    if rule not in (None, "scheduled", "torch1"):
        raise ValueError(f"rule must be None, 'scheduled' or 'torch1', got {rule!r}.")
    filled = {name: as_number(group.get(name, False)) for name in (*_NUMBERS, *_CHOICES)}
    lr = parse_lr(filled.pop("lr"))
    return config_of(NAMES, {"learning_rate": lr, "rule": rule or _rule_by_keys(group), **fields(**filled)})


def _rule_by_keys(group: Mapping[str, Any]) -> str:
    """The rule of the version that wrote a group: 1.12 brought ``foreach``, 2.0 ``differentiable``, 2.1 the others."""
    if group.get("differentiable") and "capturable" not in group:
        advice = "The differentiable step of torch 2.0 was wrong; pass rule='scheduled' for the right one."
        raise cannot_express("NadamConfig", "differentiable", True, advice)
    return "scheduled" if "differentiable" in group or group.get("foreach") else "torch1"


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Arguments for ``torch.optim.NAdam``."""
    check_fields(config, OPTIMIZER, (*SHARED_FIELDS, "maximize", "complex_as_real"))
    if rule_of(config) not in (RULES["scheduled"], RULES["constant"]):
        raise cannot_express(OPTIMIZER, "rule", config.rule, "It follows 'scheduled' since torch 2.0, or 'constant'.")
    return {
        **numbers_of(config),
        "momentum_decay": config.momentum_decay if rule_of(config).momentum_schedule else _NO_WARMUP,
        "decoupled_weight_decay": not config.coupled_weight_decay,
        "maximize": config.maximize,
        **_EXECUTION,
    }


def check_fields(config: NadamConfig, optimizer: str, expressible: Collection[str]) -> None:
    """Rejects a config with something that an optimizer of torch's making lacks."""
    check_expressible(config, optimizer, expressible)
    if isinstance(config.learning_rate, ScheduleConfig):
        advice = "Use a scheduler of torch.optim.lr_scheduler, and a number here."
        raise cannot_express(optimizer, "learning_rate", config.learning_rate, advice)
    if config.learning_rate < 0:
        raise cannot_express(optimizer, "learning_rate", config.learning_rate, "It takes no number below 0.")


def numbers_of(config: NadamConfig) -> dict[str, Any]:
    """The arguments that all optimizers of torch's making share."""
    return {
        "lr": config.learning_rate,
        "betas": (config.b1, config.b2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
