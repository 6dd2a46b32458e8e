"""Two small tasks on real data that train to convergence in seconds: a language model, and a network for digits."""

import math
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike

SMOOTHING = 0.1  # of the labels of the digits; without it the loss would go to zero, faster at a higher learning rate
MEASURED = 1024  # windows of each part of the text that the final loss is taken over

Params = Any
Activation = Callable[[jax.Array], jax.Array]
Batch = tuple[jax.Array, jax.Array]  # inputs and labels


class Sizes(NamedTuple):
    """Of a transformer: width, number of heads and of layers, and the length of the texts it sees."""

    width: int
    heads: int
    layers: int
    context: int


SMALL = Sizes(64, 4, 2, 32)


class Task(NamedTuple):
    """A training task.

    Attributes:
      name: as in the tables.
      steps: of a run.
      init: makes weights from a key.
      loss: mean cross-entropy of weights on a batch, in nats.
      draw: makes a batch from a key.
      train: the training data, or a fixed and large part of it.
      held_out: data of the same kind that is not trained on.
    """

    name: str
    steps: int
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    draw: Callable[[jax.Array], Batch]
    train: Batch
    held_out: Batch


def language_model() -> Task:
    """A transformer over bytes, trained on the help texts of Python itself; the last tenth of them is held out."""
    text = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    alphabet, codes = np.unique(text, return_inverse=True)
    seen, held_out = np.split(codes.astype(np.int32), [9 * len(codes) // 10])
    learnt = jnp.asarray(seen)

    def loss(params: Params, batch: Batch) -> jax.Array:
        logits = next_token(params, batch[0], jax.nn.relu, SMALL.heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def draw(key: jax.Array) -> Batch:
        return windows(learnt, jax.random.randint(key, (16,), 0, len(learnt) - SMALL.context), SMALL.context)

    return Task(
        name="language model",
        steps=1000,
        init=lambda key: transformer(key, len(alphabet), SMALL),
        loss=loss,
        draw=draw,
        train=_spread(learnt),
        held_out=_spread(jnp.asarray(held_out)),
    )


def digits() -> Task:
    """The network of ``examples/train_digits.py`` on the same digits."""
    from sklearn.datasets import load_digits  # here, so that the language models need jax and optax alone
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    parts = train_test_split(images, labels.astype(np.int32), test_size=0.25, stratify=labels, random_state=0)
    x, x_held_out, y, y_held_out = map(jnp.asarray, parts)

    def draw(key: jax.Array) -> Batch:
        drawn = jax.random.choice(key, len(x), (64,), replace=False)
        return x[drawn], y[drawn]

    return Task(
        name="digits",
        steps=600,
        init=_convolutions,
        loss=lambda params, batch: optax.softmax_cross_entropy(_digit(params, batch[0]), _smooth(batch[1])).mean(),
        draw=draw,
        train=(x, y),
        held_out=(x_held_out, y_held_out),
    )


def _smooth(labels: ArrayLike) -> jax.Array:
    return optax.smooth_labels(jax.nn.one_hot(labels, 10), SMOOTHING)


def windows(text: jax.Array, starts: jax.Array, context: int) -> Batch:
    """Pieces of a text, and the token after each of their tokens."""
    pieces = text[starts[:, None] + jnp.arange(context + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def _spread(text: jax.Array) -> Batch:
    """Windows evenly spaced over a text."""
    starts = np.linspace(0, len(text) - SMALL.context - 1, MEASURED).astype(np.int32)
    return windows(text, jnp.asarray(starts), SMALL.context)


def _normal(key: jax.Array, shape: tuple[int, ...], gain: float = 1.0) -> jax.Array:
    """Weights that keep the variance of their input, times a gain."""
    return gain * math.prod(shape[:-1]) ** -0.5 * jax.random.normal(key, shape)


def transformer(key: jax.Array, vocabulary: int, sizes: Sizes) -> Params:
    """The first weights of a transformer without biases, its embedding and its head apart."""
    width = sizes.width

    def block(key: jax.Array) -> Params:
        mix, out, up, down = jax.random.split(key, 4)
        return {
            "mix": _normal(mix, (width, 3 * width)),
            "out": _normal(out, (width, width), 0.5),
            "up": _normal(up, (width, 4 * width)),
            "down": _normal(down, (4 * width, width), 0.5),
            "gains": jnp.ones((2, width)),
        }

    embed, position, head, *blocks = jax.random.split(key, 3 + sizes.layers)
    return {
        "embed": _normal(embed, (vocabulary, width)),
        "position": _normal(position, (sizes.context, width), 0.5),
        "blocks": [block(key) for key in blocks],
        "gain": jnp.ones(width),
        "head": _normal(head, (width, vocabulary)),
    }


def next_token(params: Params, x: jax.Array, activation: Activation, heads: int) -> jax.Array:
    """Logits for the token after each."""
    h = params["embed"][x] + params["position"]
    for block in params["blocks"]:
        h = layer(h, block, activation, heads)
    return scaled(h, params["gain"]) @ params["head"]


def layer(h: jax.Array, block: Params, activation: Activation, heads: int) -> jax.Array:
    """Attention and then a perceptron, each added to what it reads."""
    h = h + _attention(scaled(h, block["gains"][0]) @ block["mix"], heads) @ block["out"]
    return h + activation(scaled(h, block["gains"][1]) @ block["up"]) @ block["down"]


def _attention(mixed: jax.Array, heads: int) -> jax.Array:
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in jnp.split(mixed, 3, axis=-1))
    return jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(*mixed.shape[:2], -1)


def scaled(h: jax.Array, gain: jax.Array) -> jax.Array:
    """RMS normalization."""
    return gain * h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


def _convolutions(key: jax.Array) -> Params:
    first, second, last = jax.random.split(key, 3)
    return {
        "first": {"w": _normal(first, (3, 3, 1, 16)), "b": jnp.zeros(16)},
        "second": {"w": _normal(second, (3, 3, 16, 32)), "b": jnp.zeros(32)},
        "last": {"w": _normal(last, (4 * 4 * 32, 10)), "b": jnp.zeros(10)},
    }


def _digit(params: Params, images: jax.Array) -> jax.Array:
    """Logits for the ten digits."""
    h = jax.nn.relu(_convolved(images, params["first"]))
    h = jax.nn.relu(_convolved(h, params["second"])).reshape(len(images), 4, 2, 4, 2, -1).max((2, 4))
    return h.reshape(len(images), -1) @ params["last"]["w"] + params["last"]["b"]


def _convolved(x: jax.Array, layer: Params) -> jax.Array:
    """Convolution as one matrix product: inside a loop, XLA:CPU takes nine times as long for its own."""
    padded, size = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1]
    patches = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ layer["w"].reshape(-1, layer["w"].shape[-1]) + layer["b"]
