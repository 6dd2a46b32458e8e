"""Population-based training: vmap over networks and their hyperparameters, in one compiled step.

Each member has its own learning rate and momentum. After each round the worst quarter copies the weights, the moments
and the hyperparameters of the best quarter, and perturbs its learning rates.
"""

from typing import Any

import jax
import numpy as np
import optax
from _shared import arguments, digits_in_batches, initial_params, loss_of, make_step
from jax import numpy as jnp

import optax_nadam

MEMBERS, ROUNDS = 8, 5


def survivors(scores: np.ndarray) -> np.ndarray:
    """Which member each member continues from: itself, or one of the best."""
    quarter, order, source = MEMBERS // 4, np.argsort(scores), np.arange(MEMBERS)
    source[order[-quarter:]] = order[:quarter]
    return source


def main() -> tuple[list[float], np.ndarray]:
    """Trains; returns the best loss after each round, and the final learning rates."""
    chosen = arguments(__doc__, steps=300)
    rng = np.random.default_rng(chosen.seed)
    batches = digits_in_batches(chosen.steps, chosen.seed)
    everything = digits_in_batches(8, chosen.seed + 1)
    images, labels = (np.concatenate(parts) for parts in zip(*everything, strict=True))

    members = [initial_params(chosen.seed + member) for member in range(MEMBERS)]
    params: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    tx = optax.inject_hyperparams(optax_nadam.nadam)(learning_rate=1e-3, b1=0.9)
    state: Any = jax.vmap(tx.init)(params)
    state.hyperparams["learning_rate"] = jnp.asarray(10 ** rng.uniform(-4, -1, MEMBERS), jnp.float32)
    state.hyperparams["b1"] = jnp.asarray(rng.uniform(0.5, 0.99, MEMBERS), jnp.float32)

    step = jax.vmap(make_step(tx), in_axes=(0, 0, None, None))
    score = jax.jit(jax.vmap(loss_of, in_axes=(0, None, None)))
    best = []
    for part in np.array_split(np.arange(len(batches)), ROUNDS):
        for i in part:
            params, state, _ = step(params, state, *batches[i])
        scores = np.asarray(score(params, images, labels))
        best.append(float(scores.min()))
        h = {name: float(x[scores.argmin()]) for name, x in state.hyperparams.items()}
        print(f"best loss {best[-1]:.4f}, at learning rate {h['learning_rate']:.5f} and b1 {h['b1']:.3f}")
        source = survivors(scores)
        params, state = jax.tree.map(lambda x, source=source: x[source], (params, state))
        changed = jnp.asarray(
            np.where(source == np.arange(MEMBERS), 1.0, rng.choice([0.8, 1.25], MEMBERS)), jnp.float32
        )
        state.hyperparams["learning_rate"] *= changed
    return best, np.asarray(state.hyperparams["learning_rate"])


if __name__ == "__main__":
    main()
