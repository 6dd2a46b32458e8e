"""Continue a PyTorch run in JAX: same weights, same optimizer state, same schedule, same curve.

A language model, which predicts the next byte of Python's help texts from the 16 before it, is trained with
torch.optim.NAdam under a learning rate schedule and saved with torch.save. From there it continues in PyTorch and,
loaded with optax_nadam.compat.torch, in JAX. The picture shows the loss on held-out text of both, and of two other ways
to continue: without load_state, where moments and schedule begin anew, and with optax.nadam at the right place of the
schedule.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
import optax
import torch
from _shared import Batch, Parser, cross_entropy, make_step, natural, png, positive
from jax import numpy as jnp
from matplotlib.figure import Figure

from optax_nadam import compat

CONTEXT, WIDTH, HIDDEN = 16, 32, 128
LEARNING_RATE, BATCH, HELD_OUT, EVERY = 6e-3, 64, 2048, 5


def to_params(weights: dict[str, Any]) -> dict[str, Any]:
    """The parameters in JAX of a PyTorch model's weights. Moments have the shapes of weights, so it serves both."""
    layers = {
        layer: {"kernel": jnp.asarray(weights[f"{index}.weight"].T), "bias": jnp.asarray(weights[f"{index}.bias"])}
        for layer, index in (("hidden", 2), ("last", 4))
    }
    return layers | {"embed": jnp.asarray(weights["0.weight"])}


def loss_of(params: dict[str, Any], bytes_before: jax.Array, byte: jax.Array) -> jax.Array:
    """The mean cross-entropy of the model in JAX."""
    embedded = params["embed"][bytes_before].reshape(len(byte), -1)
    hidden = jax.nn.relu(embedded @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return cross_entropy(hidden @ params["last"]["kernel"] + params["last"]["bias"], byte)


def text_in_batches(number: int, seed: int) -> tuple[list[Batch], Batch]:
    """Batches of bytes with those before them, and one large batch of the last tenth of the text."""
    text = np.frombuffer("".join(topics.values()).encode(), np.uint8).astype(np.int64)
    rng, end = np.random.default_rng(seed), len(text) * 9 // 10

    def batch(size: int, first: int, last: int) -> Batch:
        windows = text[rng.integers(first, last - CONTEXT, size)[:, None] + np.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, -1]

    return [batch(BATCH, 0, end) for _ in range(number)], batch(HELD_OUT, end, len(text))


class TorchRun:
    """A model and its optimizer in PyTorch."""

    def __init__(self, seed: int, steps: int) -> None:
        """Draws the weights."""
        torch.manual_seed(seed)
        embed, flat = torch.nn.Embedding(256, WIDTH), torch.nn.Flatten()
        hidden, last = torch.nn.Linear(CONTEXT * WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, 256)
        self.model = torch.nn.Sequential(embed, flat, hidden, torch.nn.ReLU(), last)
        self.optimizer = torch.optim.NAdam(self.model.named_parameters(), lr=LEARNING_RATE)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def train(self, batches: list[Batch], held_out: Callable[[Any], Any]) -> list[float]:
        """The loss on held-out text after every fifth batch."""
        losses = []
        for count, batch in enumerate(batches, 1):
            bytes_before, byte = map(torch.from_numpy, batch)
            self.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(bytes_before), byte).backward()
            self.optimizer.step()
            self.scheduler.step()
            if count % EVERY == 0:
                weights = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}
                losses.append(float(held_out(to_params(weights))))
        return losses


def train_in_jax(params: Any, tx: Any, state: Any, batches: list[Batch], held_out: Callable[[Any], Any]) -> list[float]:
    """The loss on held-out text after every fifth batch."""
    step, losses = make_step(tx, loss_of), []
    for count, batch in enumerate(batches, 1):
        params, state, _ = step(params, state, *batch)
        if count % EVERY == 0:
            losses.append(float(held_out(params)))
    return losses


def draw(before: list[float], runs: dict[str, list[float]], path: Path) -> None:
    """The common part, and every continuation."""
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    steps = EVERY * np.arange(1, len(before) + 1)
    axes.plot(steps, before, color="0.55", lw=1.5, label="PyTorch, before the checkpoint")
    axes.axvline(steps[-1], color="0.7", lw=0.8, ls=":")
    looks: list[dict[str, Any]] = [{"lw": 5, "color": "0.8"}, {"color": "C0"}, {"color": "C1"}, {"color": "C3"}]
    for (name, losses), look in zip(runs.items(), looks, strict=True):
        axes.plot([steps[-1], *(steps[-1] + steps)], [before[-1], *losses], **{"lw": 1.5} | look, label=name)
    lowest, highest = min(map(min, runs.values())), max(map(max, runs.values()))
    axes.set(ylim=(lowest - 0.05, 2 * highest - lowest), xlabel="step", ylabel="held-out loss, nats a byte")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains there, loads the checkpoint here, continues in both."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=600, help="steps before the checkpoint, and as many after it")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=png, default=Path("out/from_torch.png"), help="file of the picture")
    arguments = parser.parse_args()

    steps, whole = arguments.steps, 2 * arguments.steps
    batches, held_out_batch = text_in_batches(whole, arguments.seed)
    held_out = jax.jit(lambda params: loss_of(params, *map(jnp.asarray, held_out_batch)))
    run = TorchRun(arguments.seed, whole)
    before = run.train(batches[:steps], held_out)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        parts = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        checkpoint = torch.load(path)

    source = compat.torch.read(checkpoint["optimizer"], scheduler=checkpoint["scheduler"])
    print(source)
    params = to_params({name: tensor.numpy() for name, tensor in checkpoint["model"].items()})
    tx = compat.torch.from_groups(source, to_params)
    state = compat.torch.load_state(tx.init(params), source, to_params)

    cosine = optax.cosine_decay_schedule(LEARNING_RATE, whole)
    optax_nadam = optax.nadam(lambda count: cosine(count + steps))
    starts = {
        "JAX, with load_state": (tx, state),
        "JAX, without load_state": (tx, tx.init(params)),
        "optax.nadam from the weights": (optax_nadam, optax_nadam.init(params)),
    }
    runs = {"PyTorch, continued": run.train(batches[steps:], held_out)}
    runs |= {name: train_in_jax(params, *start, batches[steps:], held_out) for name, start in starts.items()}
    for name, losses in runs.items():
        print(f"held-out loss, {name}: {max(losses):.4f} at most, {losses[-1]:.4f} at the end")
    there, here, *_ = runs.values()
    print(f"largest relative difference: {max(abs(a / b - 1) for a, b in zip(here, there, strict=True)):.1e}")
    draw(before, runs, arguments.out)
    print(f"all curves in {arguments.out}")


if __name__ == "__main__":
    main()
