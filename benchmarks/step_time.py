"""How long does a step take, compared with the optimizers of other frameworks?

    python -m benchmarks.step_time            all shapes, a quarter of an hour on a processor; writes the result
    python -m benchmarks.step_time --quick    two small leaves; writes nothing

What is not installed is left out, and the result says so. On a GPU, jax and torch share the device.
"""

import functools
import gc
import importlib.metadata
import importlib.util
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import optax

import optax_nadam
from benchmarks import _report, _rivals
from benchmarks._report import Answer, Rows, interleaved, is_quick, milliseconds, save
from benchmarks._rivals import EPS, LEARNING_RATE, Problem, Rival, Run
from tests.reference import RULES

Shapes = Sequence[tuple[int, ...]]
Seconds = dict[str, list[float]]

OURS, OPTAX = "optax_nadam.nadam, scheduled", "optax.nadam"
LOOPED, FLAT = ", in a loop", ", under optax.flatten"
SINGLE, FOREACH, FUSED = "torch NAdam, foreach=False", "torch NAdam, foreach=True", "torch AdamW, fused=True"
LEGACY = "legacy tf.keras Nadam, tf.function"
GPT2, RESNET, SMALL, QUICK = "GPT-2 small", "ResNet-50", "1000 of 64", "two small ones"
CLOSE = 1e-4  # to the formula, in the check before the timing
FILLED = 0.05  # seconds that a measurement lasts at least
LOOP = 20  # steps of a program in which they are a loop
REPEATS, FEW = 25, 3
ROOM = 8 * 2**30  # bytes of params and moments at a time, where there is no GPU
QUESTION = "How long does a step take, compared with the optimizers of other frameworks?"
COLUMNS = ["leaves", "optimizer", "step", "time over ours", "bytes a parameter", "GB/s", "of the copy"]
NOTE = f"""\
Params and state are donated or updated in place, in float32; all optimizers have the same gradients. Before the timing,
every optimizer was within {CLOSE:.0e} of its formula in float64, on small leaves. A measurement starts as many steps as
take {1e3 * FILLED:.0f} ms, without waiting in between, and then waits for all. Where a step takes the device less time
than the host needs to start it, the time is the host's. In a loop, {LOOP} steps are one program, and the time is the
device's.

Ours is `{OURS}`; a time over ours is the median, with quartiles, of the ratios within a round. Memory
does not hold all at once, so the rivals are interleaved in groups, and memory is freed after each group. Ours and
`optax.nadam` are in every group, and a ratio to ours is within a group.

Bytes a parameter are the least that a step moves: read param, gradient and two moments, write all but the gradient. On
a processor XLA makes three kernels a leaf, which move 44. GB/s is the former over the time. The copies are of one array
as large as params and moments: `x + 1` in place, compiled by XLA, and `copy_` of torch to a second array. "Of the copy"
is relative to the faster one; where everything fits into a cache, it says nothing about memory.

Targets, with the 95% confidence interval of the median; within the noise, where the bound is in that interval:

"""


def gpt2_small() -> Shapes:
    """The 148 shapes of GPT-2 small, 124 million parameters."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * block), (d,), (d,)]


def resnet50() -> Shapes:
    """The 161 shapes of ResNet-50, 26 million parameters."""
    shapes: list[tuple[int, ...]] = convolution(7, 3, 64)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(1, channels, width) + convolution(3, width, width)
            shapes += convolution(1, width, 4 * width)
            shapes += convolution(1, channels, 4 * width) if block == 0 else []
            channels = 4 * width
    return [*shapes, (channels, 1000), (1000,)]


def convolution(side: int, before: int, after: int) -> list[tuple[int, ...]]:
    """The shapes of a kernel, and of scale and bias of the batch norm after it."""
    return [(side, side, before, after), (after,), (after,)]


SETS: dict[str, Shapes] = {GPT2: gpt2_small(), RESNET: resnet50(), SMALL: 1000 * [(64,)]}


def rivals(small: bool, loops: bool) -> list[Rival]:
    """All rivals, ours and optax.nadam first; these two also under ``optax.flatten`` or in loops, where asked."""
    ours = {rule: optax_nadam.nadam(LEARNING_RATE, eps=EPS, rule=cast("optax_nadam.RuleName", rule)) for rule in RULES}
    pair = [
        (OURS, ours.pop("scheduled"), _rivals.nadam()),
        (OPTAX, optax.nadam(LEARNING_RATE, eps=EPS), _rivals.nadam("constant")),
    ]
    found = [_rivals.jax_rival(*one) for one in pair]
    found += [_rivals.jax_rival(f"optax_nadam.nadam, {rule}", tx, _rivals.nadam(rule)) for rule, tx in ours.items()]
    found += [_rivals.jax_rival("optax.adam", optax.adam(LEARNING_RATE, eps=EPS), _rivals.adam)]
    if small:
        found += [_rivals.jax_rival(name + FLAT, optax.flatten(tx), updates) for name, tx, updates in pair]
    if loops:
        found += [_rivals.jax_rival(name + LOOPED, tx, updates, LOOP) for name, tx, updates in pair]
        found += [_rivals.jax_copy(LOOP)]
    return [
        *found,
        _rivals.jax_copy(),
        _rivals.torch_copy(),
        _rivals.torch_rival(SINGLE, "NAdam", _rivals.nadam(), foreach=False),
        _rivals.torch_rival(FOREACH, "NAdam", _rivals.nadam(), foreach=True),
        _rivals.torch_rival(FUSED, "AdamW", _rivals.adam, fused=True, weight_decay=0.0),
        _rivals.keras_rival(),
        _rivals.legacy_keras_rival(LEGACY),
        _rivals.legacy_keras_rival(f"{LEGACY}, jit_compile=True", jit_compile=True),
    ]


def check(rivals: Iterable[Rival]) -> None:
    """Raises where an optimizer does not take the step of its formula."""
    for one in rivals:
        if one.updates is not None and not (off := _rivals.error(one)) <= CLOSE:
            raise ValueError(f"{one.name} must be within {CLOSE:.0e} of its formula, is off by {off:.1e}.")


def grouped(rivals: Sequence[Rival], size: int, room: int) -> list[list[Rival]]:
    """The first two with as many of the others as there is room for, until each is in a group."""
    anchors, others = rivals[:2], rivals[2:]
    number = max(1, room // (12 * size) - len(anchors))
    return [[*anchors, *others[i : i + number]] for i in range(0, len(others), number)]


def room() -> int:
    """Bytes that params and moments may take at a time: half of a GPU's memory, or a fixed number."""
    memory = jax.devices()[0].memory_stats()
    return memory["bytes_limit"] // 2 if memory else ROOM


def take(run: Run, calls: int) -> float:
    """Starts steps without waiting in between, waits for them all, and returns the seconds."""
    started = time.perf_counter()
    for _ in range(calls):
        run.step()
    run.wait()
    return time.perf_counter() - started


def calls_that_fill(run: Run, seconds: float) -> int:
    """How many calls take so long, once all is compiled."""
    take(run, 2)
    return max(1, math.ceil(seconds / take(run, 1)))


def measured(rivals: Iterable[Rival], shapes: Shapes, repeats: int) -> Seconds:
    """Seconds a step of interleaved rivals."""
    problem = Problem.of(shapes)
    runs = {one.name: one.start(problem) for one in rivals}
    calls = {name: calls_that_fill(run, FILLED) for name, run in runs.items()}
    seconds = interleaved({name: functools.partial(take, run, calls[name]) for name, run in runs.items()}, repeats)
    return {name: [x / (calls[name] * run.steps) for x in seconds[name]] for name, run in runs.items()}


@dataclass
class Outcome:
    """What was measured on one set of leaves.

    Attributes:
      rivals: those that were measured.
      size: number of parameters.
      groups: seconds a step, by name, of each group that was interleaved.
    """

    rivals: list[Rival]
    size: int
    groups: list[Seconds]

    def seconds(self, name: str) -> list[float]:
        """All measurements of one."""
        return [x for group in self.groups for x in group.get(name, [])]

    def ratios(self, name: str, base: str = OURS) -> list[float]:
        """The time of one over that of another, in every round of their groups; through ours if they share none."""
        shared = [(group[name], group[base]) for group in self.groups if name in group and base in group]
        if shared:
            return [x / y for times in shared for x, y in zip(*times, strict=True)]
        return [x / statistics.median(self.ratios(base)) for x in self.ratios(name)]

    def ratio(self, name: str, base: str = OURS) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios(name, base))

    def bandwidth(self, one: Rival) -> float:
        """Bytes a second."""
        return one.bytes * self.size / statistics.median(self.seconds(one.name))

    def of_the_copy(self, one: Rival) -> list[float]:
        """Its bandwidth over that of the fastest copy, in every round."""
        copies = [copy for copy in self.rivals if copy.updates is None]
        fastest = min(copies, key=lambda copy: self.ratio(copy.name) / copy.bytes)
        return [x * one.bytes / fastest.bytes for x in self.ratios(fastest.name, one.name)]


def outcome_of(rivals: list[Rival], shapes: Shapes, repeats: int) -> Outcome:
    """Checks all, then measures group by group, and frees the memory of one before the next."""
    check(rivals)
    outcome = Outcome(rivals, sum(map(math.prod, shapes)), [])
    for group in grouped(rivals, outcome.size, room()):
        outcome.groups.append(measured(group, shapes, repeats))
        gc.collect()
    return outcome


def rows(leaves: str, outcome: Outcome) -> Iterator[list[Any]]:
    """The rows of the table for one set of leaves."""
    for one in outcome.rivals:
        low, middle, high = statistics.quantiles(outcome.ratios(one.name), n=4)
        yield [
            leaves,
            one.name,
            milliseconds(outcome.seconds(one.name)),
            f"{middle:.3g} ({low:.3g} to {high:.3g})",
            one.bytes,
            f"{outcome.bandwidth(one) / 1e9:.3g}",
            f"{statistics.median(outcome.of_the_copy(one)):.0%}",
        ]


def verdicts(leaves: str, outcome: Outcome) -> Iterator[str]:
    """Which targets are met on one set of leaves; those of a GPU where there are loops."""
    found = {one.name: one for one in outcome.rivals}
    others = [name for name in found if "nadam" in name.lower() and not name.startswith("optax")]
    for form in ("", FLAT) if OURS + FLAT in found else ("",):
        ours = OURS + form
        yield verdict(f"{leaves}: {ours} over {OPTAX + form}", outcome.ratios(ours, OPTAX + form), at_most=1.02)
        if others:
            fastest = min(others, key=outcome.ratio)
            what = f"{leaves}: {fastest}, the fastest of the other Nadams, over {ours}"
            yield verdict(what, outcome.ratios(fastest, ours), at_least=1)
    for base in (OURS, OURS + LOOPED) if OURS + LOOPED in found else ():
        yield verdict(
            f"{leaves}: {base}, bandwidth over that of the copy", outcome.of_the_copy(found[base]), at_least=0.9
        )
        if FOREACH in found:
            yield verdict(f"{leaves}: {FOREACH} over {base}", outcome.ratios(FOREACH, base), at_least=3)
            yield verdict(f"{leaves}: {base} over {FUSED}", outcome.ratios(base, FUSED), at_most=1.05)


def launches(leaves: str, outcome: Outcome, number: int) -> str:
    """What a leaf costs beside its memory traffic, in a loop of steps: the launch of its kernel."""
    ours = next(one for one in outcome.rivals if one.name == OURS + LOOPED)
    seconds = statistics.median(outcome.seconds(ours.name))
    beside = seconds * (1 - statistics.median(outcome.of_the_copy(ours))) / number
    return f"- {leaves}: in a loop, {1e6 * beside:.1f} microseconds a leaf beside the traffic at the copy's bandwidth."


def verdict(what: str, found: list[float], *, at_most: float = math.inf, at_least: float = -math.inf) -> str:
    """Whether the median meets a target, and whether the target is within its confidence interval."""
    value, (low, high) = statistics.median(found), interval(found)
    bound, word = (at_most, "at most") if at_most < math.inf else (at_least, "at least")
    judged = ("Met" if at_least <= value <= at_most else "Missed") + (" within the noise" if low < bound < high else "")
    return f"- {judged}: {what}: {value:.3f} ({low:.3f} to {high:.3f}), target {word} {bound:g}."


def interval(found: list[float]) -> tuple[float, float]:
    """The 95% confidence interval of the median, for any distribution."""
    ranked, n = sorted(found), len(found)
    k = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ranked[k], ranked[n - 1 - k]


def absences(rivals: Iterable[Rival]) -> list[str]:
    """The rivals that are left out, and why."""
    return [f"- Left out: {one.name}: {reason}." for one in rivals if (reason := one.left_out())]


def distributions(rivals: Iterable[Rival]) -> tuple[str, ...]:
    """The names of the frameworks for pip."""
    names = importlib.metadata.packages_distributions()
    return tuple(sorted({names[package][0] for one in rivals for package in one.packages}))


def answer(rows: Rows) -> Answer:
    """Ours beside the other Nadams, on the shapes of GPT-2 small."""
    times = {row[1]: float(row[3].split(" ")[0]) for row in rows if row[0] == GPT2 and "nadam" in row[1].lower()}
    others = {name: x for name, x in times.items() if not name.startswith("optax_nadam") and not name.endswith(LOOPED)}
    return Answer(
        f"{GPT2}: the other Nadams take {min(others.values()):.2f} to {max(others.values()):.2f} of our time.",
        f"{1 / times[OPTAX]:.2f} of `optax.nadam`",
    )


def draw(table: Rows, path: Path) -> Path | None:
    """Times over ours, a panel for each set of leaves; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(row[0] for row in table))
    figure = Figure(figsize=(10, 1 + 2.6 * len(sets)), layout="constrained")
    for axes, leaves in zip(figure.subplots(len(sets), 1, squeeze=False)[:, 0], sets, strict=True):
        named = [row for row in table if row[0] == leaves and not row[1].startswith("copy")]
        times = {row[1]: [float(x) for x in re.findall(r"[\d.e-]+", row[3])] for row in named}
        for place, (name, (middle, low, high)) in enumerate(times.items()):
            color = "C0" if name.startswith("optax_nadam") else "C1"
            axes.plot([low, high], [place, place], color=color, alpha=0.4, lw=6, solid_capstyle="butt")
            axes.plot(middle, place, "o", color=color, ms=5)
        axes.axvline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(times)), list(times), fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(leaves, fontsize=10)
    figure.supxlabel(f"time of a step over that of {OURS}; dot: median, bar: quartiles", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures one set of leaves after the other, and writes the results so far after each."""
    quick = is_quick(__doc__, "two small leaves, few repeats", arguments)
    os.environ.update(_rivals.ENVIRONMENT)
    gpu = jax.default_backend() == "gpu"
    table: list[list[Any]] = []
    met: list[str] = []
    absent: dict[str, None] = {}
    present: list[Rival] = []
    for leaves, shapes in ({QUICK: [(300, 200), (200,)]} if quick else SETS).items():
        candidates = rivals(small=leaves in (SMALL, QUICK), loops=gpu and leaves != SMALL)
        there = [one for one in candidates if not one.left_out()]
        outcome = outcome_of(there, shapes, FEW if quick else REPEATS)
        table += rows(leaves, outcome)
        met += verdicts(leaves, outcome)
        if any(one.name == OURS + LOOPED for one in there):
            met.append(launches(leaves, outcome, len(shapes)))
        absent |= dict.fromkeys(absences(candidates))
        present += there
        note = "\n".join([*met, *absent])
        if quick:
            print(*table, note, sep="\n")
        else:  # after each set, so that a run that is cut short leaves what it has
            picture = draw(table, _report.RESULTS.parents[1] / f"docs/img/step_time-{jax.default_backend()}.png")
            about: dict[str, Any] = {"answer": answer, "picture": picture, "packages": distributions(present)}
            save("step_time", QUESTION, COLUMNS, table, NOTE + note, **about)


if __name__ == "__main__":
    main()
