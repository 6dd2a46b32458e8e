"""Records what the real Kerases compute, for tests that run without them.

Run as ``python -m tests.parity.record_keras``. With ``--old PATH``, where PATH holds an unpacked Keras 3.0 to 3.9,
only that Keras' checkpoint and the steps after it are recorded: its product of the momenta has another place. With
``--named``, the checkpoints that are read by name are.
"""

import json
import os
import pathlib
import sys
import tempfile
import warnings
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import numpy as np
from jax import numpy as jnp

from tests.parity.problem import problem

HERE = pathlib.Path(__file__).parent.parent / "compat" / "recordings"
STEPS = [0, 1, 2, 9, 29, 59]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "keras": {
        "defaults": {},
        "decay": {"learning_rate": 0.01, "weight_decay": 0.1, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-3},
        "clipnorm": {"clipnorm": 0.5},
        "clipvalue": {"clipvalue": 0.1},
        "global_clipnorm": {"global_clipnorm": 1.0},
        "accumulation": {"gradient_accumulation_steps": 3},
    },
    "tf_keras": {"defaults": {}, "decay": {"learning_rate": 0.01, "weight_decay": 0.1}},
    "legacy": {
        "defaults": {},
        "numbers": {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-3, "schedule_decay": 0.3},
        "clips": {"clipvalue": 0.1, "clipnorm": 0.2},
        "global_clipnorm": {"global_clipnorm": 1.0},
    },
}


def record():
    """Trajectories, the optimizer's arrays after them, and configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras
        import tensorflow
        import tf_keras
    arrays: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    kinds = {
        "keras": keras.optimizers.Nadam,
        "tf_keras": tf_keras.optimizers.Nadam,
        "legacy": tf_keras.optimizers.legacy.Nadam,
    }
    for dialect, cases in CASES.items():
        for case, arguments in cases.items():
            optimizer = kinds[dialect](**arguments)
            config = optimizer.get_config()
            package = keras if dialect == "keras" else tf_keras
            trajectory, state = run(dialect, optimizer)
            configs[f"{dialect}/{case}"] = {"config": config, "serialized": package.optimizers.serialize(optimizer)}
            arrays |= {
                f"{dialect}/{case}/{name}": np.stack([p[name] for p in trajectory])[STEPS] for name in trajectory[0]
            }
            if case == "defaults":
                arrays |= {f"{dialect}/state/{i}": x for i, x in enumerate(state)}
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    configs["keras/schedule"] = {"config": keras.optimizers.Nadam(schedule).get_config()}
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Nadam(0.01))
    configs["keras/loss scaled"] = {"config": scaled.get_config(), "serialized": keras.optimizers.serialize(scaled)}
    versions = {x.__name__: x.__version__ for x in (keras, tf_keras, tensorflow, jax, np)}
    np.savez_compressed(HERE / "keras.npz", **arrays)
    recorded = {"versions": versions, "steps": STEPS, "arguments": CASES, "configs": configs}
    (HERE / "keras.json").write_text(json.dumps(recorded, indent=1, default=float) + "\n")


def run(dialect, optimizer):
    """Parameters by name after each step, and the optimizer's arrays after the last."""
    params, grads = problem(0)
    trajectory = []
    if dialect == "keras":
        import keras

        variables = [keras.Variable(p, name=name) for name, p in params.items()]
        optimizer.build(variables)
        step = jax.jit(optimizer.stateless_apply)
        values, state = [v.value for v in variables], [v.value for v in optimizer.variables]
        for g in grads:
            values, state = step(state, [jnp.asarray(g[name]) for name in params], values)
            trajectory.append(dict(zip(params, map(np.asarray, values), strict=True)))
        return trajectory, [np.asarray(x) for x in state]
    import tensorflow as tf

    by_name = {name: tf.Variable(p, name=name) for name, p in params.items()}
    for g in grads:
        optimizer.apply_gradients([(tf.constant(g[name]), by_name[name]) for name in params])
        trajectory.append({name: v.numpy() for name, v in by_name.items()})
    return trajectory, [v.numpy() for v in (optimizer.weights if dialect == "legacy" else optimizer.variables)]


def record_old(path):
    """A file of a Keras before 3.10, and ten steps that its optimizer took after."""
    sys.path.insert(0, path)
    import keras

    rng = np.random.default_rng(11)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2, use_bias=False)])
    model.compile(keras.optimizers.Nadam(0.01, weight_decay=0.1), "mse")
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    variables = model.trainable_variables
    model.optimizer.build(variables)
    arrays: dict[str, Any] = {}
    for step in range(35):
        grads = [rng.normal(size=v.shape).astype(np.float32) for v in variables]
        model.optimizer.apply([jnp.asarray(g) for g in grads], variables)
        if step == 24:
            model.save(HERE / "keras_old.keras")
            arrays |= {f"variable/{i}": np.asarray(v) for i, v in enumerate(model.optimizer.variables)}
            arrays |= {f"before/{i}": np.asarray(v) for i, v in enumerate(variables)}
        if step > 24:
            arrays |= {f"grad/{step - 25}/{i}": g for i, g in enumerate(grads)}
            arrays |= {f"after/{step - 25}/{i}": np.asarray(v) for i, v in enumerate(variables)}
    np.savez_compressed(HERE / "keras_old.npz", version=keras.__version__, **arrays)


def record_named():
    """Checkpoints as mappings of names to arrays, and the steps after them; each as few long arrays."""
    from tests.parity import keras_sources as sources

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        for name in ("tf_keras", "saver", "contrib"):
            (path / name).mkdir()
        runs = {
            "legacy": sources.tensorflow_run("legacy", sources.tensorflow_savers(path)["mapping"]),
            "tf_keras": sources.tensorflow_run("tf_keras", sources.tensorflow_savers(path / "tf_keras")["mapping"]),
            "tf.keras Saver": sources.graph_run(sources.graph_nadam, path / "saver"),
            "tf.contrib Saver": sources.graph_run(sources.contrib_nadam, path / "contrib"),
            "state tree": sources.keras_run(sources.keras_savers(path)["get_state_tree"]),
        }
        runs = {
            name: found if isinstance(found.source, dict) else found._replace(source=sources.tensors(found.source))
            for name, found in runs.items()
        }
    arrays, names = {}, {}
    for case, found in runs.items():
        flat = {name: np.asarray(x) for name, x in flatten(found.source) if not isinstance(x, bytes)}
        order = [next(n for n, x in flat.items() if np.array_equal(x, w)) for w in found.weights]
        names[case] = {"shapes": {name: x.shape for name, x in flat.items()}, "order": order}
        arrays[f"{case}/source"] = together(flat.values()).astype(np.float64)
        for part in ("grads", "after"):
            arrays[f"{case}/{part}"] = np.stack([together(x) for x in getattr(found, part)])
    np.savez_compressed(HERE / "keras_named.npz", **arrays)
    (HERE / "keras_named.json").write_text(json.dumps(names, indent=1) + "\n")


def flatten(tree, prefix=""):
    """Names with slashes, and arrays."""
    for name, x in tree.items():
        yield from flatten(x, f"{prefix}{name}/") if isinstance(x, dict) else [(prefix + name, x)]


def together(arrays):
    """The numbers of arrays, one after another."""
    return np.concatenate([np.ravel(x) for x in arrays])


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    if "--named" in sys.argv:
        record_named()
    else:
        record_old(sys.argv[2]) if "--old" in sys.argv else record()
