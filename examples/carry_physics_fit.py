"""A regression like the fit of a parton distribution, carried over from Keras 3 to JAX.

keras.optimizers.Nadam trains it with a clipnorm, which clips the gradient of each variable by its own norm; in JAX, the
Nadam that its config makes here trains it, and so does optax.nadam, not clipped and clipped in two ways. The picture
shows how far each is from Keras' weights, relative to their own way from the start. The weights are recorded, so that
the example runs without Keras.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _shared import Parser, png, positive
from jax import numpy as jnp
from matplotlib.figure import Figure

from optax_nadam import compat

RECORDING = Path(__file__).parent / "data" / "physics_fit.npz"
STEPS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 140, 160, 180, 200, 300, 400, 500)  # whose weights are recorded
UNITS = (2, 25, 20, 8)  # network, learning rate and clipnorm are those of NNPDF's fits; the data are made up
LEARNING_RATE, CLIPNORM = 2.621e-3, 6.073e-6
ONE_BIT = "Keras, one weight changed in its last bit"

Weights = list[Any]  # kernel and bias of each layer, in Keras' order


def data() -> tuple[np.ndarray, np.ndarray]:
    """Momentum fractions x and their logarithms, and eight functions x**a (1 - x)**b with noise."""
    x = np.geomspace(1e-4, 0.9, 100)[:, None]
    a, b = np.linspace(0.1, 1.2, 8), np.array([3, 5, 4, 7, 3, 6, 4, 5])
    noise = 0.01 * np.random.default_rng(0).normal(size=(len(x), 8))
    return np.hstack([x, np.log(x)]).astype(np.float32), (x**a * (1 - x) ** b + noise).astype(np.float32)


def flat(weights: Weights) -> np.ndarray:
    """All weights in one vector."""
    return np.concatenate([np.ravel(weight) for weight in weights])


def shaped(vector: np.ndarray) -> Weights:
    """The weights of the layers in one vector."""
    shapes = [shape for pair in itertools.pairwise(UNITS) for shape in (pair, pair[1:])]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(vector, ends[:-1]), shapes, strict=True)]


def keras_model() -> Any:
    """The compiled model in Keras."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # here, so that the example runs without it

    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(units, activation, kernel_initializer="glorot_normal")
        for units, activation in zip(UNITS[1:], ("tanh", "tanh", "linear"), strict=True)
    ]
    model = keras.Sequential([keras.layers.Input(UNITS[:1]), *layers])
    model.compile(keras.optimizers.Nadam(LEARNING_RATE, clipnorm=CLIPNORM), "mse")
    return model


def train_in_keras(start: np.ndarray, steps: int) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """The config of the optimizer, and the weights after the steps that are recorded."""
    model, (x, y) = keras_model(), data()
    model.set_weights(shaped(start))
    found = {}
    for step in range(1, steps + 1):
        model.train_on_batch(x, y)
        if step in STEPS:
            found[step] = flat(model.get_weights())
    return model.optimizer.get_config(), found


def record() -> None:
    """Writes the recording: Keras from its own start, and from one with the last bit of one weight changed."""
    start = flat(keras_model().get_weights())
    one_bit = start.copy()
    one_bit[0] = np.nextafter(start[0], np.float32(np.inf))
    config, weights = train_in_keras(start, STEPS[-1])
    _, others = train_in_keras(one_bit, STEPS[-1])
    np.savez_compressed(
        RECORDING,
        config=json.dumps(config),
        start=start,
        steps=STEPS,
        weights=np.stack([*weights.values()]),
        one_bit=np.stack([*others.values()]),
    )


def optimizers(config: dict[str, Any]) -> Iterator[tuple[str, optax.GradientTransformation]]:
    """Ours and optax.nadam, with what a user may put before it."""

    def clip(g: jax.Array) -> jax.Array:
        return g * jnp.minimum(1, CLIPNORM / jnp.linalg.norm(g))

    by_leaf = optax.stateless(lambda grads, _: jax.tree.map(clip, grads))
    by_all = optax.clip_by_global_norm(CLIPNORM)
    yield "optax_nadam, from Keras' config", compat.keras.config_from(config).build()
    yield "optax.nadam", optax.nadam(LEARNING_RATE)
    yield "optax.nadam, clipped by the global norm", optax.chain(by_all, optax.nadam(LEARNING_RATE))
    yield "optax.nadam, clipped per variable, eps 1e-7", optax.chain(by_leaf, optax.nadam(LEARNING_RATE, eps=1e-7))


def loss_of(weights: Weights, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error of the network."""
    *hidden_layers, (kernel, bias) = zip(weights[::2], weights[1::2], strict=True)
    for hidden_kernel, hidden_bias in hidden_layers:
        x = jnp.tanh(jnp.dot(x, hidden_kernel, precision="highest") + hidden_bias)
    return jnp.mean((jnp.dot(x, kernel, precision="highest") + bias - y) ** 2)


def train(tx: optax.GradientTransformation, start: np.ndarray, steps: int) -> np.ndarray:
    """The weights after each step, one vector each."""
    x, y = (jnp.asarray(array) for array in data())

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        weights, state = carry
        updates, state = tx.update(jax.grad(loss_of)(weights, x, y), state, weights)
        moved: Any = optax.apply_updates(weights, updates)
        return (moved, state), jnp.concatenate([jnp.ravel(weight) for weight in moved])

    weights = [jnp.asarray(weight) for weight in shaped(start)]
    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((weights, tx.init(weights)))[1])


def draw(steps: np.ndarray, distances: dict[str, np.ndarray], path: Path) -> None:
    """A line for each curve."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for (name, values), marker in zip(distances.items(), "osD^.", strict=True):
        look: dict[str, Any] = {"color": "0.5", "ls": "--", "zorder": 3} if name == ONE_BIT else {}
        axes.plot(steps, values, marker=marker, ms=4, lw=1.5, label=name, **look)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="relative distance from Keras' weights")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("A Keras 3 fit with per-variable clipping, repeated in JAX", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Trains in JAX; returns the recorded steps and, for each curve, its distances there."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=STEPS[-1], help=f"training steps, at most {STEPS[-1]}")
    parser.add_argument("--out", type=png, default=Path("out/carry_physics_fit.png"), help="file of the picture")
    parser.add_argument("--record", action="store_true", help="train in Keras first, and record its weights anew")
    arguments = parser.parse_args()
    if arguments.steps > STEPS[-1]:
        parser.error(f"argument --steps: must be at most {STEPS[-1]}, got {arguments.steps}")
    if arguments.record:
        record()

    recording = np.load(RECORDING)
    steps, start = recording["steps"], recording["start"]
    steps = steps[steps <= arguments.steps]
    keras_weights = recording["weights"][: len(steps)]
    runs = {
        name: train(tx, start, arguments.steps)[steps - 1]
        for name, tx in optimizers(json.loads(str(recording["config"])))
    }
    runs[ONE_BIT] = recording["one_bit"][: len(steps)]

    way = np.linalg.norm(keras_weights - start, axis=1)
    distances = {name: np.linalg.norm(run - keras_weights, axis=1) / way for name, run in runs.items()}
    for name, values in distances.items():
        at = {step: f"{value:.1e} at {step}" for step, value in zip(steps.tolist(), values, strict=True)}
        print(f"{name}: " + ", ".join(at[step] for step in sorted({1, 100, 140, 200, max(at)} & set(at))))
    draw(steps, distances, arguments.out)
    print(f"all curves in {arguments.out}")
    return steps, distances


if __name__ == "__main__":
    main()
