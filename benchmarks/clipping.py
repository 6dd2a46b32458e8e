"""What does clipping by the global norm add to a step, and can it do without temporaries?"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks import ahead_of_time as aot
from benchmarks._report import interleaved, is_quick, median_and_spread, milliseconds, save
from benchmarks.step_time import gpt2_small
from benchmarks.tracing import whole_step

COLUMNS = ["clipping", "optimizer"]
NOTE = """\
A whole step on the shapes of GPT-2 small (148 float32 leaves, 124 M), gradients given, params and state donated; the
norm is so large that every step clips. The norm reads every gradient once more: 4 bytes a parameter.
`optax.clip_by_global_norm` divides each leaf by the norm, under a select. XLA:CPU does not repeat that division in each
of its three passes, but stores the quotients: 4 bytes of temporaries. Ours computes one scalar, `max_norm / norm` or 1,
and multiplies by it, which every pass repeats. The difference is that of the params after all timed steps, relative to
how far they have moved."""

COMPILED_NOTE = (
    "Compiled ahead of time, not run; needs the extra `aot`. The norm reads the gradients once more, in one more fusion"
    " a leaf; both ways of clipping are fused into the update."
)


NONE, CLIP, FACTOR = "none", "optax.clip_by_global_norm", "optax_nadam.clip_by_global_norm"
CLIPPINGS = {
    NONE: optax.identity(),
    CLIP: optax.clip_by_global_norm(1.0),
    FACTOR: optax_nadam.clip_by_global_norm(1.0),
}
OPTIMIZERS = {"nadamw": optax_nadam.nadamw(1e-3), "optax.nadamw": optax.nadamw(1e-3)}


def chains() -> Iterator[tuple[str, str, Any]]:
    """Every optimizer after every way of clipping."""
    for name, tx in OPTIMIZERS.items():
        for clipping, clip in CLIPPINGS.items():
            yield clipping, name, optax.chain(clip, tx)


def compiled_step(tx: Any, grads: Any) -> tuple[Callable[[], Any], Any]:
    """A call that takes one step on its own params and state and returns the params; and the executable."""
    params = jax.tree.map(jnp.ones_like, grads)
    carry = [params, tx.init(params)]
    executable = jax.jit(whole_step(tx, apply=True), donate_argnums=(0, 1)).lower(*carry, grads).compile()

    def call() -> Any:
        carry[:] = executable(*carry, grads)
        return jax.block_until_ready(carry[0])

    return call, executable


def gradients(shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Standard normal gradients."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def difference(one: Any, other: Any) -> float:
    """Relative difference of two trees of params that started from 1."""
    a, b = (np.concatenate([np.ravel(x) - 1.0 for x in jax.tree.leaves(tree)]) for tree in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measured(shapes: Sequence[tuple[int, ...]], repeats: int) -> Iterator[list[Any]]:
    """Time, bytes and temporaries of every chain on this machine."""
    grads, size = gradients(shapes), sum(map(math.prod, shapes))
    ready = {(clipping, name): compiled_step(tx, grads) for clipping, name, tx in chains()}
    seconds = interleaved({" ".join(key): call for key, (call, _) in ready.items()}, repeats, warmup=3)
    times = {key: median_and_spread(seconds[" ".join(key)])[0] for key in ready}
    for (clipping, name), (call, executable) in ready.items():
        apart = difference(call(), ready[CLIP, name][0]()) if clipping == FACTOR else None
        yield [
            clipping,
            name,
            milliseconds(seconds[f"{clipping} {name}"]),
            f"{times[clipping, name] / times[NONE, name]:.2f}",
            f"{executable.cost_analysis()['bytes accessed'] / size:.1f}",
            f"{executable.memory_analysis().temp_size_in_bytes / size:.2f}",
            "" if apart is None else f"{apart:.1e}",
        ]


def compiled_for(target: str) -> Iterator[list[Any]]:
    """Traffic, kernels and temporaries of every chain, compiled ahead of time."""
    mesh = aot.mesh_of(target, 1)
    for arrays, shapes in {"8192 x 8192": aot.LARGE, "GPT-2 small": aot.GPT2}.items():
        size = sum(map(math.prod, shapes.values()))
        for clipping, name, tx in chains():
            compiled = aot.compiled_step(tx, shapes, mesh)
            yield [
                clipping,
                name,
                arrays,
                f"{aot.traffic(compiled) / size:.2f}",
                ", ".join(f"{count / len(shapes):g} {kind}" for kind, count in aot.kernels(compiled).items()),
                f"{compiled.memory_analysis().temp_size_in_bytes / size:.3f}",
            ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles for TPU and GPU where the extra ``aot`` is installed, and measures this machine elsewhere."""
    quick = is_quick(__doc__, "small leaves, few steps", arguments)
    if aot.installed():
        for target in aot.TARGETS:
            aot.save_compiled(
                "clipping",
                f"What does clipping by the global norm add to a step on a {target.upper()}?",
                [*COLUMNS, "arrays", "traffic a parameter", "kernels a leaf", "temporaries a parameter, bytes"],
                list(itertools.islice(compiled_for(target), 1 if quick else None)),
                COMPILED_NOTE,
                target,
                quick=quick,
            )
        return
    save(
        "clipping",
        "What does clipping by the global norm add to a step?",
        [
            *COLUMNS,
            "step",
            "over none",
            "bytes accessed a parameter",
            "temporaries a parameter, bytes",
            "params differ from those of optax.clip_by_global_norm by",
        ],
        list(measured([(64, 64), (64,)], repeats=3) if quick else measured(gpt2_small(), repeats=15)),
        NOTE,
        quick=quick,
    )


if __name__ == "__main__":
    main()
