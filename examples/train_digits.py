"""A small convolutional network on scikit-learn's handwritten digits, trained with Nadam and with Adam.

It trains with optax_nadam.nadam, optax.nadam and optax.adam, all at the same learning rate over several seeds, prints
the accuracy on held-out digits and draws the loss curves. Under two minutes on two CPU cores.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _shared import Parser, natural, png, positive
from flax import nnx
from jax import numpy as jnp
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optax_nadam

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "optax_nadam.nadam": optax_nadam.nadam,
    "optax.nadam": optax.nadam,
    "optax.adam": optax.adam,
}


class Network(nnx.Module):
    """Two convolutions and a linear layer, for images of 8 x 8 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.last = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (batch, 10) for images of shape (batch, 8, 8, 1)."""
        x = nnx.relu(self.first(images))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), strides=(2, 2))
        return self.last(x.reshape(x.shape[0], -1))


def warmup_cosine(steps: int) -> optax.Schedule:
    """A learning rate that rises for a tenth of the run and then falls to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, max(1, steps // 10), max(2, steps))


def train(name: str, steps: int, seed: int, data: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Trains one network; returns its loss at each step and its accuracy on the test digits."""
    graph, params = nnx.split(Network(nnx.Rngs(seed)))
    tx = optax.chain(optax_nadam.clip_by_global_norm(1.0), OPTIMIZERS[name](warmup_cosine(steps)))
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, losses = np.random.default_rng(seed), []
    bar = tqdm(range(steps), desc=f"{name}, seed {seed}", mininterval=0.5)
    for _ in bar:
        batch = rng.choice(len(data["train_labels"]), BATCH_SIZE, replace=False)
        params, opt_state, loss = step(params, opt_state, data["train_images"][batch], data["train_labels"][batch])
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    predicted = nnx.merge(graph, params)(data["test_images"]).argmax(axis=-1)
    return np.array(losses), float(jnp.mean(predicted == data["test_labels"]))


def load_data() -> dict[str, Any]:
    """The digits in [0, 1], a quarter held out, the same whatever the seed."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    parts = train_test_split(images, labels.astype(np.int32), test_size=0.25, stratify=labels, random_state=0)
    return dict(zip(("train_images", "test_images", "train_labels", "test_labels"), parts, strict=True))


def draw(losses: dict[str, np.ndarray], path: Path) -> None:
    """Draws the median loss over the seeds, smoothed, with the range of the seeds shaded."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, runs in losses.items():
        width = max(1, runs.shape[1] // 30)
        smooth = np.stack([np.convolve(run, np.ones(width) / width, mode="valid") for run in runs])
        steps = np.arange(smooth.shape[1]) + width
        (line,) = axes.plot(steps, np.median(smooth, axis=0), label=name)
        axes.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=line.get_color(), alpha=0.2, lw=0)
    seeds = len(next(iter(losses.values())))
    axes.set(yscale="log", xlabel="step", ylabel=f"training loss, mean of {width} steps")
    axes.set_title(f"Digits, one learning rate for all: median and range of {seeds} seeds", fontsize=10)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains, reports, draws."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=600, help="training steps of each run")
    parser.add_argument("--seed", type=natural, default=0, help="first seed")
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds")
    parser.add_argument("--out", type=png, default=Path("out/digits.png"), help="file of the picture")
    arguments = parser.parse_args()

    data, started = load_data(), time.perf_counter()
    losses: dict[str, np.ndarray] = {}
    for name in OPTIMIZERS:
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        runs = [train(name, arguments.steps, seed, data) for seed in seeds]
        losses[name] = np.stack([curve for curve, _ in runs])
        accuracies = np.array([accuracy for _, accuracy in runs])
        print(
            f"{name}: test accuracy {np.median(accuracies):.2%} "
            f"({accuracies.min():.2%} to {accuracies.max():.2%} over {len(runs)} seeds)"
        )
    draw(losses, arguments.out)
    print(f"{time.perf_counter() - started:.0f} s in all; loss curves in {arguments.out}")


if __name__ == "__main__":
    main()
