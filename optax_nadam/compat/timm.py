"""timm's ``NAdamW`` and ``NAdamLegacy``: constructors, parameter groups and checkpoints, under their own names.

timm's ``nadam`` is ``torch.optim.NAdam``: see :mod:`optax_nadam.compat.torch`. Neither timm nor torch is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES, is_number
from optax_nadam.compat import _torch_state as torch_state
from optax_nadam.compat._common import rebuilt_product, rule_of, unsupported

_NADAMW = torch_state.Layout("timm.optim.NAdamW", product=None)
_LEGACY = torch_state.Layout("timm.optim.NAdamLegacy", product="m_schedule", plain=True)
_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_CHOICES = ("caution", "corrected_weight_decay", "maximize", "max_lr_snapshot", "clipping_threshold")
_EXECUTION = {"foreach": None, "capturable": False}
_LEGACY_FIELDS = (
    "learning_rate",
    "b1",
    "b2",
    "eps",
    "momentum_decay",
    "rule",
    "weight_decay",
    "coupled_weight_decay",
    "complex_as_real",
)
_NADAMW_FIELDS = (*_LEGACY_FIELDS, "max_learning_rate", "clip_update_rms", "caution", "maximize")


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
      weight_decay: taken off the parameters, times ``lr``; not negative; 0 for none.
      caution: drop elements of the update that point away from the gradient.
      corrected_weight_decay: weight decay is multiplied by ``lr**2 / max_lr_snapshot`` in place of ``lr``.
      maximize: ascend.
      foreach: how timm runs, not what it computes: without effect here, as the one that follows.
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
      TypeError: no number where one is due.

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
    if is_number(lr):
        validation.check_not_negative("lr", lr)
    if corrected_weight_decay and max_lr_snapshot is None:
        if not is_number(lr):
            raise ValueError(f"max_lr_snapshot must be the largest lr where lr is no number, got lr={lr!r}.")
        max_lr_snapshot = lr
    group = {
        "lr": 0.0,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "caution": caution,
        "corrected_weight_decay": corrected_weight_decay,
        "max_lr_snapshot": max_lr_snapshot,
        "maximize": maximize,
        "foreach": foreach,
        "capturable": capturable,
        "clipping_threshold": clipping_threshold,
    }
    return config_from(group).build(lr)


def nadamlegacy(
    lr: optax.ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    schedule_decay: float = 4e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""``timm.optim.NAdamLegacy``, with its arguments, order and defaults.

    Its step is the ``scheduled`` rule of :func:`optax_nadam.scale_by_nadam`. Complex leaves, which timm squares as
    they are, are not offered as there.

    Args:
      lr: learning rate, a number, an array or an Optax schedule; a number is not negative.
      betas: decays of the two moments, each in [0, 1).
      eps: added to the root, not negative.
      weight_decay: added to the gradient, times the parameters; not negative; 0 for none.
      schedule_decay: how fast the momentum rises, per step, not negative.

    Returns:
      A gradient transformation, that of ``config_from(param_group).build(lr)``. Its ``update`` needs ``params`` where
      there is weight decay.

    Raises:
      ValueError: a number out of range.
      TypeError: no number where one is due.

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
    if is_number(lr):
        validation.check_not_negative("lr", lr)
    group = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay, "schedule_decay": schedule_decay}
    return config_from(group).build(lr)


def config_from(group: Mapping[str, Any]) -> NadamConfig:
    """The hyperparameters of a parameter group of ``NAdamW``, or of ``NAdamLegacy`` where it has ``schedule_decay``.

    The learning rate is the group's as it is now; what a scheduler noted in the group, such as ``initial_lr`` and
    ``lr_scale``, is not read. Groups of older releases, which lack some keys of NAdamW, are read as timm reads them.

    Args:
      group: an entry of ``optimizer.param_groups`` or of ``optimizer.state_dict()["param_groups"]``.

    Returns:
      The config. It builds what :func:`nadamw` or :func:`nadamlegacy` builds.

    Raises:
      ValueError: a key is missing or unknown, or a number is out of range. An older release with
        ``corrected_weight_decay`` wrote no ``max_lr_snapshot``: add it, the ``lr`` that the optimizer was made with.
      TypeError: no number where one is due.

    Examples:
      >>> from optax_nadam.compat import timm as timm_names
      >>> group = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "caution": True,
      ...          "corrected_weight_decay": False, "max_lr_snapshot": 0.001, "foreach": None, "maximize": False,
      ...          "capturable": False, "clipping_threshold": None, "params": [0, 1]}
      >>> config = timm_names.config_from(group)
      >>> config.rule, config.weight_decay, config.caution, config.max_learning_rate
      ('simplified', 0.01, True, None)

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    return _legacy_config(group) if "schedule_decay" in group else _nadamw_config(group)


def _legacy_config(group: Mapping[str, Any]) -> NadamConfig:
    known = (*_NUMBERS, "schedule_decay")
    torch_state.check_group(f"{_LEGACY.optimizer} group", group, known, known)
    values = torch_state.not_negative(group, "lr", "eps", "weight_decay", "schedule_decay")
    b1, b2 = torch_state.pair("betas", group["betas"])
    return NadamConfig(
        learning_rate=values["lr"],
        b1=b1,
        b2=b2,
        eps=values["eps"],
        momentum_decay=values["schedule_decay"],
        weight_decay=values["weight_decay"],
        coupled_weight_decay=True,
    )


def _nadamw_config(group: Mapping[str, Any]) -> NadamConfig:
    what = f"{_NADAMW.optimizer} group"
    # Other optimizers of timm have groups with the numbers alone.
    required = (*_NUMBERS, "maximize", "capturable")
    torch_state.check_group(what, group, required, (*_NUMBERS, *_CHOICES, *_EXECUTION))
    values = torch_state.not_negative(group, "lr", "eps", "weight_decay")
    b1, b2 = torch_state.pair("betas", group["betas"])
    corrected = group.get("corrected_weight_decay", False)
    if corrected:
        torch_state.check_group(f"{what} with corrected_weight_decay", group, ("max_lr_snapshot",), group)
    return NadamConfig(
        learning_rate=values["lr"],
        b1=b1,
        b2=b2,
        eps=values["eps"],
        rule="simplified",
        weight_decay=values["weight_decay"],
        max_learning_rate=torch_state.positive("max_lr_snapshot", group["max_lr_snapshot"]) if corrected else None,
        clip_update_rms=torch_state.positive("clipping_threshold", group.get("clipping_threshold")),
        caution=group.get("caution", False),
        maximize=group.get("maximize", False),
        complex_as_real=True,
    )


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
      ValueError: a field is set that the optimizer cannot follow, or the rule is another; named in the text.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam.compat import timm as timm_names
      >>> config = optax_nadam.NadamConfig(rule="simplified", learning_rate=0.01, weight_decay=0.1, clip_update_rms=1.0)
      >>> group = timm_names.config_to(config)
      >>> group["lr"], group["weight_decay"], group["clipping_threshold"]
      (0.01, 0.1, 1.0)

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    if rule_of(config) == RULES["simplified"]:
        return _nadamw_group(config)
    if rule_of(config) == RULES["scheduled"]:
        return _legacy_group(config)
    advice = f"{_NADAMW.optimizer} follows 'simplified', {_LEGACY.optimizer} 'scheduled'."
    raise unsupported("NadamConfig", "rule", config.rule, advice)


def _nadamw_group(config: NadamConfig) -> dict[str, Any]:
    torch_state.check_fields(config, _NADAMW.optimizer, _NADAMW_FIELDS)
    _check_decay(config, _NADAMW, coupled=False)
    corrected = config.max_learning_rate is not None
    return {
        "lr": config.learning_rate,
        "betas": (config.b1, config.b2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "caution": config.caution,
        "corrected_weight_decay": corrected,
        "max_lr_snapshot": config.max_learning_rate if corrected else config.learning_rate,
        "maximize": config.maximize,
        **_EXECUTION,
        "clipping_threshold": config.clip_update_rms,
    }


def _legacy_group(config: NadamConfig) -> dict[str, Any]:
    torch_state.check_fields(config, _LEGACY.optimizer, _LEGACY_FIELDS)
    _check_decay(config, _LEGACY, coupled=True)
    return {
        "lr": config.learning_rate,
        "betas": (config.b1, config.b2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "schedule_decay": config.momentum_decay,
    }


def _check_decay(config: NadamConfig, layout: torch_state.Layout, coupled: bool) -> None:
    """Rejects weight decay of the other kind."""
    if config.weight_decay and config.coupled_weight_decay != coupled:
        way = "to the gradient only" if coupled else "apart from the gradient only"
        advice = f"{layout.optimizer} applies weight decay {way}."
        raise unsupported("NadamConfig", "coupled_weight_decay", config.coupled_weight_decay, advice)


def load_state(
    opt_state: Any,
    source: Mapping[str, Any],
    to_params: Callable[[Any], Any],
    *,
    names: Sequence[str] | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
    mismatch: str = "raise",
) -> Any:
    """Goes on where timm's ``NAdamW`` or ``NAdamLegacy`` stopped: the next step is the one it would have taken next.

    Hyperparameters are not read: build the optimizer with :func:`config_from` or a constructor first. Which of the two
    wrote the checkpoint is seen by its groups' keys. Where groups have Nadams of their own (``optax.partition``),
    load each part of the state by itself, from a source with its group alone in ``param_groups``.

    Args:
      opt_state: the state that ``tx.init(params)`` made; it is not changed. The Nadam may be anywhere inside.
      source: what ``optimizer.state_dict()`` returned, with tensors or NumPy arrays inside.
      to_params: the function that turns the model's weights, NumPy arrays by name as in its ``state_dict()``, into
        the params tree, transposes and all. The moments have the shapes of the weights and go the same way. Where
        parameters have no names, it gets a list in the optimizer's order.
      names: names of the parameters in the optimizer's order, group after group. None takes those of the groups.
      weights: the model's weights as ``to_params`` takes them, whose shapes are read for what has no moments yet.
      mismatch: ``"raise"``, or ``"largest"`` to go on from the largest step, where parameters have taken different
        numbers of steps.

    Returns:
      A new state. Arrays are copied. The product of the momenta, which NAdamW neither keeps nor needs, is
      that of its step.

    Raises:
      ValueError: ``source`` is not such a checkpoint; parameters differ in their steps or never stepped, which the
        text names; names or moments do not fit.
      TypeError: a moment is no array of numbers.

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

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    groups = torch_state.groups_of(source, _NADAMW)
    layout = _layout_of(groups)
    return torch_state.load_state(
        opt_state,
        source,
        to_params,
        layout=layout,
        names=names,
        weights=weights,
        mismatch=mismatch,
        product_after=None if layout.product else lambda count: rebuilt_product(count, config_from(groups[0])),
    )


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    param_groups: NadamConfig | Sequence[Mapping[str, Any]],
    *,
    as_tensor: Callable[[np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """The checkpoint from which timm's ``NAdamW`` or ``NAdamLegacy`` goes on, the inverse of :func:`load_state`.

    Args:
      opt_state: a state that holds one Nadam, which treats complex leaves as two real ones.
      from_params: the inverse of ``to_params``: turns the params tree into NumPy arrays by name, or into a list of
        them, **in the order of the optimizer's parameters**. torch goes by order alone.
      param_groups: a config, for one group of all parameters; or the groups that are wanted, best those of the
        optimizer that is to go on, ``optimizer.state_dict()["param_groups"]``. Where these have ``param_names``,
        arrays by name are put in their order. A group with ``schedule_decay``, or a config with the rule
        ``scheduled``, is NAdamLegacy's.
      as_tensor: what makes a tensor of an array, ``torch.from_numpy``. torch's ``load_state_dict`` needs tensors;
        None leaves NumPy arrays.

    Returns:
      A dict for ``optimizer.load_state_dict``, with ``param_names`` where a config made the group and ``from_params``
      gave names.

    Raises:
      ValueError: the parameters do not fit the groups; or as :func:`config_to`.
      TypeError: ``from_params`` returned neither a dict nor a list.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam.compat import timm as timm_names
      >>> state = timm_names.nadamlegacy().init({"kernel": jnp.zeros((3, 2))})
      >>> config = timm_names.config_from({"lr": 0.002, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0,
      ...                                  "schedule_decay": 0.004})
      >>> dumped = timm_names.dump_state(state, lambda params: [params["kernel"].T], config)
      >>> dumped["state"][0]["m_schedule"], dumped["state"][0]["exp_avg"].shape
      (1.0, (2, 3))

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    groups = [config_to(param_groups)] if isinstance(param_groups, NadamConfig) else param_groups
    return torch_state.dump_state(opt_state, from_params, groups, layout=_layout_of(groups), as_tensor=as_tensor)


def _layout_of(groups: Sequence[Mapping[str, Any]]) -> torch_state.Layout:
    """What the optimizer of these groups keeps."""
    return _LEGACY if any("schedule_decay" in group for group in groups) else _NADAMW
