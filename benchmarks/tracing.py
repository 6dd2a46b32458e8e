"""What do tracing, compiling and calling a step cost, and how does that grow with the number of leaves?"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks._report import Answer, Rows, interleaved, is_quick, milliseconds, row_of, save

Step = Callable[..., Any]
Calls = dict[str, Callable[[], None]]  # by what is measured
Times = dict[str, list[float]]  # seconds, by whose they are
Results = dict[tuple[str, str], dict[int, Times]]  # by the chain and what is measured, then by the number of leaves

FIRST = optax_nadam.scale_by_nadam(), optax.scale_by_adam(nesterov=True)
DECAY = optax.add_decayed_weights(1e-4)
NADAMW = optax_nadam.nadamw(1e-3), optax.nadamw(1e-3)
SCALE_BY, UPDATE, WHOLE = "scale_by_nadam", "+ scale_by_learning_rate = nadamw", "+ apply_updates = whole step"
PAIRS: dict[str, tuple[Any, Any]] = {
    SCALE_BY: FIRST,
    "+ add_decayed_weights": (optax.chain(FIRST[0], DECAY), optax.chain(FIRST[1], DECAY)),
    UPDATE: NADAMW,
    WHOLE: NADAMW,
}
WHOSE = ("ours", "optax")
REPEATS = {10: (21, 11), 148: (21, 7), 1000: (11, 3), 3000: (3, 1)}  # of tracing and of eager calls; of compiling
SWEEP = {"learning_rate": (1e-3, 2e-3, 4e-3), "b1": (0.8, 0.9, 0.95), "weight_decay": (0.0, 1e-4, 1e-2)}
COMPILED = "/jax/core/compile/backend_compile_duration"
NOTE = """\
Leaves of 64 floats. In both chains the transformations after the first are Optax's own; in Optax's, the first is
`scale_by_adam(nesterov=True)`. A call outside jit is of the whole chain named. The first call is all stages, from a
function to its first result. Growth is the power of the number of leaves, fitted from 148 on. The sweep is over three
settings of injected hyperparameters.

Targets: at most 5 equations a leaf for the whole step, 1 compilation for a sweep, and at most 0.2 of Optax's time for
the two below. Tracing the whole step, 1000 leaves: {trace} Outside jit, `update` of `nadamw`, 148 leaves: {eager}"""
PARTS = """\
{ratio:.2f}. Of our {ours:.1f} ms, `scale_by_nadam` takes {first:.1f}, which is {fraction:.2f} of Optax's {theirs:.1f}
ms; the transformations after it, Optax's own, take {others:.1f} ms."""


def whole_step(tx: Any, apply: bool) -> Step:
    """A step: update and, where asked, apply the update."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates) if apply else updates), state

    return step


def leaves(number: int) -> dict[str, jax.Array]:
    """A number of leaves of 64 floats."""
    return {f"w{i}": jnp.ones(64) for i in range(number)}


def steps(what: str) -> list[tuple[Any, Step]]:
    """Both chains, ours and Optax's, and their steps."""
    return [(tx, whole_step(tx, apply=what == WHOLE)) for tx in PAIRS[what]]


def first_call(step: Step, arguments: tuple[Any, ...]) -> list[float]:
    """Seconds to trace, lower, compile and run, each from the result of the one before."""
    jax.clear_caches()
    clock = [time.perf_counter()]

    def timed(result: Any) -> Any:
        clock.append(time.perf_counter())
        return result

    traced = timed(jax.jit(step).trace(*arguments))
    compiled = timed(timed(traced.lower()).compile())
    timed(jax.block_until_ready(compiled(*arguments)))
    return [end - start for start, end in itertools.pairwise(clock)]


def tracing(step: Step, arguments: tuple[Any, ...]) -> Calls:
    """The first stage alone."""

    def trace() -> None:
        jax.clear_caches()
        jax.jit(step).trace(*arguments)

    return {"trace": trace}


def eager(step: Step, arguments: tuple[Any, ...]) -> Calls:
    """A call outside jit."""
    return {"call outside jit": lambda: jax.block_until_ready(step(*arguments))}


def timed(what: str, number: int, make_calls: Callable[..., Calls], repeats: int) -> dict[str, Times]:
    """Seconds of calls of a step, ours and Optax's interleaved."""
    params = leaves(number)
    pair = [make_calls(step, (params, tx.init(params), params)) for tx, step in steps(what)]
    turns = {whose + measure: call for whose, calls in zip(WHOSE, pair, strict=True) for measure, call in calls.items()}
    seconds = interleaved(turns, repeats, warmup=min(repeats - 1, 2))
    return {measure: {whose: seconds[whose + measure] for whose in WHOSE} for measure in pair[0]}


def starting(number: int, repeats: int) -> dict[str, Times]:
    """Seconds of the later stages of the whole step's first call, and of all stages together."""
    params = leaves(number)
    taken: dict[str, list[list[float]]] = {whose: [] for whose in WHOSE}

    def turn(whose: str, tx: Any, step: Step) -> Callable[[], None]:
        arguments = params, tx.init(params), params
        return lambda: taken[whose].append(first_call(step, arguments))

    turns = {whose: turn(whose, *pair) for whose, pair in zip(WHOSE, steps(WHOLE), strict=True)}
    interleaved(turns, repeats, warmup=min(repeats - 1, 2))
    counted = {whose: seconds[-repeats:] for whose, seconds in taken.items()}

    def of(stage: int) -> Times:
        return {whose: [stages[stage] for stages in seconds] for whose, seconds in counted.items()}

    first = {whose: [sum(stages) for stages in seconds] for whose, seconds in counted.items()}
    return {"lower": of(1), "compile": of(2), "first call": first}


def results(repeats: dict[int, tuple[int, int]]) -> Results:
    """All times; for the chains in between, only at the sizes of the targets."""
    everything: Results = {}
    for what in PAIRS:
        sizes = {n: x for n, x in repeats.items() if what in (SCALE_BY, WHOLE) or n in (4, 148, 1000)}
        found = [(number, timed(what, number, tracing, many)) for number, (many, _) in sizes.items()]
        found += [(number, timed(what, number, eager, many)) for number, (many, _) in sizes.items()]
        found += [(number, starting(number, few)) for number, (_, few) in sizes.items() if what == WHOLE]
        for number, by_measure in found:
            for measure, times in by_measure.items():
                everything.setdefault((what, measure), {})[number] = times
    return everything


def medians(sizes: dict[int, Times], whose: str) -> dict[int, float]:
    """Milliseconds, by the number of leaves."""
    return {number: 1e3 * statistics.median(times[whose]) for number, times in sizes.items()}


def growth(times: dict[int, float]) -> float:
    """The power of the number of leaves that times grow with, from 148 leaves on."""
    numbers = [number for number in times if number >= 148] or list(times)
    return float(np.polyfit(np.log(numbers), np.log([times[number] for number in numbers]), 1)[0])


def shown(seconds: list[float]) -> str:
    """Median and quartiles, or the only time."""
    return milliseconds(seconds) if len(seconds) > 1 else f"{1e3 * seconds[0]:.4g} ms"


def rows_of_times(everything: Results) -> Iterator[list[Any]]:
    """A row for each size, and one with the growth."""
    for (what, measure), sizes in everything.items():
        ours, theirs = (medians(sizes, whose) for whose in WHOSE)
        for number, times in sizes.items():
            texts = [shown(times[whose]) for whose in WHOSE]
            yield [what, measure, number, len(times["ours"]), *texts, f"{ours[number] / theirs[number]:.2f}"]
        if len(sizes) > 2:
            yield [what, measure, "growth", "", f"{growth(ours):.2f}", f"{growth(theirs):.2f}", ""]


def equations_a_leaf(tx: Any, step: Step) -> int:
    """By how many equations one more leaf lengthens the program."""
    few, more = (len(jax.make_jaxpr(step)(p, tx.init(p), p).eqns) for p in (leaves(10), leaves(11)))
    return more - few


def compilations(act: Callable[[], None]) -> int:
    """How many programs are compiled by a call."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        events.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    act()
    jax.monitoring.clear_event_listeners()  # there is no other; jax 0.6 cannot remove a single one
    return events.count(COMPILED)


def five_steps(make: Callable[..., Any], number: int) -> int:
    """Compilations of a run."""
    tx, params = make(1e-3), leaves(number)
    carry, step = [params, tx.init(params)], jax.jit(whole_step(tx, apply=True))

    def act() -> None:
        for _ in range(5):
            carry[:] = step(*carry, params)

    return compilations(act)


def sweep(make: Callable[..., Any], number: int) -> int:
    """Compilations of a step with injected hyperparameters, for several settings of them."""
    tx, params = optax.inject_hyperparams(make)(**{name: values[0] for name, values in SWEEP.items()}), leaves(number)
    state, step = tx.init(params), jax.jit(whole_step(tx, apply=True))

    def act() -> None:
        for values in zip(*SWEEP.values(), strict=True):
            state.hyperparams.update(zip(SWEEP, map(np.float32, values), strict=True))
            step(params, state, params)

    return compilations(act)


def rows_of_counts(numbers: tuple[int, ...]) -> Iterator[list[Any]]:
    """What does not depend on the machine: equations and compilations."""
    for what in PAIRS:
        yield [what, "equations a leaf", "", "", *(equations_a_leaf(*pair) for pair in steps(what)), ""]
    for number in numbers:
        for measure, count in {"compilations of 5 steps": five_steps, "compilations of a sweep": sweep}.items():
            counts = (count(make, number) for make in (optax_nadam.nadamw, optax.nadamw))
            yield [WHOLE, measure, number, "", *counts, ""]


def parts(everything: Results, what: str, measure: str, number: int) -> str:
    """How much of a time is due to the first transformation, and how much to those that are Optax's own."""
    ours, theirs = (medians(everything[what, measure], whose)[number] for whose in WHOSE)
    first = medians(everything[SCALE_BY, measure], "ours")[number]
    return PARTS.format(
        ratio=ours / theirs, ours=ours, first=first, fraction=first / theirs, theirs=theirs, others=ours - first
    )


def answer(rows: Rows) -> Answer:
    """The whole step of 1000 leaves, over Optax's."""
    trace, compiling, first = (row_of(rows, WHOLE, what, 1000)[6] for what in ("trace", "compile", "first call"))
    return Answer(
        f"1000 leaves are traced in {trace} of the time of `optax.nadamw`, compiled in {compiling}.",
        f"{first} of the first call of `optax.nadamw`",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures 10 to 3000 leaves, which takes some ten minutes, most of it compilation."""
    quick = is_quick(__doc__, "two to six leaves, once", arguments)
    sizes = {2: (2, 1), 4: (2, 1), 6: (2, 1)} if quick else REPEATS
    everything = results(sizes)
    save(
        "tracing",
        "What do tracing, compiling and calling a step cost?",
        ["chain", "measured", "leaves", "repeats", "ours", "optax", "ratio"],
        [*rows_of_counts((2,) if quick else (10, 148, 1000)), *rows_of_times(everything)],
        NOTE.format(
            trace=parts(everything, WHOLE, "trace", 6 if quick else 1000),
            eager=parts(everything, UPDATE, "call outside jit", 4 if quick else 148),
        ),
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
