"""Keras' Nadams under Keras' names: constructors, configs, checkpoints.

Three dialects, here as in every ``dialect`` argument:

* ``"keras"``: Keras 3, the default wherever something is written.
* ``"tf_keras"``: ``tf.keras`` from TensorFlow 2.11 and the package ``tf_keras``. Equal to Keras 3 where it runs
  eagerly. Inside ``fit()`` it multiplies the product of the momenta about once per variable and step, not once per
  step, which is not imitated here; the product vanishes on both sides, so that such a run is continued exactly after
  some tens of steps.
* ``"legacy"``: ``tf.keras`` from TensorFlow 1 to 2.10 and ``optimizers.legacy``; Keras 2.2 and 2.3 are read too.

Neither Keras nor TensorFlow is needed, but for what reads their files: TensorFlow for its checkpoints, ``h5py`` for
``.h5`` and ``.keras``, Orbax for its directories.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jax.typing import ArrayLike

from optax_nadam._config import NadamConfig
from optax_nadam._schedules import ScheduleConfig
from optax_nadam._wrappers import freeze_rows_without_gradient
from optax_nadam.compat import _keras_config as configs
from optax_nadam.compat import _keras_state as states
from optax_nadam.compat._common import build, cannot_express, load

__all__ = [
    "config_from",
    "config_to",
    "dump_state",
    "get_weights",
    "legacy_nadam",
    "load_state",
    "nadam",
    "read_config",
    "read_weights",
    "set_weights",
]

_CLIPS_SLICES = "The original clips slices before it adds up those of one row; clip with Optax around the optimizer."


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
      learning_rate: :math:`\alpha`, a number, a scalar array, an Optax schedule of the steps taken, or a
        :class:`optax_nadam.ScheduleConfig`, which counts the gradients seen, as Keras' own schedules do.
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
    fields = configs.fields(
        "keras",
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        clipnorm=clipnorm,
        clipvalue=clipvalue,
        global_clipnorm=global_clipnorm,
        use_ema=use_ema,
        loss_scale_factor=loss_scale_factor,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    return build(learning_rate, configs.NAMES, fields)


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
        warnings.warn("decay has no effect in the legacy Nadam; schedule_decay is what it calls so.", stacklevel=2)
    learning_rate = learning_rate if lr is None else lr
    if callable(learning_rate) or isinstance(learning_rate, ScheduleConfig):
        raise ValueError(f"learning_rate must not be a schedule in the legacy Nadam, got {learning_rate!r}.")
    clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    for clip, value in clips.items():
        if sparse_rows is not None and value is not None:
            raise cannot_express("legacy_nadam with sparse_rows", clip, value, _CLIPS_SLICES)
    fields = configs.legacy_fields(
        beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, schedule_decay=schedule_decay, **clips
    )
    tx = build(learning_rate, configs.NAMES, fields)
    return tx if sparse_rows is None else freeze_rows_without_gradient(tx, sparse_rows)


def config_from(config: Mapping[str, Any]) -> NadamConfig:
    r"""The config in what ``get_config()`` of a Keras Nadam returns, or ``keras.optimizers.serialize``.

    The dialect is told from the keys: ``decay`` or ``schedule_decay`` is legacy, ``is_legacy_optimizer`` is tf_keras,
    ``loss_scale_factor`` is Keras 3. A ``LossScaleOptimizer`` around a Keras 3 Nadam becomes the rule
    ``"loss_scaled"``, which is what Keras computes there under JAX: its product of the momenta is lost between steps,
    so that :math:`P_t = \mu_t`. Other backends store the product; for those, and to be rid of the flaw, replace the
    rule by ``"scheduled"``. Scaling the loss, and skipping steps that are not finite, is left to the caller
    (``optax.apply_if_finite``).

    Args:
      config: a mapping; it is not changed.

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
    return configs.config_from(config)


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
    return configs.config_to(config, dialect)


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
        momenta, or gradients are accumulated; ``.h5`` and ``.keras`` files have it themselves.
      dialect: which Keras wrote the checkpoint: ``"keras"``, ``"tf_keras"`` or ``"legacy"``; None to find out from
        names or shapes.

    Returns:
      A new state.

    Raises:
      ValueError: no optimizer state, arrays that fit no layout or more than one, moments that do not fit the params,
        no config where one is needed, or accumulation, there or here, that had not come to its end.
      ImportError: a source is to be read without the package that reads it.

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
    return load(opt_state, states.read(opt_state, source, config, dialect).mapped(to_params), config)


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
    return states.write(opt_state, from_params, config, dialect)


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
    return states.to_weights(opt_state, from_params)


def set_weights(opt_state: Any, weights: Sequence[Any], to_params: Callable[[Any], Any]) -> Any:
    """The optimizer state with the weights of a legacy Nadam, the inverse of :func:`get_weights`.

    Args:
      opt_state: a state of the optimizer that is to continue; it is not changed.
      weights: ``[iterations, momentum_cache, *m, *v]``, in the order of the model's trainable weights.
      to_params: turns the list of the model's trainable weights into a tree like the params.

    Returns:
      A new state.

    Raises:
      ValueError: the weights do not fit the state in number or shape.
      TypeError: a moment is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_nadam import compat
      >>> state = compat.keras.legacy_nadam().init({"w": jnp.ones(2)})
      >>> weights = compat.keras.get_weights(state, lambda params: [params["w"]])
      >>> state = compat.keras.set_weights(state, [jnp.array(1), *weights[1:]], lambda weights: {"w": weights[0]})
      >>> int(optax.tree.get(state, "count"))
      1
    """
    return load(opt_state, states.from_weights(opt_state, weights).mapped(to_params), None)


def read_weights(source: Any) -> Any:
    """The model's trainable weights in a checkpoint, in the form in which :func:`load_state` passes its moments.

    With it a run moves from the checkpoint alone: ``params = to_params(read_weights(source))``.

    Args:
      source: as in :func:`load_state`: a TensorFlow checkpoint, a tree or an Orbax directory of Keras 3, or a ``.h5``
        file. A ``.keras`` and a ``.weights.h5`` file do not tell which weights are trainable.

    Returns:
      A dict by name, or, of a ``.h5`` file, a list in the order of ``model.trainable_variables``. A weight without
      moments, which was not trained, is left out.

    Raises:
      ValueError: the source does not tell which of its weights are trainable.
      ImportError: a package is needed that is not installed.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import compat
      >>> saver = {"w": np.ones(1), "training/Nadam/w/m": np.zeros(1), "training/Nadam/w/v": np.zeros(1)}
      >>> compat.keras.read_weights(saver | {"training/Nadam/iter": np.array(1)})
      {'w': array([1.])}
    """
    return states.read_weights(source)


def read_config(source: Any) -> NadamConfig:
    """The hyperparameters in a checkpoint.

    Args:
      source: as in :func:`load_state`: a ``.h5`` or ``.keras`` file, or a TensorFlow checkpoint of the legacy Nadam,
        which stores learning rate, betas and ``schedule_decay``, but neither epsilon, which is then 1e-7, nor clips.

    Returns:
      A config that builds the same optimizer.

    Raises:
      ValueError: the source holds no hyperparameters, or as :func:`config_from`.
      ImportError: a package is needed that is not installed.

    Examples:
      >>> import numpy as np
      >>> from optax_nadam import compat
      >>> numbers = {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.999, "decay": 0.004, "momentum_cache": 0.4}
      >>> compat.keras.read_config({f"Nadam/{name}": np.float32(x) for name, x in numbers.items()}).b1
      0.8
    """
    return states.read_config(source)
