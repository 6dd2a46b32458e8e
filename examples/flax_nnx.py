"""Flax nnx: Nadam in an nnx.Optimizer, which updates the model in place."""

from typing import Any

import jax
from _shared import arguments, cross_entropy, digits_in_batches, report
from flax import nnx
from jax.typing import ArrayLike

import optax_nadam


@nnx.jit
def step(model: nnx.Sequential, optimizer: Any, images: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Updates the model and returns the loss."""
    loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(images), labels))(model)
    optimizer.update(model, grads)
    return loss


def main() -> list[float]:
    """Trains on the digits."""
    chosen = arguments(__doc__, steps=300)
    rngs = nnx.Rngs(chosen.seed)
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax_nadam.nadamw(3e-3), wrt=nnx.Param)
    losses = [float(step(model, optimizer, *batch)) for batch in digits_in_batches(chosen.steps, chosen.seed)]
    report(losses)
    return losses


if __name__ == "__main__":
    main()
