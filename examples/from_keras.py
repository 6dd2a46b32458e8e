"""Continue a Keras run in JAX: same weights, same optimizer state, same curve.

A small network is trained on scikit-learn's digits with keras.optimizers.Nadam under a learning rate schedule, saved as
a .keras file, and loaded into JAX with optax_nadam.compat.keras. Then both continue from there, and both curves are
drawn into one picture.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from _shared import Parser, digits_in_batches, make_step, natural, png, positive, train
from jax import numpy as jnp
from matplotlib.figure import Figure

from optax_nadam import compat


def to_params(weights: list[Any]) -> dict[str, Any]:
    """The parameters in JAX of a Keras model's weights. Moments have the shapes of weights, so it serves both."""
    hidden, hidden_bias, last, last_bias = (jnp.asarray(array) for array in weights)
    return {"hidden": {"kernel": hidden, "bias": hidden_bias}, "last": {"kernel": last, "bias": last_bias}}


def keras_model(seed: int, steps: int) -> Any:
    """A compiled model in Keras."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, 2 * steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Nadam(schedule, weight_decay=1e-2), loss)
    return model


def train_in_keras(model: Any, batches: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """The loss of each batch."""
    return [float(model.train_on_batch(images, labels)) for images, labels in batches]


def draw(before: list[float], there: list[float], here: list[float], path: Path) -> None:
    """Draws the common part and both continuations, and prints how much they differ."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(before, color="0.6", label="Keras, before the checkpoint")
    steps = np.arange(len(before), len(before) + len(there))
    axes.plot(steps, there, lw=4, alpha=0.4, label="Keras, continued")
    axes.plot(steps, here, lw=1.2, label="JAX, continued from the checkpoint")
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title="Digits: one run, two frameworks")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"loss at the end: Keras {there[-1]:.6f}, JAX {here[-1]:.6f}")
    print(f"largest relative difference: {max(abs(a / b - 1) for a, b in zip(here, there, strict=True)):.1e}")
    print(f"both curves in {path}")


def main() -> None:
    """Trains there, loads the checkpoint here, continues in both."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=300, help="steps before the checkpoint, and as many after it")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=png, default=Path("out/from_keras.png"), help="file of the picture")
    arguments = parser.parse_args()

    batches = digits_in_batches(2 * arguments.steps, arguments.seed)
    model = keras_model(arguments.seed, arguments.steps)
    before = train_in_keras(model, batches[: arguments.steps])

    params = to_params([np.asarray(weight.value) for weight in model.trainable_weights])
    tx = compat.keras.config_from(model.optimizer.get_config()).build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        state = compat.keras.load_state(tx.init(params), path, to_params)

    *_, here = train(make_step(tx), params, state, batches[arguments.steps :])
    there = train_in_keras(model, batches[arguments.steps :])
    draw(before, there, here, arguments.out)


if __name__ == "__main__":
    main()
