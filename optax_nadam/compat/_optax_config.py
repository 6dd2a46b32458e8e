"""The arguments of ``optax.nadam``, ``nadamw``, ``adam`` and ``adamw``, and the config that each makes."""

from collections.abc import Mapping
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam.compat._common import cannot_express, check_expressible, check_keys, config_of, rule_of

NAMES = {"m_dtype": "mu_dtype"}
OPTIMIZERS = ("nadam", "nadamw", "adam", "adamw")
_SHARED = ("learning_rate", "b1", "b2", "eps", "eps_root")
_EXPRESSIBLE = (*_SHARED, "rule", "weight_decay", "m_dtype")


def config_from(arguments: Mapping[str, Any], optimizer: str) -> NadamConfig:
    """The config of a call of an Optax optimizer."""
    validation.check_choice("optimizer", optimizer, OPTIMIZERS)
    decays, is_adam = optimizer.endswith("w"), optimizer.startswith("adam")
    optional = (*(("weight_decay",) if decays else ()), *(("nesterov",) if is_adam else ()), "mu_dtype")
    check_keys(f"optax.{optimizer}", arguments, (*_SHARED, *optional), required=("learning_rate",))
    fields = {name: arguments[name] for name in _SHARED if name in arguments}
    if decays:
        fields["weight_decay"] = arguments.get("weight_decay", 1e-4)
    rule = "adam" if is_adam and not arguments.get("nesterov") else "constant"
    return config_of(NAMES, {"eps": 1e-8, **fields, "rule": rule, "m_dtype": arguments.get("mu_dtype")})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Arguments for ``optax.nadamw``, or for ``optax.adamw`` where the rule is ``adam``."""
    side = "optax.nadamw"
    check_expressible(config, side, _EXPRESSIBLE, "Do it around the optimizer, and leave it out of the config.")
    if rule_of(config) not in (RULES["constant"], RULES["adam"]):
        raise cannot_express(side, "rule", config.rule, "It follows 'constant', optax.adamw 'adam'.")
    if not isinstance(config.learning_rate, float):
        raise cannot_express(side, "learning_rate", config.learning_rate, "Pass config.learning_rate.build() to it.")
    if config.m_dtype == "int8":
        raise cannot_express(side, "m_dtype", config.m_dtype, "It has no 8-bit format.")
    decay = {"weight_decay": config.weight_decay, "mu_dtype": config.m_dtype}
    return {name: getattr(config, name) for name in _SHARED} | decay
