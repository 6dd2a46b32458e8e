"""A learning rate for each layer: optax.partition gives each its own Nadam."""

from typing import Any

import jax
import optax
from _shared import arguments, digits_in_batches, initial_params, make_step, report, train
from jax import numpy as jnp

import optax_nadam

LEARNING_RATES = {"hidden": 3e-4, "last": 3e-3}


def main() -> tuple[dict[str, float], list[float]]:
    """Trains; returns the largest change of a weight of each layer in the first step, and the losses."""
    chosen = arguments(__doc__, steps=300)
    batches, params = digits_in_batches(chosen.steps, chosen.seed), initial_params(chosen.seed)
    optimizers: dict[Any, optax.GradientTransformation] = {
        layer: optax_nadam.nadam(learning_rate) for layer, learning_rate in LEARNING_RATES.items()
    }
    tx = optax.partition(optimizers, {layer: layer for layer in params})
    step = make_step(tx)
    first, _, _ = step(params, tx.init(params), *batches[0])
    moves = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old)), first, params)
    largest = {layer: float(jnp.asarray(optax.tree.max(moves[layer]))) for layer in LEARNING_RATES}
    for layer, move in largest.items():
        print(f"{layer}: learning rate {LEARNING_RATES[layer]:g}, the first step moves a weight by up to {move:.6f}")

    _, _, losses = train(step, params, tx.init(params), batches)
    report(losses)
    return largest, losses


if __name__ == "__main__":
    main()
