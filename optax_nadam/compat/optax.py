"""The Nadams of Optax and of AlgoPerf: their names, defaults and states.

What follows them here: ``optax.nadam`` and ``optax.nadamw`` of Optax 0.2, and ``nadamw`` of the AlgoPerf baselines in
JAX. Their arithmetic is that of the rules ``constant``, ``simplified`` and ``undebiased``; only this module knows
their names for things.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

import optax_nadam
from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam.compat._common import check_keys, get_numbers, put_state, rebuilt_product

_SHARED = ("learning_rate", "b1", "b2", "eps", "eps_root")
_STATE = "source must hold one state of optax.adam, adamw, nadam or nadamw (a ScaleByAdamState), but holds {found}."


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
      TypeError: a value that is no number.

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


def algoperf_nadamw(
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
      power: of :math:`\hat v` in the denominator, in place of the root; positive.

    Returns:
      A gradient transformation that takes the steps of AlgoPerf's.

    Raises:
      ValueError: a number out of range.
      TypeError: a value that is no number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.algoperf_nadamw(0.01)
      >>> p = jnp.float32(1.0)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(p), p)
      >>> f"{float(updates):.5f}"
      '-0.01900'
    """
    validation.check_positive("power", power)
    rule = dataclasses.replace(RULES["simplified" if debias else "undebiased"], power=power)
    return optax_nadam.nadamw(
        learning_rate, b1, b2, eps, eps_root, rule=rule, weight_decay=weight_decay, mask=weight_decay_mask
    )


def config_from(arguments: Mapping[str, Any]) -> NadamConfig:
    """The config of ``optax.nadam(**arguments)``, or of ``optax.nadamw`` where there is a ``weight_decay``.

    Args:
      arguments: keyword arguments of either, plain numbers.

    Returns:
      A config that builds the same optimizer.

    Raises:
      ValueError: an unknown key, a missing learning rate, or a mask, which is not plain data.
      TypeError: a value that is no number.

    Examples:
      >>> from optax_nadam import compat
      >>> compat.optax.config_from({"learning_rate": 0.1}).rule
      'constant'
    """
    check_keys("optax.nadam", arguments, (*_SHARED, "weight_decay"))
    if "learning_rate" not in arguments:
        raise ValueError("optax.nadam has no default learning_rate; the arguments must hold one.")
    return NadamConfig(**{"eps": 1e-8, "rule": "constant", **arguments})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Keyword arguments for ``optax.nadamw`` where there is weight decay, for ``optax.nadam`` where there is none.

    Args:
      config: what to translate.

    Returns:
      The arguments; :func:`config_from` turns them back into an equal config.

    Raises:
      ValueError: the config has something that Optax's Nadam has not, named in the text.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam import compat
      >>> compat.optax.config_to(optax_nadam.NadamConfig(rule="constant", learning_rate=0.1))["b1"]
      0.9
    """
    arguments = {name: getattr(config, name) for name in _SHARED}
    if config.weight_decay:
        arguments["weight_decay"] = config.weight_decay
    if isinstance(config.learning_rate, float):
        expressed = config_from(arguments).to_dict()
        differing = [name for name, value in config.to_dict().items() if expressed[name] != value]
    else:
        differing = ["learning_rate"]
    if differing:
        named = ", ".join(f"{name}={getattr(config, name)!r}" for name in differing)
        raise ValueError(f"optax.nadam has no counterpart of {named}.")
    return arguments


def load_state(
    opt_state: Any,
    source: Any,
    to_params: Callable[[Any], Any] = lambda weights: weights,
    *,
    config: NadamConfig | None = None,
) -> Any:
    """Goes on from the state of ``optax.adam``, ``adamw``, ``nadam`` or ``nadamw``.

    A running Adam job turns into Nadam so: the moments are the same, and the product of the momenta is what it would
    have been had the run been Nadam from the start.

    Args:
      opt_state: a state of the optimizer that is to go on, as its ``init`` makes it.
      source: Optax's state, at any depth of chains and wrappers.
      to_params: turns a tree like the other run's params into one like ours; by default they are the same.
      config: hyperparameters of the optimizer that goes on, for the product of the momenta; by default those of
        ``optax.nadam``.

    Returns:
      A new optimizer state. With the rule ``constant`` the next step is the one that Optax would take.

    Raises:
      ValueError: ``source`` holds no such state or more than one, or its moments do not fit.
      TypeError: a moment is no array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam import compat
      >>> p, adam, tx = jnp.float32(1.0), optax.adam(0.01), compat.optax.nadam(0.01)
      >>> _, running = adam.update(p, adam.init(p))
      >>> compat.optax.load_state(tx.init(p), running)[0].count.item()
      1
    """
    found = [s for s in jax.tree.leaves(source, is_leaf=_is_adam) if _is_adam(s)]
    if len(found) != 1:
        raise ValueError(_STATE.format(found=len(found)))
    (adam,) = found
    config = config or NadamConfig(rule="constant")
    return put_state(
        opt_state,
        count=adam.count,
        mu_product=rebuilt_product(int(adam.count), config),
        m=to_params(adam.mu),
        v=to_params(adam.nu),
    )


def dump_state(opt_state: Any, from_params: Callable[[Any], Any] = lambda params: params) -> optax.ScaleByAdamState:
    """The state that Optax's Adam and Nadam keep.

    Args:
      opt_state: a state with one Nadam in it, at any depth.
      from_params: turns a tree like our params into one like the other run's; by default they are the same.

    Returns:
      ``optax.ScaleByAdamState(count, mu, nu)``, the first link of the state of ``optax.adam`` and its kin.

    Raises:
      ValueError: there is no Nadam state in ``opt_state``, or more than one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.nadam(0.01)
      >>> compat.optax.dump_state(tx.init(jnp.float32(1.0))).count.item()
      0
    """
    state = get_numbers(opt_state)
    return optax.ScaleByAdamState(count=state.count, mu=from_params(state.m), nu=from_params(state.v))


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
