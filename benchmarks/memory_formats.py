"""How much memory, traffic and time do the formats of moments and weights take?"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp
from jax.typing import DTypeLike

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
from benchmarks._rivals import in_a_loop
from benchmarks.step_time import LOOP, gpt2_small
from benchmarks.tracing import whole_step

INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
BFLOAT16: Any = {"m_dtype": "bfloat16", "v_dtype": "bfloat16"}


class Format(NamedTuple):
    """An optimizer and the dtype of the weights it trains."""

    name: str
    weights: DTypeLike
    tx: Any


FORMATS = [
    Format("float32", jnp.float32, optax_nadam.nadamw(1e-3)),
    Format("bfloat16", jnp.float32, optax_nadam.nadamw(1e-3, **BFLOAT16)),
    Format("int8", jnp.float32, optax_nadam.nadamw(1e-3, **INT8)),
    Format("float32", jnp.bfloat16, optax_nadam.nadamw(1e-3)),
    Format("bfloat16", jnp.bfloat16, optax_nadam.nadamw(1e-3, **BFLOAT16)),
    Format("int8", jnp.bfloat16, optax_nadam.nadamw(1e-3, **INT8)),
    Format("float32, compensated", jnp.bfloat16, optax_nadam.compensated(optax_nadam.nadamw(1e-3))),
    Format("int8, compensated", jnp.bfloat16, optax_nadam.compensated(optax_nadam.nadamw(1e-3, **INT8))),
    Format(
        "int8, compensated by int16",
        jnp.bfloat16,
        optax_nadam.compensated(optax_nadam.nadamw(1e-3, **INT8), remainder_dtype="int16"),
    ),
    Format(
        "int8, weights stochastically rounded",
        jnp.bfloat16,
        optax_nadam.compensated(optax_nadam.nadamw(1e-3, **INT8), remainder_dtype=None),
    ),
    Format("optax.nadamw", jnp.float32, optax.nadamw(1e-3)),
    Format("optax.nadamw, mu_dtype=bfloat16", jnp.float32, optax.nadamw(1e-3, mu_dtype=jnp.bfloat16)),
    Format("optax.nadamw", jnp.bfloat16, optax.nadamw(1e-3)),
]
RIVALS: list[Format] = []  # run, not compiled for other devices
if importlib.util.find_spec("rollfast"):
    from rollfast.optim.adam8 import adamw8

    RIVALS.append(Format("rollfast, adamw8(nesterov=True)", jnp.float32, adamw8(1e-3, nesterov=True)))
GROUPS = FORMATS[:3], FORMATS[3:6], FORMATS[6:9], FORMATS[9:] + RIVALS  # a few at a time, so that all fit
COLUMNS = ["moments", "weights and gradients"]
NOTE = """\
The shapes of GPT-2 small, the whole step of `nadamw`, params and state donated. The state is all arrays of the
optimizer. {programs} Ratios are to float32 in the same rounds; the first row is the same program, so
its distance from 1 is noise. `optax.nadamw` in bfloat16 rounds moments and weights to the nearest. Compensated weights
have 24 bits, or all of float32's 32 with int16."""
ON_CPU = """\
XLA's bytes and temporaries are of the program for the CPU, which has a kernel for each result and recomputes
the codes in each; so int8 takes long."""
ON_DEVICE = f"""\
Timed are {LOOP} steps as one program, since the host takes longer to start a step of so many arrays than the device to
take it; the time is that of one. Temporaries, and bytes where XLA counts them, are of a single step."""
COMPILED_NOTE = """\
One leaf of 8192 x 8192, one chip, the whole step of `nadamw`, compiled ahead of time and not run; needs the group
`aot`. Traffic is what passes between the chip and its memory: 6 bytes for bfloat16 weights and gradients, 12 for
float32, and the moments. The scales of int8 moments need one more read of gradients and codes, 6 bytes, or 4 with
bfloat16; fusions that work on the scales alone are counted too. A custom kernel, in place of XLA's fusions, would move
24 bytes in a chain ([decision](decisions.md))."""


def arrays(shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> list[jax.Array]:
    """Standard normal leaves."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def running(format_: Format, shapes: Sequence[tuple[int, ...]], looped: int) -> tuple[Callable[[], Any], Any, int]:
    """A step that continues from the last one, or so many in a loop; one as a program; the bytes of its state."""
    params, grads = (arrays(shapes, format_.weights) for _ in range(2))
    state = jax.jit(format_.tx.init)(params)
    stored = sum(x.nbytes for x in jax.tree.leaves(state))
    one = whole_step(format_.tx, apply=True)
    single = run = jax.jit(one, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    rest: tuple[Any, ...] = (grads,)
    if looped:
        rest = grads, jnp.ones(looped, format_.weights)
        run = jax.jit(in_a_loop(one), donate_argnums=(0, 1)).lower(params, state, *rest).compile()
    carry = [params, state]

    def call() -> Any:
        carry[:] = run(*carry, *rest)
        return jax.block_until_ready(carry[0])

    return call, single, stored


def measured(some: list[Format], shapes: Sequence[tuple[int, ...]], repeats: int, looped: int = 0) -> Rows:
    """Memory and time of some formats on this machine, beside a reference in float32."""
    size = sum(map(math.prod, shapes))
    plain = Format("reference", jnp.float32, optax_nadam.nadamw(1e-3))
    ready = {k: running(format_, shapes, looped) for k, format_ in enumerate([plain, *some])}
    calls = interleaved({str(k): call for k, (call, _, _) in ready.items()}, repeats)
    seconds = {k: [x / max(1, looped) for x in calls[str(k)]] for k in ready}
    whole = median_and_spread(seconds[0])[0]
    rows = []
    for k, format_ in enumerate(some, start=1):
        _, executable, stored = ready[k]
        counted = (executable.cost_analysis() or {}).get("bytes accessed")
        rows.append(
            [
                format_.name,
                jnp.dtype(format_.weights).name,
                f"{stored / size:.3f}",
                f"{executable.memory_analysis().temp_size_in_bytes / size:.2f}",
                f"{counted / size:.1f}" if counted else "not counted",
                milliseconds(seconds[k]),
                f"{median_and_spread(seconds[k])[0] / whole:.2f}",
            ]
        )
    return rows


def compiled_for(target: str) -> Iterator[list[Any]]:
    """Traffic, kernels and temporaries of every format, compiled ahead of time."""
    size = sum(map(math.prod, aot.LARGE.values()))
    for name, weights, tx in FORMATS:
        compiled = aot.compiled_step(tx, aot.LARGE, aot.mesh_of(target, 1), weights)
        memory = compiled.memory_analysis()
        gradients_and_weights = 2 * jnp.dtype(weights).itemsize
        yield [
            name,
            jnp.dtype(weights).name,
            f"{memory.argument_size_in_bytes / size - gradients_and_weights:.3f}",
            f"{memory.temp_size_in_bytes / size:.3f}",
            f"{aot.traffic(compiled) / size:.2f}",
            aot.kernels(compiled)["fusion"],
        ]


def answer(rows: Rows) -> Answer:
    """State and traffic, or time, of 8-bit moments over float32 ones; weights are float32."""
    whole, small = (row_of(rows, name, "float32") for name in ("float32", "int8"))
    state = f"8-bit moments take {small[2]} bytes a parameter, float32 ones {whole[2]}"
    if len(whole) > 6:  # measured on this machine
        return Answer(f"{state}.", f"{float(small[6]) / float(whole[6]):.1f} of the step time")
    moved = f"the step moves {small[4]}, or {whole[4]}"
    return Answer(f"{state}; {moved}.", f"{float(small[4]) / float(whole[4]):.2f} of the traffic")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles for TPU and GPU where the group ``aot`` is installed, and measures this machine elsewhere."""
    quick = is_quick(__doc__, "one small leaf, half of the formats, few steps", arguments)
    if aot.installed():
        aot.save_all_compiled(
            "memory_formats",
            "How much do the formats of moments and weights take on a {target}?",
            [*COLUMNS, "state, bytes a parameter", "temporaries", "traffic a parameter", "fusions"],
            compiled_for,
            COMPILED_NOTE,
            answer=answer,
            quick=quick,
        )
        return
    cpu = jax.default_backend() == "cpu"
    shapes = [(64, 64)] if quick else gpt2_small()
    columns = [*COLUMNS, "state, bytes a parameter", "temporaries", "bytes accessed a parameter", "step"]
    rows: Rows = []
    for some in GROUPS[::3] if quick else GROUPS:  # the result is written after each: one cut short leaves what it has
        rows += measured(some, shapes, repeats=3 if quick else 11, looped=0 if cpu else LOOP)
        save(
            "memory_formats",
            "How much do the formats of moments and weights take?",
            [*columns, "over float32's"],
            rows,
            NOTE.format(programs=ON_CPU if cpu else ON_DEVICE),
            answer=answer,
            packages=("rollfast",) if importlib.util.find_spec("rollfast") else (),
            quick=quick,
        )


if __name__ == "__main__":
    main()
