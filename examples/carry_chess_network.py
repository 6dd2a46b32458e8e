"""Carry the training of a chess network from framework to framework, in the middle of a run.

A small policy and value network learns 512 positions of random legal play. Part a begins it in tf_keras with a legacy
Nadam in a loop of its own, and continues it in JAX from the TensorFlow checkpoint alone. Part b trains it in Flax nnx
with optax.nadamw, and continues the Orbax checkpoint with optax_nadam, in float32 and with 8-bit moments. Part c hands
that run on to torch.optim.NAdam. Each part prints how far the two sides are apart, in units of the learning rate.
"""

import argparse
import functools
import importlib.util
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from _shared import Batch, Parser, cross_entropy, natural, png, positive
from flax import nnx
from jax import numpy as jnp
from jax.typing import ArrayLike
from matplotlib.figure import Figure

import optax_nadam
from optax_nadam import NadamConfig, ScheduleConfig, compat

POSITIONS = Path(__file__).parent / "data" / "chess_positions.npz"
NEEDS = {"a": ["tensorflow", "tf_keras"], "b": [], "c": ["torch"]}
LAYERS = ("embedding", "norm", "hidden", "policy", "value")
BATCH_SIZE, WIDTH, COMPARED, CONTINUED = 64, 128, 8, 50
CLIP = optax_nadam.clip_by_global_norm(10.0)
NADAMW: dict[str, Any] = {"b1": 0.9, "b2": 0.98, "eps": 1e-7, "weight_decay": 1e-4}
RATES = (2e-3, 1e-3, 2e-4)  # in the first half, then, and after half of the steps that are compared


def random_play(number: int = 512, seed: int = 0) -> dict[str, np.ndarray]:
    """Positions of random legal games, seen by the side to move: 12 planes as bits, the move's square, the balance."""
    import chess

    rng, board = random.Random(seed), chess.Board()
    planes, policy, value = [], [], []
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


def train(tx: optax.GradientTransformation, run: Run, batches: list[Batch]) -> Iterator[tuple[Run, float]]:
    """The run after each batch, and the loss of that batch before its step."""

    @jax.jit
    def step(run: Run, planes: jax.Array, targets: jax.Array) -> tuple[Run, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(run.params, planes, targets)
        updates, opt_state = tx.update(grads, run.opt_state, run.params)
        params = optax.apply_updates(run.params, updates)
        return Run(params, opt_state, optax.incremental_update(params, run.average, 0.02)), loss

    for batch in batches:
        run, loss = step(run, *batch)
        yield run, float(loss)


def distance(ours: Any, theirs: Any, learning_rate: float) -> float:
    """The largest difference of two trees of weights, in units of the learning rate."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs) / learning_rate


def report(what: str, found: dict[str, float]) -> None:
    """Prints the differences of a part."""
    figures = ", ".join(f"{name} {x:.1e} lr" for name, x in found.items())
    print(f"{what}, largest difference of a weight after {COMPARED} steps: {figures}")


def to_params(weights: dict[str, Any]) -> dict[str, Any]:
    """The params of what a TensorFlow checkpoint has, by name. Moments are named as weights, so it serves both."""
    names = {"norm": {"scale": "gamma", "bias": "beta"}}
    linear = {"kernel": "kernel", "bias": "bias"}
    return {
        layer: {
            ours: jnp.asarray(weights[f"model/layer_with_weights-{index}/{theirs}"])
            for ours, theirs in names.get(layer, linear).items()
        }
        for index, layer in enumerate(LAYERS)
    }


class Ancestor:
    """The network in tf_keras; the legacy Nadam has a learning rate that is set from outside."""

    def __init__(self, seed: int) -> None:
        """Draws the weights."""
        import tensorflow as tf
        import tf_keras as keras

        keras.utils.set_random_seed(seed)
        planes, dense = keras.Input((768,)), keras.layers.Dense
        x = dense(WIDTH, "relu")(planes)
        x = x + dense(WIDTH, "relu")(keras.layers.LayerNormalization(epsilon=1e-6)(x))
        self.model = keras.Model(planes, [dense(64)(x), dense(1, "tanh")(x)])
        self.learning_rate = tf.Variable(1e-3, trainable=False)
        self.optimizer = keras.optimizers.legacy.Nadam(self.learning_rate, beta_2=0.98)
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)
        self.step = tf.function(functools.partial(self._step, tf))

    def _step(self, tf: Any, planes: Any, targets: Any) -> None:
        weights = self.model.trainable_variables
        with tf.GradientTape() as tape:
            policy, value = self.model(planes)
            labels = tf.cast(targets[:, 0], tf.int32)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, policy)
            loss = tf.reduce_mean(losses) + tf.reduce_mean((value[:, 0] - targets[:, 1]) ** 2)
        grads, _ = tf.clip_by_global_norm(tape.gradient(loss, weights), 10.0)
        self.optimizer.apply_gradients(zip(grads, weights, strict=True))


def part_a(steps: int, seed: int) -> dict[str, float]:
    """From tf_keras, by its checkpoint alone."""
    batches, there = make_batches(steps + COMPARED, seed), Ancestor(seed)
    with tempfile.TemporaryDirectory() as folder:
        for number, batch in enumerate(batches):
            if number == steps // 2:
                there.learning_rate.assign(5e-4)
            if number == steps:
                prefix = there.checkpoint.save(f"{folder}/before")
            there.step(*batch)
        config = compat.keras.read_config(prefix)
        params = to_params(compat.keras.read_weights(prefix))
        tx = replace(config, clip_global_norm=10.0).build()
        state = compat.keras.load_state(tx.init(params), prefix, to_params)
        theirs = to_params(compat.keras.read_weights(there.checkpoint.save(f"{folder}/after")))

    lost = optax_nadam.get_state(state)._replace(mu_product=jnp.ones(()))
    states = {"carried": state, "without the product": (state[0], lost, *state[2:]), "fresh": tx.init(params)}
    found = {}
    for name, opt_state in states.items():
        *_, (ours, _) = train(tx, Run(params, opt_state, params), batches[steps:])
        found[name] = distance(ours.params, theirs, float(config.learning_rate))
    report("a: tf_keras to JAX", found)
    return found


class Present(NamedTuple):
    """The run of today when it is carried over: what Orbax restored, its further way in Optax, and ours."""

    batches: list[Batch]
    before: list[float]
    theirs: list[tuple[Run, float]]
    ours: Run
    config: NadamConfig


def decays(params: Any) -> Any:
    """Which leaves have weight decay: kernels, but for the embedding's."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key != "embedding" and path[1].key == "kernel", params
    )


def ours_of(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer that takes the steps of ``theirs_of``."""
    nadamw = optax_nadam.nadamw(learning_rate, **NADAMW, rule="constant", mask=decays)
    return optax.chain(CLIP, nadamw)


def theirs_of(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the present run."""
    return optax.chain(optax.clip_by_global_norm(10.0), optax.nadamw(learning_rate, **NADAMW, mask=decays))


def present_run(steps: int, seed: int) -> Present:
    """Trains with Optax, saves and restores with Orbax without a target, and continues with Optax."""
    batches = make_batches(steps + CONTINUED, seed)
    drops = [steps // 2, steps + CONTINUED // 2]
    tx = theirs_of(optax.piecewise_constant_schedule(RATES[0], {drops[0]: 0.5, drops[1]: 0.2}))
    params = nnx.state(Network(nnx.Rngs(seed)))
    run, before = Run(params, tx.init(params), params), []
    for run, loss in train(tx, run, batches[:steps]):  # noqa: B007
        before.append(loss)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "run", run._asdict())
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "run")
    theirs = list(train(tx, run, batches[steps:]))

    schedule = ScheduleConfig("piecewise_constant", {"boundaries": [drop - 1 for drop in drops], "values": RATES})
    config = NadamConfig(rule="constant", learning_rate=schedule, clip_global_norm=10.0, **NADAMW)
    fresh = ours_of(schedule).init(restored["params"])
    state = compat.optax.load_state(fresh, restored["opt_state"], config=config)
    return Present(batches[steps:], before, theirs, Run(restored["params"], state, restored["average"]), config)


def next_rate(state: Any, start: Present) -> float:
    """The learning rate of the next step: how much longer it is than one at a learning rate of one."""
    grads = params = start.ours.params
    updates = [ours_of(rate).update(grads, state, params)[0] for rate in (start.config.learning_rate, lambda count: 1.0)]
    return float(optax.tree.norm(updates[0]) / optax.tree.norm(updates[1]))


def part_b(start: Present, out: Path) -> dict[str, float]:
    """From optax.nadamw to optax_nadam, in float32 and in 8 bits."""
    run, tx = start.ours, ours_of(start.config.learning_rate)
    small = optax_nadam.convert_moments(run.opt_state, m_dtype="int8", v_dtype="int8")
    states = {"float32": run.opt_state, "int8": small, "fresh": tx.init(run.params)}
    found, losses = {}, {"optax": [loss for _, loss in start.theirs]}
    for name, opt_state in states.items():
        runs = list(train(tx, run._replace(opt_state=opt_state), start.batches))
        found[name] = distance(runs[COMPARED - 1][0].params, start.theirs[COMPARED - 1][0].params, RATES[1])
        losses[name] = [loss for _, loss in runs]
    report("b: Optax to optax_nadam", found)
    differences = {f"loss {name}": max(relative(losses[name], losses["optax"])) for name in states}
    print(f"   largest relative difference in {CONTINUED} steps: " + ", ".join(f"{k} {x:.1e}" for k, x in differences.items()))
    later = len(start.before) + CONTINUED // 2
    rate = next_rate(optax_nadam.set_count(run.opt_state, later, start.config), start)
    print(f"   step set by hand from {len(start.before)} to {later}: learning rate {RATES[1]:.1e}, then {rate:.1e}")
    draw(start.before, losses, out)
    return {**found, **differences, "rate": rate}


def relative(losses: list[float], others: list[float]) -> list[float]:
    """The relative differences of two runs' losses."""
    return [abs(a / b - 1) for a, b in zip(losses, others, strict=True)]


def draw(before: list[float], losses: dict[str, list[float]], path: Path) -> None:
    """Draws the losses, and below them how far those of the continuations are from Optax's."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=[3, 2])
    steps = np.arange(len(before), len(before) + CONTINUED)
    upper.plot(steps[0] - np.arange(CONTINUED, 0, -1)[-len(before):], before[-CONTINUED:], color="0.6", label="Optax, before")
    styles: dict[str, dict[str, Any]] = {
        "optax": {"color": "C0", "lw": 7, "alpha": 0.3, "label": "Optax, continued"},
        "float32": {"color": "C0", "lw": 2, "label": "optax_nadam, float32"},
        "int8": {"color": "C1", "lw": 2, "ls": (0, (2, 2)), "label": "optax_nadam, 8-bit moments"},
        "fresh": {"color": "C3", "lw": 1, "label": "moments and count lost"},
    }
    for name, style in styles.items():
        upper.plot(steps, losses[name], **style)
        if name != "optax":
            lower.plot(steps, np.maximum(relative(losses[name], losses["optax"]), 1e-8), **style)
    upper.set(yscale="log", ylabel="training loss", title="A chess network: one run, carried over in the middle")
    upper.legend(frameon=False, fontsize=9)
    lower.set(yscale="log", xlabel="step", ylabel="relative difference\nfrom Optax's loss", xlim=upper.get_xlim())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"   picture in {path}")


def part_c(start: Present) -> dict[str, float]:
    """From optax_nadam to torch.optim.NAdam; gradients are JAX's, clipped there."""
    import torch

    run, batches, decaying = start.ours, start.batches[:COMPARED], jax.tree.leaves(decays(start.ours.params))
    ours = [step for step, _ in train(ours_of(start.config.learning_rate), run, batches)]

    def from_params(params: Any) -> list[np.ndarray]:
        """What decays, then what does not; kernels are transposed in torch."""
        arrays = [np.asarray(x).T for x in jax.tree.leaves(params)]
        return [x for wanted in (True, False) for x, decay in zip(arrays, decaying, strict=True) if decay == wanted]

    gradient = jax.jit(lambda params, *batch: CLIP.update(jax.grad(loss_of)(params, *batch), CLIP.init(None))[0])
    grads = [from_params(gradient(x.params, *batch)) for x, batch in zip([run, *ours], batches, strict=False)]
    config, found = replace(start.config, learning_rate=RATES[1], clip_global_norm=None), {}
    for name in ("carried", "fresh"):
        weights = [torch.nn.Parameter(torch.tensor(x)) for x in from_params(run.params)]
        groups = [{"params": weights[: sum(decaying)]}, {"params": weights[sum(decaying) :], "weight_decay": 0.0}]
        optimizer = torch.optim.NAdam(groups, **compat.torch.config_to(config))
        if name == "carried":
            wanted = optimizer.state_dict()["param_groups"]
            state = compat.torch.dump_state(run.opt_state, from_params, param_groups=wanted, as_tensor=torch.tensor)
            optimizer.load_state_dict(state)
        for arrays in grads:
            for weight, array in zip(weights, arrays, strict=True):
                weight.grad = torch.tensor(array)
            optimizer.step()
        found[name] = distance(from_params(ours[-1].params), [x.detach() for x in weights], RATES[1])
    report("c: optax_nadam to torch", found)
    return found


def main() -> dict[str, dict[str, float]]:
    """Runs the parts."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=300, help="steps before the run is carried over")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=png, default=Path("out/carry_chess_network.png"), help="file of the picture of b")
    parser.add_argument("--parts", nargs="+", choices=list(NEEDS), default=list(NEEDS), help="which parts run")
    chosen = parser.parse_args()

    missing = {part: [x for x in NEEDS[part] if importlib.util.find_spec(x) is None] for part in chosen.parts}
    for part, packages in missing.items():
        if packages:
            print(f"{part}: left out, for it needs {' and '.join(packages)}")
    parts, found = [part for part in chosen.parts if not missing[part]], {}
    if "a" in parts:
        found["a"] = part_a(chosen.steps, chosen.seed)
    start = present_run(chosen.steps, chosen.seed) if {"b", "c"} & {*parts} else None
    if start and "b" in parts:
        found["b"] = part_b(start, chosen.out)
    if start and "c" in parts:
        found["c"] = part_c(start)
    return found


if __name__ == "__main__":
    main()
