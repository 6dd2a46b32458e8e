"""timm's ``NAdamW`` and ``NAdamLegacy``: constructors, parameter groups and checkpoints, under their own names.

timm's ``nadam`` is ``torch.optim.NAdam``: see :mod:`optax_nadam.compat.torch`. Neither timm nor torch is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam.compat import _timm_config as configs
from optax_nadam.compat import _torch_groups as groups
from optax_nadam.compat import _torch_sources as sources
from optax_nadam.compat import _torch_state as states
from optax_nadam.compat._common import build
from optax_nadam.compat._torch_config import parse_lr

__all__ = ["config_from", "config_to", "dump_state", "from_groups", "load_state", "nadamlegacy", "nadamw"]

_NADAMW = sources.Layout(configs.NADAMW, product=None)
_LEGACY = sources.Layout(configs.LEGACY, product="m_schedule", python_numbers=True)


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
    fields = configs.fields(
        betas, eps, weight_decay, caution, corrected_weight_decay, maximize, clipping_threshold, max_lr_snapshot
    )
    return build(parse_lr(lr), configs.NAMES, fields)


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
    fields = configs.legacy_fields(betas, eps, weight_decay, schedule_decay)
    return build(parse_lr(lr), configs.LEGACY_NAMES, fields)


def config_from(config: Mapping[str, Any]) -> NadamConfig:
    """The hyperparameters of a parameter group of ``NAdamW``, or of ``NAdamLegacy`` where it has ``schedule_decay``.

    The learning rate is the group's as it is now; what a scheduler noted in the group, such as ``initial_lr`` and
    ``lr_scale``, is not read. Groups of older releases, which lack some keys of NAdamW, are read as timm reads them.

    Args:
      config: an entry of ``optimizer.param_groups`` or of ``optimizer.state_dict()["param_groups"]``.

    Returns:
      The config. It builds what :func:`nadamw` or :func:`nadamlegacy` builds.

    Raises:
      ValueError: a key is missing or unknown, or a number is out of range. An older release with
        ``corrected_weight_decay`` wrote no ``max_lr_snapshot``: add it, the ``lr`` that the optimizer was made with.
      TypeError: a value that is not a number.

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
    return configs.config_from(config)


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
      ValueError: the config has something that the optimizer cannot express; named in the text.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam.compat import timm as timm_names
      >>> config = optax_nadam.NadamConfig(rule="simplified", weight_decay=0.1, clip_by_gradient_rms=1.0)
      >>> group = timm_names.config_to(config)
      >>> group["lr"], group["weight_decay"], group["clipping_threshold"]
      (0.001, 0.1, 1.0)

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    return configs.config_to(config)


def from_groups(
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    to_params: Callable[[Any], Any],
    *,
    names: Sequence[str] | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a whole checkpoint, however many parameter groups it has.

    Groups that differ in weight decay only become one Nadam, with a mask for each weight decay. Others become an
    ``optax.partition`` with a Nadam for each set of hyperparameters. Parameters that never stepped where others did
    are frozen: ``optax.set_to_zero`` leaves them alone, as timm does. :func:`load_state` of the same
    checkpoint then fills the optimizer's state in one call, each Nadam from its own leaves.

    Args:
      param_groups: best the whole checkpoint, as :func:`load_state` takes it, which tells what is frozen and has the
        shapes of the parameters; or its ``param_groups`` alone.
      to_params: as in :func:`load_state`. From ``param_groups`` alone it gets placeholders, of which it may take
        ``.T`` and other methods of arrays; where it needs arrays, pass the checkpoint or ``weights``.
      names: as in :func:`load_state`.
      weights: as in :func:`load_state`; what the optimizer does not have is frozen.

    Returns:
      A gradient transformation. With one set of hyperparameters it is that of ``config_from(group).build()``.

    Raises:
      ValueError: as :func:`config_from` and :func:`load_state`; a leaf is made of parameters of different groups.
      TypeError: as :func:`config_from`.

    Warns:
      UserWarning: as :func:`config_from`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import NadamConfig, compat
      >>> group = compat.timm.config_to(NadamConfig(rule="simplified", learning_rate=0.01, weight_decay=0.1))
      >>> groups = [{**group, "params": [0], "param_names": ["w"]},
      ...           {**group, "params": [1], "param_names": ["b"], "weight_decay": 0.0}]
      >>> tx = compat.timm.from_groups(groups, lambda weights: {"w": weights["w"].T, "b": weights["b"]})
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> updates, state = tx.update({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, tx.init(params), params)
      >>> float(updates["w"][0, 0]) < 0, float(updates["b"][0])
      (True, -0.0)
    """
    whole = param_groups if isinstance(param_groups, Mapping) else {"state": {}, "param_groups": param_groups}
    return groups.from_groups(sources.read(whole, _layout_of, names, weights), to_params, config_from)


def load_state(
    opt_state: Any,
    source: Mapping[str, Any],
    to_params: Callable[[Any], Any],
    *,
    config: NadamConfig | None = None,
    names: Sequence[str] | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
    mismatch: str = "raise",
) -> Any:
    """The optimizer state that continues where timm's ``NAdamW`` or ``NAdamLegacy`` stopped: the next step is theirs.

    Hyperparameters are not read: build the optimizer with :func:`from_groups`, :func:`config_from` or a constructor
    first. Where it has several Nadams (``optax.partition``), each gets the steps and moments of its own leaves.
    See "Every checkpoint" in the documentation for what to pass for which kind of file. Which of the two wrote the
    checkpoint is seen by its groups' keys.

    Args:
      opt_state: the state that ``tx.init(params)`` made; it is not changed. The Nadam may be anywhere inside.
      source: what ``optimizer.state_dict()`` returned, or ``get_optimizer_state_dict`` of torch.distributed, flattened
        or not, with tensors or NumPy arrays inside.
      to_params: the function that turns the model's weights, NumPy arrays by name as in its ``state_dict()``, into
        the params tree, transposes and all. The moments have the shapes of the weights and go the same way. Where
        parameters have no names, it gets a list in the optimizer's order.
      config: the hyperparameters of the optimizer that continues, from which a product of the momenta that ``source``
        does not store is computed; None for those of the checkpoint's own groups.
      names: names of the parameters in the optimizer's order, one group after another:
        ``[n for n, _ in model.named_parameters()]`` where it was made of ``model.parameters()``. None takes those of
        the checkpoint, which has them where the optimizer was made of ``model.named_parameters()``.
      weights: the model's own arrays, as ``to_params`` takes them, whose shapes are compared with those of the
        moments, and serve for what has no moments yet.
      mismatch: ``"raise"``, or ``"largest"`` to continue from the largest step, where parameters have taken different
        numbers of steps.

    Returns:
      A new state. Arrays are copied. The product of the momenta, which NAdamW neither stores nor needs, is
      that of its step.

    Raises:
      ValueError: ``source`` is not such a checkpoint, or has shards only; parameters of one Nadam differ in their steps
        or never stepped, which the text names; names, weights or moments do not fit; weights are tied.
      TypeError: a moment is not an array of numbers.

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
    return states.load_state(
        opt_state,
        sources.read(source, _layout_of, names, weights),
        to_params,
        config_from=config_from,
        config=config,
        mismatch=mismatch,
    )


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    *,
    config: NadamConfig | None = None,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    as_tensor: Callable[[np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """The checkpoint from which timm's ``NAdamW`` or ``NAdamLegacy`` continues, the inverse of :func:`load_state`.

    Args:
      opt_state: a state with a Nadam in it, or with several that have leaves of their own, as :func:`from_groups` makes
        them; they treat complex leaves as two real ones. What no Nadam has is left out, as what never stepped.
      from_params: the inverse of ``to_params``: turns the params tree into NumPy arrays by name, or into a list of
        them, **in the order of the optimizer's parameters**. torch goes by order alone.
      config: the hyperparameters, for one group of all parameters.
      param_groups: in place of ``config``, the groups that are wanted, best those of the optimizer that continues,
        ``optimizer.state_dict()["param_groups"]``. Where these have ``param_names``, arrays by name are put in their
        order; where several groups have none, ``from_params`` must return a list, one group after another. A group
        with ``schedule_decay``, or a config with the rule ``scheduled``, is NAdamLegacy's.
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
      >>> dumped = timm_names.dump_state(state, lambda params: [params["kernel"].T], config=config)
      >>> dumped["state"][0]["m_schedule"], dumped["state"][0]["exp_avg"].shape
      (1.0, (2, 3))

    Source: ``timm/optim/nadamw.py`` and ``nadam.py`` of timm 1.0.31.
    """
    wanted = states.groups_to_dump(config, param_groups, configs.config_to)
    return states.dump_state(opt_state, from_params, wanted, layout=_layout_of(wanted), as_tensor=as_tensor)


def _layout_of(groups: Sequence[Mapping[str, Any]]) -> sources.Layout:
    """What the optimizer of these groups stores."""
    return _LEGACY if any(map(configs.is_legacy, groups)) else _NADAMW
