"""What the examples share: arguments, the digits, a network in JAX, a picture of one run in two frameworks."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits


class Parser(argparse.ArgumentParser):
    """A parser that answers a bad argument with one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def positive(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A whole number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def png(text: str) -> Path:
    """A path to a PNG."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)


def digits_in_batches(number: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of 64 handwritten digits: 64 pixels each in [0, 1], and labels."""
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    rows = [rng.choice(len(labels), 64, replace=False) for _ in range(number)]
    return [((pixels[row] / 16).astype(np.float32), labels[row]) for row in rows]


def loss_of(params: dict[str, Any], images: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of the network of 64, 32 and 10 units that the examples bring over."""
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["last"]["kernel"] + params["last"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_in_jax(params: Any, tx: Any, state: Any, batches: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """The loss at each batch."""

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for images, labels in batches:
        params, state, loss = step(params, state, images, labels)
        losses.append(float(loss))
    return losses


def draw_continuations(framework: str, before: list[float], there: list[float], here: list[float], path: Path) -> None:
    """Draws the common part and both continuations, and prints how far apart they are."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(before, color="0.6", label=f"{framework}, before the checkpoint")
    steps = np.arange(len(before), len(before) + len(there))
    axes.plot(steps, there, lw=4, alpha=0.4, label=f"{framework}, going on")
    axes.plot(steps, here, lw=1.2, label="JAX, going on from the checkpoint")
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title="Digits: one run, two frameworks")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"loss at the end: {framework} {there[-1]:.6f}, JAX {here[-1]:.6f}")
    print(
        f"largest relative difference on the way: {max(abs(a / b - 1) for a, b in zip(here, there, strict=True)):.1e}"
    )
    print(f"both curves in {path}")
