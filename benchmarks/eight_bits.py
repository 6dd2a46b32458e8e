"""Are 8-bit moments safe?

python -m benchmarks.eight_bits            streams of gradients of many kinds
python -m benchmarks.eight_bits --quick    one stream of twenty steps; writes nothing
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks._report import Answer, Rows, is_quick, save
from benchmarks.precision import error
from benchmarks.tracing import whole_step

NAME, RIVALS = "eight_bits", ("rollfast", "flashoptim-jax")
Shape = tuple[int, ...]

B2, STEPS, SEEDS, SEEDS_ALIKE, SPIKE = (0.999, 0.95), 1000, 3, 9, 300
EXCEPTED = "elements over 1e4"  # from the target for the largest step
LARGEST_STEP = {0.999: 2.0, 0.95: 1.5}
QUESTION = "Are 8-bit moments safe?"
COLUMNS = ["gradients", "b2", "float32, largest step", "int8", "bfloat16", *RIVALS]
NOTE = f"""\
Each cell: the error of the weights; the largest step over float32's. Both after {STEPS:,} steps on given gradients, at
a learning rate of 1, beside the same optimizer with float32 moments: `nadam(rule="simplified", eps=1e-8)`, rollfast's
`adamw8(nesterov=True)` beside its `quantize=False`, flashoptim-jax's `flash_adamw` likewise. The error is the norm of
the difference over the norm of float32's weights, the median of {SEEDS} seeds; the largest step is that of any element,
the worst of the seeds. Gradients that are alike have {SEEDS_ALIKE} seeds: rollfast's error differs between them.

Each element's gradient is noise about a mean of its own, 0.3 standard deviations away from zero, times 1e-2; leaves are
64 x 256. Heavy-tailed: times the exponential of twice a normal number. Outliers: one element in 1000 is 1000 times as
large. Columns, rows and columns, elements: each has a size of its own, over four powers of ten. Spike: one element of
one step. Sparse: in each step 2% of the columns are not zero. Constant: the mean alone. Table: 4096 x 16, its rows over
four powers of ten; its smallest eighth are the rows with the smallest gradients.

"""


class Stream(NamedTuple):
    """Gradients of a run: a factor from a key of the run, a key of the step, the step and the shape; and the noise."""

    factor: Callable[[jax.Array, jax.Array, jax.Array, Shape], Any] = lambda run, step, index, shape: 1.0
    shape: Shape = (64, 256)
    noise: float = 1.0


def gradients(stream: Stream, key: jax.Array, index: jax.Array) -> jax.Array:
    """Those of a step: noise about a mean that each element keeps, times the factor."""
    run, mean, step, noise = jax.random.split(key, 4)
    step, noise = (jax.random.fold_in(key, index) for key in (step, noise))
    drawn = 0.3 * jax.random.normal(mean, stream.shape) + stream.noise * jax.random.normal(noise, stream.shape)
    return 1e-2 * drawn * stream.factor(run, step, index, stream.shape)


def over_1e4(key: jax.Array, shape: Shape) -> jax.Array:
    """Sizes over four powers of ten."""
    return 10 ** jax.random.uniform(key, shape, minval=-4.0, maxval=0.0)


def _rows(key: jax.Array, shape: Shape) -> jax.Array:
    return over_1e4(key, (shape[0], 1))


def _columns(key: jax.Array, shape: Shape) -> jax.Array:
    return over_1e4(jax.random.fold_in(key, 1), (1, shape[1]))


def _outliers(run: jax.Array, step: jax.Array, index: jax.Array, shape: Shape) -> jax.Array:
    return jnp.where(jax.random.bernoulli(run, 1e-3, shape), 1e3, 1.0)


def _spike(run: jax.Array, step: jax.Array, index: jax.Array, shape: Shape) -> jax.Array:
    return jnp.ones(shape).at[3, 7].set(jnp.where(index == SPIKE, 1e5, 1.0))


ALIKE, TABLE, SMALLEST = "alike", "table, rows over 1e4", "table, its smallest eighth"
STREAMS = {
    ALIKE: Stream(),
    "heavy-tailed": Stream(lambda run, step, index, shape: jnp.exp(2 * jax.random.normal(step, shape))),
    "outliers of 1e3": Stream(_outliers),
    "columns over 1e4": Stream(lambda run, step, index, shape: _columns(run, shape)),
    "rows x columns": Stream(lambda run, step, index, shape: _rows(run, shape) * _columns(run, shape)),
    EXCEPTED: Stream(lambda run, step, index, shape: over_1e4(run, shape)),
    "a spike of 1e5": Stream(_spike),
    "sparse": Stream(lambda run, step, index, shape: jax.random.bernoulli(step, 0.02, (1, shape[1]))),
    "constant": Stream(noise=0.0),
    TABLE: Stream(lambda run, step, index, shape: _rows(run, shape), shape=(4096, 16)),
}

# Errors that the first 8-bit format, that of 0.2.0, had on the same gradients, with each of B2.
FORMER = {
    ALIKE: (0.0265, 0.00453),
    "heavy-tailed": (0.0472, 0.0264),
    "outliers of 1e3": (0.17, 0.0664),
    "columns over 1e4": (0.412, 0.21),
    "rows x columns": (0.295, 0.15),
    EXCEPTED: (0.421, 0.213),
    "a spike of 1e5": (0.0383, 0.00849),
    "sparse": (0.0281, 0.0283),
    "constant": (0.0588, 0.0081),
    TABLE: (0.504, 0.282),
    SMALLEST: (1.26, 0.724),
}
HALVED = ("outliers of 1e3", "columns over 1e4", "rows x columns", "constant")


class Optimizer(NamedTuple):
    """How a state begins, and a step that changes params."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


class Format(NamedTuple):
    """Narrow moments of a library: its module, and its optimizer for a value of b2, with or without them."""

    module: str
    make: Callable[[float, bool], Optimizer]


def ours(dtype: str, b2: float, narrow: bool) -> Optimizer:
    """This library's, with moments of a dtype."""
    moments = dtype if narrow else None
    tx = optax_nadam.nadam(1.0, b2=b2, eps=1e-8, rule="simplified", m_dtype=moments, v_dtype=moments)
    return Optimizer(tx.init, whole_step(tx, apply=True))


def rollfast(learning_rate: optax.ScalarOrSchedule, b2: float, narrow: bool) -> optax.GradientTransformation:
    """Rollfast's, whose codes are those of bitsandbytes."""
    from rollfast.optim.adam8 import adamw8

    return adamw8(learning_rate, b2=b2, nesterov=True, weight_decay=0.0, quantize=narrow)


def _rollfast(b2: float, narrow: bool) -> Optimizer:
    tx = rollfast(1.0, b2, narrow)
    return Optimizer(tx.init, whole_step(tx, apply=True))


def _flashoptim(b2: float, narrow: bool) -> Optimizer:
    import flashoptim_jax as flash

    options: dict[str, Any] = {"weight_decay": 0.0, "quantize": narrow, "master_weight_bits": None, "fused": False}
    tx = flash.flash_adamw(1.0, b2=b2, eps=1e-8, **options)
    return Optimizer(tx.init, tx.step)


FORMATS = {
    "int8": Format("optax_nadam", functools.partial(ours, "int8")),
    "bfloat16": Format("optax_nadam", functools.partial(ours, "bfloat16")),
    RIVALS[0]: Format("rollfast", _rollfast),
    RIVALS[1]: Format("flashoptim_jax", _flashoptim),
}


class Run(NamedTuple):
    """The weights after a run, the largest step of any element, and the sum of each element's gradients' sizes."""

    weights: np.ndarray
    largest: np.ndarray
    sizes: np.ndarray


def runs_of(optimizer: Optimizer, stream: Stream, steps: int, seeds: int) -> list[Run]:
    """A run from zero weights for each seed."""

    @jax.jit
    def run(key: jax.Array) -> Run:
        def step(carry: Any, index: jax.Array) -> Any:
            params, state, sizes = carry
            grads = gradients(stream, key, index)
            new, state = optimizer.step(params, state, {"w": grads})
            return (new, state, sizes + jnp.abs(grads)), jnp.abs(new["w"] - params["w"]).max()

        params = {"w": jnp.zeros(stream.shape)}
        start = params, optimizer.init(params), jnp.zeros(stream.shape)
        (params, _, sizes), largest = jax.lax.scan(step, start, jnp.arange(steps))
        return Run(params["w"], largest.max(), sizes)

    return [jax.device_get(run(jax.random.key(seed))) for seed in range(seeds)]


def whole(run: Run) -> slice:
    """All rows."""
    return slice(None)


def smallest_eighth(run: Run) -> np.ndarray:
    """The rows with the smallest gradients."""
    return np.argsort(run.sizes.sum(axis=1))[: len(run.sizes) // 8]


def compared(narrow: list[Run], wide: list[Run], rows: Callable[[Run], Any]) -> str:
    """Median error of the weights in these rows, and the worst ratio of the largest steps."""
    pairs = list(zip(narrow, wide, strict=True))
    errors = [error(a.weights[rows(b)], b.weights[rows(b)].astype(np.float64)) for a, b in pairs]
    return f"{np.median(errors):.3g}; {max(a.largest / b.largest for a, b in pairs):.3g}"


def stream_rows(name: str, b2: float, steps: int, seeds: int) -> Iterator[list[Any]]:
    """The row of a stream; of the table, also that of its smallest eighth."""
    wide: dict[str, list[Run]] = {}
    pairs: list[tuple[list[Run], list[Run]] | None] = []
    for form in FORMATS.values():
        if importlib.util.find_spec(form.module) is None:
            pairs.append(None)
            continue
        if form.module not in wide:
            wide[form.module] = runs_of(form.make(b2, False), STREAMS[name], steps, seeds)
        pairs.append((runs_of(form.make(b2, True), STREAMS[name], steps, seeds), wide[form.module]))
    largest = f"{max(run.largest for run in wide['optax_nadam']):.2f}"
    for part, rows in {name: whole, **({SMALLEST: smallest_eighth} if name == TABLE else {})}.items():
        yield [part, b2, largest, *(compared(*pair, rows) if pair else "not installed" for pair in pairs)]


def numbers(rows: Rows, column: str, b2: float | None = None) -> dict[str, tuple[float, float]]:
    """Error and ratio of the largest steps, by the kind of gradients; empty for what is not installed."""
    place = COLUMNS.index(column)
    chosen = {row[0]: row[place] for row in rows if b2 in (None, row[1]) and ";" in row[place]}
    return {name: tuple(map(float, cell.split(";"))) for name, cell in chosen.items()}


def missed(values: dict[str, float], targets: dict[str, float]) -> str:
    """Met, or missed by what."""
    over = [f"{name} ({values[name]:g}, not {target:.3g})" for name, target in targets.items() if values[name] > target]
    return f"Missed by {', '.join(over)}" if over else "Met"


def verdicts(rows: Rows) -> Iterator[str]:
    """Whether the targets are met, and where not."""
    for b2 in sorted({row[1] for row in rows}):
        found, theirs = (numbers(rows, column, b2) for column in ("int8", RIVALS[0]))
        errors, steps = ({name: pair[k] for name, pair in found.items()} for k in range(2))
        bound = LARGEST_STEP[b2]
        said = missed(steps, {name: bound for name in steps if name != EXCEPTED})
        yield f"- b2 = {b2}: {said}: the largest step is at most {bound} times float32's, elements excepted."
        said = missed(errors, {name: FORMER[name][B2.index(b2)] / (2 if name in HALVED else 1) for name in errors})
        yield f"- b2 = {b2}: {said}: the error is at most that of 0.2.0's format, half of it on {', '.join(HALVED)}."
        if ALIKE in theirs:
            said = missed(errors, {ALIKE: theirs[ALIKE][0]})
            yield f"- b2 = {b2}: {said}: the error on gradients that are alike is at most rollfast's."


def answer(rows: Rows) -> Answer:
    """The worst errors and steps of ours, and in how many cases it is nearer to float32 than the others."""
    mine = [numbers(rows, "int8", b2) for b2 in B2]
    worst = max(x for found in mine for name, (_, x) in found.items() if name != EXCEPTED)
    nearer = []
    for rival in RIVALS:
        theirs = [numbers(rows, rival, b2) for b2 in B2]
        pairs = [(a[k][0], b[k][0]) for a, b in zip(mine, theirs, strict=True) for k in b]
        nearer.append(f"{rival}'s in {sum(x < y for x, y in pairs)} of {len(pairs)} cases")
    return Answer(
        f"Their weights are nearer to float32's than {' and '.join(nearer)}; where not every element has a size of its"
        f" own, no step is over {worst:.2f} of float32's largest.",
        f"{worst:.2f} of float32's largest step",
    )


def packages() -> tuple[str, ...]:
    """The rivals that are here."""
    return tuple(rival for rival in RIVALS if importlib.util.find_spec(rival.replace("-", "_")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares on all streams, with both values of b2."""
    quick = is_quick(__doc__, "one stream of twenty steps", arguments)
    cases = [(ALIKE, B2[0])] if quick else itertools.product(STREAMS, B2)
    rows: list[list[Any]] = []
    for name, b2 in cases:
        seeds = SEEDS_ALIKE if name == ALIKE else SEEDS
        rows += stream_rows(name, b2, *((20, 1) if quick else (STEPS, seeds)))
        print(*rows[-1], sep=" | ", flush=True)
    note = NOTE + "\n".join(verdicts(rows))
    save(NAME, QUESTION, COLUMNS, rows, note, answer=answer, packages=packages(), quick=quick)


if __name__ == "__main__":
    main()
