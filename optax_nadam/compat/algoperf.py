"""``nadamw`` of the AlgoPerf baselines in JAX, under its own names. Its state is that of Optax's Adam.

Its step is that of the rule ``simplified``, or of ``undebiased`` where ``debias`` is False.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

from optax_nadam import _nadam as ours
from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES, Rule, RuleName
from optax_nadam.compat._common import SCHEDULE, cannot_express, check_expressible, check_keys, config_of, rule_of
from optax_nadam.compat.optax import load_state, to_adam_state

__all__ = ["config_from", "config_to", "dump_state", "load_state", "nadamw"]

_SIDE = "AlgoPerf's nadamw"
_SHARED = ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay")
_DEFAULTS = {"eps": 1e-8, "weight_decay": 0.0, "debias": True, "power": 0.5}
_OTHER_RULE = (
    "It follows 'simplified', or 'undebiased' with debias=False: pass dataclasses.replace(config, rule='simplified')."
)


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    debias: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    power: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""``nadamw`` of the AlgoPerf baselines in JAX, with its arguments and defaults.

    Args:
      learning_rate: a number, a scalar array or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      debias: whether the moments are debiased.
      weight_decay: decoupled weight decay, not negative, multiplied by the learning rate; a number or a schedule.
      weight_decay_mask: which leaves decay, see ``mask`` of :func:`optax_nadam.nadamw`.
      power: of :math:`\hat v` in the denominator, in place of the root; positive.

    Returns:
      A gradient transformation that takes the steps of AlgoPerf's.

    Raises:
      ValueError: a number out of range.
      TypeError: a value that is not a number, or a ``debias`` that is not a boolean.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.algoperf.nadamw(0.01)
      >>> p = jnp.float32(1.0)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(p), p)
      >>> f"{float(updates):.5f}"
      '-0.01900'

    Source: ``reference_algorithms/paper_baselines/nadamw/jax/submission.py`` of AlgoPerf.
    """
    return ours.nadamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        rule=_rule(debias, power),
        weight_decay=weight_decay,
        mask=weight_decay_mask,
    )


def _rule(debias: Any, power: Any) -> RuleName | Rule:
    """The rule that these two arguments choose."""
    validation.check_bool("debias", debias)
    validation.check_static("power", power)
    rule: RuleName = "simplified" if debias else "undebiased"
    return rule if power == 0.5 else dataclasses.replace(RULES[rule], power=power)


def config_from(config: Mapping[str, Any]) -> NadamConfig:
    """The config of ``nadamw(**config)``.

    Args:
      config: its keyword arguments, plain data; what is left out has AlgoPerf's default.

    Returns:
      A config that builds the same optimizer.

    Raises:
      ValueError: an unknown key, a missing learning rate, or a number out of range.
      TypeError: a value of the wrong type.

    Examples:
      >>> from optax_nadam import compat
      >>> compat.algoperf.config_from({"learning_rate": 0.1, "debias": False}).rule
      'undebiased'
    """
    check_keys(_SIDE, config, (*_SHARED, "debias", "power"), required=("learning_rate",))
    fields = {**_DEFAULTS, **config}
    rule = _rule(fields.pop("debias"), fields.pop("power"))
    return config_of({}, {**fields, "rule": rule})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Keyword arguments for ``nadamw``.

    Args:
      config: what to translate.

    Returns:
      The arguments; :func:`config_from` turns them back into an equal config, but for fields without effect.

    Raises:
      ValueError: the config has something that AlgoPerf's nadamw cannot express, named in the text.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam import compat
      >>> compat.algoperf.config_to(optax_nadam.NadamConfig(rule="simplified", learning_rate=0.1))["debias"]
      True
    """
    debias = _debias(config)
    if not isinstance(config.learning_rate, float):
        raise cannot_express(_SIDE, "learning_rate", config.learning_rate, SCHEDULE)
    return {name: getattr(config, name) for name in _SHARED} | {"debias": debias, "power": rule_of(config).power}


def _debias(config: NadamConfig) -> bool:
    """The argument of that name for a config, which AlgoPerf must be able to express, whatever its learning rate."""
    check_expressible(config, _SIDE, (*_SHARED, "rule"))
    debias = {RULES["simplified"]: True, RULES["undebiased"]: False}.get(
        dataclasses.replace(rule_of(config), power=0.5)
    )
    if debias is None:
        raise cannot_express(_SIDE, "rule", config.rule, _OTHER_RULE)
    return debias


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any] = lambda params: params,
    *,
    config: NadamConfig | None = None,
) -> optax.ScaleByAdamState:
    """The state that AlgoPerf's ``nadamw`` stores, the inverse of :func:`load_state`.

    Args:
      opt_state: a state with one Nadam in it, at any depth.
      from_params: turns a tree like our params into one like the other run's; by default they are the same.
      config: the hyperparameters of the run, to check that AlgoPerf can express them. Its state holds none.

    Returns:
      ``optax.ScaleByAdamState(count, mu, nu)``, whose fields are those of AlgoPerf's own class of that name.

    Raises:
      ValueError: there is no Nadam state in ``opt_state``, or more than one; a config that AlgoPerf cannot express.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> compat.algoperf.dump_state(compat.algoperf.nadamw(0.01).init(jnp.ones(2))).count.item()
      0
    """
    if config is not None:
        _debias(config)
    return to_adam_state(opt_state, from_params)
