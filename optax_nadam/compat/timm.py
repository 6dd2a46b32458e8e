"""timm's ``NAdamW`` and ``NAdamLegacy``: constructors, parameter groups and checkpoints, under their own names.

timm's ``nadam`` is ``torch.optim.NAdam``: see :mod:`optax_nadam.compat.torch`. Neither timm nor torch is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat import _torch_groups as shared
from optax_nadam.compat import _torch_read as reader
from optax_nadam.compat._checkpoint import Checkpoint
from optax_nadam.compat._common import as_number, build, cannot_express, config_of, rule_of
from optax_nadam.compat._match import Matched, load
from optax_nadam.compat._torch_dump import check_real, dump, groups_to_dump

__all__ = ["config_from", "config_to", "dump_state", "from_groups", "load_state", "nadamlegacy", "nadamw", "read"]

_NADAMW, _LEGACY = "timm.optim.NAdamW", "timm.optim.NAdamLegacy"
_NAMES = {
    **shared.NAMES,
    "weight_decay_peak_learning_rate": "max_lr_snapshot",
    "clip_by_gradient_rms": "clipping_threshold",
    "cautious": "caution",
}
_LEGACY_NAMES = {**shared.NAMES, "momentum_decay": "schedule_decay"}
_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_CHOICES = {"caution": False, "corrected_weight_decay": False, "maximize": False} | dict.fromkeys(
    ("max_lr_snapshot", "clipping_threshold")
)
_EXECUTION = {"foreach": None, "capturable": False}
_LEGACY_NUMBERS = (*_NUMBERS, "schedule_decay")
_LEGACY_FIELDS = (*shared.FIELDS, "complex_as_real")
_NADAMW_FIELDS = (*_LEGACY_FIELDS, "weight_decay_peak_learning_rate", "clip_by_gradient_rms", "cautious", "maximize")
_OTHER_RULE = (
    "timm.optim.NAdamW follows 'simplified', timm.optim.NAdamLegacy 'scheduled': pass dataclasses.replace(config,"
    " rule='simplified') for the first, dataclasses.replace(config, rule='scheduled') for the second."
)
_COUPLED = "It adds weight decay to the gradient: pass dataclasses.replace(config, coupled_weight_decay=True)."
_DECOUPLED = "It adds no weight decay to the gradient: pass dataclasses.replace(config, coupled_weight_decay=False)."


def nadamw(
    lr: optax.ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    caution: bool = False,
    corrected_weight_decay: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    clipping_threshold: float | None = None,
    *,
    max_lr_snapshot: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``timm.optim.NAdamW``, with its arguments, order and defaults.

    Its step is the ``simplified`` rule of :func:`optax_nadam.scale_by_nadam`, with decoupled weight decay. Complex
    leaves are two real ones, as in timm, but that ``caution`` and ``clipping_threshold`` see one part at a time.

    Args:
      lr: learning rate, a number, an array or an Optax schedule; a number is not negative.
      betas: decays of the two moments, each in [0, 1).
      eps: added to the root, not negative.
      weight_decay: ``lr * weight_decay * parameter`` is subtracted from the parameter; not negative; 0 for none.
      caution: drop elements of the update that point away from the gradient.
      corrected_weight_decay: weight decay is multiplied by ``lr**2 / max_lr_snapshot`` in place of ``lr``.
      maximize: ascend.
      foreach: without effect here, as the one that follows: it says how timm runs, not what it computes.
      capturable: likewise.
      clipping_threshold: the largest root mean square of the gradient over its own scale in a leaf that does not
        shrink the update, positive; None for no limit.
      max_lr_snapshot: the largest ``lr``, positive, read with ``corrected_weight_decay`` only. None takes ``lr``, as
        timm does, which must be a number then. No argument in timm, but a key of its parameter groups.

    Returns:
      A gradient transformation, that of ``config_from(param_group).build(lr)``. Its ``update`` needs ``params`` where
      there is weight decay.

    Raises:
      ValueError: a number out of range, or ``corrected_weight_decay`` beside a schedule without ``max_lr_snapshot``.
      TypeError: a value that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam.compat import timm as timm_names
      >>> tx = timm_names.nadamw(lr=0.01, weight_decay=0, caution=True)
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(jnp.full(3, 0.5), tx.init(params), params)
      >>> [f"{x:.6f}" for x in optax.apply_updates(params, updates).tolist()]
      ['0.981000', '0.981000', '0.981000']

    Source: ``timm/optim/nadamw.py`` of timm 1.0.31; Choi et al., `On Empirical Comparisons of Optimizers for Deep
    Learning <https://arxiv.org/abs/1910.05446>`_, 2019, table 1.
    """
    del foreach, capturable
    if corrected_weight_decay and max_lr_snapshot is None:
        if not validation.is_number(lr):
            raise ValueError(f"max_lr_snapshot must be the largest lr where lr is not a number, got lr={lr!r}.")
        max_lr_snapshot = lr
    fields = _nadamw_fields(
        betas, eps, weight_decay, caution, corrected_weight_decay, maximize, max_lr_snapshot, clipping_threshold
    )
    return build(shared.parse_lr(lr), _NAMES, fields)


def nadamlegacy(
    lr: optax.ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    schedule_decay: float = 4e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""``timm.optim.NAdamLegacy``, with its arguments, order and defaults.

    Its step is the ``scheduled`` rule of :func:`optax_nadam.scale_by_nadam`. Complex leaves are not
    supported: timm squares them as they are.

    Args:
      lr: learning rate, a number, an array or an Optax schedule; a number is not negative.
      betas: decays of the two moments, each in [0, 1).
      eps: added to the root, not negative.
      weight_decay: ``weight_decay * parameter`` is added to the gradient; not negative; 0 for none.
      schedule_decay: how fast the momentum rises, per step, not negative.

    Returns:
      A gradient transformation, that of ``config_from(param_group).build(lr)``. Its ``update`` needs ``params`` where
      there is weight decay.

    Raises:
      ValueError: a number out of range.
      TypeError: a value that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam.compat import timm as timm_names
      >>> tx = timm_names.nadamlegacy(lr=0.01)
      >>> params = jnp.array(1.0)
      >>> updates, state = tx.update(jnp.array(0.5), tx.init(params))
      >>> f"{float(optax.apply_updates(params, updates)):.6f}"
      '0.989435'

    Source: ``timm/optim/nadam.py`` of timm 1.0.31.
    """
    return build(shared.parse_lr(lr), _LEGACY_NAMES, _legacy_fields(betas, eps, weight_decay, schedule_decay))


def config_from(
    config: Mapping[str, Any] | Checkpoint, *, learning_rate: float | ScheduleConfig | None = None
) -> NadamConfig:
    """The hyperparameters of a parameter group of ``NAdamW``, or of ``NAdamLegacy`` where it has ``schedule_decay``.

    Groups of older releases, and of AlgoPerf's NAdamW for torch, which lack some keys of NAdamW, are read as timm reads
    them. What a scheduler notes in a group besides ``initial_lr``, such as ``lr_scale``, is not read.

    Args:
      config: an entry of ``optimizer.param_groups`` or of ``optimizer.state_dict()["param_groups"]``; or what
        :func:`read` returned, all of whose groups must have the same hyperparameters.
      learning_rate: as in :func:`optax_nadam.compat.torch.config_from`.

    Returns:
      The config. It builds what :func:`nadamw` or :func:`nadamlegacy` builds.

    Raises:
      ValueError: a key is missing or unknown, or a number is out of range. An older release with
        ``corrected_weight_decay`` wrote no ``max_lr_snapshot``: add it, the ``lr`` that the optimizer was made with.
      TypeError: a value that is not a number.

    Warns:
      UserWarning: as :func:`optax_nadam.compat.torch.config_from`.

    Examples:
      >>> from optax_nadam.compat import timm as timm_names
      >>> group = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "caution": True,
      ...          "corrected_weight_decay": False, "max_lr_snapshot": 0.001, "foreach": None, "maximize": False,
      ...          "capturable": False, "clipping_threshold": None, "params": [0, 1]}
      >>> config = timm_names.config_from(group)
      >>> config.rule, config.weight_decay, config.cautious, config.weight_decay_peak_learning_rate
      ('simplified', 0.01, True, None)

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    if isinstance(config, Checkpoint):
        return config.config_with(learning_rate)
    what, required, known = _keys(config)
    shared.check_group(what, config, required, known)
    lr = shared.learning_rate_of(what, config, learning_rate)
    if "schedule_decay" in config:
        given = {name: as_number(config[name]) for name in _LEGACY_NUMBERS[1:]}
        return config_of(_LEGACY_NAMES, {"learning_rate": lr, **_legacy_fields(**given)})
    if config.get("corrected_weight_decay") and config.get("max_lr_snapshot") is None:
        raise ValueError(f"{what} with corrected_weight_decay lacks max_lr_snapshot: add the lr it was made with.")
    given = {name: as_number(config.get(name, _CHOICES.get(name))) for name in (*_NUMBERS[1:], *_CHOICES)}
    return config_of(_NAMES, {"learning_rate": lr, **_nadamw_fields(**given)})


def _parse(group: Mapping[str, Any], learning_rate: Any) -> NadamConfig:
    return config_from(group, learning_rate=learning_rate)


def config_to(config: NadamConfig) -> dict[str, Any]:
    """The parameter group of ``NAdamW`` for the rule ``simplified``, and of ``NAdamLegacy`` for ``scheduled``.

    ``NAdamW([{"params": params, **config_to(config)}])`` is the optimizer; ``NAdamLegacy`` likewise. ``config_from``
    of the result is the config again, but for fields without effect: ``complex_as_real`` on real leaves,
    ``coupled_weight_decay`` without weight decay, and ``momentum_decay`` under ``simplified``.

    Args:
      config: the hyperparameters.

    Returns:
      The group's keys but ``params``.

    Raises:
      ValueError: a field is set that the optimizer cannot express; the text names it and what to pass.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam.compat import timm as timm_names
      >>> config = optax_nadam.NadamConfig(rule="simplified", weight_decay=0.1, clip_by_gradient_rms=1.0)
      >>> group = timm_names.config_to(config)
      >>> group["lr"], group["weight_decay"], group["clipping_threshold"]
      (0.001, 0.1, 1.0)

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    rule = rule_of(config)
    if rule not in (RULES["simplified"], RULES["scheduled"]):
        raise cannot_express("timm", "rule", config.rule, _OTHER_RULE)
    return _nadamw_group(config) if rule == RULES["simplified"] else _legacy_group(config)


def read(
    source: Any,
    *,
    names: Sequence[str] | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    steps_per_epoch: int | None = None,
    lr_scheduler_type: str | None = None,
    **scheduler_arguments: Any,
) -> Checkpoint:
    """What a checkpoint holds, as :func:`optax_nadam.compat.torch.read` reads it.

    The schedulers of timm itself are not read: pass ``learning_rate`` to :func:`from_groups`.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import NadamConfig, compat
      >>> group = compat.timm.config_to(NadamConfig(rule="simplified", learning_rate=0.01))
      >>> moments = {"exp_avg": np.ones((2, 3)), "exp_avg_sq": np.ones((2, 3))}
      >>> source = {"state": {0: {"step": 3.0, **moments}}, "param_groups": [{**group, "params": [0]}]}
      >>> compat.timm.read(source).count
      3
    """
    request = reader.Request(scheduler, steps_per_epoch, lr_scheduler_type, scheduler_arguments)
    return reader.read(source, _layout_of, names, weights, request)


def _layout_of(groups: Sequence[Mapping[str, Any]]) -> reader.Layout:
    """What the optimizer of these groups stores."""
    for group in groups:
        if set(group) - {"params", "param_names"}:
            what, required, known = _keys(group)
            shared.check_class(what, group, required, known)
    return _LEGACY_LAYOUT if any("schedule_decay" in group for group in groups) else _NADAMW_LAYOUT


_NADAMW_LAYOUT = reader.Layout(_NADAMW, product=None, parse=_parse, version="timm, or AlgoPerf for torch")
_LEGACY_LAYOUT = reader.Layout(_LEGACY, product="m_schedule", parse=_parse, version="timm", python_numbers=True)


def from_groups(
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Checkpoint,
    to_params: Callable[[Any], Any],
    *,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | ScheduleConfig | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a whole checkpoint, as :func:`optax_nadam.compat.torch.from_groups` makes it of torch's.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import NadamConfig, compat
      >>> group = compat.timm.config_to(NadamConfig(rule="simplified", learning_rate=0.01, weight_decay=0.1))
      >>> groups = [{**group, "params": [0]}, {**group, "params": [1], "weight_decay": 0.0}]
      >>> weights = [jnp.ones((2, 3)), jnp.ones(2)]
      >>> tx = compat.timm.from_groups(groups, lambda arrays: {"w": arrays[0].T, "b": arrays[1]}, weights=weights)
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> updates, state = tx.update({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, tx.init(params), params)
      >>> float(updates["w"][0, 0]) < 0, float(updates["b"][0])
      (True, -0.0)
    """
    found = reader.read(reader.whole(param_groups), _layout_of, names, weights)
    return shared.optimizer_of(found, to_params, learning_rate)


def load_state(
    opt_state: Any,
    source: Mapping[str, Any] | Checkpoint,
    to_params: Callable[[Any], Any],
    *,
    config: NadamConfig | None = None,
    names: Sequence[str] | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
    mismatch: str = "raise",
) -> Any:
    """The optimizer state that continues where timm's ``NAdamW`` or ``NAdamLegacy`` stopped.

    Arguments and errors are those of :func:`optax_nadam.compat.torch.load_state`. The keys of the groups tell which of
    the two wrote the checkpoint. NAdamW neither stores nor needs a product of the momenta: it is computed from
    ``config``, or else from the groups' hyperparameters, of which :func:`config_from` may warn.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import optax
      >>> from optax_nadam.compat import timm as timm_names
      >>> moments = {"exp_avg": np.full((2, 3), 0.1), "exp_avg_sq": np.full((2, 3), 0.2)}
      >>> group = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False,
      ...          "capturable": False, "params": [0]}
      >>> source = {"state": {0: {"step": 7.0, **moments}}, "param_groups": [group]}
      >>> tx = timm_names.nadamw()
      >>> state = timm_names.load_state(
      ...     tx.init({"kernel": jnp.zeros((3, 2))}), source, lambda arrays: {"kernel": arrays[0].T})
      >>> int(optax.tree.get(state, "count")), optax.tree.get(state, "m")["kernel"].shape
      (7, (3, 2))
    """
    check_real(opt_state, _NADAMW)
    found = reader.read(source, _layout_of, names, weights)
    return load(opt_state, Matched(found, to_params), config, mismatch)


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    *,
    config: NadamConfig | None = None,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    params: Any = None,
    as_tensor: Callable[[np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """The checkpoint from which timm's ``NAdamW`` or ``NAdamLegacy`` continues, the inverse of :func:`load_state`.

    Arguments and errors are those of :func:`optax_nadam.compat.torch.dump_state`. The checkpoint is NAdamLegacy's where
    a group has ``schedule_decay``, or the config the rule ``scheduled``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam.compat import timm as timm_names
      >>> state = timm_names.nadamlegacy().init({"kernel": jnp.zeros((3, 2))})
      >>> config = timm_names.config_from({"lr": 0.002, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0,
      ...                                  "schedule_decay": 0.004})
      >>> dumped = timm_names.dump_state(state, lambda params: [params["kernel"].T], config=config)
      >>> dumped["state"][0]["m_schedule"], dumped["state"][0]["exp_avg"].shape
      (1.0, (2, 3))
    """
    groups = groups_to_dump(None if config is None else config_to(config), param_groups)
    return dump(opt_state, from_params, groups, _layout_of(groups), params, as_tensor)


def _keys(group: Mapping[str, Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The optimizer of a group, the keys that it must have, and those that it may have."""
    if "schedule_decay" in group:
        return f"{_LEGACY} group", _LEGACY_NUMBERS, _LEGACY_NUMBERS
    others = {*_CHOICES, *_EXECUTION} - {"foreach"}
    # Without any of these it may be of an old release, or AlgoPerf's; other optimizers of timm have some.
    required = (*_NUMBERS, "maximize", "capturable") if others & set(group) else _NUMBERS
    return f"{_NADAMW} group", required, (*_NUMBERS, *_CHOICES, *_EXECUTION)


def _nadamw_fields(
    betas: Any,
    eps: Any,
    weight_decay: Any,
    caution: Any,
    corrected_weight_decay: Any,
    maximize: Any,
    max_lr_snapshot: Any,
    clipping_threshold: Any,
) -> dict[str, Any]:
    """The fields of the config that these arguments of ``NAdamW`` choose."""
    validation.check_bool("corrected_weight_decay", corrected_weight_decay)
    return {
        **shared.pair(betas),
        "eps": eps,
        "rule": "simplified",
        "weight_decay": weight_decay,
        "weight_decay_peak_learning_rate": max_lr_snapshot if corrected_weight_decay else None,
        "clip_by_gradient_rms": clipping_threshold,
        "cautious": caution,
        "maximize": maximize,
        "complex_as_real": True,
    }


def _legacy_fields(betas: Any, eps: Any, weight_decay: Any, schedule_decay: Any) -> dict[str, Any]:
    """The fields of the config that these arguments of ``NAdamLegacy`` choose."""
    return {
        **shared.pair(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": schedule_decay,
        "coupled_weight_decay": True,
    }


def _nadamw_group(config: NadamConfig) -> dict[str, Any]:
    """The group of ``NAdamW``."""
    shared.check_fields(config, _NADAMW, _NADAMW_FIELDS)
    if config.weight_decay and config.coupled_weight_decay:
        raise cannot_express(_NADAMW, "coupled_weight_decay", True, _DECOUPLED)
    peak = config.weight_decay_peak_learning_rate
    return {
        **shared.shared_arguments(config),
        "caution": config.cautious,
        "corrected_weight_decay": peak is not None,
        "max_lr_snapshot": config.learning_rate if peak is None else peak,
        "maximize": config.maximize,
        **_EXECUTION,
        "clipping_threshold": config.clip_by_gradient_rms,
    }


def _legacy_group(config: NadamConfig) -> dict[str, Any]:
    """The group of ``NAdamLegacy``."""
    shared.check_fields(config, _LEGACY, _LEGACY_FIELDS)
    if config.weight_decay and not config.coupled_weight_decay:
        raise cannot_express(_LEGACY, "coupled_weight_decay", False, _COUPLED)
    return {**shared.shared_arguments(config), "schedule_decay": config.momentum_decay}
