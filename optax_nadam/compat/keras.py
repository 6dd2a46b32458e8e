"""Keras' Nadams under Keras' names: constructors, configs, checkpoints.

Three dialects, here as in every ``dialect`` argument:

* ``"keras"``: Keras 3.
* ``"tf_keras"``: ``tf.keras`` from TensorFlow 2.11 and the package ``tf_keras``. Equal to Keras 3 where it runs
  eagerly; inside ``fit()`` it multiplies the momentum product about once per variable and step, not once per step,
  which is not imitated here.
* ``"legacy"``: ``tf.keras`` from TensorFlow 1 to 2.10 and ``optimizers.legacy``; Keras 2.2 and 2.3 are read too.

Neither Keras nor TensorFlow is needed.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optax_nadam import _links as links
from optax_nadam._config import NadamConfig
from optax_nadam._schedules import Schedule
from optax_nadam.compat import _keras_config as configs
from optax_nadam.compat import _keras_files as files
from optax_nadam.compat._common import (
    as_numpy,
    check_keys,
    get_numbers,
    put_state,
    rebuilt_product,
    rule_of,
    unsupported,
)


def nadam(
    learning_rate: optax.ScalarOrSchedule | Schedule = 0.001,
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
      learning_rate: :math:`\alpha`, a number, a scalar array, an Optax schedule of the steps taken, or a
        :class:`optax_nadam.Schedule`, which counts the gradients seen, as Keras' own schedules do.
      beta_1: decay of the first moment and limit of the momentum, in [0, 1).
      beta_2: decay of the second moment, in [0, 1).
      epsilon: added to the root, not negative.
      weight_decay: :math:`\lambda`, not negative; None for none.
      clipnorm: the largest norm of a leaf's gradient; None or 0 for no limit.
      clipvalue: the largest magnitude of a gradient's element; None or 0 for no limit.
      global_clipnorm: the largest norm of all gradients together; None or 0 for no limit.
      use_ema: must be False.
      ema_momentum: not used, for there is no ``use_ema``.
      ema_overwrite_frequency: not used.
      loss_scale_factor: must be None.
      gradient_accumulation_steps: gradients that are averaged for one step, at least 2; None for every one.
      name: not used.

    Returns:
      A gradient transformation; its ``update`` needs ``params`` if there is weight decay or accumulation.

    Raises:
      ValueError: a number out of range, more than one of the three clips, or ``use_ema`` or ``loss_scale_factor``.
      TypeError: a hyperparameter that is no number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam.compat import keras
      >>> tx = keras.nadam(0.01, weight_decay=0.1)
      >>> params = jnp.array(1.0)
      >>> updates, state = tx.update(jnp.array(0.5), tx.init(params), params)
      >>> f"{float(params + updates):.6f}"
      '0.988372'

    Source: https://keras.io/api/optimizers/Nadam/
    """
    del name, ema_momentum, ema_overwrite_frequency
    fields = configs.keras_fields(
        {
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "use_ema": use_ema,
            "loss_scale_factor": loss_scale_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        },
        "keras",
    )
    return configs.build(learning_rate, fields)


def legacy_nadam(
    learning_rate: jax.typing.ArrayLike = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float | None = 1e-7,
    name: str = "Nadam",
    *,
    lr: jax.typing.ArrayLike | None = None,
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
      decay: without effect, as in the original, which puts ``schedule_decay`` in its place: there is no
        inverse-time decay of the learning rate.
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
      TypeError: a hyperparameter that is no number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam.compat import keras
      >>> tx = keras.legacy_nadam(0.01, sparse_rows=True)
      >>> table = jnp.ones((2, 1))
      >>> updates, state = tx.update(jnp.array([[0.5], [0.0]]), tx.init(table))
      >>> [f"{x:.6f}" for x in (table + updates).ravel().tolist()]
      ['0.989435', '1.000000']

    Source: ``tf_keras/src/optimizers/legacy/nadam.py``.
    """
    del name
    if decay is not None:
        warnings.warn("decay has no effect in the legacy Nadam; schedule_decay is what it calls so.", stacklevel=2)
    clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    given = {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon, "schedule_decay": schedule_decay, **clips}
    rate = learning_rate if lr is None else lr
    if callable(rate) or isinstance(rate, Schedule):
        raise ValueError(f"learning_rate must not be a schedule in the legacy Nadam, got {rate!r}.")
    set_clips = [x for x in clips if clips[x] is not None]
    if sparse_rows is not None and set_clips:
        raise unsupported("legacy Nadam", set_clips[0], clips[set_clips[0]], "It clips slices, before sparse_rows.")
    tx = configs.build(rate, configs.legacy_fields({**given, "name": "Nadam"}))
    return tx if sparse_rows is None else links.keep_rows_without_gradient(tx, sparse_rows)


def config_from(config: Mapping[str, Any]) -> NadamConfig:
    r"""The hyperparameters in what ``get_config()`` of a Keras Nadam returns, or ``keras.optimizers.serialize``.

    The dialect is told from the keys: ``decay`` or ``schedule_decay`` is legacy, ``is_legacy_optimizer`` is tf_keras,
    ``loss_scale_factor`` is Keras 3. A ``LossScaleOptimizer`` around a Keras 3 Nadam becomes the rule
    ``"loss_scaled"``, which is what Keras computes there under JAX: its momentum product is lost between steps, so
    that :math:`P_t = \mu_t`. Other backends keep the product; for those, and to be rid of the flaw, replace the rule
    by ``"scheduled"``. The scaling itself and the skipping of steps that are not finite are left to the caller
    (``optax.apply_if_finite``).

    Args:
      config: a mapping; it is not changed.

    Returns:
      The config; ``config.build()`` is the optimizer. A custom ``schedule_decay`` survives, which Keras' own
      ``from_config(get_config())`` resets to 0.004.

    Raises:
      ValueError: an unknown key, optimizer or schedule, a missing key, an option that has no counterpart, each by
        name, or a number out of range.
      TypeError: a value that is no number.

    Examples:
      >>> from optax_nadam.compat import keras
      >>> theirs = {"name": "Nadam", "learning_rate": 0.01, "decay": 0.004}
      >>> config = keras.config_from(theirs | {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-07})
      >>> config.learning_rate, config.momentum_decay
      (0.01, 0.004)
    """
    if "class_name" in config:
        return config_from(configs.unwrapped(config))
    if "inner_optimizer" in config:
        check_keys("LossScaleOptimizer config", config, configs.ACCEPTED["loss scale"])
        inner = configs.unwrapped(config["inner_optimizer"])
        rule = "loss_scaled" if configs.dialect_of(inner) == "keras" else "scheduled"
        return dataclasses.replace(config_from(inner), rule=rule)
    dialect = configs.dialect_of(config)
    config = {"learning_rate" if key == "lr" else key: value for key, value in config.items()}
    check_keys(f"{dialect} Nadam config", config, configs.ACCEPTED[dialect])
    missing = sorted(configs.STEP - set(config))
    if missing:
        raise ValueError(f"{dialect} Nadam config lacks {', '.join(missing)}.")
    fields = configs.legacy_fields(config) if dialect == "legacy" else configs.keras_fields(config, dialect)
    return configs.checked(learning_rate=configs.rate_from(config["learning_rate"], dialect), **fields)


def config_to(config: NadamConfig, dialect: str = "keras") -> dict[str, Any]:
    """The dict from which Keras' own ``Nadam.from_config`` makes the optimizer of these hyperparameters.

    For the rule ``"loss_scaled"`` it is one for ``keras.optimizers.LossScaleOptimizer.from_config``. The other way
    round, ``config_from(config_to(config, dialect)) == config``, but for what has no effect and no word in Keras:
    ``complex_as_real``, and the kind of a weight decay of zero.

    Args:
      config: the hyperparameters.
      dialect: ``"keras"``, ``"tf_keras"`` or ``"legacy"``.

    Returns:
      A new dict of plain data.

    Raises:
      ValueError: a field that the dialect has no word for, by name, or an unknown dialect.

    Examples:
      >>> import optax_nadam
      >>> from optax_nadam.compat import keras
      >>> config = optax_nadam.NadamConfig(learning_rate=0.01)
      >>> keras.config_to(config, "legacy")["schedule_decay"]
      0.004
      >>> keras.config_from(keras.config_to(config, "legacy")) == config
      True
    """
    _check_dialect(dialect)
    configs.check_said(config, dialect)
    theirs = {
        "learning_rate": configs.rate_to(config.learning_rate),
        "beta_1": config.b1,
        "beta_2": config.b2,
        "epsilon": config.eps,
        "clipnorm": config.clip_norm,
        "clipvalue": config.clip_value,
        "global_clipnorm": config.clip_global_norm,
    }
    if dialect == "legacy":
        clips = {key: value for key, value in theirs.items() if value is not None}
        return {"name": "Nadam", **clips, "schedule_decay": config.momentum_decay}
    theirs |= {"weight_decay": config.weight_decay or None}
    theirs |= {"use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None}
    if dialect == "tf_keras":
        return {"name": "Nadam", **theirs, "jit_compile": True, "is_legacy_optimizer": False}
    steps = config.accumulate_steps if config.accumulate_steps > 1 else None
    theirs = {"name": "nadam", **theirs, "loss_scale_factor": None, "gradient_accumulation_steps": steps}
    if config.rule == "scheduled":
        return theirs
    inner = {"module": "keras.optimizers", "class_name": "Nadam", "config": theirs, "registered_name": None}
    return {"name": "loss_scale_optimizer", "inner_optimizer": inner}


def load_state(
    opt_state: Any,
    source: Any,
    to_params: Callable[[list[np.ndarray]], Any],
    *,
    config: NadamConfig | None = None,
    dialect: str | None = None,
) -> Any:
    """The optimizer state that goes on where a Keras optimizer stopped.

    Args:
      opt_state: a fresh state of the optimizer that is to go on, at any depth of chains and wrappers.
      source: one of

        * the list that ``optimizer.get_weights()`` returned (legacy, Keras 2);
        * ``optimizer.variables`` or ``optimizer.weights``, or the list of their values;
        * the path of a model's ``.h5``, ``.keras`` or ``.weights.h5`` file, which needs ``h5py``.
      to_params: turns the list of the model's trainable weights into the params; moments have the same shapes.
      config: the hyperparameters of the optimizer. Needed where the checkpoint has no momentum product, which is then
        rebuilt, or gradients are accumulated; files, except for ``.weights.h5``, have it themselves.
      dialect: who wrote the checkpoint: ``"keras"``, ``"tf_keras"`` or ``"legacy"``; None to find out from
        names or shapes.

    Returns:
      A new state, of the dtypes of the old one.

    Raises:
      ValueError: no optimizer state, arrays that fit no layout or more than one, moments that do not fit the params,
        no config where one is needed, or accumulation, there or here, that had not come to its end.
      ImportError: a file is to be read without ``h5py``.

    Warns:
      UserWarning: the momentum product was not in the checkpoint and has been rebuilt; the learning rate in the
        checkpoint is not that of the config.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from optax_nadam.compat import keras
      >>> get_weights = [np.array(1), np.float32(0.4501), np.array([0.05]), np.array([0.00025])]
      >>> tx = keras.legacy_nadam()
      >>> state = keras.load_state(tx.init({"w": jnp.ones(1)}), get_weights, lambda weights: {"w": weights[0]})
      >>> [x.tolist() for x in keras.get_weights(state)][0]
      1
    """
    if dialect is not None:
        _check_dialect(dialect)
    _check_between_steps(opt_state)
    elements = sum(leaf.size for leaf in jax.tree.leaves(get_numbers(opt_state).m))
    found = files.read(source, dialect, elements)
    if config is None and (found.product is None or found.accumulates is not False):
        if found.config is None:
            raise ValueError(
                "config is needed: the checkpoint lacks the momentum product, or holds accumulated gradients or"
                " averages. Pass config=config_from(optimizer.get_config())."
            )
        config = config_from(found.config)
    count = _steps_taken(found, 1 if config is None else config.accumulate_steps)
    product = found.product
    if product is None:
        assert config is not None  # checked above
        product = rebuilt_product(count, config)
        _warn_of_product(found.dialect, count, config)
    if config is not None:
        _warn_of_rate(found.rate, config)
    return put_state(opt_state, count=count, mu_product=product, m=to_params(found.m), v=to_params(found.v))


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Sequence[Any]],
    *,
    dialect: str = "legacy",
    config: NadamConfig | None = None,
) -> list[np.ndarray]:
    """The arrays that make a Keras optimizer go on from an optimizer state: the way back from :func:`load_state`.

    Args:
      opt_state: a state that holds one :class:`optax_nadam.ScaleByNadamState`.
      from_params: turns params into the list of the model's trainable weights.
      dialect: the order. ``"legacy"``: ``[iterations, momentum_cache, *m, *v]`` for ``optimizer.set_weights``;
        ``"tf_keras"``: ``[iteration, m, v, m, v, ...]``, which has no place for the product; ``"keras"``:
        ``optimizer.variables`` of Keras from 3.10, of the inner optimizer for the rule ``"loss_scaled"``.
      config: needed by ``"keras"``: whether there is a learning rate, and accumulation, in between.

    Returns:
      New NumPy arrays.

    Raises:
      ValueError: an unknown dialect, ``"keras"`` without a config, or gradients not yet made into a step.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_nadam.compat import keras
      >>> state = keras.legacy_nadam().init({"w": jnp.ones(3)})
      >>> [x.shape for x in keras.dump_state(state, lambda params: [params["w"]])]
      [(), (), (3,), (3,)]
    """
    _check_dialect(dialect)
    _check_between_steps(opt_state)
    state = get_numbers(opt_state)
    m, v = ([as_numpy(x) for x in from_params(tree)] for tree in (state.m, state.v))
    product, pairs = as_numpy(state.mu_product), [x for pair in zip(m, v, strict=True) for x in pair]
    if dialect == "legacy":
        return [np.asarray(state.count, np.int64), product, *m, *v]
    if dialect == "tf_keras":
        return [np.asarray(state.count, np.int64), *pairs]
    if config is None:
        raise ValueError("config is needed for dialect='keras', to know which arrays it keeps.")
    steps = config.accumulate_steps
    rate = [np.float32(config.learning_rate)] if isinstance(config.learning_rate, float) else []
    accumulators = [np.zeros_like(x) for x in m] if steps > 1 else []
    behind = [product] if rule_of(config).keeps_product else []
    return [np.asarray(state.count * steps, np.int32), *map(np.asarray, rate), *accumulators, *pairs, *behind]


def get_weights(opt_state: Any) -> list[np.ndarray]:
    """What ``optimizer.get_weights()`` of the legacy Nadam returns: ``[iterations, momentum_cache, *m, *v]``.

    Args:
      opt_state: a state that holds one :class:`optax_nadam.ScaleByNadamState`.

    Returns:
      New NumPy arrays; moments in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: as :func:`dump_state`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam.compat import keras
      >>> [x.tolist() for x in keras.get_weights(keras.legacy_nadam().init(jnp.ones(2)))]
      [0, 1.0, [0.0, 0.0], [0.0, 0.0]]
    """
    return dump_state(opt_state, jax.tree.leaves)


def set_weights(opt_state: Any, weights: Sequence[Any]) -> Any:
    """An optimizer state with weights as :func:`get_weights` returns them.

    Args:
      opt_state: a state of the optimizer that is to go on; it is not changed.
      weights: ``[iterations, momentum_cache, *m, *v]``, moments in the order of ``jax.tree.leaves``.

    Returns:
      A new state, of the dtypes of the old one.

    Raises:
      ValueError: the weights do not fit the state in number or shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam.compat import keras
      >>> state = keras.legacy_nadam().init(jnp.ones(2))
      >>> weights = keras.get_weights(state)
      >>> weights[2] = weights[2] + 1
      >>> [x.tolist() for x in keras.get_weights(keras.set_weights(state, weights))]
      [0, 1.0, [1.0, 1.0], [0.0, 0.0]]
    """
    leaves, structure = jax.tree.flatten(get_numbers(opt_state).m)
    if len(weights) != 2 + 2 * len(leaves):
        raise ValueError(f"weights must be {2 + 2 * len(leaves)} arrays for {len(leaves)} leaves, got {len(weights)}.")
    return load_state(opt_state, weights, lambda leaves: jax.tree.unflatten(structure, leaves), dialect="legacy")


def _check_dialect(dialect: str) -> None:
    """Rejects an unknown dialect."""
    if dialect not in files.DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(map(repr, files.DIALECTS))}, got {dialect!r}.")


def _check_between_steps(opt_state: Any) -> None:
    """Rejects a state that has accumulated gradients."""
    if int(optax.tree.get(opt_state, "mini_step", 0)):
        raise ValueError("opt_state holds accumulated gradients that no step has used yet; take it after a step.")


def _steps_taken(found: files.Checkpoint, steps: int) -> int:
    """Steps from gradients."""
    if found.accumulates is False:
        return found.iterations
    if found.accumulates and steps == 1:
        raise ValueError("the checkpoint holds accumulated gradients, but config has accumulate_steps=1.")
    count, left_over = divmod(found.iterations, steps)
    if left_over:
        raise ValueError(
            f"the checkpoint was saved after {found.iterations} gradients, in the middle of accumulating"
            f" {steps} for a step; save it after a multiple of {steps}."
        )
    return count


def _warn_of_product(dialect: str, count: int, config: NadamConfig) -> None:
    """Says that the product was rebuilt, unless it is not used."""
    if not rule_of(config).keeps_product:
        return
    aside = {
        "legacy": "",
        "tf_keras": " tf_keras inside fit() multiplies it about once per variable and step, so its own run differs.",
        "keras": " Under LossScaleOptimizer and JAX, Keras forgets it at every step: that is rule='loss_scaled'.",
    }[dialect]
    warnings.warn(
        f"the checkpoint does not keep the momentum product; it was rebuilt from {count} steps, b1={config.b1} and"
        f" momentum_decay={config.momentum_decay}.{aside}",
        stacklevel=3,
    )


def _warn_of_rate(rate: float | None, config: NadamConfig) -> None:
    """Says that the learning rate has changed since the config was made."""
    if rate is not None and isinstance(config.learning_rate, float) and np.float32(config.learning_rate) != rate:
        warnings.warn(
            f"the checkpoint's learning rate is {rate!r}, the config's {config.learning_rate!r}; the optimizer keeps"
            " its own.",
            stacklevel=3,
        )
