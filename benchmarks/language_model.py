"""What do narrow moments and narrow weights cost a language model?

python -m benchmarks.language_model                      three models; runs that were made before are not made again
python -m benchmarks.language_model --model "head tied"  one of the models
python -m benchmarks.language_model --quick              a small text, two formats, a few steps; writes nothing
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.typing import DTypeLike
from matplotlib.figure import Figure

import optax_nadam
from benchmarks import _report, _tasks
from benchmarks._report import Answer, Rows, mean_and_error, save
from optax_nadam._rounding import RandomBits

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "language_model.png"
RUNS = _report.RESULTS / "language_model"
CONTEXT, VOCABULARY, HELD_OUT, WINDOWS = 64, 8000, 200_000, 1024
PEAK, PARTS, AT_FIRST, LONG_STEP, WITHIN = 2e-3, 20, 10, 2.0, 5e-4
RANKS = (0, 128, 1024, VOCABULARY)  # the most frequent tokens, the next, the rest
FLOAT32, ROLLFAST_32, INT8 = "float32", "rollfast, float32", "int8"
FORMER = "int8 of 0.2.0"  # recorded with that version
JITTERED = "float32, weights times 1 + 1e-6"
NEAREST, NEAREST_16 = "int8, rounded to the nearest", "bfloat16, rounded to the nearest"
BYTES = "int8; bfloat16 weights, compensated by int8"
ROUNDED_WEIGHTS = "int8; bfloat16 weights, stochastically rounded"
NAIVE = "float32; bfloat16 weights, naive"
QUESTION = "What do narrow moments and narrow weights cost a language model?"
COLUMNS = ["model", "moments; weights", "seeds", "held-out loss", "over float32's, less 1"]
COLUMNS += ["frequent tokens", "in between", "rare tokens"]
COLUMNS += ["train loss over float32's, less 1: at a quarter, half, end", "slope over the second half", "long steps"]
NOTE = """\
Transformers of two layers over {vocabulary:,} tokens, a byte-pair encoding of the sources of the standard library of
Python {python}, on which they are trained. Gradients are clipped to a norm of 1; the
learning rate, 2e-3, warms up for a tenth and falls to a tenth on a cosine. All are `rule="simplified"`, `eps=1e-8`.
{models}
Held out: 1024 windows of the last 200,000 tokens. A seed has its own weights and batches, the same in every format.
Differences are of the same seed to float32 (rollfast: to its own float32), a mean with its standard error; "float32,
weights times 1 + 1e-6" is float32 with other rounding errors, the floor of the noise. Frequent are the first 128
tokens, rare those from 1024 on. Slope: how much the train loss over float32's changes in 1,000 steps, fitted to the
second half. Long steps: those after the first ten in which an element moves by over twice the learning rate, of each
seed; at b2 = 0.999 rare tokens do so with exact moments too.
Rounded to the nearest: the same formats without stochastic rounding. Naive: a step is added to the bfloat16 weight.
"{former}" was recorded with that version. The runs took {hours:.1f} hours of one processor.

"""

Maker = Callable[[optax.Schedule, float], Any]


class Kind(NamedTuple):
    """A format: the optimizer for a schedule and b2, the weights and what wraps the chain, what it is compared with."""

    make: Maker
    weights: DTypeLike = jnp.float32
    wrap: Callable[[Any], Any] | None = None
    beside: str = FLOAT32
    scale: float = 1.0  # of the first weights
    nearest: bool = False


class Model(NamedTuple):
    """A model, how long it is trained, and the formats."""

    name: str
    width: int
    tied: bool
    b2: float
    batch: int
    steps: int
    seeds: int
    kinds: tuple[str, ...]
    layers: int = 2


def nadam(moments: DTypeLike | None = None) -> Maker:
    """This library's, with moments of a dtype."""
    return lambda schedule, b2: optax_nadam.nadam(
        schedule, b2=b2, eps=1e-8, rule="simplified", m_dtype=moments, v_dtype=moments
    )


def rollfast(quantize: bool) -> Maker:
    """Rollfast's, whose codes are those of bitsandbytes."""

    def make(schedule: optax.Schedule, b2: float) -> Any:
        from rollfast.optim.adam8 import adamw8

        return adamw8(schedule, b2=b2, nesterov=True, weight_decay=0.0, quantize=quantize)

    return make


def compensated(remainder: DTypeLike | None) -> Callable[[Any], Any]:
    """The chain with what rounding drops stored beside the weights."""
    return functools.partial(optax_nadam.compensated, remainder_dtype=remainder)


KINDS = {
    FLOAT32: Kind(nadam()),
    JITTERED: Kind(nadam(), scale=1 + 1e-6),
    "bfloat16": Kind(nadam("bfloat16")),
    INT8: Kind(nadam("int8")),
    FORMER: Kind(nadam("int8")),
    "int8; bfloat16 weights, compensated by int16": Kind(nadam("int8"), jnp.bfloat16, compensated(jnp.int16)),
    BYTES: Kind(nadam("int8"), jnp.bfloat16, compensated(jnp.int8)),
    ROUNDED_WEIGHTS: Kind(nadam("int8"), jnp.bfloat16, compensated(None)),
    NAIVE: Kind(nadam(), jnp.bfloat16),
    NEAREST_16: Kind(nadam("bfloat16"), nearest=True),
    NEAREST: Kind(nadam("int8"), nearest=True),
    ROLLFAST_32: Kind(rollfast(False), beside=ROLLFAST_32),
    "rollfast, 8-bit": Kind(rollfast(True), beside=ROLLFAST_32),
}
APART = tuple(kind for kind in KINDS if kind not in (NEAREST, NEAREST_16))
TIED = (FLOAT32, JITTERED, INT8, FORMER, ROLLFAST_32, "rollfast, 8-bit")
LONG = (FLOAT32, INT8, NEAREST, JITTERED, NAIVE, BYTES, NEAREST_16, "bfloat16")
MODELS = (
    Model("head apart", 128, False, 0.95, 8, 300, 3, APART),
    Model("head tied", 128, True, 0.95, 8, 300, 3, TIED),
    Model("long run", 64, True, 0.999, 4, 5000, 2, LONG),
)


class Run(NamedTuple):
    """What a run has shown.

    Attributes:
      held_out: the loss on the held-out text; then of its frequent tokens, those in between, and rare ones.
      curve: the loss of the batches, the mean of each of the parts of the run.
      long_steps: the number of steps, after the first few, in which an element moves by over twice the learning rate.
      seconds: of processor time.
    """

    held_out: list[float]
    curve: list[float]
    long_steps: int
    seconds: float


class Text(NamedTuple):
    """Tokens by their rank in frequency, the most frequent first."""

    train: np.ndarray
    held_out: np.ndarray


@functools.cache
def library_text(files: int | None = None) -> Text:
    """The sources of the standard library without its tests, file by file in random order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & {*path.parts})
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:files]]
    texts = [path.read_text(encoding="utf8", errors="ignore") for path in paths]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    tokens = np.concatenate([np.array(found.ids, np.int32) for found in tokenizer.encode_batch(texts)])
    return Text(*np.split(by_rank(tokens), [-min(HELD_OUT, len(tokens) // 10)]))


def by_rank(tokens: np.ndarray) -> np.ndarray:
    """Each token as its rank in frequency."""
    _, codes, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    return np.argsort(np.argsort(-counts, kind="stable"))[codes].astype(np.int32)


def first_weights(model: Model, seed: int) -> Any:
    """Those of a seed, in float32."""
    sizes = _tasks.Sizes(width=model.width, heads=4, layers=model.layers, context=CONTEXT)
    weights = _tasks.transformer(jax.random.key(seed), VOCABULARY, sizes)
    return {name: x for name, x in weights.items() if not (model.tied and name == "head")}


@jax.jit
def losses(params: Any, windows: jax.Array) -> jax.Array:
    """The cross-entropy of each token but the first of each window, computed in float32."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    if "head" not in params:  # it is tied
        params = {**params, "head": params["embed"].T}
    logits = _tasks.next_token(params, windows[:, :-1], jax.nn.gelu, 4)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def pieces(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Windows of a text, and of the token after each."""
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


def trainer(model: Model, kind: Kind, text: Text) -> Callable[[int], Run]:
    """A function of a seed, whose step is compiled once for all."""
    warmup = max(1, model.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(PEAK / warmup, PEAK, warmup, model.steps, PEAK / 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), kind.make(schedule, model.b2))
    tx = kind.wrap(tx) if kind.wrap else tx

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array, index: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(lambda params: losses(params, windows).mean())(params)
        before = weights_of(state, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        moved = optax.tree.sub(weights_of(state, params), before) if kind.wrap else updates
        largest = jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(moved)]).max()
        return params, state, (loss, largest / schedule(index))

    def train(seed: int) -> Run:
        started, rng, seen = time.process_time(), np.random.default_rng(seed), []
        params = jax.tree.map(lambda x: (kind.scale * x).astype(kind.weights), first_weights(model, seed))
        state = tx.init(params)
        for index in range(model.steps):
            windows = pieces(text.train, rng.integers(0, len(text.train) - CONTEXT - 1, model.batch))
            params, state, outcome = step(params, state, windows, jnp.int32(index))
            seen.append(outcome)
        curve, steps = np.array(jax.device_get(seen), np.float64).T
        parts = [float(part.mean()) for part in np.array_split(curve, PARTS)]
        long_steps = int((~(steps[AT_FIRST:] <= LONG_STEP)).sum())
        return Run(
            evaluated(weights_of(state, params), text.held_out), parts, long_steps, time.process_time() - started
        )

    return train


def weights_of(state: Any, params: Any) -> Any:
    """With what is stored beside them, if anything is."""
    compensated = isinstance(state, optax_nadam.CompensatedState)
    return optax_nadam.master_params(state, params) if compensated else params


@contextlib.contextmanager
def rounding(kind: Kind) -> Iterator[None]:
    """Rounds moments to the nearest where a format asks for it: its random bits are the half of a last bit."""
    if not kind.nearest:
        yield
        return
    jax.clear_caches()  # of what was traced with random bits, and then of what was traced without
    with mock.patch.object(RandomBits, "draw", lambda self, shape: jnp.full(shape, 1 << 15, jnp.uint32)):
        yield
    jax.clear_caches()


def evaluated(params: Any, text: np.ndarray) -> list[float]:
    """The loss on a text, and on its tokens of each range of ranks."""
    number = min(WINDOWS, len(text) // (32 * CONTEXT) * 32)
    windows = pieces(text, np.linspace(0, len(text) - CONTEXT - 1, number).astype(int))
    each = np.concatenate([losses(params, part) for part in np.split(windows, number // 32)]).astype(np.float64)
    ranks = [(low <= windows[:, 1:]) & (windows[:, 1:] < high) for low, high in itertools.pairwise(RANKS)]
    return [float(each.mean()), *(float(each[part].mean()) for part in ranks)]


Found = dict[str, list[Run]]


def stored(model: Model) -> Path:
    """Where the runs of a model are."""
    return RUNS / f"{model.name.replace(' ', '-')}.json"


def loaded(model: Model) -> Found:
    """The runs so far."""
    if not stored(model).exists():
        return {}
    return {kind: [Run(**run) for run in runs] for kind, runs in json.loads(stored(model).read_text()).items()}


def store(model: Model, found: Found) -> None:
    """Writes the runs so far."""
    RUNS.mkdir(parents=True, exist_ok=True)
    lines = {kind: [run._asdict() for run in runs] for kind, runs in found.items()}
    stored(model).write_text(json.dumps(lines) + "\n")


def train(model: Model) -> None:
    """Makes the runs that are missing, seed by seed, and writes each."""
    found = loaded(model)
    trainers: dict[str, Callable[[int], Run]] = {}
    for seed in range(model.seeds):
        for name in model.kinds:
            absent = name == FORMER or ("rollfast" in name and importlib.util.find_spec("rollfast") is None)
            if absent or len(found.get(name, [])) > seed:
                continue
            trainers[name] = trainers.get(name) or trainer(model, KINDS[name], library_text())
            with rounding(KINDS[name]):
                found.setdefault(name, []).append(trainers[name](seed))
            store(model, found)
            print(model.name, name, seed, found[name][-1], sep=" | ", flush=True)


def excess(found: Found, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses over float32's, less 1, for each seed: on the held-out text, and over the parts of the run."""
    pairs = list(zip(found[name], found[KINDS[name].beside], strict=False))
    held_out = [np.divide(a.held_out, b.held_out) - 1 for a, b in pairs]
    return np.array(held_out), np.array([np.divide(a.curve, b.curve) - 1 for a, b in pairs])


def slopes(curves: np.ndarray, steps: int) -> np.ndarray:
    """How much each curve changes in 1,000 steps, fitted to its second half."""
    half = PARTS // 2
    return np.polyfit(np.arange(half) * steps / PARTS / 1000, curves[:, half:].T, 1)[0]


def spread(values: np.ndarray) -> str:
    """A mean with its standard error."""
    if len(values) == 1:
        return f"{values[0]:+.5f}"
    mean, error = mean_and_error(values)
    return f"{mean:+.5f} ± {error:.5f}"


def row(model: Model, name: str, found: Found) -> list[Any]:
    """The row of a format."""
    runs, (held_out, curves) = found[name], excess(found, name)
    over = ", ".join(f"{x:+.5f}" for x in curves.mean(axis=0)[[PARTS // 4 - 1, PARTS // 2 - 1, -1]])
    compared = [*map(spread, held_out.T), over, spread(slopes(curves, model.steps))]
    if name == KINDS[name].beside:
        compared = [""] * len(compared)
    loss = f"{np.mean([run.held_out[0] for run in runs]):.4f}"
    long_steps = "" if name == ROUNDED_WEIGHTS else " ".join(str(run.long_steps) for run in runs)
    return [model.name, name, len(curves), loss, *compared, long_steps]


def verdict(model: Model, found: Found) -> str:
    """Whether the loss with 8-bit moments is float32's."""
    held_out = excess(found, INT8)[0][:, 0]
    said = "Met" if abs(held_out.mean()) <= WITHIN else "Missed"
    what = f"{model.name}, int8, held-out loss over float32's, less 1"
    return f"- {said}: {what}: {spread(held_out)}, target within {WITHIN}."


def answer(rows: Rows) -> Answer:
    """The held-out loss with 8-bit moments."""
    found = {row[0]: row[4] for row in rows if row[1] == INT8}
    first, *_ = found.values()
    said = ", ".join(f"{excess} ({name})" for name, excess in found.items())
    return Answer(
        f"Over float32's, less 1, the held-out loss with 8-bit moments is {said}.",
        f"{1 + float(first.split(' ')[0]):.4f} of float32's loss",
    )


def described(model: Model) -> str:
    """A line of the note."""
    head = "its embedding is its head" if model.tied else "a head apart, (width, tokens)"
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: first_weights(model, 0))))
    steps = f"{model.steps:,} steps of {model.batch} x {CONTEXT} tokens"
    return f"{model.name.capitalize()}: {size:,} weights, width {model.width}, {head}; {steps}, b2 = {model.b2}."


def draw(results: dict[Model, Found], path: Path) -> None:
    """The train loss over float32's in the course of the runs, the mean of the seeds."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    names = [name for name, kind in KINDS.items() if name != kind.beside]
    for axes, (model, found) in zip(panels, results.items(), strict=True):
        steps = (np.arange(PARTS) + 0.5) * model.steps / PARTS
        for i, name in enumerate(names):
            if name in found:
                style = {"color": f"C{i % 10}", "ls": (":", "-", "--")[i // 10 + (name != JITTERED)]}
                axes.plot(steps, excess(found, name)[1].mean(axis=0), lw=1.2, label=name, **style)
        axes.set_yscale("symlog", linthresh=1e-3, linscale=1.5)
        axes.set_title(f"{model.name}, b2 = {model.b2}", fontsize=10)
        axes.axhline(0, color="grey", lw=0.8)
        axes.grid(alpha=0.2)
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("train loss over float32's, less 1", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(results: dict[Model, Found]) -> None:
    """Writes the table and the picture of the runs so far."""
    rows = [row(model, name, found) for model, found in results.items() for name in KINDS if name in found]
    hours = sum(run.seconds for found in results.values() for runs in found.values() for run in runs) / 3600
    models = "\n".join(map(described, results))
    note = NOTE.format(
        vocabulary=VOCABULARY, python=platform.python_version(), models=models, former=FORMER, hours=hours
    )
    note += "\n".join(verdict(model, found) for model, found in results.items())
    rival = ("rollfast",) if importlib.util.find_spec("rollfast") else ()
    about: dict[str, Any] = {"packages": (*rival, "tokenizers"), "picture": PICTURE}
    save("language_model", QUESTION, COLUMNS, rows, note, answer=answer, **about)
    draw(results, PICTURE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, and writes the result."""
    parser = _report.parser(__doc__, "a small text, one layer, two formats, a few steps")
    parser.add_argument("--model", choices=[model.name for model in MODELS], help="only one of the models")
    options = parser.parse_args(arguments)
    if options.quick:
        model = MODELS[-1]._replace(steps=PARTS, layers=1)
        found = {name: [trainer(model, KINDS[name], library_text(20))(0)] for name in (FLOAT32, INT8)}
        print(*(row(model, name, found) for name in found), verdict(model, found), sep="\n", flush=True)
        return
    for model in MODELS:
        if options.model in (None, model.name):
            train(model)
            report({model: found for model in MODELS if FLOAT32 in (found := loaded(model))})


if __name__ == "__main__":
    main()
