"""What the examples share: arguments, the digits, a network and its training in JAX, printing."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from jax.typing import ArrayLike
from sklearn.datasets import load_digits

Batch = tuple[np.ndarray, np.ndarray]


class Parser(argparse.ArgumentParser):
    """A parser that reports a bad argument in one line."""

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


def arguments(description: str | None, steps: int, out: str | None = None) -> argparse.Namespace:
    """The arguments of a short example: steps, a seed and, where it draws, the picture."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=steps, help="training steps")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights and the batches")
    if out:
        parser.add_argument("--out", type=png, default=Path(out), help="file of the picture")
    return parser.parse_args()


def digits_in_batches(number: int, seed: int) -> list[Batch]:
    """Batches of 64 handwritten digits: 64 pixels each in [0, 1], and labels."""
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    rows = [rng.choice(len(labels), 64, replace=False) for _ in range(number)]
    return [((pixels[row] / 16).astype(np.float32), labels[row]) for row in rows]


def initial_params(seed: int) -> dict[str, Any]:
    """Weights of the network of 64, 32 and 10 units."""
    rng = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        kernel = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}

    return {"hidden": layer(64, 32), "last": layer(32, 10)}


def cross_entropy(logits: jax.Array, labels: ArrayLike) -> jax.Array:
    """The mean cross-entropy of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_of(params: dict[str, Any], images: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of the network of 64, 32 and 10 units."""
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["last"]["kernel"] + params["last"]["bias"]
    return cross_entropy(logits, labels)


def make_step(tx: optax.GradientTransformation, loss_of: Callable[..., jax.Array] = loss_of) -> Callable[..., Any]:
    """A training step: from params, optimizer state and a batch to new params, new state and loss."""

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(step: Callable[..., Any], params: Any, state: Any, batches: list[Batch]) -> tuple[Any, Any, list[float]]:
    """The params and the optimizer state after all batches, and the loss of each batch."""
    losses = []
    for images, labels in batches:
        params, state, loss = step(params, state, images, labels)
        losses.append(float(loss))
    return params, state, losses


def report(losses: list[float]) -> None:
    """Prints the first and the last loss."""
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} after {len(losses)} steps")
