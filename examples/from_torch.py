"""Continue a PyTorch run in JAX: same weights, same optimizer state, same curve.

A small network is trained on scikit-learn's digits with torch.optim.NAdam under a learning rate schedule, saved with
torch.save, and loaded into JAX with optax_nadam.compat.torch. Then both continue from there, and both curves are drawn
into one picture.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import Parser, digits_in_batches, draw_continuations, natural, png, positive, train_in_jax
from jax import numpy as jnp

from optax_nadam import compat

LEARNING_RATE, DECAY = 3e-3, 1e-2


def to_params(weights: dict[str, Any]) -> dict[str, Any]:
    """The parameters in JAX of a PyTorch model's weights. Moments have the shapes of weights, so it serves both."""
    return {
        layer: {"kernel": jnp.asarray(weights[f"{index}.weight"].T), "bias": jnp.asarray(weights[f"{index}.bias"])}
        for layer, index in (("hidden", 0), ("last", 2))
    }


class TorchRun:
    """A model and its optimizer in PyTorch."""

    def __init__(self, seed: int, steps: int) -> None:
        """Draws the weights."""
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        decay: dict[str, Any] = {"weight_decay": DECAY, "decoupled_weight_decay": True}
        self.optimizer = torch.optim.NAdam(self.model.named_parameters(), lr=LEARNING_RATE, **decay)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def train(self, batches: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
        """The loss of each batch."""
        losses = []
        for images, labels in batches:
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(torch.from_numpy(images)), torch.from_numpy(labels))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses


def main() -> None:
    """Trains there, loads the checkpoint here, continues in both."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=300, help="steps before the checkpoint, and as many after it")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=png, default=Path("out/from_torch.png"), help="file of the picture")
    arguments = parser.parse_args()

    steps, whole = arguments.steps, 2 * arguments.steps
    batches = digits_in_batches(whole, arguments.seed)
    run = TorchRun(arguments.seed, whole)
    before = run.train(batches[:steps])
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

    here = train_in_jax(params, tx, state, batches[steps:])
    there = run.train(batches[steps:])
    draw_continuations("PyTorch", before, there, here, arguments.out)


if __name__ == "__main__":
    main()
