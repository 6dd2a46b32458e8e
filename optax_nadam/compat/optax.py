"""``optax.nadam``, ``nadamw``, ``adam`` and ``adamw`` of Optax 0.2: their names, defaults and states.

Their arithmetic is that of the rules ``constant`` and ``adam``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

import optax_nadam
from optax_nadam._config import NadamConfig
from optax_nadam.compat import _optax_config as configs
from optax_nadam.compat import _optax_state as states
from optax_nadam.compat._common import load

__all__ = ["config_from", "config_to", "dump_state", "load_state", "nadam", "nadamw"]


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``optax.nadam``, with its arguments and defaults.

    Args:
      learning_rate: a number, a scalar array or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      mu_dtype: dtype of the first moment; see ``m_dtype`` of :func:`optax_nadam.scale_by_nadam`.

    Returns:
      A gradient transformation that takes the steps of ``optax.nadam``.

    Raises:
      ValueError: a number out of range, or a dtype that is not offered.
      TypeError: a value that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.nadam(0.01)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(jnp.float32(1.0)))
      >>> f"{float(updates):.5f}"
      '-0.01474'
    """
    return optax_nadam.nadam(learning_rate, b1, b2, eps, eps_root, rule="constant", m_dtype=mu_dtype)


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``optax.nadamw``, with its arguments and defaults.

    Args:
      learning_rate: as in :func:`nadam`, as all up to ``mu_dtype``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      mu_dtype: dtype of the first moment.
      weight_decay: decoupled weight decay, not negative, times the learning rate.
      mask: which leaves decay, see :func:`optax_nadam.nadamw`.

    Returns:
      A gradient transformation that takes the steps of ``optax.nadamw``.

    Raises:
      ValueError: as :func:`nadam`.
      TypeError: as :func:`nadam`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.nadamw(0.01, weight_decay=0.1)
      >>> p = jnp.float32(1.0)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(p), p)
      >>> f"{float(updates):.5f}"
      '-0.01574'
    """
    return optax_nadam.nadamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        rule="constant",
        m_dtype=mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
    )


def config_from(config: Mapping[str, Any], *, optimizer: str) -> NadamConfig:
    """The config of a call of an Optax optimizer.

    Args:
      config: its keyword arguments, plain data; what is left out has Optax's default.
      optimizer: whose: ``"nadam"``, ``"nadamw"``, ``"adam"`` or ``"adamw"``. It must be said, since their defaults
        differ: ``nadamw`` has a weight decay of 1e-4.

    Returns:
      A config that builds the same optimizer, with the rule ``constant``, or with ``adam`` for ``optax.adam`` and
      ``adamw`` without ``nesterov``.

    Raises:
      ValueError: an unknown key or optimizer, a missing learning rate, a number out of range, or a mask, which is not
        plain data.
      TypeError: a value of the wrong type.

    Examples:
      >>> from optax_nadam import compat
      >>> config = compat.optax.config_from({"learning_rate": 0.1}, optimizer="nadamw")
      >>> config.rule, config.weight_decay
      ('constant', 0.0001)
    """
    return configs.config_from(config, optimizer)


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Keyword arguments for ``optax.nadamw``, or for ``optax.adamw`` where the rule is ``adam``.

    Args:
      config: what to translate.

    Returns:
      The arguments, the weight decay among them, which may be 0. :func:`config_from` with ``optimizer="nadamw"`` (or
      ``"adamw"``) turns them back into an equal config, but for fields without effect.

    Raises:
      ValueError: the config has something that Optax's optimizers cannot express, named in the text.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam import compat
      >>> compat.optax.config_to(optax_nadam.NadamConfig(rule="constant", learning_rate=0.1))["weight_decay"]
      0.0
    """
    return configs.config_to(config)


def load_state(
    opt_state: Any,
    source: Any,
    to_params: Callable[[Any], Any] = lambda weights: weights,
    *,
    config: NadamConfig | None = None,
) -> Any:
    """The optimizer state that continues where ``optax.adam``, ``adamw``, ``nadam`` or ``nadamw`` stopped.

    A running Adam job becomes Nadam this way: the moments are the same, and the product of the momenta is what it
    would have been had the run been Nadam from the start.

    Args:
      opt_state: a fresh state of the optimizer that is to continue, at any depth of chains and wrappers; it is not
        changed.
      source: Optax's state, at any depth of chains and wrappers; also as the dicts and lists that Orbax without a
        target, or Flax's ``to_state_dict``, makes of it.
      to_params: turns a tree like the other run's params into one like ours; by default they are the same.
      config: the hyperparameters of the optimizer that continues. Needed: Optax stores no product of the momenta.

    Returns:
      A new optimizer state. With the rule ``constant`` the next step is the one that ``optax.nadam`` would take, with
      ``adam`` that of ``optax.adam``.

    Raises:
      ValueError: ``source`` holds no such state or more than one, its moments do not fit, or there is no config.
      TypeError: a moment is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam import compat
      >>> config = compat.optax.config_from({"learning_rate": 0.01}, optimizer="nadam")
      >>> p, adam, tx = jnp.float32(1.0), optax.adam(0.01), config.build()
      >>> _, running = adam.update(p, adam.init(p))
      >>> state = compat.optax.load_state(tx.init(p), running, config=config)
      >>> int(optax.tree.get(state, "count"))
      1
    """
    return load(opt_state, states.read(source), to_params, config)


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any] = lambda params: params,
    *,
    config: NadamConfig | None = None,
) -> optax.ScaleByAdamState:
    """The state that Optax's Adam and Nadam store, the inverse of :func:`load_state`.

    Args:
      opt_state: a state with one Nadam in it, at any depth.
      from_params: turns a tree like our params into one like the other run's; by default they are the same.
      config: not needed: Optax's state holds no hyperparameters.

    Returns:
      ``optax.ScaleByAdamState(count, mu, nu)``, the first part of the state of ``optax.adam`` and its kin.

    Raises:
      ValueError: there is no Nadam state in ``opt_state``, or more than one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.nadam(0.01)
      >>> compat.optax.dump_state(tx.init(jnp.float32(1.0))).count.item()
      0
    """
    del config
    return states.write(opt_state, from_params)
