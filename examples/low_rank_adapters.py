"""Low-rank adapters (LoRA): Nadam trains the adapters; the base weights do not change and have no moments.

A network that was trained on the digits is adapted to mirrored digits.
"""

from typing import Any

import jax
import numpy as np
import optax
from _shared import arguments, digits_in_batches, initial_params, loss_of, make_step, report, train
from jax import numpy as jnp

import optax_nadam

RANK = 4


def new_adapters(params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Two low-rank factors for each kernel, whose product is zero at first."""
    rng = np.random.default_rng(seed)

    def factors(kernel: jax.Array) -> dict[str, jax.Array]:
        inputs, outputs = kernel.shape
        down = rng.normal(0, inputs**-0.5, (inputs, RANK)).astype(np.float32)
        return {"down": jnp.asarray(down), "up": jnp.zeros((RANK, outputs))}

    return {name: factors(layer["kernel"]) for name, layer in params.items()}


def adapted_loss(tree: dict[str, Any], images: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of the network with its adapters."""
    adapted = {
        name: layer | {"kernel": layer["kernel"] + tree["adapters"][name]["down"] @ tree["adapters"][name]["up"]}
        for name, layer in tree["base"].items()
    }
    return loss_of(adapted, images, labels)


def main() -> tuple[Any, Any, list[float]]:
    """Trains the network, then its adapters; returns all weights before and after the latter, and the losses."""
    chosen = arguments(__doc__, steps=300)
    batches, tx = digits_in_batches(chosen.steps, chosen.seed), optax_nadam.nadamw(1e-2)
    base = initial_params(chosen.seed)
    base, _, _ = train(make_step(tx), base, tx.init(base), batches)

    before = {"base": base, "adapters": new_adapters(base, chosen.seed)}
    parts = {"base": "frozen", "adapters": "trained"}
    partial = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, parts)
    mirrored = [(images.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64), labels) for images, labels in batches]
    after, state, losses = train(make_step(partial, adapted_loss), before, partial.init(before), mirrored)

    report(losses)
    for part in parts:
        print(f"{part}: moved by {optax.tree.norm(optax.tree.sub(after[part], before[part])):.4f}")
    moments, weights = (sum(x.size for x in jax.tree.leaves(t)) for t in (optax.tree.get(state, "m"), before))
    print(f"{moments} of {weights} weights have moments")
    return before, after, losses


if __name__ == "__main__":
    main()
