"""What the chess example trains: positions of random legal play, a network in Flax nnx, and a training loop."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _shared import Batch, cross_entropy
from flax import nnx
from jax import numpy as jnp
from jax.typing import ArrayLike

POSITIONS = Path(__file__).parent / "data" / "chess_positions.npz"
BATCH_SIZE, WIDTH = 128, 128


def random_play(number: int = 512, seed: int = 0) -> dict[str, Any]:
    """Positions of random legal games, seen by the side to move: 12 planes as bits, the move's square, the balance."""
    import chess

    rng, board = random.Random(seed), chess.Board()
    planes: list[list[bool]] = []
    policy, value = [], []
    while len(planes) < number:
        if board.is_game_over() or board.ply() == 80:
            board = chess.Board()
        move = rng.choice(sorted(board.legal_moves, key=chess.Move.uci))
        seen = board if board.turn else board.mirror()
        sides = [[seen.pieces(piece, side) for piece in chess.PIECE_TYPES] for side in chess.COLORS]
        planes.append([square in pieces for side in sides for pieces in side for square in chess.SQUARES])
        policy.append(move.from_square if board.turn else chess.square_mirror(move.from_square))
        mine, theirs = (sum(n * len(x) for n, x in zip((1, 3, 3, 5, 9), side, strict=False)) for side in sides)
        value.append(np.tanh((mine - theirs) / 10))
        board.push(move)
    bits = np.packbits(np.array(planes), axis=1)
    return {"planes": bits, "policy": np.array(policy, np.uint8), "value": np.array(value, np.float32)}


def record() -> None:
    """Writes the positions that come with this example."""
    np.savez_compressed(POSITIONS, **random_play())


def make_batches(number: int, seed: int) -> list[Batch]:
    """Batches of positions, as 768 floats each, and of targets: the square that the move left, and the value."""
    with np.load(POSITIONS) as stored:
        planes = np.unpackbits(stored["planes"], axis=1).astype(np.float32)
        targets = np.stack([stored["policy"].astype(np.float32), stored["value"]], axis=1)
    rng = np.random.default_rng(seed)
    rows = [rng.choice(len(planes), BATCH_SIZE, replace=False) for _ in range(number)]
    return [(planes[row], targets[row]) for row in rows]


class Network(nnx.Module):
    """An embedding of the planes, one residual block, and two heads."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.embedding = nnx.Linear(768, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.policy = nnx.Linear(WIDTH, 64, rngs=rngs)
        self.value = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, planes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the squares, and the value."""
        x = nnx.relu(self.embedding(planes))
        x = x + nnx.relu(self.hidden(self.norm(x)))
        return self.policy(x), jnp.tanh(self.value(x)[:, 0])


def loss_of(params: Any, planes: ArrayLike, targets: jax.Array) -> jax.Array:
    """The cross-entropy of the policy, and the squared error of the value."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    policy, value = nnx.merge(graph, params)(planes)
    return cross_entropy(policy, targets[:, 0].astype(int)) + jnp.mean((value - targets[:, 1]) ** 2)


class Run(NamedTuple):
    """What a checkpoint has; the average of the weights is kept beside the optimizer."""

    params: Any
    opt_state: Any
    average: Any


@functools.partial(jax.jit, static_argnums=0)
def step(tx: optax.GradientTransformation, run: Run, planes: jax.Array, targets: jax.Array) -> tuple[Run, jax.Array]:
    """One step, and the loss before it."""
    loss, grads = jax.value_and_grad(loss_of)(run.params, planes, targets)
    updates, opt_state = tx.update(grads, run.opt_state, run.params)
    params = optax.apply_updates(run.params, updates)
    return Run(params, opt_state, optax.incremental_update(params, run.average, 0.02)), loss


def train(tx: optax.GradientTransformation, run: Run, batches: list[Batch]) -> Iterator[tuple[Run, float]]:
    """The run after each batch, and the loss of that batch before its step."""
    run = jax.device_put(run, jax.devices()[0])  # all of it, so that a restored run compiles once
    for batch in batches:
        run, loss = step(tx, run, *batch)
        yield run, float(loss)


def weights_of(run: Run) -> tuple[Any, Any]:
    """The weights and their average."""
    return run.params, run.average


def distance(ours: Any, theirs: Any, learning_rate: float) -> float:
    """The largest difference of two trees of weights, in units of the learning rate."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs) / learning_rate
