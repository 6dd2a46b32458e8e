"""Flax linen: Nadam in a TrainState."""

import jax
from _shared import arguments, cross_entropy, digits_in_batches, report
from flax import linen
from flax.training.train_state import TrainState

import optax_nadam


class Network(linen.Module):
    """A hidden layer of 32 units."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (batch, 10) for images of shape (batch, 64)."""
        return linen.Dense(10)(linen.relu(linen.Dense(32)(images)))


@jax.jit
def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """The new state and the loss."""
    loss, grads = jax.value_and_grad(lambda params: cross_entropy(state.apply_fn(params, images), labels))(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> list[float]:
    """Trains on the digits."""
    chosen, losses = arguments(__doc__, steps=300), []
    batches, model = digits_in_batches(chosen.steps, chosen.seed), Network()
    params = model.init(jax.random.key(chosen.seed), batches[0][0])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax_nadam.nadamw(3e-3))
    for images, labels in batches:
        state, loss = step(state, images, labels)
        losses.append(float(loss))
    report(losses)
    return losses


if __name__ == "__main__":
    main()
