"""``torch.optim.NAdam``: its constructor, its parameter groups and its checkpoints, under its own names.

Parameter groups and checkpoints of ``torch.optim.Adam`` and ``AdamW`` are read too, as ``rule="adam"``. torch itself is
not needed, except for reading files: checkpoints are dicts of whatever NumPy can read.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES, RuleName
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat import _torch_groups as shared
from optax_nadam.compat import _torch_read as reader
from optax_nadam.compat._checkpoint import Checkpoint
from optax_nadam.compat._common import as_number, build, cannot_express, config_of, rule_of
from optax_nadam.compat._match import Matched, load
from optax_nadam.compat._torch_dump import check_real, dump, groups_to_dump
from optax_nadam.compat._torch_schedules import schedule_from

__all__ = ["config_from", "config_to", "dump_state", "from_groups", "load_state", "nadam", "read", "schedule_from"]

_OPTIMIZER, _ADAM = "torch.optim.NAdam", "torch.optim.Adam or AdamW"
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum_decay")
_ADAM_NUMBERS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_CHOICES = ("decoupled_weight_decay", "maximize")
_EXECUTION = {"foreach": None, "capturable": False, "differentiable": False}
# So large that the momentum is b1 from the first step on.
_NO_WARMUP = 1e4
_OTHER_RULE = (
    "It follows 'scheduled' since torch 2.0, or 'constant': pass dataclasses.replace(config, rule='scheduled')."
)
_NOT_DECOUPLED = (
    "{what} has weight_decay={decay!r} and no key decoupled_weight_decay, which tells Adam from AdamW since torch 2.6."
    " Add it: True for AdamW, False for Adam."
)
_AMSGRAD = "It has no maximum of second moments: train without, or continue the run in torch."
_WRONG_STEP = "The differentiable step of torch 2.0 was wrong; pass rule='scheduled' for the right one."


def nadam(
    lr: optax.ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``torch.optim.NAdam`` as it is since torch 2.0, with its arguments, order and defaults.

    Its step is the ``scheduled`` rule of :func:`optax_nadam.scale_by_nadam`. Complex leaves are two real ones, as in
    torch; note that torch's gradient of a complex parameter is the conjugate of JAX's. A parameter without gradient
    is skipped in torch and takes part here.

    Args:
      lr: learning rate, a number, an array or an Optax schedule; a number is not negative.
      betas: decays of the two moments, each in [0, 1).
      eps: added to the root, not negative.
      weight_decay: not negative; 0 for none.
      momentum_decay: how fast the momentum rises, per step, not negative.
      decoupled_weight_decay: False adds weight decay to the gradient, True subtracts
        ``lr * weight_decay * parameter`` from the parameter.
      maximize: ascend.
      foreach: without effect here, as the two that follow: it says how torch runs, not what it computes.
      capturable: likewise.
      differentiable: likewise; this optimizer is differentiable.

    To change ``lr`` from outside, ``optax.inject_hyperparams(nadam, static_args=("eps", "weight_decay",
    "momentum_decay"))``.

    Returns:
      A gradient transformation, that of ``config_from(param_group).build(lr)``. Its ``update`` needs ``params`` where
      there is weight decay.

    Raises:
      ValueError: a number out of range.
      TypeError: a value that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_nadam.compat import torch as torch_names
      >>> tx = torch_names.nadam(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
      >>> params = jnp.array(1.0)
      >>> updates, state = tx.update(jnp.array(0.5), tx.init(params), params)
      >>> f"{float(optax.apply_updates(params, updates)):.6f}"
      '0.988436'

    Source: ``torch/optim/nadam.py`` of torch 2.13.
    """
    del foreach, capturable, differentiable
    fields = _fields(betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize)
    return build(shared.parse_lr(lr), shared.NAMES, fields)


def config_from(
    config: Mapping[str, Any] | Checkpoint,
    *,
    rule: RuleName | None = None,
    learning_rate: float | ScheduleConfig | None = None,
) -> NadamConfig:
    """The hyperparameters of a parameter group of ``torch.optim.NAdam``, or of ``Adam`` or ``AdamW``.

    Groups of torch 1.10 to 1.13, which lack the key ``differentiable``, get the rule ``torch1``, as those versions
    divided by another product of momenta; but not with ``foreach=True``, which was right even then. Groups of Adam and
    AdamW, which have the key ``amsgrad``, get the rule ``adam``.

    Args:
      config: an entry of ``optimizer.param_groups`` or of ``optimizer.state_dict()["param_groups"]``; or what
        :func:`read` returned, all of whose groups must have the same hyperparameters.
      rule: ``"scheduled"`` for the step of torch 2, ``"torch1"`` for that of torch 1, or None to go by the keys.
      learning_rate: a number, or a schedule of the steps taken; None for that of the checkpoint, whose schedule
        :func:`read` knows, or else for the group's current one.

    Returns:
      The config, with ``complex_as_real`` set, which builds what :func:`nadam` builds.

    Raises:
      ValueError: a key is missing or unknown, a number is out of range, groups differ, the group's ``lr`` is 0 as a
        scheduler has set it, or the group is of a differentiable optimizer of torch 2.0, whose step was neither rule.
      TypeError: a value that is not a number.

    Warns:
      UserWarning: a scheduler sets the learning rate, and there is no schedule; a key that torch does not read is
        ignored; ``OneCycleLR`` has cycled ``betas[0]``.

    Examples:
      >>> from optax_nadam.compat import torch as torch_names
      >>> group = {"lr": 0.002, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "momentum_decay": 0.004,
      ...          "decoupled_weight_decay": True, "maximize": False, "foreach": None, "capturable": False,
      ...          "differentiable": False, "params": [0, 1]}
      >>> config = torch_names.config_from(group)
      >>> config.rule, config.weight_decay, config.coupled_weight_decay
      ('scheduled', 0.1, False)

    Source: ``torch/optim/nadam.py`` of torch 1.13, 2.0, 2.1 and 2.13; ``adam.py`` and ``adamw.py`` of 2.13.
    """
    if isinstance(config, Checkpoint):
        chosen = config.config_with(learning_rate)
        return chosen if rule is None else dataclasses.replace(chosen, rule=rule)
    if _is_adam(config):
        return _adam_config(config, rule, learning_rate)
    shared.check_group(f"{_OPTIMIZER} group", config, _NUMBERS, (*_NUMBERS, *_CHOICES, *_EXECUTION))
    if rule is not None:
        validation.check_choice("rule", rule, ("scheduled", "torch1"))
    given = {name: as_number(config.get(name, False)) for name in (*_NUMBERS[1:], *_CHOICES)}
    lr = shared.learning_rate_of(f"{_OPTIMIZER} group", config, learning_rate)
    return config_of(shared.NAMES, {"learning_rate": lr, "rule": rule or _rule_by_keys(config), **_fields(**given)})


def _parse(group: Mapping[str, Any], learning_rate: Any) -> NadamConfig:
    return config_from(group, learning_rate=learning_rate)


def _is_adam(group: Mapping[str, Any]) -> bool:
    return "amsgrad" in group and "momentum_decay" not in group


def _adam_config(group: Mapping[str, Any], rule: str | None, learning_rate: Any) -> NadamConfig:
    """The config of a group of ``Adam`` or ``AdamW``."""
    what = f"{_ADAM} group"
    shared.check_group(what, group, _ADAM_NUMBERS, (*_ADAM_NUMBERS, *_CHOICES, *_EXECUTION, "fused"))
    if rule is not None:
        validation.check_choice("rule", rule, ("adam",))
    if group["amsgrad"]:
        raise cannot_express("optax_nadam", "amsgrad", group["amsgrad"], _AMSGRAD)
    decay, is_decoupled = as_number(group["weight_decay"]), group.get("decoupled_weight_decay")
    if decay and is_decoupled is None:
        raise ValueError(_NOT_DECOUPLED.format(what=what, decay=decay))
    maximize, lr = as_number(group.get("maximize", False)), shared.learning_rate_of(what, group, learning_rate)
    fields = _fields(group["betas"], as_number(group["eps"]), decay, 0.004, bool(is_decoupled), maximize)
    return config_of(shared.NAMES, {"learning_rate": lr, "rule": "adam", **fields})


def config_to(config: NadamConfig) -> dict[str, Any]:
    """The arguments of ``torch.optim.NAdam``, which are the keys of a parameter group too.

    ``torch.optim.NAdam(params, **config_to(config))`` is the optimizer; where an older torch 2 lacks an argument, take
    it out. ``config_from`` of the result is the config again, but that ``complex_as_real`` is set: torch has no other
    way with complex parameters.

    Args:
      config: the hyperparameters.

    Returns:
      All arguments but ``params``.

    Raises:
      ValueError: a field is set that torch cannot express; the text names it and what to pass.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam.compat import torch as torch_names
      >>> group = torch_names.config_to(optax_nadam.NadamConfig(learning_rate=0.01, eps=1e-8, weight_decay=0.1))
      >>> group["lr"], group["betas"], group["decoupled_weight_decay"]
      (0.01, (0.9, 0.999), True)

    Source: ``torch/optim/nadam.py`` of torch 2.13.
    """
    shared.check_fields(config, _OPTIMIZER, (*shared.FIELDS, "maximize", "complex_as_real"))
    rule = rule_of(config)
    if rule not in (RULES["scheduled"], RULES["constant"]):
        raise cannot_express(_OPTIMIZER, "rule", config.rule, _OTHER_RULE)
    return {
        **shared.shared_arguments(config),
        "momentum_decay": config.momentum_decay if rule.momentum_schedule else _NO_WARMUP,
        "decoupled_weight_decay": not config.coupled_weight_decay,
        "maximize": config.maximize,
        **_EXECUTION,
    }


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
    """What a checkpoint holds: print it before anything is loaded, and pass it wherever a source is taken.

    Args:
      source: as in :func:`load_state`; also the path of a file, of a checkpoint of the Trainer of transformers or of
        what ``save_state`` of accelerate wrote, all read by torch, and a whole checkpoint of Lightning.
      names: as in :func:`load_state`.
      weights: as in :func:`load_state`.
      scheduler: what ``state_dict()`` of the learning rate scheduler returned; None for that in ``source``, if any.
      steps_per_epoch: steps of the optimizer for each step of the scheduler, where it steps once an epoch.
      lr_scheduler_type: the name of a schedule of transformers, whose state holds no formula, as ``linear`` or
        ``cosine``; see :func:`schedule_from`.
      scheduler_arguments: its arguments, ``num_warmup_steps`` and so on. ``num_training_steps`` is read from a
        checkpoint of the Trainer.

    Returns:
      A :class:`optax_nadam.compat.Checkpoint`: steps, moments, groups, schedule. Its ``select`` leaves parameters out.

    Raises:
      ValueError: something in the source does not balance; the text names the entries and what to do.
      ImportError: a file is to be read, and torch is not installed.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import NadamConfig, compat
      >>> entry = {"step": 3.0, "mu_product": 0.09, "exp_avg": np.ones((2, 3)), "exp_avg_sq": np.ones((2, 3))}
      >>> group = {**compat.torch.config_to(NadamConfig(learning_rate=0.01)), "params": [0], "param_names": ["w"]}
      >>> found = compat.torch.read({"state": {0: entry}, "param_groups": [group]})
      >>> print(found)
      optimizer     torch.optim.NAdam (torch 1.10 or later)
      steps         3
      parameters    1, with 6 numbers
      names         w
      group 0       1 parameter, 6 numbers; lr=0.01, weight_decay=0.0, betas=(0.9, 0.999)
      learning rate no schedule stored
      product       0.09, stored
      weights       not read: take the model's
      not stored    gradient clipping
      >>> found.config.learning_rate
      0.01
    """
    request = reader.Request(scheduler, steps_per_epoch, lr_scheduler_type, scheduler_arguments)
    return reader.read(source, _layout_of, names, weights, request)


def _layout_of(groups: Sequence[Mapping[str, Any]]) -> reader.Layout:
    """What the optimizer of these groups stores."""
    if any(group.get("amsgrad") for group in groups):
        raise cannot_express("optax_nadam", "amsgrad", True, _AMSGRAD)
    return _ADAM_LAYOUT if any(map(_is_adam, groups)) else _NADAM_LAYOUT


_NADAM_LAYOUT = reader.Layout(_OPTIMIZER, product="mu_product", parse=_parse, version="torch 1.10 or later")
_ADAM_LAYOUT = reader.Layout(_ADAM, product=None, parse=_parse, version="torch 1.12 or later", ignored=("mu_product",))


def from_groups(
    param_groups: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Checkpoint,
    to_params: Callable[[Any], Any],
    *,
    names: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | ScheduleConfig | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a whole checkpoint, however many parameter groups it has.

    Groups that differ in weight decay only become one Nadam, with a mask for each weight decay. Others, and parameters
    that took different numbers of steps, become an ``optax.partition`` with a Nadam for each. Parameters that never
    stepped where others did are frozen: ``optax.set_to_zero`` leaves them alone, as torch does. :func:`load_state` of
    the same checkpoint then fills the optimizer's state in one call, each Nadam from its own leaves.

    Args:
      param_groups: preferably the whole checkpoint, as :func:`load_state` takes it, which tells what is frozen and has
        the shapes of the parameters; or its ``param_groups`` alone, which need ``weights`` where they differ.
      to_params: as in :func:`load_state`.
      names: as in :func:`load_state`.
      learning_rate: a number, or a schedule of the run's steps, of the first group; another group's is in the
        proportion of its ``initial_lr`` (or ``lr``). None for that of the checkpoint, whose schedule :func:`read`
        knows, or else for the current one.
      weights: as in :func:`load_state`; needed for parameters that never stepped. What is in ``weights``, but not in
        the optimizer, is frozen.

    Returns:
      A gradient transformation. With one set of hyperparameters it is that of ``config_from(group).build()``.

    Raises:
      ValueError: as :func:`config_from` and :func:`load_state`; a leaf is made of parameters of different groups; the
        shapes of parameters are needed and not known.
      TypeError: as :func:`config_from`.

    Warns:
      UserWarning: as :func:`config_from`; a schedule given as ``learning_rate`` that does not give the stored rate.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import NadamConfig, compat
      >>> group = compat.torch.config_to(NadamConfig(learning_rate=0.01, weight_decay=0.1))
      >>> groups = [{**group, "params": [0], "param_names": ["w"]},
      ...           {**group, "params": [1], "param_names": ["b"], "weight_decay": 0.0}]
      >>> def to_params(weights):
      ...     return {"w": weights["w"].T, "b": weights["b"]}
      >>> weights = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
      >>> tx, params = compat.torch.from_groups(groups, to_params, weights=weights), to_params(weights)
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
    """The optimizer state that continues where a ``torch.optim.NAdam`` stopped: the next step is torch's next.

    So it continues from ``Adam`` and ``AdamW`` with the rule ``adam``. Hyperparameters are not read: build the
    optimizer with :func:`from_groups`, :func:`config_from` or a constructor first. Where it has several Nadams
    (``optax.partition``), each gets the steps and moments of its own leaves. "Carrying a run over" in the
    documentation tells what to pass for which kind of file.

    Args:
      opt_state: the state that ``tx.init(params)`` made; it is not changed. The Nadam may be anywhere inside.
      source: what ``optimizer.state_dict()`` returned, or ``get_optimizer_state_dict`` of torch.distributed, flattened
        or not, of torch 1.10 or later, with tensors or NumPy arrays inside; a path, or what :func:`read` returned.
      to_params: the function that turns the model's weights, NumPy arrays by name as in its ``state_dict()``, into
        the params tree, transposes and all. The moments have the shapes of the weights and go the same way. Where
        parameters have no names, it gets a list in the optimizer's order.
      config: the hyperparameters of the optimizer that continues, from which a product of the momenta that ``source``
        does not store is computed; None for those of the checkpoint's own groups.
      names: names of the parameters in the optimizer's order, one group after another:
        ``[n for n, _ in model.named_parameters()]`` where it was made of ``model.parameters()``. In a group the
        parameters of a module come before those of the modules inside it. None takes the names of the checkpoint, which
        has them where the optimizer was made of ``model.named_parameters()``.
      weights: the model's own arrays, as ``to_params`` takes them, whose shapes are compared with those of the
        moments, and serve for what has no moments yet.
      mismatch: ``"raise"``, or ``"largest"`` to continue from the largest step and its product of momenta, where
        parameters have taken different numbers of steps.

    Returns:
      A new state. Arrays are copied.

    Raises:
      ValueError: ``source`` is not such a checkpoint, or has shards only; parameters of one Nadam differ in their steps
        or never stepped, which the text names; names, weights or moments do not fit; weights are tied.
      TypeError: a moment is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_nadam.compat import torch as torch_names
      >>> def to_params(weights):
      ...     return {"kernel": weights["linear.weight"].T}
      >>> moments = {"exp_avg": np.full((2, 3), 0.1), "exp_avg_sq": np.full((2, 3), 0.2)}
      >>> source = {"state": {0: {"step": 7.0, "mu_product": 0.005, **moments}},
      ...           "param_groups": [{"params": [0], "param_names": ["linear.weight"]}]}
      >>> tx = torch_names.nadam()
      >>> state = torch_names.load_state(tx.init({"kernel": jnp.zeros((3, 2))}), source, to_params)
      >>> import optax
      >>> int(optax.tree.get(state, "mu_product") * 1000), optax.tree.get(state, "m")["kernel"].shape
      (5, (3, 2))

    Source: ``torch/optim/optimizer.py`` and ``nadam.py`` of torch 2.13.
    """
    check_real(opt_state, _OPTIMIZER)
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
    """The checkpoint from which ``torch.optim.NAdam`` continues, the inverse of :func:`load_state`.

    Args:
      opt_state: a state with a Nadam in it, or with several that have leaves of their own, as :func:`from_groups` makes
        them; they treat complex leaves as two real ones. What no Nadam has is left out, as what never stepped.
      from_params: the inverse of ``to_params``: turns the params tree into NumPy arrays by name, or into a list of
        them, **in the order of the torch optimizer's parameters**. torch goes by order alone.
      config: the hyperparameters, for one group of all parameters.
      param_groups: in place of ``config``, the groups that are wanted, preferably those of the optimizer that
        continues, ``optimizer.state_dict()["param_groups"]``. Where these have ``param_names``, arrays by name are put
        in their order; where several groups have none, ``from_params`` must return a list, one group after another.
      params: the params, needed where no Nadam has some of their leaves, for the shapes of these.
      as_tensor: what makes a tensor of an array, ``torch.from_numpy``. torch's ``load_state_dict`` needs tensors;
        None leaves NumPy arrays.

    Returns:
      A dict for ``optimizer.load_state_dict``, with ``param_names`` where a config made the group and ``from_params``
      gave names.

    Raises:
      ValueError: the parameters do not fit the groups; ``params`` are needed; or as :func:`config_to`.
      TypeError: ``from_params`` returned neither a dict nor a list.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_nadam
      >>> from optax_nadam.compat import torch as torch_names
      >>> def from_params(params):
      ...     return {"linear.weight": params["kernel"].T}
      >>> state = torch_names.nadam().init({"kernel": jnp.zeros((3, 2))})
      >>> dumped = torch_names.dump_state(state, from_params, config=optax_nadam.NadamConfig())
      >>> dumped["state"][0]["exp_avg"].shape, dumped["param_groups"][0]["param_names"]
      ((2, 3), ['linear.weight'])

    Source: ``torch/optim/optimizer.py`` and ``nadam.py`` of torch 2.13.
    """
    groups = groups_to_dump(None if config is None else config_to(config), param_groups)
    return dump(opt_state, from_params, groups, _NADAM_LAYOUT, params, as_tensor)


def _fields(
    betas: Any, eps: Any, weight_decay: Any, momentum_decay: Any, decoupled_weight_decay: Any, maximize: Any
) -> dict[str, Any]:
    """The fields of the config that these arguments choose."""
    validation.check_bool("decoupled_weight_decay", decoupled_weight_decay)
    return {
        **shared.pair(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": momentum_decay,
        "coupled_weight_decay": not decoupled_weight_decay,
        "maximize": maximize,
        "complex_as_real": True,
    }


def _rule_by_keys(group: Mapping[str, Any]) -> str:
    """The rule of the version that wrote a group: 1.12 brought ``foreach``, 2.0 ``differentiable``, 2.1 the others."""
    if group.get("differentiable") and "capturable" not in group:
        raise cannot_express("NadamConfig", "differentiable", True, _WRONG_STEP)
    return "scheduled" if "differentiable" in group or group.get("foreach") else "torch1"
