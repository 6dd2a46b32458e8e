"""Keras' Nadams under Keras' names: constructors, configs, checkpoints.

Three dialects, here as in every ``dialect`` argument:

* ``"keras"``: Keras 3, the default wherever something is written.
* ``"tf_keras"``: ``tf.keras`` from TensorFlow 2.11 and the package ``tf_keras``. Equal to Keras 3 where it runs
  eagerly. Inside ``fit()`` it multiplies the product of the momenta about once per variable and step, not once per
  step, which is not imitated here; the product vanishes on both sides, so that such a run is continued exactly after
  some tens of steps.
* ``"legacy"``: ``tf.keras`` from TensorFlow 1 to 2.10 and ``optimizers.legacy``; Keras 2.2 and 2.3 are read too.

Neither Keras nor TensorFlow is needed. Their files are read by other packages: TensorFlow's checkpoints by TensorFlow,
``.h5`` and ``.keras`` by ``h5py``, Orbax' directories by Orbax.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._rules import RULES
from optax_nadam._schedules import ScheduleConfig
from optax_nadam._state import KINDS
from optax_nadam._tree import nodes_of
from optax_nadam._wrappers import freeze_rows_without_gradient
from optax_nadam.compat import _common as common
from optax_nadam.compat._checkpoint import Checkpoint
from optax_nadam.compat._keras_checkpoint import checkpoint_of, warn_of_differences
from optax_nadam.compat._keras_read import DIALECTS, read_source
from optax_nadam.compat._keras_roles import OTHERS, Roles, by_names, by_shapes
from optax_nadam.compat._match import Matched, load

__all__ = [
    "config_from",
    "config_to",
    "dump_state",
    "get_weights",
    "legacy_nadam",
    "load_state",
    "nadam",
    "read",
    "read_config",
    "read_weights",
    "set_weights",
]

# Our fields, and their arguments.
_NUMBERS = {"b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
_CLIPS = {"clip_norm": "clipnorm", "clip_global_norm": "global_clipnorm", "clip_value": "clipvalue"}
_OTHERS = {"momentum_decay": "schedule_decay", "accumulate_steps": "gradient_accumulation_steps"}
_NAMES = {**_NUMBERS, **_CLIPS, **_OTHERS}
_SCHEDULES = {"ExponentialDecay": "exponential_decay", "InverseTimeDecay": "inverse_time_decay"}
_SCHEDULES |= {"PolynomialDecay": "polynomial_decay", "PiecewiseConstantDecay": "piecewise_constant"}
_SCHEDULES |= {"CosineDecay": "cosine_decay", "CosineDecayRestarts": "cosine_decay_restarts"}

# The keys of their configs. The first mark that a config has tells its dialect.
_MARKS = {"decay": "legacy", "schedule_decay": "legacy"}
_MARKS |= {"is_legacy_optimizer": "tf_keras", "loss_scale_factor": "keras"}
_REQUIRED = ("learning_rate", *_NUMBERS.values())
_SHARED = (*_REQUIRED, *_CLIPS.values(), "name")
_NEW = (*_SHARED, "weight_decay", "use_ema", "ema_momentum", "ema_overwrite_frequency")
_KEYS = {
    "keras": (*_NEW, "loss_scale_factor", "gradient_accumulation_steps"),
    "tf_keras": (*_NEW, "jit_compile", "is_legacy_optimizer"),
    "legacy": (*_SHARED, "decay", "schedule_decay", "is_legacy_optimizer"),
}
_WRAPPER_KEYS = {*_KEYS["keras"], *_KEYS["tf_keras"]} - set(_REQUIRED)
_WRAPPER_KEYS |= {"inner_optimizer", "initial_scale", "dynamic_growth_steps", "dynamic"}

# What a dialect can express; complex_as_real has no effect there, since it has no complex leaves.
_SIDES = {"keras": "Keras 3", "tf_keras": "tf_keras", "legacy": "tf.keras' legacy Nadam"}
_RULES = {"keras": ("scheduled", "loss_scaled"), "tf_keras": ("scheduled",), "legacy": ("scheduled",)}
_EVERYWHERE = {"learning_rate", "momentum_decay", "rule", "complex_as_real", *_NUMBERS, *_CLIPS}
_ALSO = {"keras": {"weight_decay", "accumulate_steps"}, "tf_keras": {"weight_decay"}, "legacy": set[str]()}

_NO_EMA = "Average the params with optax.incremental_update, and pass use_ema=False."
_NO_SCALE = "Scale the loss and divide the gradients by the same factor, and pass loss_scale_factor=None."
_CLIPS_SLICES = (
    "The original clips slices before it adds up those of one row: pass {name}=None, and clip with Optax around the"
    " optimizer."
)
_ONE_CLIP = "Only one of them can be set: pass dataclasses.replace(config, {changes})."
_ADVICE = {
    "rule": "It follows {rules}: pass dataclasses.replace(config, rule='scheduled').",
    "momentum_decay": (
        "It has 1.0 and no argument for it: pass dataclasses.replace(config, momentum_decay=1.0), or dialect='legacy',"
        " which has schedule_decay."
    ),
    "schedule_counts_gradients": (
        "Its schedules count gradients: stretch the schedule by accumulate_steps, and pass"
        " dataclasses.replace(config, schedule_counts_gradients=True)."
    ),
    "learning_rate": (
        "Its learning rate is a number: pass dataclasses.replace(config, learning_rate=0.001), and set"
        " optimizer.learning_rate during the run."
    ),
    "eps": "It makes 1e-7 of it: pass dataclasses.replace(config, eps=1e-07).",
}
_TWO_MEANINGS = (
    "clipnorm means two things in a Nadam config without a name: Keras up to 2.3 clips by the norm of all gradients"
    " (write global_clipnorm), tf.keras each by its own (add a name)."
)
_NO_LIST = (
    "from_params must return a list of arrays in the order of model.trainable_variables, got {got}: a Keras optimizer"
    " goes by order alone. Return list(weights[name] for name in the model's order)."
)
_OTHER_NAME = (
    "config is of the optimizer {name!r}, not of a Nadam. If it is a Nadam under that name, pass {{**config, 'name':"
    " 'nadam'}}."
)
_NO_KNOWN_SCHEDULE = (
    "learning_rate must be a number or one of the schedules {known}, got {kind!r}. Pass learning_rate= to config_from,"
    " a number or a ScheduleConfig, or learning_rate=1.0 and any function of the steps to config.build."
)
_HAD_SCHEDULE = (
    "the optimizer has no learning rate of its own: it had a schedule, which the source does not hold. Pass"
    " optimizer.get_config() to config_from, or a schedule to the constructor."
)


def nadam(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str = "nadam",
) -> optax.GradientTransformationExtraArgs:
    r"""``keras.optimizers.Nadam`` of Keras 3, and of ``tf.keras`` from TensorFlow 2.11.

    The step of :func:`optax_nadam.scale_by_nadam` with ``momentum_decay=1``, that is
    :math:`\mu_t = \beta_1 (1 - \tfrac12\, 0.96^t)`, and decoupled weight decay:

    .. math:: \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    Args:
      learning_rate: :math:`\alpha`, a number, a scalar array, or a schedule: Optax's, or a
        :class:`optax_nadam.ScheduleConfig`. A schedule is a function of the gradients seen, as Keras' own are of
        ``iterations``: of ``gradient_accumulation_steps`` for each step.
      beta_1: decay of the first moment and limit of the momentum, in [0, 1).
      beta_2: decay of the second moment, in [0, 1).
      epsilon: added to the root, not negative.
      weight_decay: :math:`\lambda`, not negative; None for none.
      clipnorm: the largest norm of a leaf's gradient; None or 0 for no limit.
      clipvalue: the largest magnitude of a gradient's element; None or 0 for no limit.
      global_clipnorm: the largest norm of all gradients together; None or 0 for no limit.
      use_ema: must be False.
      ema_momentum: not used, since ``use_ema`` is False.
      ema_overwrite_frequency: not used.
      loss_scale_factor: must be None.
      gradient_accumulation_steps: gradients that are averaged for one step, at least 2; None for a step with each.
      name: not used.

    Returns:
      A gradient transformation; its ``update`` needs ``params`` if there is weight decay or accumulation.

    Raises:
      ValueError: a number out of range, more than one of the three clips, or ``use_ema`` or ``loss_scale_factor``.
      TypeError: a hyperparameter that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.keras.nadam(0.01, weight_decay=0.1)
      >>> params = jnp.array(1.0)
      >>> updates, state = tx.update(jnp.array(0.5), tx.init(params), params)
      >>> f"{float(params + updates):.6f}"
      '0.988372'

    Source: https://keras.io/api/optimizers/Nadam/
    """
    del name, ema_momentum, ema_overwrite_frequency
    numbers = {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon, "weight_decay": weight_decay}
    clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    others = {"use_ema": use_ema, "loss_scale_factor": loss_scale_factor}
    others |= {"gradient_accumulation_steps": gradient_accumulation_steps}
    return common.build(learning_rate, _NAMES, _fields("keras", numbers | clips | others))


def legacy_nadam(
    learning_rate: ArrayLike = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float | None = 1e-7,
    name: str = "Nadam",
    *,
    lr: ArrayLike | None = None,
    decay: float | None = None,
    schedule_decay: float = 0.004,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    sparse_rows: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``tf.keras.optimizers.Nadam`` of TensorFlow 1 to 2.10, now ``tf_keras.optimizers.legacy.Nadam``.

    The step of :func:`optax_nadam.nadam` with :math:`\psi` = ``schedule_decay``. Gradients are clipped by value, then
    by norm (TensorFlow up to 2.3 clipped by norm first).

    Args:
      learning_rate: a number or a scalar array.
      beta_1: decay of the first moment and limit of the momentum, in [0, 1).
      beta_2: decay of the second moment, in [0, 1).
      epsilon: added to the root; 0 and None become 1e-7, as in the original.
      name: not used.
      lr: in place of ``learning_rate``; its old name.
      decay: without effect, as in the original, which has no inverse-time decay of the learning rate.
      schedule_decay: :math:`\psi`, how fast the momentum rises, per step, not negative.
      clipnorm: the largest norm of a leaf's gradient, positive; None for no limit.
      clipvalue: the largest magnitude of a gradient's element, positive; None for no limit.
      global_clipnorm: the largest norm of all gradients together, positive; None for no limit.
      sparse_rows: a tree of booleans like the params, or a prefix of it: the embedding tables. Their gradients were
        ``tf.IndexedSlices``, for which the original lets all moments decay, but moves the rows that were looked up
        and no others. Here a row counts as looked up if its gradient is not all zeros.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a number out of range, a schedule as the learning rate, ``clipnorm`` beside ``global_clipnorm``, or
        a clip beside ``sparse_rows``: the original clips the slices before it adds up those of one row, which a dense
        gradient no longer shows.
      TypeError: a hyperparameter that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> tx = compat.keras.legacy_nadam(0.01, sparse_rows=True)
      >>> table = jnp.ones((2, 1))
      >>> updates, state = tx.update(jnp.array([[0.5], [0.0]]), tx.init(table))
      >>> [f"{x:.6f}" for x in (table + updates).ravel().tolist()]
      ['0.989435', '1.000000']

    Source: ``tf_keras/src/optimizers/legacy/nadam.py``.
    """
    del name
    if decay is not None:
        validation.warn("decay has no effect in the legacy Nadam: pass schedule_decay instead.")
    learning_rate = learning_rate if lr is None else lr
    if callable(learning_rate) or isinstance(learning_rate, ScheduleConfig):
        raise ValueError(f"learning_rate must not be a schedule in the legacy Nadam, got {learning_rate!r}.")
    clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    for clip, value in clips.items():
        if sparse_rows is not None and value is not None:
            raise common.cannot_express("legacy_nadam with sparse_rows", clip, value, _CLIPS_SLICES.format(name=clip))
    numbers = {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon, "schedule_decay": schedule_decay}
    tx = common.build(learning_rate, _NAMES, _legacy_fields(numbers | clips))
    return tx if sparse_rows is None else freeze_rows_without_gradient(tx, sparse_rows)


def config_from(
    config: Mapping[str, Any] | Checkpoint, *, learning_rate: float | ScheduleConfig | None = None
) -> NadamConfig:
    r"""The config in what ``get_config()`` of a Keras Nadam returns, or ``keras.optimizers.serialize``.

    The dialect is inferred from the keys: ``decay`` or ``schedule_decay`` is legacy, ``is_legacy_optimizer`` is
    tf_keras, ``loss_scale_factor`` is Keras 3. A ``LossScaleOptimizer`` around a Keras 3 Nadam becomes the rule
    ``"loss_scaled"``, which Keras computes there under JAX: it loses its product of the momenta between steps, so that
    :math:`P_t = \mu_t`. Other backends store the product; for those, and to be rid of the flaw, replace the rule by
    ``"scheduled"``. The caller scales the loss, and skips steps that are not finite (``optax.apply_if_finite``).

    Args:
      config: a mapping; it is not changed. Or what :func:`read` returned of a source that stores it.
      learning_rate: a number or a schedule in place of the config's own, which may be a function that is not data; None
        for that.

    Returns:
      A config that builds the same optimizer. A custom ``schedule_decay`` survives, which Keras' own
      ``from_config(get_config())`` resets to 0.004.

    Raises:
      ValueError: an unknown key, optimizer or schedule, a missing key, an option that optax_nadam cannot express, each
        by name, or a number out of range.
      TypeError: a value of the wrong type.

    Examples:
      >>> from optax_nadam import compat
      >>> theirs = {"name": "Nadam", "learning_rate": 0.01, "decay": 0.004}
      >>> config = compat.keras.config_from(theirs | {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-07})
      >>> config.learning_rate, config.momentum_decay
      (0.01, 0.004)
    """
    if isinstance(config, Checkpoint):
        return config.config_with(learning_rate)
    config = _unwrapped(config)
    if "inner_optimizer" not in config:
        return common.config_of(_NAMES, _all_fields(config, learning_rate))
    common.check_keys("the LossScaleOptimizer config", config, _WRAPPER_KEYS)
    inner = _unwrapped(config["inner_optimizer"])
    rule = "loss_scaled" if _dialect_of(inner) == "keras" else "scheduled"
    return common.config_of(_NAMES, {**_all_fields(inner, learning_rate), "rule": rule})


def _unwrapped(config: Any) -> Mapping[str, Any]:
    """The config in ``{"class_name": ..., "config": ...}``, or the config itself."""
    if "class_name" not in config:
        _check_name(config)
        return config
    kind = str(config["class_name"]).rpartition(">")[2].lower()
    if kind != "nadam" and not kind.startswith("lossscaleoptimizer"):
        raise ValueError(f"config must be that of a Nadam or a LossScaleOptimizer, got {config['class_name']!r}.")
    return config["config"]


def _check_name(config: Mapping[str, Any]) -> None:
    """Rejects the config of another optimizer, of which the name alone may tell: Adamax and Lamb have our keys."""
    name = str(config.get("name", ""))
    if re.sub(r"_\d+$", "", name).lower() in OTHERS:
        raise ValueError(_OTHER_NAME.format(name=name))


def _dialect_of(config: Mapping[str, Any]) -> str:
    """The dialect of a config."""
    for mark, dialect in _MARKS.items():
        if mark in config:
            return dialect
    raise ValueError(f"config must have one of the keys {', '.join(_MARKS)}, which tell its dialect; got {config!r}.")


def _all_fields(config: Mapping[str, Any], learning_rate: Any) -> dict[str, Any]:
    """Our fields of a config."""
    dialect = _dialect_of(config)
    config = {"learning_rate" if key == "lr" else key: value for key, value in config.items()}
    common.check_keys(f"the {dialect} Nadam config", config, _KEYS[dialect], _REQUIRED)
    fields = _stored_legacy_fields(config) if dialect == "legacy" else _fields(dialect, config)
    if learning_rate is None:
        learning_rate = _learning_rate_from(config["learning_rate"], dialect)
    return {"learning_rate": learning_rate, **fields}


def _stored_legacy_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of a config of tf.keras, or of Keras up to 2.3, which has no name and allows an epsilon of 0."""
    is_keras_2 = "name" not in config
    if is_keras_2 and config.get("clipnorm") is not None:
        raise ValueError(_TWO_MEANINGS)
    fields = _legacy_fields({"schedule_decay": config.get("decay"), **config})
    return {**fields, "eps": 0.0} if is_keras_2 and _is_zero(config["epsilon"]) else fields


def _learning_rate_from(learning_rate: Any, dialect: str) -> Any:
    """The number or the schedule in a config."""
    if not isinstance(learning_rate, Mapping):
        return learning_rate
    kind = learning_rate.get("class_name")
    if kind not in _SCHEDULES:
        raise ValueError(_NO_KNOWN_SCHEDULE.format(known=", ".join(_SCHEDULES), kind=kind))
    if dialect == "legacy":
        raise ValueError(f"learning_rate must not be a schedule in the legacy Nadam, got {kind!r}.")
    arguments = {name: _plain(x) for name, x in learning_rate["config"].items() if name != "name"}
    return ScheduleConfig(_SCHEDULES[kind], arguments)


def _plain(value: Any) -> Any:
    """A number that Keras serialized as a tensor or an array, or another value as it is."""
    if isinstance(value, Mapping) and value.get("class_name") in ("__tensor__", "__numpy__"):
        return value["config"]["value"]
    return common.as_number(value)


def _fields(dialect: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields, but for the learning rate, of the arguments of a Keras 3 or tf_keras Nadam."""
    if theirs.get("use_ema"):
        raise common.cannot_express("optax_nadam", "use_ema", theirs["use_ema"], _NO_EMA)
    if theirs.get("loss_scale_factor") is not None:
        raise common.cannot_express("optax_nadam", "loss_scale_factor", theirs["loss_scale_factor"], _NO_SCALE)
    steps = theirs.get("gradient_accumulation_steps") or None
    if steps is not None and steps < 2:
        raise ValueError(f"gradient_accumulation_steps must be at least 2, or None, got {steps!r}.")
    numbers = {ours: theirs[name] for ours, name in _NUMBERS.items()}
    weight_decay = theirs.get("weight_decay")
    others = {"momentum_decay": 1.0, "weight_decay": 0.0 if weight_decay is None else weight_decay}
    accumulation = {"accumulate_steps": steps or 1, "schedule_counts_gradients": steps is not None}
    return {**numbers, **others, **accumulation, **_clip_in_force(dialect, theirs)}


def _clip_in_force(dialect: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The clip in force: of a norm and the value tf_keras takes the norm; Keras 3 does not allow more than one."""
    given = {ours: theirs[name] for ours, name in _CLIPS.items() if theirs.get(name) is not None}
    if len(given) > 1 and (dialect == "keras" or "clip_value" not in given):
        got = ", ".join(_CLIPS[ours] for ours in given)
        raise ValueError(f"only one of {', '.join(_CLIPS.values())} can be set, got {got}.")
    in_force = [ours for ours in given if not _is_zero(given[ours])]
    return {ours: given[ours] for ours in in_force[:1]}


def _legacy_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields, but for the learning rate, of the arguments of a legacy Nadam; an epsilon of 0 becomes 1e-7."""
    clips = {ours: theirs.get(name) for ours, name in _CLIPS.items()}
    if clips["clip_norm"] is not None and clips["clip_global_norm"] is not None:
        got = f"clipnorm={theirs['clipnorm']!r} and global_clipnorm={theirs['global_clipnorm']!r}"
        raise ValueError(f"only one of clipnorm, global_clipnorm can be set, got {got}.")
    eps = theirs["epsilon"]
    numbers = {"b1": theirs["beta_1"], "b2": theirs["beta_2"], "momentum_decay": theirs["schedule_decay"]}
    return {**numbers, "eps": 1e-7 if eps is None or _is_zero(eps) else eps, **clips}


def _is_zero(value: Any) -> bool:
    """Whether a value is the number 0; an array is not compared."""
    return validation.is_number(value) and value == 0


def config_to(config: NadamConfig, *, dialect: str = "keras") -> dict[str, Any]:
    """The dict from which Keras' own ``Nadam.from_config`` makes the optimizer of these hyperparameters.

    For the rule ``"loss_scaled"`` it is one for ``keras.optimizers.LossScaleOptimizer.from_config``.

    Args:
      config: what to translate.
      dialect: ``"keras"``, ``"tf_keras"`` or ``"legacy"``; by default Keras 3, today's Keras, as in
        :func:`dump_state`.

    Returns:
      A new dict of plain data; :func:`config_from` turns it back into an equal config, but for fields without effect.

    Raises:
      ValueError: an unknown dialect, or a field that the dialect cannot express, by name.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam import compat
      >>> config = optax_nadam.NadamConfig(learning_rate=0.01)
      >>> compat.keras.config_to(config, dialect="legacy")["schedule_decay"]
      0.004
    """
    _check_config(config, dialect)
    theirs = {"learning_rate": _learning_rate_to(config.learning_rate)}
    theirs |= {name: getattr(config, ours) for ours, name in {**_NUMBERS, **_CLIPS}.items()}
    if dialect == "legacy":
        given = {key: value for key, value in theirs.items() if value is not None}
        return {"name": "Nadam", **given, "schedule_decay": config.momentum_decay}
    theirs |= {"weight_decay": config.weight_decay or None}
    theirs |= {"use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None}
    if dialect == "tf_keras":
        return {"name": "Nadam", **theirs, "jit_compile": True, "is_legacy_optimizer": False}
    steps = config.accumulate_steps if config.accumulate_steps > 1 else None
    nadam = {"name": "nadam", **theirs, "loss_scale_factor": None, "gradient_accumulation_steps": steps}
    if common.rule_of(config).running_product:
        return nadam
    return {"name": "loss_scale_optimizer", "inner_optimizer": _serialized("keras.optimizers", "Nadam", nadam)}


def _serialized(module: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """An object as Keras serializes it."""
    return {"module": module, "class_name": class_name, "config": config, "registered_name": None}


def _learning_rate_to(learning_rate: float | ScheduleConfig) -> Any:
    """The number, or the schedule as Keras serializes it."""
    if not isinstance(learning_rate, ScheduleConfig):
        return learning_rate
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if learning_rate.name not in names:
        raise common.cannot_express("Keras", "learning_rate", learning_rate, common.SCHEDULE)
    arguments = {name: list(x) if isinstance(x, tuple) else x for name, x in learning_rate.arguments.items()}
    return _serialized("keras.optimizers.schedules", names[learning_rate.name], arguments)


def _check_config(config: NadamConfig, dialect: str) -> None:
    """Rejects a dialect that does not exist, and a config that it cannot express."""
    validation.check_choice("dialect", dialect, DIALECTS)
    without_effect = set() if config.weight_decay else {"coupled_weight_decay"}
    common.check_expressible(config, _SIDES[dialect], _EVERYWHERE | _ALSO[dialect] | without_effect)
    _check_values(config, dialect)
    _check_clips(config, dialect)


def _check_values(config: NadamConfig, dialect: str) -> None:
    """Rejects a value that the dialect lacks of a field that it has."""
    legacy, scheduled = dialect == "legacy", isinstance(config.learning_rate, ScheduleConfig)
    counts_steps = scheduled and config.accumulate_steps > 1 and not config.schedule_counts_gradients
    lacking = {
        "rule": common.rule_of(config) not in [RULES[rule] for rule in _RULES[dialect]],
        "momentum_decay": not legacy and config.momentum_decay != 1,
        "schedule_counts_gradients": counts_steps,
        "learning_rate": legacy and scheduled,
        "eps": legacy and not config.eps,
    }
    for name in [name for name, is_lacking in lacking.items() if is_lacking]:
        advice = _ADVICE[name].format(rules=" or ".join(map(repr, _RULES[dialect])))
        raise common.cannot_express(_SIDES[dialect], name, getattr(config, name), advice)


def _check_clips(config: NadamConfig, dialect: str) -> None:
    """Rejects two clips where the dialect has one at a time; the legacy Nadam has a value beside a norm."""
    exclusive = [name for name in _CLIPS if dialect != "legacy" or name != "clip_value"]
    kept, *others = [name for name in exclusive if getattr(config, name) is not None] or [""]
    if others:
        advice = _ONE_CLIP.format(changes=", ".join(f"{name}=None" for name in others))
        raise common.cannot_express(_SIDES[dialect], f"{others[0]} beside {kept}", getattr(config, others[0]), advice)


def load_state(
    opt_state: Any,
    source: Any,
    to_params: Callable[[Any], Any],
    *,
    config: NadamConfig | None = None,
    dialect: str | None = None,
) -> Any:
    """The optimizer state that continues where a Keras optimizer stopped.

    Args:
      opt_state: a fresh state of the optimizer that is to continue, at any depth of chains and wrappers; it is not
        changed.
      source: one of

        * the list that ``optimizer.get_weights()`` returned (legacy, Keras 2);
        * ``optimizer.variables`` or ``optimizer.weights``, or the list of their values;
        * the path of a model's ``.h5``, ``.keras`` or ``.weights.h5`` file, or of the directory of Keras 3's
          ``BackupAndRestore``, which needs ``h5py``;
        * the path of a TensorFlow checkpoint, which needs TensorFlow: a prefix (``save_weights``, ``Saver``,
          ``tf.train.Checkpoint``), the directory of the latest, a SavedModel, that of ``BackupAndRestore``;
        * a mapping of a TensorFlow checkpoint's names to its arrays, as ``tf.train.load_checkpoint`` has them;
        * ``model.get_state_tree()`` of Keras 3, or what Orbax restores of it, or the directory of the callback
          ``OrbaxCheckpoint``, which needs ``orbax-checkpoint``.
      to_params: turns the model's trainable weights into a tree like the params, and so the moments, which it gets in
        the same form: a list in the order of ``model.trainable_variables``; or, from a TensorFlow checkpoint, a tree of
        Keras 3 and any mapping, a dict by name, as :func:`read_weights` returns it.
      config: the hyperparameters of the optimizer that continues. Needed where the checkpoint has no product of the
        momenta, or gradients are accumulated, unless the source is a ``.h5`` or ``.keras`` file, which stores them.
      dialect: which Keras wrote the checkpoint: ``"keras"``, ``"tf_keras"`` or ``"legacy"``; None to find out from
        names or shapes.

    Returns:
      A new state.

    Raises:
      ValueError: no optimizer state, arrays that fit no layout or more than one, moments that do not fit the params,
        no config where one is needed, or accumulated gradients, there or here, that no step has used yet.
      ImportError: the package that reads the source is not installed.

    Warns:
      UserWarning: the product of the momenta was not in the checkpoint and has been computed, unless it is below 1e-6,
        where it changes no step by as much; the learning rate in the checkpoint is not that of the config.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from optax_nadam import compat
      >>> get_weights = [np.array(1), np.float32(0.4501), np.array([0.05]), np.array([0.00025])]
      >>> tx = compat.keras.legacy_nadam()
      >>> state = compat.keras.load_state(tx.init({"w": jnp.ones(1)}), get_weights, lambda weights: {"w": weights[0]})
      >>> int(optax.tree.get(state, "count"))
      1
    """
    _check_between_steps(opt_state)
    size = sum(math.prod(m.shape) for state in nodes_of(opt_state, KINDS) for m in jax.tree.leaves(state.m))
    found = _read(source, config=config, dialect=dialect, size=size)
    if config is None and found.groups[0].options:
        config = found.parse(found.groups[0].options, None)
    if config is not None:
        warn_of_differences(found, config)
    return load(opt_state, Matched(found, to_params), config)


def read(source: Any, *, config: NadamConfig | None = None, dialect: str | None = None) -> Checkpoint:
    """What a checkpoint holds: print it before anything is loaded, and pass it wherever a source is taken.

    Args:
      source: as in :func:`load_state`.
      config: as in :func:`load_state`, needed where gradients are accumulated or averages of the weights are stored.
      dialect: as in :func:`load_state`.

    Returns:
      A :class:`optax_nadam.compat.Checkpoint`: its ``config`` are the hyperparameters and its ``weights`` the trainable
      weights, where the source has them.

    Raises:
      ValueError: something in the source does not balance; the text names the arrays and what to do.
      ImportError: the package that reads the source is not installed.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import compat
      >>> print(compat.keras.read([np.array(1), np.float32(0.4501), np.array([0.05]), np.array([0.00025])]))
      optimizer     Nadam of Keras (TensorFlow up to 2.10, tf_keras legacy, Keras 2)
      steps         1
      parameters    1, with 1 numbers
      names         none: a list in order
      group 0       1 parameter, 1 numbers; hyperparameters not stored
      learning rate no schedule stored
      product       0.4501, stored
      weights       not read: take the model's
      not stored    exclude_from_weight_decay (pass mask= to build), constraints, repeated ids of an Embedding
      not stored    clips (clipnorm and the others)
    """
    return _read(source, config=config, dialect=dialect)


def _read(
    source: Any, *, config: NadamConfig | None = None, dialect: str | None = None, size: int | None = None
) -> Checkpoint:
    """The checkpoint in a source; of two layouts that fit the shapes, the one with ``size`` numbers in the params."""
    if isinstance(source, Checkpoint):
        if dialect is not None:
            raise ValueError("dialect belongs to read: a checkpoint that was read has it.")
        return source
    stored = read_source(source, dialect)
    if stored.config:
        _unwrapped(stored.config)
    named = by_names(stored)
    roles = named or by_shapes(stored, size)
    if config is None and stored.config and roles.needs_config:
        config = config_from(stored.config)
    found = checkpoint_of(stored, roles, config, _parse, is_named=named is not None)
    try:
        schedule = _schedule_of(stored.config, roles)
    except ValueError as error:
        return dataclasses.replace(found, unread_schedule=str(error))
    return dataclasses.replace(found, groups=(found.groups[0]._replace(schedule=schedule),))


def _schedule_of(config: Mapping[str, Any] | None, roles: Roles) -> ScheduleConfig | None:
    """The schedule that is stored; None where the learning rate is a number."""
    if config:
        inner = _unwrapped(config)
        inner = _unwrapped(inner.get("inner_optimizer", inner))
        learning_rate = _learning_rate_from(inner.get("learning_rate"), _dialect_of(inner))
        return learning_rate if isinstance(learning_rate, ScheduleConfig) else None
    if roles.dialect == "keras" and roles.learning_rate is None:
        raise ValueError(_HAD_SCHEDULE)
    return None


def _parse(config: Mapping[str, Any], learning_rate: Any) -> NadamConfig:
    return config_from(config, learning_rate=learning_rate)


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Sequence[Any]],
    *,
    config: NadamConfig | None = None,
    dialect: str = "keras",
) -> list[np.ndarray]:
    """The arrays that make a Keras optimizer continue, the inverse of :func:`load_state`.

    Args:
      opt_state: a state with one Nadam in it, at any depth.
      from_params: turns a tree like the params into the list of the model's trainable weights.
      config: the hyperparameters. Needed by ``"keras"``, whose arrays depend on them: whether there is a learning rate,
        and accumulation.
      dialect: whose order; by default that of Keras 3, today's Keras, as in :func:`config_to`. ``"keras"``:
        ``optimizer.variables`` of Keras from 3.10, of the inner optimizer for the rule ``"loss_scaled"``;
        ``"tf_keras"``: ``[iteration, m, v, m, v, ...]``, which has no place for the product; ``"legacy"``:
        ``[iterations, momentum_cache, *m, *v]`` for ``optimizer.set_weights``.

    Returns:
      New NumPy arrays.

    Raises:
      ValueError: an unknown dialect, a config that it cannot express, ``"keras"`` without a config, or gradients that
        no step has used yet.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> state = compat.keras.legacy_nadam().init({"w": jnp.ones(3)})
      >>> [x.shape for x in compat.keras.dump_state(state, lambda params: [params["w"]], dialect="legacy")]
      [(), (), (3,), (3,)]
    """
    validation.check_choice("dialect", dialect, DIALECTS)
    if config is not None:
        _check_config(config, dialect)
    if dialect == "legacy":
        return get_weights(opt_state, from_params)
    count, product, m, v = _in_order(opt_state, from_params)
    pairs = [x for pair in zip(m, v, strict=True) for x in pair]
    if dialect == "tf_keras":
        return [np.asarray(count, np.int64), *pairs]
    if config is None:
        raise ValueError("config is needed for dialect='keras', to know which arrays it stores.")
    learning_rate = [np.asarray(config.learning_rate, np.float32)] if isinstance(config.learning_rate, float) else []
    accumulators = [np.zeros_like(x) for x in m] if config.accumulate_steps > 1 else []
    behind = [product] if common.rule_of(config).running_product else []
    return [np.asarray(count * config.accumulate_steps, np.int32), *learning_rate, *accumulators, *pairs, *behind]


def _in_order(
    opt_state: Any, from_params: Callable[[Any], Sequence[Any]]
) -> tuple[int, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Steps taken, product, and moments in the order of their weights."""
    _check_between_steps(opt_state)
    state = common.get_numbers(opt_state)
    m, v = (_listed(from_params(tree)) for tree in (state.m, state.v))
    return int(state.count), common.as_numpy(state.mu_product), m, v


def _listed(weights: Any) -> list[np.ndarray]:
    """What ``from_params`` returned, a list of arrays."""
    if isinstance(weights, Mapping) or not isinstance(weights, Iterable):
        raise TypeError(_NO_LIST.format(got=type(weights).__name__))
    arrays = [common.as_numpy(x) for x in weights]
    for other in [x for x in arrays if not np.issubdtype(x.dtype, np.number) and x.dtype.kind != "V"]:
        raise TypeError(_NO_LIST.format(got=f"an array of {other.dtype}"))
    return arrays


def _check_between_steps(opt_state: Any) -> None:
    """Rejects a state that has accumulated gradients."""
    if int(optax.tree.get(opt_state, "mini_step", 0)):
        raise ValueError("opt_state holds accumulated gradients that no step has used yet; take it after a step.")


def get_weights(opt_state: Any, from_params: Callable[[Any], Sequence[Any]]) -> list[np.ndarray]:
    """What ``optimizer.get_weights()`` of the legacy Nadam returns: ``[iterations, momentum_cache, *m, *v]``.

    Args:
      opt_state: a state with one Nadam in it, at any depth.
      from_params: turns a tree like the params into the list of the model's trainable weights.

    Returns:
      New NumPy arrays.

    Raises:
      ValueError: there is no Nadam state in ``opt_state``, or more than one; or gradients that no step has used yet.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> state = compat.keras.legacy_nadam().init({"w": jnp.ones(2)})
      >>> [x.tolist() for x in compat.keras.get_weights(state, lambda params: [params["w"]])]
      [0, 1.0, [0.0, 0.0], [0.0, 0.0]]
    """
    count, product, m, v = _in_order(opt_state, from_params)
    return [np.asarray(count, np.int64), product, *m, *v]


def set_weights(
    opt_state: Any, weights: Sequence[Any], to_params: Callable[[Any], Any], *, config: NadamConfig | None = None
) -> Any:
    """The optimizer state with the weights of a legacy Nadam, the inverse of :func:`get_weights`.

    Args:
      opt_state: a state of the optimizer that is to continue; it is not changed.
      weights: ``[iterations, momentum_cache, *m, *v]``, in the order of the model's trainable weights.
      to_params: turns the list of the model's trainable weights into a tree like the params.
      config: the hyperparameters of the run, where they are not those of a legacy Nadam by default.

    Returns:
      A new state.

    Raises:
      ValueError: the weights do not fit the state in number or shape, or ``momentum_cache`` is not the product of the
        momenta after so many iterations.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> state = compat.keras.legacy_nadam().init({"w": jnp.ones(2)})
      >>> weights = compat.keras.get_weights(state, lambda params: [params["w"]])
      >>> weights[:2] = [jnp.array(1), jnp.array(0.4501)]
      >>> state = compat.keras.set_weights(state, weights, lambda weights: {"w": weights[0]})
      >>> int(optax.tree.get(state, "count"))
      1
    """
    return load_state(opt_state, list(weights), to_params, config=config, dialect="legacy")


def read_weights(source: Any, *, config: NadamConfig | None = None) -> Any:
    """The model's trainable weights in a checkpoint, in the form in which :func:`load_state` passes its moments.

    With it a run moves from the checkpoint alone: ``params = to_params(read_weights(source))``.

    Args:
      source: as in :func:`load_state`: a TensorFlow checkpoint, a tree or an Orbax directory of Keras 3, or a ``.h5``
        file. A ``.keras`` and a ``.weights.h5`` file do not tell which weights are trainable.
      config: as in :func:`read`.

    Returns:
      A dict by name, or, of a ``.h5`` file, a list in the order of ``model.trainable_variables``. A weight without
      moments, which was not trained, is left out.

    Raises:
      ValueError: the source does not tell which of its weights are trainable.
      ImportError: the package that reads the source is not installed.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import compat
      >>> saver = {"w": np.ones(1), "training/Nadam/w/m": np.zeros(1), "training/Nadam/w/v": np.zeros(1)}
      >>> saver |= {"training/Nadam/iter": np.array(1), "training/Nadam/momentum_cache": np.array(0.45)}
      >>> compat.keras.read_weights(saver)
      {'w': array([1.])}
    """
    return read(source, config=config).weights


def read_config(source: Any) -> NadamConfig:
    """The hyperparameters in a checkpoint.

    Args:
      source: as in :func:`load_state`: a ``.h5`` or ``.keras`` file, or a TensorFlow checkpoint of the legacy Nadam,
        which stores learning rate, betas and ``schedule_decay``, but neither epsilon, which is then 1e-7, nor clips.

    Returns:
      A config that builds the same optimizer.

    Raises:
      ValueError: the source holds no hyperparameters, or as :func:`config_from`.
      ImportError: the package that reads the source is not installed.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import compat
      >>> numbers = {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.999, "decay": 0.004, "momentum_cache": 0.4}
      >>> saver = {f"Nadam/{name}": np.float32(x) for name, x in (numbers | {"iter": 1}).items()}
      >>> saver |= {"w": np.ones(1), "Nadam/w/m": np.zeros(1), "Nadam/w/v": np.zeros(1)}
      >>> compat.keras.read_config(saver).b1
      0.8
    """
    return read(source).config
