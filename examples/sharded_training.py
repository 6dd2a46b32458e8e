"""A network on the handwritten digits, trained on all devices, with the moments split over them.

    python examples/sharded_training.py                                  on the devices of this machine
    JAX_NUM_CPU_DEVICES=8 python examples/sharded_training.py            on eight virtual ones
    python examples/sharded_training.py --coordinator HOST:PORT --processes 2 --process 0      as one of two processes

Three layouts with the same code: they differ in which trees are split over the mesh and which are on every device.

    replicated   params and moments on every device: plain data parallelism
    zero1        params on every device; each device stores and computes its part of the moments
    fsdp         params split as well, and gathered where the network needs them
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _shared import Parser, digits_in_batches, initial_params, loss_of, natural, positive, report
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_nadam

LAYOUTS = {"replicated": (False, False), "zero1": (False, True), "fsdp": (True, True)}


def shardings(tree: Any, mesh: Mesh, split: bool) -> Any:
    """Each leaf split over its first axis that can be divided by the number of devices, or on every device."""

    def of(leaf: Any) -> NamedSharding:
        axis = next((i for i, size in enumerate(leaf.shape) if split and size % mesh.size == 0), None)
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data"))

    return jax.tree.map(of, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, as arrays over all devices."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree, shardings
    )


def train(layout: str, steps: int, seed: int) -> tuple[dict[str, Any], Any, list[float]]:
    """Trains over all devices; returns params, optimizer state and losses."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    weights = initial_params(seed)
    of_params, of_moments = (shardings(weights, mesh, split) for split in LAYOUTS[layout])
    tx = optax.chain(
        optax_nadam.clip_by_global_norm(1.0),
        optax_nadam.nadamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-3),
        # Split moments give split updates; this gathers them like the params.
        optax.stateless(lambda updates, _: jax.lax.with_sharding_constraint(updates, of_params)),
    )
    params = place(weights, of_params)
    opt_state = jax.jit(tx.init)(place(weights, of_moments))  # the moments are sharded like the params given to init

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        grads = jax.lax.with_sharding_constraint(grads, of_moments)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for batch in digits_in_batches(steps, seed):
        images, labels = place(batch, shardings(batch, mesh, split=True))
        params, opt_state, loss = step(params, opt_state, images, labels)
        losses.append(float(loss))
    return params, opt_state, losses


def bytes_on_one_device(tree: Any) -> int:
    """Bytes of a tree on the first device of this process."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def gathered(tree: Any) -> Any:
    """Every leaf whole on every device; all processes must call it."""
    mesh = jax.tree.leaves(tree)[-1].sharding.mesh
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)


def save(path: Path, tree: Any) -> None:
    """Writes the leaves under their paths as one .npz."""
    arrays: dict[str, Any] = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    np.savez(path, **arrays)


def main() -> None:
    """Reads the arguments, joins the other processes, trains and reports."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="zero1")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", type=Path, help="write params and optimizer state to this .npz")
    parser.add_argument("--coordinator", help="address of the first process, where there are several")
    parser.add_argument("--processes", type=positive, default=1)
    parser.add_argument("--process", type=natural, default=0, help="which of them this is, from 0")
    chosen = parser.parse_args()
    if chosen.processes > 1:
        jax.distributed.initialize(chosen.coordinator, chosen.processes, chosen.process)

    params, opt_state, losses = train(chosen.layout, chosen.steps, chosen.seed)
    whole = gathered({"params": params, "opt_state": opt_state})
    if jax.process_index() == 0:
        if chosen.out:
            save(chosen.out, whole)
        print(f"{chosen.layout} on {jax.device_count()} devices of {jax.process_count()} processes")
        report(losses)
        of_params, of_state = bytes_on_one_device(params), bytes_on_one_device(opt_state)
        print(f"bytes on one device: {of_params} of params, {of_state} of optimizer state")


if __name__ == "__main__":
    main()
