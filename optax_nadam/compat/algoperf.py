"""``nadamw`` of the AlgoPerf baselines in JAX, under its own names.

Its step is that of the rule ``simplified``, or of ``undebiased`` where ``debias`` is False.
"""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

import optax_nadam
from optax_nadam._config import NadamConfig
from optax_nadam.compat import _algoperf_config as configs
from optax_nadam.compat import _optax_state as states
from optax_nadam.compat._common import load

__all__ = ["config_from", "config_to", "dump_state", "load_state", "nadamw"]


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    debias: bool = True,
    weight_decay: ArrayLike = 0.0,
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
      weight_decay: decoupled weight decay, not negative, times the learning rate.
      weight_decay_mask: which leaves decay, see ``mask`` of :func:`optax_nadam.nadamw`.
      power: of :math:`\hat v` in the denominator, in place of the root; not negative.

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
    return optax_nadam.nadamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        **configs.fields(debias, power),
        weight_decay=weight_decay,
        mask=weight_decay_mask,
    )


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
    return configs.config_from(config)


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
    return configs.config_to(config)


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
      source: AlgoPerf's optimizer state, at any depth of chains and wrappers.
      to_params: turns a tree like the other run's params into one like ours; by default they are the same.
      config: the hyperparameters of the optimizer that continues. Needed: the source stores no product of the momenta.

    Returns:
      A new state. With the rule ``simplified`` the next step is the one that AlgoPerf's would take.

    Raises:
      ValueError: ``source`` holds no such state or more than one, its moments do not fit, or there is no config.
      TypeError: a moment is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam import compat
      >>> config = compat.algoperf.config_from({"learning_rate": 0.1})
      >>> tx, p = config.build(), jnp.ones(2)
      >>> theirs = optax.ScaleByAdamState(count=jnp.int32(7), mu=p, nu=p)
      >>> state = compat.algoperf.load_state(tx.init(p), theirs, config=config)
      >>> int(optax.tree.get(state, "count"))
      7
    """
    return load(opt_state, states.read(source), to_params, config)


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
      config: not needed: this state holds no hyperparameters.

    Returns:
      ``optax.ScaleByAdamState(count, mu, nu)``, whose fields are those of AlgoPerf's own class of that name.

    Raises:
      ValueError: there is no Nadam state in ``opt_state``, or more than one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> compat.algoperf.dump_state(compat.algoperf.nadamw(0.01).init(jnp.ones(2))).count.item()
      0
    """
    del config
    return states.write(opt_state, from_params)
