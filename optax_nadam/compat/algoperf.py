"""``nadamw`` of the AlgoPerf baselines in JAX, under its own names. Its state is that of Optax's Adam.

Its step is that of the rule ``simplified``, or of ``undebiased`` where ``debias`` is False. Checkpoints of the
baseline's ``NAdamW`` for torch are read too; :mod:`optax_nadam.compat.timm` has the optimizer of their groups.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from jax.typing import ArrayLike

from optax_nadam import _nadam as ours
from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES, Rule, RuleName
from optax_nadam.compat import optax as states
from optax_nadam.compat import timm
from optax_nadam.compat._checkpoint import Checkpoint
from optax_nadam.compat._common import SCHEDULE, cannot_express, check_expressible, check_keys, config_of, rule_of
from optax_nadam.compat._match import Matched, load

__all__ = ["config_from", "config_to", "dump_state", "load_state", "nadamw", "read"]

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


def read(source: Any, *, names: Sequence[str] | None = None) -> Checkpoint:
    """What the state of ``nadamw`` in JAX holds, or a checkpoint of AlgoPerf's ``NAdamW`` for torch.

    Args:
      source: as in :func:`load_state`.
      names: of the parameters of torch, as in :func:`optax_nadam.compat.torch.load_state`.

    Returns:
      A :class:`optax_nadam.compat.Checkpoint`, taken wherever a source is.

    Raises:
      ValueError: as :func:`load_state`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> state = compat.algoperf.dump_state(compat.algoperf.nadamw(0.01).init(jnp.ones(2)))
      >>> compat.algoperf.read(state).count
      0
    """
    is_torch = isinstance(source, Mapping) and {"state", "param_groups"} <= set(source)
    return timm.read(source, names=names) if is_torch or names is not None else states.read(source)


def load_state(
    opt_state: Any,
    source: Any,
    to_params: Callable[[Any], Any] = lambda weights: weights,
    *,
    config: NadamConfig | None = None,
) -> Any:
    """The optimizer state that continues where AlgoPerf's ``nadamw`` stopped.

    Args:
      opt_state: a fresh state of the optimizer that is to continue, at any depth of chains and wrappers; it is not
        changed.
      source: as in :func:`optax_nadam.compat.optax.load_state`; or of torch what ``optimizer.state_dict()`` returned.
      to_params: as there; of torch as in :func:`optax_nadam.compat.torch.load_state`.
      config: the hyperparameters of the optimizer that continues; needed for the state in JAX, which stores none.

    Returns:
      A new state.

    Raises:
      ValueError: ``source`` holds no such state or more than one, its moments do not fit, or there is no config.
      TypeError: a moment is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import NadamConfig, compat
      >>> state = compat.algoperf.nadamw(0.01).init(jnp.ones(2))
      >>> stored = compat.algoperf.dump_state(state)
      >>> config = NadamConfig(rule="simplified")
      >>> int(optax.tree.get(compat.algoperf.load_state(state, stored, config=config), "count"))
      0
    """
    return load(opt_state, Matched(read(source), to_params), config)


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
    return states.to_adam_state(opt_state, from_params)
