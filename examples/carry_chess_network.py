"""Carry the training of a chess network from framework to framework, in the middle of a run.

A small policy and value network learns 512 positions of random legal play. Part a begins it in tf_keras with a legacy
Nadam in a loop of its own, and continues it in JAX from the TensorFlow checkpoint alone. Part b trains it in Flax nnx
with optax.nadamw, and continues the Orbax checkpoint with optax_nadam, in float32 and with 8-bit moments. Part c hands
that run on to torch.optim.NAdam. Each part prints how far the two sides are apart, in units of the learning rate.
"""

import argparse
import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from _chess import WIDTH, Network, Run, distance, loss_of, make_batches, train, weights_of
from _shared import Batch, Parser, natural, png, positive
from flax import nnx
from jax import numpy as jnp
from matplotlib.figure import Figure

import optax_nadam
from optax_nadam import NadamConfig, ScheduleConfig, compat

NEEDS = {"a": ["tensorflow", "tf_keras"], "b": [], "c": ["torch"]}
LINEAR = {"embedding": 0, "hidden": 2, "policy": 3, "value": 4}  # layers of the model in tf_keras, with a norm as 1
COMPARED, CONTINUED = 8, 50  # steps in which weights, and losses, are compared
CLIP = optax_nadam.clip_by_global_norm(10.0)
NADAMW: dict[str, Any] = {"b1": 0.9, "b2": 0.98, "eps": 1e-7, "weight_decay": 1e-4}
ROUNDING = 2.0**-24  # of float32
RATES = (1e-3, 5e-4, 1e-4)  # in the first half, then, and after half of the steps that are compared


def report(what: str, found: dict[str, float]) -> None:
    """Prints the differences of a part."""
    figures = ", ".join(f"{name} {x:.1e} lr" for name, x in found.items())
    print(f"{what}, largest difference of a weight after {COMPARED} steps: {figures}")


def to_params(weights: dict[str, Any]) -> dict[str, Any]:
    """The params of what a TensorFlow checkpoint has, by name. Moments are named as weights, so it serves both."""

    def layer(index: int, **names: str) -> dict[str, Any]:
        return {ours: jnp.asarray(weights[f"model/layer_with_weights-{index}/{name}"]) for ours, name in names.items()}

    linear = {name: layer(i, kernel="kernel", bias="bias") for name, i in LINEAR.items()}
    return {**linear, "norm": layer(1, scale="gamma", bias="beta")}


def ancestor(seed: int) -> tuple[Any, Any, Any]:
    """The network in tf_keras: its checkpoint, its learning rate, which is set from outside, and its step."""
    import tensorflow as tf
    import tf_keras as keras

    keras.utils.set_random_seed(seed)
    planes, dense = keras.Input((768,)), keras.layers.Dense
    x = dense(WIDTH, "relu")(planes)
    x = x + dense(WIDTH, "relu")(keras.layers.LayerNormalization(epsilon=1e-6)(x))
    model = keras.Model(planes, [dense(64)(x), dense(1, "tanh")(x)])
    learning_rate = tf.Variable(RATES[0], trainable=False)
    optimizer = keras.optimizers.legacy.Nadam(learning_rate, beta_2=0.98)

    def step(planes: Any, targets: Any) -> None:
        with tf.GradientTape() as tape:
            policy, value = model(planes)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(targets[:, 0], tf.int32), policy)
            loss = tf.reduce_mean(losses) + tf.reduce_mean((value[:, 0] - targets[:, 1]) ** 2)
        grads, _ = tf.clip_by_global_norm(tape.gradient(loss, model.trainable_variables), 10.0)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    return tf.train.Checkpoint(model=model, optimizer=optimizer), learning_rate, tf.function(step)


def part_a(steps: int, seed: int) -> dict[str, float]:
    """From tf_keras, by its checkpoint alone."""
    batches = make_batches(steps + COMPARED, seed)
    checkpoint, learning_rate, step = ancestor(seed)
    with tempfile.TemporaryDirectory() as folder:
        for number, batch in enumerate(batches):
            if number == steps // 2:
                learning_rate.assign(RATES[1])
            if number == steps:
                prefix = checkpoint.save(f"{folder}/before")
            step(*batch)
        config = compat.keras.read_config(prefix)
        params = to_params(compat.keras.read_weights(prefix))
        tx = replace(config, clip_global_norm=10.0).build()
        state = compat.keras.load_state(tx.init(params), prefix, to_params)
        theirs = to_params(compat.keras.read_weights(checkpoint.save(f"{folder}/after")))

    lost = optax_nadam.get_state(state)._replace(mu_product=jnp.ones(()))
    states = {"carried": state, "without the product": (state[0], lost, *state[2:]), "fresh": tx.init(params)}
    found = {}
    for name, opt_state in states.items():
        *_, (ours, _) = train(tx, Run(params, opt_state, params), batches[steps:])
        found[name] = distance(ours.params, theirs, RATES[1])
    report("a: tf_keras to JAX", found)
    return found


class Present(NamedTuple):
    """The run of today when it is carried over: what Orbax restored, its further way in Optax, and ours."""

    batches: list[Batch]
    before: list[float]
    theirs: list[tuple[Run, float]]
    ours: Run
    tx: optax.GradientTransformation
    config: NadamConfig


def decays(params: Any) -> Any:
    """Which leaves have weight decay: kernels, but for the embedding's."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key != "embedding" and path[1].key == "kernel", params
    )


def ours_of(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer that takes the steps of ``theirs_of``."""
    return optax.chain(CLIP, optax_nadam.nadamw(learning_rate, **NADAMW, rule="constant", mask=decays))


def theirs_of(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the present run."""
    return optax.chain(optax.clip_by_global_norm(10.0), optax.nadamw(learning_rate, **NADAMW, mask=decays))


def present_run(steps: int, seed: int) -> Present:
    """Trains with Optax, saves and restores with Orbax without a target, and continues with Optax."""
    batches = make_batches(steps + CONTINUED, seed)
    drops = [steps // 2, steps + CONTINUED // 2]
    tx = theirs_of(optax.piecewise_constant_schedule(RATES[0], {drops[0]: 0.5, drops[1]: 0.2}))
    params = nnx.state(Network(nnx.Rngs(seed)))
    run, before = Run(params, tx.init(params), params), list[float]()
    for trained, loss in train(tx, run, batches[:steps]):
        run, before = trained, [*before, loss]
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "run", run._asdict())
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "run")
    theirs = list(train(tx, run, batches[steps:]))

    schedule = ScheduleConfig("piecewise_constant", {"boundaries": [drop - 1 for drop in drops], "values": RATES})
    config = NadamConfig(rule="constant", learning_rate=schedule, clip_global_norm=10.0, **NADAMW)
    tx = ours_of(schedule)
    state = compat.optax.load_state(tx.init(restored["params"]), restored["opt_state"], config=config)
    return Present(batches[steps:], before, theirs, Run(restored["params"], state, restored["average"]), tx, config)


def next_rate(state: Any, start: Present) -> float:
    """The learning rate of the next step: how much longer it is than one at a learning rate of one."""

    @jax.jit
    def lengths(state: Any, params: Any) -> list[jax.Array]:
        return [optax.tree.norm(tx.update(params, state, params)[0]) for tx in (start.tx, ours_of(lambda count: 1.0))]

    ours, of_one = lengths(state, start.ours.params)
    return float(ours / of_one)


def part_b(start: Present, out: Path) -> dict[str, float]:
    """From optax.nadamw to optax_nadam, in float32 and in 8 bits."""
    run, tx = start.ours, start.tx
    small = optax_nadam.convert_moments(run.opt_state, m_dtype="int8", v_dtype="int8")
    states = {"float32": run.opt_state, "int8": small, "fresh": tx.init(run.params)}
    found, losses = {}, {"optax": [loss for _, loss in start.theirs]}
    for name, opt_state in states.items():
        runs = list(train(tx, run._replace(opt_state=opt_state), start.batches))
        found[name] = distance(weights_of(runs[COMPARED - 1][0]), weights_of(start.theirs[COMPARED - 1][0]), RATES[1])
        losses[name] = [loss for _, loss in runs]
    report("b: Optax to optax_nadam", found)
    differences = {name: max(relative(losses[name], losses["optax"])) for name in states}
    figures = ", ".join(f"{name} {x:.1e}" for name, x in differences.items())
    print(f"   largest relative difference of the losses of {CONTINUED} steps: {figures}")
    later = len(start.before) + CONTINUED // 2
    rate = next_rate(optax_nadam.set_count(run.opt_state, later, start.config), start)
    print(f"   step set by hand from {len(start.before)} to {later}: learning rate {RATES[1]:.1e}, then {rate:.1e}")
    draw(start.before, losses, out)
    return {**found, **{f"loss of {name}": x for name, x in differences.items()}, "rate": rate}


def relative(losses: list[float], others: list[float]) -> list[float]:
    """The relative differences of two runs' losses."""
    return [abs(a / b - 1) for a, b in zip(losses, others, strict=True)]


def draw(before: list[float], losses: dict[str, list[float]], path: Path) -> None:
    """Draws the losses, and below them how far those of the continuations are from Optax's."""
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=[3, 2])
    now, shown = len(before), before[-CONTINUED:]
    upper.plot(np.arange(now - len(shown), now), shown, color="0.6", label="Optax, before")
    styles: dict[str, dict[str, Any]] = {
        "optax": {"color": "C0", "lw": 7, "alpha": 0.3, "label": "Optax, continued"},
        "float32": {"color": "C0", "lw": 2, "label": "optax_nadam, float32"},
        "int8": {"color": "C1", "lw": 2, "ls": (0, (2, 2)), "label": "optax_nadam, 8-bit moments"},
        "fresh": {"color": "C3", "lw": 1, "label": "fresh state, schedule starts again"},
    }
    steps = np.arange(now, now + CONTINUED)
    for name, style in styles.items():
        upper.plot(steps, losses[name], **style)
        if name != "optax":
            lower.plot(steps, np.maximum(relative(losses[name], losses["optax"]), ROUNDING), **style)
    lower.axhline(ROUNDING, color="0.6", lw=0.8, ls=":")
    lower.text(now - 2, ROUNDING, "rounding of float32", ha="right", va="bottom", color="0.4", fontsize=9)
    upper.set(yscale="log", ylabel="training loss", title="A chess network: one run, carried over in the middle")
    upper.legend(frameon=False, fontsize=9, loc="lower left")
    lower.set(yscale="log", xlabel="step", ylabel="relative difference\nfrom Optax's loss", xlim=upper.get_xlim())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"   picture in {path}")


def part_c(start: Present) -> dict[str, float]:
    """From optax_nadam to torch.optim.NAdam; gradients are JAX's, clipped there."""
    import torch

    run, batches, decaying = start.ours, start.batches[:COMPARED], jax.tree.leaves(decays(start.ours.params))
    ours = [step for step, _ in train(start.tx, run, batches)]

    def from_params(params: Any) -> list[np.ndarray]:
        """What decays, then what does not; kernels are transposed in torch."""
        arrays = [np.asarray(x).T for x in jax.tree.leaves(params)]
        return [x for wanted in (True, False) for x, decay in zip(arrays, decaying, strict=True) if decay == wanted]

    gradient = jax.jit(lambda params, *batch: CLIP.update(jax.grad(loss_of)(params, *batch), CLIP.init(params))[0])
    grads = [from_params(gradient(x.params, *batch)) for x, batch in zip([run, *ours], batches, strict=False)]
    config, found = replace(start.config, learning_rate=RATES[1], clip_global_norm=None), {}
    for name in ("carried", "fresh"):
        weights = [torch.nn.Parameter(torch.tensor(x)) for x in from_params(run.params)]
        groups: list[dict[str, Any]] = [
            {"params": weights[: sum(decaying)]},
            {"params": weights[sum(decaying) :], "weight_decay": 0.0},
        ]
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
    parser.add_argument("--steps", type=positive, default=200, help="steps before the run is carried over")
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
