"""What do clipping, cautious updates and gradient accumulation add to a step?"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks import ahead_of_time as aot
from benchmarks._report import (
    Answer,
    Rows,
    interleaved,
    is_quick,
    median_and_spread,
    milliseconds,
    row_of,
    save,
)
from benchmarks.tracing import whole_step

GRADIENTS = 4  # how many make a step where they are accumulated; so many are given in a measured call
PLAIN = "none"
NOTE = f"""\
The whole step of `nadamw` on float32 leaves, {{leaves}}; gradients given, params and state donated. A measured call
gives {GRADIENTS} gradients, and all figures are of one of them. The norm is so small that every step clips. Rows with
`optax.` have Optax's transformation around or before our `nadamw`; the others are fields of a `NadamConfig`. Bytes
accessed are XLA's own count; it adds up both branches of accumulation, of which three calls in four take the cheap one.
"""
ON_CPU = """
XLA:CPU makes a kernel of each result, which together move 44 bytes a parameter, and does not fuse the operands of a sum
into it. So the mask of `cautious` and the squares of `clip_by_gradient_rms` are written out and read again: 4 bytes of
temporaries."""
COMPILED_NOTE = f"""\
One leaf of 8192 x 8192, one chip, compiled ahead of time and not run; needs the group `aot`. Traffic is what passes
between the chip and its memory, a gradient: where {GRADIENTS} are accumulated, the mean of {GRADIENTS} calls. The norm
and the share of elements that agree each need one more reading, in a fusion of its own."""


def config(**options: Any) -> Any:
    """The optimizer of a config with some options."""
    return optax_nadam.NadamConfig(learning_rate=1e-3, weight_decay=1e-4, **options).build()


NADAMW = config()
OPTIONS: dict[str, Any] = {
    PLAIN: NADAMW,
    "clip_global_norm": config(clip_global_norm=1.0),
    "optax.clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), NADAMW),
    "clip_norm, a leaf": config(clip_norm=1.0),
    "cautious": config(cautious=True),
    "clip_by_gradient_rms": config(clip_by_gradient_rms=0.5),
    "accumulate_steps": config(accumulate_steps=GRADIENTS),
    "optax.MultiSteps": optax.MultiSteps(NADAMW, GRADIENTS).gradient_transformation(),
    "optax.apply_if_finite": optax.apply_if_finite(NADAMW, 5),
}


ACCUMULATED = ("accumulate_steps", "optax.MultiSteps")


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


def measured(shapes: Sequence[tuple[int, ...]], repeats: int, at_once: int = 3) -> Iterator[list[Any]]:
    """Time, bytes and temporaries of every option on this machine, a few at a time, each beside the plain step."""
    grads, size = gradients(shapes), sum(map(math.prod, shapes))

    def several(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [call() for _ in range(GRADIENTS)]

    others = [name for name in OPTIONS if name != PLAIN]
    for k in range(0, len(others), at_once):
        some = others[k : k + at_once]
        ready = {name: compiled_step(OPTIONS[name], grads) for name in (PLAIN, *some)}
        seconds = interleaved({name: several(call) for name, (call, _) in ready.items()}, repeats)
        plain = median_and_spread(seconds[PLAIN])[0]
        for name in some if k else [PLAIN, *some]:
            executable = ready[name][1]
            counted = (executable.cost_analysis() or {}).get("bytes accessed")
            yield [
                name,
                milliseconds([x / GRADIENTS for x in seconds[name]]),
                f"{median_and_spread(seconds[name])[0] / plain:.2f}",
                f"{counted / size:.1f}" if counted else "not counted",
                f"{executable.memory_analysis().temp_size_in_bytes / size:.2f}",
            ]


def compiled_for(target: str) -> Iterator[list[Any]]:
    """Traffic and temporaries of every option, compiled ahead of time."""
    mesh, size = aot.mesh_of(target, 1), sum(map(math.prod, aot.LARGE.values()))
    for name, tx in OPTIONS.items():
        compiled = aot.compiled_step(tx, aot.LARGE, mesh)
        # Where gradients are accumulated, all calls but the last take the cheap branch.
        calls = [max, *(GRADIENTS - 1) * [min if name in ACCUMULATED else max]]
        yield [
            name,
            f"{sum(aot.traffic(compiled, branch=branch) for branch in calls) / GRADIENTS / size:.2f}",
            f"{compiled.memory_analysis().temp_size_in_bytes / size:.3f}",
        ]


def answer(rows: Rows) -> Answer:
    """The step with each option over the plain one; the second column is the time, or the traffic where compiled."""
    plain, column = row_of(rows, PLAIN), 2 if len(rows[0]) > 3 else 1
    names = ("clip_global_norm", "cautious", "clip_by_gradient_rms", "accumulate_steps")
    over = {name: float(row_of(rows, name)[column]) / float(plain[column]) for name in names}
    return Answer(
        "A gradient takes " + ", ".join(f"{ratio:.2f} with `{name}`" for name, ratio in over.items()) + ".",
        f"{max(over.values()):.2f} of the plain step at most",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles for TPU and GPU where the group ``aot`` is installed, and measures this machine elsewhere."""
    quick = is_quick(__doc__, "one small leaf, few steps", arguments)
    if aot.installed():
        aot.save_all_compiled(
            "options",
            "What do clipping, cautious updates and gradient accumulation add to a step on a {target}?",
            ["option", "traffic a parameter", "temporaries a parameter, bytes"],
            compiled_for,
            COMPILED_NOTE,
            answer=answer,
            quick=quick,
        )
        return
    cpu = jax.default_backend() == "cpu"
    number, rows, columns = (40, 1024, 1024) if cpu else (10, 4096, 8192)
    save(
        "options",
        "What do clipping, cautious updates and gradient accumulation add to a step?",
        ["option", "a gradient", "over none", "bytes accessed a parameter", "temporaries a parameter, bytes"],
        list(measured([(64, 64)], repeats=3) if quick else measured(number * [(rows, columns)], repeats=11)),
        NOTE.format(leaves=f"{number} of {rows} x {columns}") + (ON_CPU if cpu else ""),
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
