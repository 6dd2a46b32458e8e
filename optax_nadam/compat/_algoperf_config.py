"""The arguments of AlgoPerf's ``nadamw``, and the config that they make."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam.compat._common import cannot_express, check_expressible, check_keys, config_of, rule_of

NAMES: Mapping[str, str] = {}
_SIDE = "AlgoPerf's nadamw"
_SHARED = ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay")
_DEFAULTS = {"eps": 1e-8, "weight_decay": 0.0, "debias": True, "power": 0.5}


def fields(debias: Any, power: Any) -> dict[str, Any]:
    """The fields of the config that these two arguments choose."""
    validation.check_bool("debias", debias)
    validation.check_static("power", power)
    rule = "simplified" if debias else "undebiased"
    return {"rule": rule if power == 0.5 else dataclasses.replace(RULES[rule], power=power)}


def config_from(arguments: Mapping[str, Any]) -> NadamConfig:
    """The config of a call of ``nadamw``."""
    check_keys(_SIDE, arguments, (*_SHARED, "debias", "power"), required=("learning_rate",))
    filled = {**_DEFAULTS, **arguments}
    shared = {name: filled[name] for name in _SHARED if name in filled}
    return config_of(NAMES, {**shared, **fields(filled["debias"], filled["power"])})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Arguments for ``nadamw``."""
    advice = "Do it around the optimizer, and leave it out of the config."
    check_expressible(config, _SIDE, (*_SHARED, "rule"), advice)
    if not isinstance(config.learning_rate, float):
        raise cannot_express(_SIDE, "learning_rate", config.learning_rate, "Pass config.learning_rate.build() to it.")
    rule = rule_of(config)
    debias = {RULES["simplified"]: True, RULES["undebiased"]: False}.get(dataclasses.replace(rule, power=0.5))
    if debias is None:
        raise cannot_express(_SIDE, "rule", config.rule, "It follows 'simplified', or 'undebiased' with debias=False.")
    return {name: getattr(config, name) for name in _SHARED} | {"debias": debias, "power": rule.power}
