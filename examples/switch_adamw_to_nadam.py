"""AdamW becomes Nadam in mid-run: a small language model, sharded over eight devices, with a checkpoint in between.

A transformer over the characters of Python's help texts is trained with optax.adamw and saved by Orbax. The checkpoint
is continued with optax.adamw, and from the same moments by optax_nadam with the rules adam, constant and scheduled,
each with float32 and with 8-bit moments. Two more show what goes wrong otherwise: moments that start at zero, and the
checkpoint's moments with a count of zero.
"""

import argparse
import functools
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # virtual devices, where there are no others

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from _shared import Parser, cross_entropy, natural, png, positive
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import optax_nadam
from optax_nadam import NadamConfig, RuleName, compat

WIDTH, HEADS, CONTEXT, BATCH = 64, 4, 32, 16
BETAS_AND_EPS: dict[str, Any] = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
ADAMW, ZERO, UNCOUNTED = "optax.adamw", "scheduled, moments of zero", "scheduled, count and product not loaded"
FORMATS: dict[str, dict[str, Any]] = {"float32": {}, "8-bit": {"m_dtype": "int8", "v_dtype": "int8"}}
RULES: tuple[RuleName, ...] = ("adam", "constant", "scheduled")
CHARACTERS, TEXT = np.unique(list("\n".join(topics[name] for name in sorted(topics))), return_inverse=True)
EARLY = 20  # steps after the switch in which a jump would show


def initial_params(seed: int) -> dict[str, np.ndarray]:
    """Weights of a transformer with one block."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (-(-len(CHARACTERS) // 8) * 8, WIDTH),  # rows for eight devices
        "position": (CONTEXT, WIDTH),
        "mix": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "head": (WIDTH, len(CHARACTERS)),
    }
    weights = {name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return weights | {"gains": np.ones((3, WIDTH), np.float32)}


def loss_of(params: dict[str, jax.Array], text: jax.Array) -> jax.Array:
    """The loss of the next character, in nats, for windows of shape (batch, CONTEXT + 1)."""

    def scaled(h: jax.Array, layer: int) -> jax.Array:
        return params["gains"][layer] * h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)

    h = params["embed"][text[:, :-1]] + params["position"]
    query, key, value = jnp.split(scaled(h, 0) @ params["mix"], 3, axis=-1)
    heads = (x.reshape(*x.shape[:2], HEADS, -1) for x in (query, key, value))
    h = h + jax.nn.dot_product_attention(*heads, is_causal=True).reshape(h.shape) @ params["out"]
    h = h + jax.nn.gelu(scaled(h, 1) @ params["up"]) @ params["down"]
    return cross_entropy(scaled(h, 2) @ params["head"], text[:, 1:])


def schedule(steps: int) -> optax.Schedule:
    """The learning rate of the whole run: a warm-up, and a cosine to a tenth."""
    return optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 10), steps, 3e-4)


def matrices(params: Any) -> Any:
    """What has weight decay: not the gains."""
    return {name: name != "gains" for name in params}


def split(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Arrays over all devices: an axis is split where the number of devices divides it."""

    def place(x: np.ndarray) -> jax.Array:
        spec = PartitionSpec(*[None] * axis, "data") if x.shape[axis] % mesh.size == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def windows(steps: range, seed: int, mesh: Mesh) -> jax.Array:
    """The batches of these steps of the run: pieces of the text, of shape (steps, batch, CONTEXT + 1)."""
    starts = [np.random.default_rng((seed, step)).integers(len(TEXT) - CONTEXT, size=(BATCH, 1)) for step in steps]
    return split(TEXT[np.stack(starts) + np.arange(CONTEXT + 1)].astype(np.int32), mesh, axis=1)


@functools.partial(jax.jit, static_argnames="tx")
def train(tx: Any, params: Any, state: Any, batches: jax.Array) -> tuple[Any, Any, jax.Array]:
    """Params and optimizer state after these batches, and the loss of each."""

    def step(carry: tuple[Any, Any], text: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, text)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), batches)
    return params, state, losses


def continuations(restored: Any, learning_rate: optax.Schedule, weight_decay: float) -> dict[str, tuple[Any, Any]]:
    """Each optimizer that continues, and its state, sharded like the params."""
    params, moments = restored["params"], restored["opt_state"]
    found = {}
    for rule in RULES:
        for name, narrow in FORMATS.items():
            tx = optax_nadam.nadamw(
                learning_rate, rule=rule, weight_decay=weight_decay, mask=matrices, **BETAS_AND_EPS, **narrow
            )
            config = NadamConfig(rule=rule, **BETAS_AND_EPS)
            found[f"{rule}, {name}"] = tx, compat.optax.load_state(jax.jit(tx.init)(params), moments, config=config)
    tx, (nadam, *rest) = found["scheduled, float32"]
    fresh = jax.jit(tx.init)(params)[0]
    found[ZERO] = tx, (fresh, *rest)  # the counter of the schedule stays
    found[UNCOUNTED] = tx, (nadam._replace(count=fresh.count, mu_product=fresh.mu_product), *rest)
    return found


def draw(before: np.ndarray, after: dict[str, np.ndarray], path: Path) -> None:
    """The loss around the switch, and that of each continuation over that of AdamW, both as means of ten steps."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = min(10, len(before))
    shown = min(100, len(before))

    def mean(losses: np.ndarray) -> np.ndarray:
        return np.convolve(losses, np.ones(width) / width, mode="valid")

    for number, (name, losses) in enumerate(after.items()):
        wrong = {ZERO: "0.55", UNCOUNTED: "0.2"}.get(name)
        color = wrong or ("0.75" if name == ADAMW else f"C{(number - 1) // 2}")
        style: dict[str, Any] = {"color": color, "ls": ":" if wrong else "--" if "8-bit" in name else "-"}
        style |= {"lw": 3.0 if name == ADAMW else 1.2, "label": name}
        whole = np.concatenate([before, losses])[len(before) - shown : len(before) + shown]
        left.plot(np.arange(width - shown, shown + 1), mean(whole), **style)
        right.plot(np.arange(width, len(losses) + 1), mean(losses / after[ADAMW]), **style)
    left.axvline(0, color="0.8", lw=0.8)
    left.set(xlabel="step after the switch", ylabel="training loss, nats a character")
    right.set(xlabel="step after the switch", ylabel="loss over that of AdamW", ylim=(0.993, 1.012))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> dict[str, np.ndarray]:
    """Trains, saves, restores, switches; returns the losses of each continuation."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=200, help="steps before the switch, and as many after it")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=png, default=Path("out/switch_adamw_to_nadam.png"), help="file of the picture")
    chosen = parser.parse_args()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    learning_rate, weight_decay = schedule(2 * chosen.steps), 0.1
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, mask=matrices, **BETAS_AND_EPS)

    params = split(initial_params(chosen.seed), mesh)
    first, second = (windows(range(n, n + chosen.steps), chosen.seed, mesh) for n in (0, chosen.steps))
    params, running, losses = train(adamw, params, jax.jit(adamw.init)(params), first)
    before = np.asarray(losses)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "run", {"params": params, "opt_state": running})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "run")  # without a target: dicts and lists, still sharded

    runs = {ADAMW: (adamw, running)} | continuations(restored, learning_rate, weight_decay)
    size, after = sum(x.size for x in jax.tree.leaves(params)), {}
    print(f"{size} params on {mesh.size} devices; AdamW's loss at the switch: {before[-EARLY:].mean():.4f}")
    print(f"{'after the switch':39} bytes of state  loss of {EARLY} steps / AdamW's  of all steps / AdamW's")
    for name, (tx, state) in runs.items():
        after[name] = np.asarray(train(tx, restored["params"], state, second)[-1])
        ratio = after[name] / after[ADAMW]
        bytes_a_param = sum(x.nbytes for x in jax.tree.leaves(state)) / size
        print(f"{name:39} {bytes_a_param:14.2f}  {ratio[:EARLY].mean():26.4f}  {ratio.mean():22.4f}", flush=True)
    draw(before, after, chosen.out)
    print(f"loss curves in {chosen.out}")
    return after


if __name__ == "__main__":
    main()
