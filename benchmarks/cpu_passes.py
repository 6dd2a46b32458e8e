"""Can XLA make fewer passes over the arrays on a CPU than one for each result?"""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

import optax_nadam
from benchmarks._report import Answer, Rows, interleaved, is_quick, milliseconds, save
from benchmarks.tracing import whole_step

Step = Callable[..., Any]

SIZE = 2**24
TX = optax_nadam.nadam(1e-3)
NOTE = """\
One float32 leaf of 2^24 elements; a whole step of `nadam`, params and state donated. Each way runs in its own process,
and all take turns. All give the bits of the plain step, which is checked. A pass reads p, g, m, v once and writes
p, m, v once: 28 bytes. XLA:CPU makes a kernel for each of the three results, hence 44. Bytes are XLA's count; for a
loop, that of its body times its iterations (left out where XLA's count mixes the loop with the rest). The data of a
small chunk stay in the processor's cache, so no more than 28 of the bytes need to come from memory. Processor time is
that of all threads. Threads are the most that XLA gives a kernel on two cores. Step times depend on whether both cores
are free, processor times hardly.

A loop over chunks that writes its results in place copies the whole arrays in every iteration. Two things prevent that:
the option `xla_cpu_copy_insertion_use_region_analysis`, which `jax.jit` takes in `compiler_options`, or stacking the
three results of a chunk behind an `optimization_barrier`. Both move fewer bytes over the memory bus. But XLA runs a
small chunk, and a write into an array, on one thread. With every core free the plain step, which is split over the
cores, can be as fast or faster. Around `scale_by_nadam` alone the loop is slower, as the update has to be stored for
the next transformation. Multi-output fusion is a flag of the process, which `jax.jit` does not take, and saves one read
of four bytes. So the library leaves the step as it is: on GPU and TPU it is one pass, and `lax.platform_dependent`
would keep it one pass."""


class Variant(NamedTuple):
    """A step, and the options of its compilation."""

    step: Step
    counted: int | None = None  # elements in XLA's count of bytes, which has a loop's body once; 0: not known
    options: dict[str, Any] = {}  # noqa: RUF012  # of jax.jit; never written to
    flags: str = ""  # of the process


def cut(tree: Any, at: jax.Array, size: int) -> Any:
    """A chunk of the arrays of a tree; its scalars whole."""
    return jax.tree.map(lambda x: lax.dynamic_slice(x, (at,), (size,)) if x.ndim else x, tree)


def put(tree: Any, chunk: Any, at: jax.Array) -> Any:
    """The tree with a chunk of its arrays replaced; its scalars as they were."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice(x, y, (at,)) if x.ndim else x, tree, chunk)


def stacked(tree: Any) -> Any:
    """The same tree, with no array ready before all are."""
    rows = iter(lax.optimization_barrier(jnp.stack([x for x in jax.tree.leaves(tree) if x.ndim])))
    return jax.tree.map(lambda x: next(rows) if x.ndim else x, tree)


def with_scalars(arrays: Any, scalars: Any) -> Any:
    """The arrays of one tree and the scalars of another, whose arrays are not computed."""
    return jax.tree.map(lambda x, y: x.reshape(y.shape) if y.ndim else y, arrays, scalars)


def in_chunks(step: Step, size: int, tie: Callable[[Any], Any] = lambda tree: tree) -> Step:
    """The step, taken chunk by chunk in place."""

    def chunked(params: Any, state: Any, grads: Any) -> Any:
        def body(i: jax.Array, carry: Any) -> Any:
            chunk = lax.optimization_barrier(cut((*carry, grads), i * size, size))
            return put(carry, tie(step(*chunk)), i * size)

        carry = lax.fori_loop(0, grads.size // size, body, (params, state))
        return with_scalars(carry, step(params, state, grads))

    return chunked


def scanned(step: Step, size: int) -> Step:
    """The step, scanned over chunks."""

    def chunked(params: Any, state: Any, grads: Any) -> Any:
        def body(_: None, chunk: Any) -> Any:
            p, m, v, g = chunk
            return None, step(p, optax.tree.set(state, m=m, v=v), g)

        arrays = params, optax.tree.get(state, "m"), optax.tree.get(state, "v"), grads
        _, chunks = lax.scan(body, None, jax.tree.map(lambda x: x.reshape(-1, size), arrays))
        return with_scalars(chunks, step(params, state, grads))

    return chunked


def transformation_in_chunks(inner: optax.GradientTransformation, size: int) -> optax.GradientTransformation:
    """A transformation that runs chunk by chunk, and stores the update for the next one."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        chunked = in_chunks(lambda _, state, grads: inner.update(grads, state), size, stacked)
        return chunked(jnp.zeros_like(updates), state, updates)

    return optax.GradientTransformation(inner.init, update)


def on_cpu(step: Step, elsewhere: Step) -> Step:
    """One step on a CPU, another on every other platform."""
    return lambda *arguments: lax.platform_dependent(*arguments, cpu=step, default=elsewhere)


PLAIN = whole_step(TX, apply=True)
ALONE = optax.chain(transformation_in_chunks(optax_nadam.scale_by_nadam(), 2**14), optax.scale_by_learning_rate(1e-3))
MULTI = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
REGIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
VARIANTS = {
    "plain": Variant(PLAIN),
    "multi-output fusion": Variant(PLAIN, flags=MULTI),
    "without fusion emitters": Variant(PLAIN, options={"xla_cpu_use_fusion_emitters": False}),
    "three results stacked, no loop": Variant(lambda *arguments: stacked(PLAIN(*arguments))),
    **{f"loop, chunks of 2^{k}, region analysis": Variant(in_chunks(PLAIN, 2**k), 2**k, REGIONS) for k in (12, 14, 18)},
    "loop, chunks of 2^18, region analysis, multi-output fusion": Variant(
        in_chunks(PLAIN, 2**18), 2**18, REGIONS, MULTI
    ),
    **{f"loop, chunks of 2^{k}, results stacked": Variant(in_chunks(PLAIN, 2**k, stacked), 2**k) for k in (12, 14, 18)},
    "the same, 2^14, by `lax.platform_dependent`": Variant(on_cpu(in_chunks(PLAIN, 2**14, stacked), PLAIN), 2**14),
    "the same, 2^14, around `scale_by_nadam` alone": Variant(whole_step(ALONE, apply=True), 0),
}
SLOW = {
    "loop, chunks of 2^18": Variant(in_chunks(PLAIN, 2**18), 2**18),
    "`lax.scan` over chunks of 2^18": Variant(scanned(PLAIN, 2**18), 0),
}


def arrays(size: int) -> tuple[Any, Any, Any]:
    """Params, state and gradients, seeded."""
    params, grads = jax.random.normal(jax.random.key(0), (2, size))
    return params, TX.init(params), grads


class Facts(NamedTuple):
    """Figures of an executable, its number of loops on other platforms, and the results of its first step."""

    bytes: float
    temporaries: int
    threads: int
    loops_elsewhere: dict[str, int]
    results: list[np.ndarray]


def facts(step: Any, executable: Any, arguments: tuple[Any, Any, Any]) -> Facts:
    """Reads them, on copies of the arguments."""
    lowered = {x: step.trace(*arguments).lower(lowering_platforms=(x,)).as_text() for x in ("cuda", "tpu")}
    params, state, grads = arguments
    return Facts(
        executable.cost_analysis()["bytes accessed"],
        executable.memory_analysis().temp_size_in_bytes,
        max(map(int, re.findall(r'outer_dimension_partitions":\["(\d+)"', executable.as_text())), default=1),
        {platform: text.count("stablehlo.while") for platform, text in lowered.items()},
        jax.tree.map(np.asarray, jax.tree.leaves(executable(*jax.tree.map(jnp.copy, (params, state)), grads))),
    )


def serve(connection: multiprocessing.connection.Connection, name: str, size: int) -> None:
    """Runs a variant: sends its facts, then takes a step at each request and sends its processor time."""
    variant = (VARIANTS | SLOW)[name]
    step = jax.jit(variant.step, donate_argnums=(0, 1), compiler_options=variant.options or None)
    *carry, grads = arrays(size)
    executable: Any = step.lower(*carry, grads).compile()
    connection.send(facts(step, executable, (*carry, grads)))
    with contextlib.suppress(EOFError):
        while connection.recv():
            started = time.process_time()
            carry = jax.block_until_ready(executable(*carry, grads))
            connection.send(time.process_time() - started)


class Worker:
    """A variant in its own process, since XLA reads its flags once a process."""

    def __init__(self, name: str, variant: Variant, size: int):
        """Starts it and waits for its facts."""
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        with mock.patch.dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {variant.flags}".strip()):
            context.Process(target=serve, args=(there, name, size), daemon=True).start()
        there.close()
        self.facts: Facts = self.connection.recv()
        self.processor: list[float] = []

    def step(self) -> None:
        """Takes a step and records its processor time."""
        self.connection.send(True)
        self.processor.append(self.connection.recv())


def rows(variants: dict[str, Variant], size: int, repeats: int) -> Iterator[list[Any]]:
    """One row for each variant, the first of which is the plain step."""
    workers = {name: Worker(name, variant, size) for name, variant in variants.items()}
    for name, worker in workers.items():
        for result, expected in zip(worker.facts.results, workers["plain"].facts.results, strict=True):
            np.testing.assert_array_equal(result, expected, name)
    seconds = interleaved({name: worker.step for name, worker in workers.items()}, repeats, warmup=1)
    wall = {name: statistics.median(times) for name, times in seconds.items()}
    processor = {name: statistics.median(worker.processor[1:]) for name, worker in workers.items()}
    for name, worker in workers.items():
        counted = size if variants[name].counted is None else variants[name].counted
        yield [
            name,
            f"{worker.facts.bytes / counted:.1f}" if counted else "",
            f"{worker.facts.temporaries / size:.2f}",
            milliseconds(seconds[name]),
            f"{wall[name] / wall['plain']:.2f}",
            f"{1e3 * processor[name]:.0f} ms",
            f"{processor[name] / processor['plain']:.2f}",
            worker.facts.threads,
            "yes" if any(worker.facts.loops_elsewhere.values()) else "no",
        ]


def answer(rows: Rows) -> Answer:
    """The fastest step."""
    best = min(rows, key=lambda row: float(row[4]))
    return Answer(
        f"Yes, but not from within the library. Fastest: {best[0]}.",
        f"{best[4]} of the plain step, {best[6]} of its processor time",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the variants, the slow ones in few steps."""
    quick = is_quick(__doc__, "the plain step and one variant, on small arrays", arguments)
    if quick:
        variants, slow = dict(itertools.islice(VARIANTS.items(), 2)), []
    else:
        variants = VARIANTS
        _, *slow = rows({"plain": VARIANTS["plain"]} | SLOW, SIZE, 3)
    save(
        "cpu_passes",
        "Can XLA make fewer passes over the arrays on a CPU?",
        [
            "step",
            "bytes accessed a parameter",
            "temporaries a parameter, bytes",
            "step time",
            "over plain",
            "processor time",
            "over plain's",
            "threads",
            "a loop on GPU and TPU too",
        ],
        [*rows(variants, 2**16 if quick else SIZE, 3 if quick else 21), *slow],
        NOTE,
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
