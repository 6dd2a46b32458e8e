"""``optax.nadam``, ``nadamw``, ``adam`` and ``adamw`` of Optax 0.2: their names, defaults and states.

Their arithmetic is that of the rules ``constant`` and, without ``nesterov``, ``adam``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_nadam import _nadam as ours
from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES, RuleName
from optax_nadam._state import KINDS
from optax_nadam.compat._account import check_parameter
from optax_nadam.compat._checkpoint import Checkpoint, Group, Parameter
from optax_nadam.compat._common import (
    SCHEDULE,
    as_numpy,
    cannot_express,
    check_expressible,
    check_keys,
    config_of,
    get_numbers,
    rule_of,
)
from optax_nadam.compat._match import Matched, load

__all__ = ["adam", "adamw", "config_from", "config_to", "dump_state", "load_state", "nadam", "nadamw", "read"]

_NAMES = {"m_dtype": "mu_dtype"}
_OPTIMIZERS = ("nadam", "nadamw", "adam", "adamw")
_SHARED = ("learning_rate", "b1", "b2", "eps", "eps_root")
_EXPRESSIBLE = (*_SHARED, "rule", "weight_decay", "m_dtype")
_OTHER_RULE = "Optax follows 'constant' (nadamw) and 'adam' (adamw): pass dataclasses.replace(config, rule='constant')."
_ONE_FORMAT = "It has one dtype for all leaves: pass dataclasses.replace(config, m_dtype=None)."
_NO_8_BITS = "It has no 8-bit format: pass dataclasses.replace(config, m_dtype='bfloat16')."

_FIELDS = optax.ScaleByAdamState._fields  # count, mu, nu
_NOT_ONE = (
    "source must hold one ScaleByAdamState, the state of optax.adam, adamw, nadam or nadamw and of AlgoPerf's nadamw,"
    " but holds {found}."
)

_OURS = " It holds the state of optax_nadam itself: put it into a fresh one with optax_nadam.set_state."
_ALIKE = " A dict with mu and nu has {fields}: a state has count, mu and nu alone, and count is a whole number."
_REPLICATED = (
    "count has shape {shape}: the state is replicated over devices. Pass one copy of it:"
    " flax.jax_utils.unreplicate(state), or jax.tree.map(lambda x: x[0], state)."
)
_SOURCE = "a ScaleByAdamState"
_NOTES = ("hyperparameters: pass config=", "gradient clipping")


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """``optax.nadam``, with its arguments and defaults.

    Args:
      learning_rate: a number, a scalar array or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      mu_dtype: dtype of the first moment; see ``m_dtype`` of :func:`optax_nadam.scale_by_nadam`.
      nesterov: whether the update looks ahead, as Nadam; otherwise it is that of Adam.

    Returns:
      A gradient transformation that takes the steps of ``optax.nadam``.

    Raises:
      ValueError: a number out of range, or a dtype that is not offered.
      TypeError: a value that is not a number, or a ``nesterov`` that is not a boolean.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.nadam(0.01)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(jnp.float32(1.0)))
      >>> f"{float(updates):.5f}"
      '-0.01474'
    """
    return ours.nadam(learning_rate, b1, b2, eps, eps_root, rule=_rule(nesterov), m_dtype=mu_dtype)


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """``optax.nadamw``, with its arguments and defaults.

    Args:
      learning_rate: as in :func:`nadam`, as all up to ``mu_dtype``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      mu_dtype: dtype of the first moment.
      weight_decay: decoupled weight decay, not negative, multiplied by the learning rate; a number or a schedule.
      mask: which leaves decay, see :func:`optax_nadam.nadamw`.
      nesterov: as in :func:`nadam`.

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
    return ours.nadamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        rule=_rule(nesterov),
        m_dtype=mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
    )


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """``optax.adam``: :func:`nadam` with ``nesterov=False`` as the default.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.adam(0.01)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(jnp.float32(1.0)))
      >>> f"{float(updates):.5f}"
      '-0.01000'
    """
    return nadam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """``optax.adamw``: :func:`nadamw` with ``nesterov=False`` as the default.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.adamw(0.01, weight_decay=0.1)
      >>> p = jnp.float32(1.0)
      >>> updates, state = tx.update(jnp.float32(0.5), tx.init(p), p)
      >>> f"{float(updates):.5f}"
      '-0.01100'
    """
    return nadamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov)


def _rule(nesterov: bool) -> RuleName:
    validation.check_bool("nesterov", nesterov)
    return "constant" if nesterov else "adam"


def config_from(config: Mapping[str, Any], *, optimizer: str) -> NadamConfig:
    """The config of a call of an Optax optimizer.

    Args:
      config: its keyword arguments, plain data; what is left out has Optax's default.
      optimizer: whose: ``"nadam"``, ``"nadamw"``, ``"adam"`` or ``"adamw"``. Required, because their defaults differ:
        ``nadamw`` has a weight decay of 1e-4.

    Returns:
      A config that builds the same optimizer, with the rule ``constant``, or ``adam`` without ``nesterov``.

    Raises:
      ValueError: an unknown key or optimizer, a missing learning rate, a number out of range, or a mask, which is not
        plain data: pass it to ``NadamConfig.build``.
      TypeError: a value of the wrong type.

    Examples:
      >>> from optax_nadam import compat
      >>> config = compat.optax.config_from({"learning_rate": 0.1}, optimizer="nadamw")
      >>> config.rule, config.weight_decay
      ('constant', 0.0001)
    """
    validation.check_choice("optimizer", optimizer, _OPTIMIZERS)
    defaults = {"eps": 1e-8, "mu_dtype": None, "nesterov": optimizer.startswith("nadam")}
    defaults |= {"weight_decay": 1e-4} if optimizer.endswith("w") else {}
    check_keys(f"optax.{optimizer}", config, {*_SHARED, *defaults}, required=("learning_rate",))
    fields = {**defaults, **config}
    rule, m_dtype = _rule(fields.pop("nesterov")), fields.pop("mu_dtype")
    return config_of(_NAMES, {**fields, "rule": rule, "m_dtype": m_dtype})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """Keyword arguments for ``optax.nadamw`` and for ``optax.adamw``, which differ in the default of ``nesterov`` only.

    Args:
      config: what to translate.

    Returns:
      The arguments, ``nesterov`` and the weight decay among them, which may be 0. :func:`config_from` with
      ``optimizer="nadamw"`` or ``"adamw"`` turns them back into an equal config, but for fields without effect.

    Raises:
      ValueError: the config has something that Optax's optimizers cannot express, named in the text.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam import compat
      >>> compat.optax.config_to(optax_nadam.NadamConfig(rule="constant", learning_rate=0.1))["nesterov"]
      True
    """
    _check_config(config)
    if not isinstance(config.learning_rate, float):
        raise cannot_express("optax.nadamw", "learning_rate", config.learning_rate, SCHEDULE)
    decay = {"weight_decay": config.weight_decay, "mu_dtype": config.m_dtype}
    return {name: getattr(config, name) for name in _SHARED} | decay | {"nesterov": rule_of(config).nesterov}


def _check_config(config: NadamConfig) -> None:
    """Rejects a config that Optax cannot express, whatever its learning rate."""
    check_expressible(config, "optax.nadamw", _EXPRESSIBLE)
    if rule_of(config) not in (RULES["constant"], RULES["adam"]):
        raise cannot_express("optax.nadamw", "rule", config.rule, _OTHER_RULE)
    if isinstance(config.m_dtype, dict | list):
        raise cannot_express("optax.nadamw", "m_dtype", config.m_dtype, _ONE_FORMAT)
    if config.m_dtype == "int8":
        raise cannot_express("optax.nadamw", "m_dtype", config.m_dtype, _NO_8_BITS)


def read(source: Any) -> Checkpoint:
    """What the state of an Optax optimizer holds.

    Args:
      source: as in :func:`load_state`.

    Returns:
      A :class:`optax_nadam.compat.Checkpoint`, taken wherever a source is.

    Raises:
      ValueError: ``source`` holds no such state or more than one, or impossible numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam import compat
      >>> compat.optax.read(optax.adamw(0.01).init({"w": jnp.ones(3)})).names
      ["['w']"]
    """
    if isinstance(source, Checkpoint):
        return source
    found = [node for node in jax.tree.leaves(source, is_leaf=_is_adam) if _is_adam(node)]
    if len(found) != 1:
        raise ValueError(_NOT_ONE.format(found=len(found)) + _reason(source))
    (adam,) = found
    count, m, v = (adam[name] if isinstance(adam, Mapping) else getattr(adam, name) for name in _FIELDS)
    if np.ndim(count) == 1:
        raise ValueError(_REPLICATED.format(shape=np.shape(count)))
    return _checkpoint(validation.parse_count("count", count), m, v)


def _checkpoint(count: int, m: Any, v: Any) -> Checkpoint:
    """The record of moments in trees like the other run's params."""
    validation.check_structure("mu and nu", v, m)
    parameters: dict[Any, Parameter | None] = {}
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(m), jax.tree.leaves(v), strict=True):
        label = jax.tree_util.keystr(path)
        parameter = Parameter(count, None, np.float32, as_numpy(x), as_numpy(y))
        check_parameter(label, parameter)
        parameters[label] = parameter
    groups = (Group({}, tuple(parameters)),)
    return Checkpoint(_SOURCE, "Optax, AlgoPerf", parameters, groups, structure=jax.tree.structure(m), notes=_NOTES)


def _reason(source: Any) -> str:
    """Why there is no state of Optax's in a source, where something like it is."""

    def is_like(node: Any) -> bool:
        return isinstance(node, Mapping) and {"mu", "nu"} <= set(node)

    def is_ours(node: Any) -> bool:
        return isinstance(node, KINDS) or (isinstance(node, Mapping) and {"mu_product", "m", "v"} <= set(node))

    if any(map(is_ours, jax.tree.leaves(source, is_leaf=is_ours))):
        return _OURS
    alike = [node for node in jax.tree.leaves(source, is_leaf=is_like) if is_like(node)]
    fields = [f"count={node['count']!r:.40}" if "count" in node else "no count" for node in alike]
    return _ALIKE.format(fields=", ".join(fields)) if alike else ""


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
        target, or Flax's ``to_state_dict``, makes of it; or what :func:`read` returned.
      to_params: turns a tree like the other run's params into one like ours; by default they are the same.
      config: the hyperparameters of the optimizer that continues. Required, because Optax stores no product of the
        momenta.

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
    return load(opt_state, Matched(read(source), to_params), config)


def _is_adam(node: Any) -> bool:
    """Whether a node is Optax's state, AlgoPerf's of the same name and fields, or what Orbax restores of either.

    Orbax without a target restores NamedTuples as dicts of their fields. A layer may have params of these names, but
    then its ``count`` is not an integer.
    """
    if isinstance(node, Mapping):
        return set(node) == set(_FIELDS) and np.issubdtype(np.asarray(node["count"]).dtype, np.integer)
    same_name = type(node).__name__ == optax.ScaleByAdamState.__name__
    return same_name and getattr(node, "_fields", None) == _FIELDS


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
      config: the hyperparameters of the run, to check that Optax can express them. Its state holds none.

    Returns:
      ``optax.ScaleByAdamState(count, mu, nu)``, the first part of the state of ``optax.adam`` and its kin.

    Raises:
      ValueError: there is no Nadam state in ``opt_state``, or more than one; a config that Optax cannot express.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.optax.nadam(0.01)
      >>> compat.optax.dump_state(tx.init(jnp.float32(1.0))).count.item()
      0
    """
    if config is not None:
        _check_config(config)
    return to_adam_state(opt_state, from_params)


def to_adam_state(opt_state: Any, from_params: Callable[[Any], Any]) -> optax.ScaleByAdamState:
    """The state of Optax's Adam with the numbers of ours."""
    state = get_numbers(opt_state)
    return optax.ScaleByAdamState(count=state.count, mu=from_params(state.m), nu=from_params(state.v))
