"""Reading and changing the learning rate during a run: optax.inject_hyperparams stores it in the state."""

import optax
from _shared import arguments, digits_in_batches, initial_params, make_step, report, train
from jax import numpy as jnp

import optax_nadam


def main() -> tuple[list[float], list[float]]:
    """Trains in four parts, each at half the learning rate of the one before; returns learning rates and losses."""
    chosen = arguments(__doc__, steps=300)
    batches, params = digits_in_batches(chosen.steps, chosen.seed), initial_params(chosen.seed)
    tx = optax.chain(
        optax_nadam.clip_by_global_norm(1.0), optax.inject_hyperparams(optax_nadam.nadamw)(learning_rate=1e-2)
    )
    state, step = tx.init(params), make_step(tx)
    learning_rates: list[float] = []
    losses: list[float] = []
    quarter = -(-len(batches) // 4)
    for start in range(0, len(batches), quarter):
        params, state, part = train(step, params, state, batches[start : start + quarter])
        learning_rate = optax.tree.get(state, "learning_rate")
        print(f"step {start + len(part)}: learning rate {learning_rate:.5f}, loss {part[-1]:.4f}")
        learning_rates.append(float(learning_rate))
        losses.extend(part)
        state = optax.tree.set(state, learning_rate=jnp.float32(learning_rate / 2))  # without another compilation
    report(losses)
    return learning_rates, losses


if __name__ == "__main__":
    main()
