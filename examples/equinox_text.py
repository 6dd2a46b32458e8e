"""Equinox: a model that predicts the next character of the help texts that come with Python."""

from pydoc_data.topics import topics
from typing import Any

import equinox as eqx
import jax
import numpy as np
from _shared import arguments, cross_entropy, report

import optax_nadam

WINDOW = 8
TEXT = "".join(topics.values())
CHARACTERS = sorted(set(TEXT))


class Model(eqx.Module):
    """Embeds a window of characters and maps it to the next one."""

    embedding: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        """Draws the weights."""
        of_embedding, of_mlp = jax.random.split(key)
        self.embedding = eqx.nn.Embedding(len(CHARACTERS), 16, key=of_embedding)
        self.mlp = eqx.nn.MLP(WINDOW * 16, len(CHARACTERS), 128, 1, key=of_mlp)

    def __call__(self, window: jax.Array) -> jax.Array:
        """The logits of the next character."""
        return self.mlp(jax.vmap(self.embedding)(window).ravel())


def main() -> list[float]:
    """Trains on random windows of the text."""
    chosen, losses = arguments(__doc__, steps=300), []
    model, tx = Model(jax.random.key(chosen.seed)), optax_nadam.nadamw(3e-3)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))  # a module also holds functions: they have no moments

    @eqx.filter_value_and_grad
    def gradient(model: Model, windows: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(model)(windows[:, :-1]), windows[:, -1])

    @eqx.filter_jit
    def step(model: Model, state: Any, windows: jax.Array) -> tuple[Model, Any, jax.Array]:
        loss, grads = gradient(model, windows)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    codes, rng = np.searchsorted(CHARACTERS, list(TEXT)), np.random.default_rng(chosen.seed)
    for _ in range(chosen.steps):
        starts = rng.integers(len(codes) - WINDOW, size=(256, 1))
        model, state, loss = step(model, state, codes[starts + np.arange(WINDOW + 1)])
        losses.append(float(loss))
    report(losses)
    return losses


if __name__ == "__main__":
    main()
