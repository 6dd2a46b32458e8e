"""Are 8-bit moments safe?

python -m benchmarks.eight_bits                streams of gradients, then training on text
python -m benchmarks.eight_bits --part text    only one of the two: streams or text
python -m benchmarks.eight_bits --quick        one stream of twenty steps, a small text; writes nothing
"""

import functools
import importlib.util
import itertools
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks import _report, _tasks
from benchmarks._report import Answer, Rows, row_of, save
from benchmarks.memory_quality import mean_and_error
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

CONTEXT, BATCH, VOCABULARY, WORDS, HELD_OUT = 64, 8, 8192, 4_000_000, 200_000
SIZES = _tasks.Sizes(width=128, heads=4, layers=2, context=CONTEXT)
TEXT_B2, TEXT_STEPS, TEXT_SEEDS, RIVAL_SEEDS, PEAK = 0.95, 300, 5, 2, 2e-3
AT_FIRST, WITHIN = 10, 5e-4
FLOAT32, INT8, ROLLFAST, ROLLFAST_32 = "float32", "int8", "rollfast, 8-bit", "rollfast, float32"
JITTERED = "float32, weights times 1 + 1e-6"
TEXT_QUESTION = "Are 8-bit moments safe in training on text?"
TEXT_COLUMNS = ["moments", "held-out loss", "over float32's, less 1, by seed", "mean", "rare words", "largest step"]
TEXT_NOTE = """\
A transformer over words: two layers, width 128, a vocabulary of 8192 with a head of its own, 2.5 million weights. It is
trained for {steps} steps of 8 x 64 words on the sources of the standard library of Python {python}, with b2 = 0.95 and
gradients clipped to a norm of 1; the learning rate, 2e-3, warms up and falls to a tenth on a cosine. Held out: 1024
windows of its last 200,000 words. Each seed has its own weights and batches, the same in every format; rollfast
is compared with its own float32. Mean: of the seeds, with its standard error. Rare words: the mean for those whose rank
is over 2048. Largest step: of any element after the first ten steps, over the learning rate, in the worst seed. The
second row is float32 with other rounding errors.

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


def stream_verdicts(rows: Rows) -> Iterator[str]:
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


def stream_answer(rows: Rows) -> Answer:
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


class Text(NamedTuple):
    """Numbers of words, by frequency: 0 stands for all that are not in the vocabulary, 1 for the most frequent one."""

    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int = VOCABULARY
    sizes: _tasks.Sizes = SIZES


def numbered(words: list[str], vocabulary: int) -> np.ndarray:
    """Each word's rank, or 0 where that is not below the size of the vocabulary."""
    ranks = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return np.array([ranks.get(word, 0) for word in words], np.int32)


def library_text(words: int = WORDS, held_out: int = HELD_OUT) -> Text:
    """The sources of the standard library without its tests, file by file in random order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & {*path.parts})
    read: list[str] = []
    for path in np.random.default_rng(0).permutation(sorted(files)):
        source = path.read_text(encoding="utf8", errors="ignore")
        read += re.findall(r"[A-Za-z_]+|[0-9]|\n *| +|[^\sA-Za-z_0-9]", source)
        if len(read) >= words:
            break
    return Text(*np.split(numbered(read, VOCABULARY), [len(read) - held_out]))


def small_text() -> Text:
    """Another one, and a smaller model, that is trained in seconds: ranks are taken modulo 512."""
    train, held_out, *_ = library_text(50_000, 5_000)
    return Text(train % 512, held_out % 512, 512, SIZES._replace(width=16, layers=1))


class Moments(NamedTuple):
    """A row of the table: an optimizer for a schedule, the row it is compared with, its seeds, and a factor."""

    make: Callable[[optax.Schedule], Any]
    beside: str = FLOAT32
    seeds: int = TEXT_SEEDS
    scale: float = 1.0  # of the first weights


def nadam(dtype: str | None, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """This library's, with moments of a dtype."""
    return optax_nadam.nadam(schedule, b2=TEXT_B2, eps=1e-8, rule="simplified", m_dtype=dtype, v_dtype=dtype)


KINDS = {
    FLOAT32: Moments(functools.partial(nadam, None)),
    JITTERED: Moments(functools.partial(nadam, None), scale=1 + 1e-6),
    INT8: Moments(functools.partial(nadam, "int8")),
    ROLLFAST_32: Moments(lambda schedule: rollfast(schedule, TEXT_B2, False), ROLLFAST_32, RIVAL_SEEDS),
    ROLLFAST: Moments(lambda schedule: rollfast(schedule, TEXT_B2, True), ROLLFAST_32, RIVAL_SEEDS),
}


class Trained(NamedTuple):
    """Held-out loss, that of the rare words, and the largest step over the learning rate after the first few."""

    loss: float
    rare: float
    largest: float


@jax.jit
def losses(params: Any, windows: jax.Array) -> jax.Array:
    """The cross-entropy of each word but the first of each window."""
    logits = _tasks.next_token(params, windows[:, :-1], jax.nn.gelu, SIZES.heads)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def trainer(text: Text, kind: Moments, steps: int) -> Callable[[int], Trained]:
    """A function of a seed, whose step is compiled once for all."""
    warmup = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(PEAK / warmup, PEAK, warmup, steps, PEAK / 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), kind.make(schedule))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array, index: jax.Array) -> Any:
        grads = jax.grad(lambda params: losses(params, windows).mean())(params)
        updates, state = tx.update(grads, state, params)
        largest = jnp.stack([jnp.abs(u).max() for u in jax.tree.leaves(updates)]).max()
        return optax.apply_updates(params, updates), state, largest / schedule(index)

    def train(seed: int) -> Trained:
        first = _tasks.transformer(jax.random.key(seed), text.vocabulary, text.sizes)
        params = jax.tree.map(lambda x: kind.scale * x, first)
        state, rng, largest = tx.init(params), np.random.default_rng(seed), []
        for index in range(steps):
            windows = pieces(text.train, rng.integers(0, len(text.train) - CONTEXT - 1, BATCH))
            params, state, one = step(params, state, windows, jnp.int32(index))
            largest.append(one)
        held_out = pieces(text.held_out, np.linspace(0, len(text.held_out) - CONTEXT - 1, _tasks.MEASURED).astype(int))
        each = np.concatenate([losses(params, part) for part in np.split(held_out, 32)]).astype(np.float64)
        rare = each[held_out[:, 1:] >= text.vocabulary // 4]
        return Trained(each.mean(), rare.mean(), float(np.max(largest[AT_FIRST:])))

    return train


def pieces(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Windows of a text, and of the word after each."""
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


def less_one(values: np.ndarray) -> str:
    """Mean of ratios with its standard error, less 1."""
    if len(values) == 1:
        return f"{values[0] - 1:+.5f}"
    mean, error = mean_and_error(values - 1)
    return f"{mean:+.5f} ± {error:.5f}"


def text_row(name: str, found: dict[str, list[Trained]]) -> list[Any]:
    """The row of a format, from the runs so far."""
    runs = found[name]
    loss, rare = (
        np.array([a[k] / b[k] for a, b in zip(runs, found[KINDS[name].beside], strict=True)]) for k in range(2)
    )
    each = ", ".join(f"{x - 1:+.5f}" for x in loss)
    largest = f"{max(run.largest for run in runs):.2f}"
    return [name, f"{np.mean([run.loss for run in runs]):.4f}", each, less_one(loss), less_one(rare), largest]


def text_verdict(found: dict[str, list[Trained]]) -> str:
    """Whether the mean is within the target, and how sure that is."""
    pairs = zip(found[INT8], found[FLOAT32], strict=True)
    mean, error = mean_and_error(np.array([a.loss / b.loss - 1 for a, b in pairs]))
    said = "Met" if abs(mean) <= WITHIN else "Missed"
    if abs(abs(mean) - WITHIN) <= 2 * error:
        said += " within the noise"
    return f"- {said}: int8, held-out loss over float32's, less 1: {mean:+.5f} ± {error:.5f}, target within {WITHIN}."


def text_answer(rows: Rows) -> Answer:
    """The loss beside float32's."""
    excess, rare = (row_of(rows, INT8)[k] for k in (3, 4))
    ratio = 1 + float(excess.split(" ")[0])
    return Answer(
        f"Over float32's, less 1, the held-out loss is {excess}, that of rare words {rare}.",
        f"{ratio:.4f} of float32's loss",
    )


def train_on_text(*, quick: bool) -> None:
    """Seed by seed, and writes the result so far after each."""
    text = small_text() if quick else library_text()
    steps, seeds = (12, 1) if quick else (TEXT_STEPS, TEXT_SEEDS)
    kinds = {FLOAT32: KINDS[FLOAT32], INT8: KINDS[INT8]} if quick else KINDS
    if importlib.util.find_spec("rollfast") is None:
        kinds = {name: kind for name, kind in kinds.items() if not name.startswith("rollfast")}
    trainers = {name: trainer(text, kind, steps) for name, kind in kinds.items()}
    found: dict[str, list[Trained]] = {name: [] for name in kinds}
    for seed in range(seeds):
        for name, kind in kinds.items():
            if seed < kind.seeds:
                found[name].append(trainers[name](seed))
                print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
        rows = [text_row(name, found) for name in kinds]
        note = TEXT_NOTE.format(steps=steps, python=platform.python_version())
        if seed:
            note += text_verdict(found)
        about: dict[str, Any] = {"backend": f"text-{jax.default_backend()}", "packages": packages()[:1]}
        save(NAME, TEXT_QUESTION, TEXT_COLUMNS, rows, note, answer=text_answer, quick=quick, **about)


def packages() -> tuple[str, ...]:
    """The rivals that are here."""
    return tuple(rival for rival in RIVALS if importlib.util.find_spec(rival.replace("-", "_")))


def compare_streams(*, quick: bool) -> None:
    """All streams, with both values of b2."""
    cases = [(ALIKE, B2[0])] if quick else itertools.product(STREAMS, B2)
    rows: list[list[Any]] = []
    for name, b2 in cases:
        seeds = SEEDS_ALIKE if name == ALIKE else SEEDS
        rows += stream_rows(name, b2, *((20, 1) if quick else (STEPS, seeds)))
        print(*rows[-1], sep=" | ", flush=True)
    note = NOTE + "\n".join(stream_verdicts(rows))
    save(NAME, QUESTION, COLUMNS, rows, note, answer=stream_answer, packages=packages(), quick=quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares on streams of gradients and trains on text."""
    parser = _report.parser(__doc__, "one stream of twenty steps, a small text")
    parser.add_argument("--part", choices=("streams", "text"), help="only one of the two")
    options = parser.parse_args(arguments)
    if options.part != "text":
        compare_streams(quick=options.quick)
    if options.part != "streams":
        train_on_text(quick=options.quick)


if __name__ == "__main__":
    main()
