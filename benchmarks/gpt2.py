"""What do narrow moments and weights cost at the size of GPT-2 small?

    python -m benchmarks.gpt2            five formats, a thousand steps each: minutes on an H100
    python -m benchmarks.gpt2 --seeds 3 --minutes 8    no seed is begun that would end later
    python -m benchmarks.gpt2 --quick    a tiny model, float32, ten steps; writes nothing
    python -m benchmarks.gpt2 --draw     draws the picture from the last result again

Needs jax and optax alone; without matplotlib there is no picture. The result so far is written after each format.
"""

import collections
import functools
import hashlib
import importlib.util
import itertools
import math
import re
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.typing import DTypeLike

import optax_nadam
from benchmarks import _report, _tasks
from benchmarks._tasks import Batch, Params, Sizes

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "gpt2.png"
PIECE = re.compile(rb" ?[A-Za-z_]+|[0-9]|\n *| +|[^\w\s]+|.", re.DOTALL)  # of a text: at most a word with a space
SUFFIXES = {".py", ".txt", ".md", ".rst"}
HELD_OUT = 20  # of as many files, one is not trained on
PEAK, B2, WEIGHT_DECAY = 6e-4, 0.95, 0.1
QUESTION = "What do narrow moments and weights cost at the size of GPT-2 small?"
COLUMNS = ["weights and moments", "weights + state, bytes a parameter", "train loss", "over float32"]
COLUMNS += ["held-out loss", "over float32", "tokens a second", "memory of the program, GB", "peak of the device, GB"]
NOTE = """\
{parameters:,} weights: a transformer of {layers} layers and width {width} over {vocabulary:,} tokens, without biases,
embedding and head apart. Computed in bfloat16, loss and optimizer in float32; gradients have the dtype of the weights.
{steps} steps of {batch} x {context} tokens; all formats have the same batches and the same first weights, rounded where
they are bfloat16. `nadamw` with b2 of {b2} and a weight decay of {decay}, gradients clipped to a norm of 1, a learning
rate that warms up to {peak} and falls to zero on a cosine.

The text is that of {files:,} files with a suffix of {suffixes} in Python's own folders on that machine, {bytes:,} bytes
and {tokens:,} tokens, SHA-256 {digest}; one file of {held_out} is held out. A token is a frequent word or sign, or a
byte. Train loss is the mean over the last tenth of the batches, in nats. Seeds: {seeds}, each with its own weights and
batches; over float32 is the mean of the ratios with its standard error. With one seed a difference of a percent, to
either side, may be chance. Memory of the program: arguments, temporaries and results of the compiled steps, weights
and activations included. Peak of the device is the largest so far, as the backend reports it; formats run in
the order of their size, the text is counted."""

Maker = Callable[[optax.Schedule], Any]


class Format(NamedTuple):
    """The optimizer for a learning rate, and the dtype of the weights."""

    name: str
    make: Maker
    weights: DTypeLike


class Text(NamedTuple):
    """Tokens to train on and tokens held out, and where they come from."""

    seen: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    files: int
    bytes: int
    digest: str


class Setting(NamedTuple):
    """What all formats share.

    Attributes:
      sizes: of the model.
      vocabulary: number of tokens there are, at most.
      bytes: of text, at most.
      steps: of a run.
      batch: texts in a batch.
      chunk: steps of one program.
    """

    sizes: Sizes
    vocabulary: int
    bytes: int
    steps: int
    batch: int
    chunk: int


class Run(NamedTuple):
    """The outcome of a format: losses of batches and of what was held out, speed, and bytes of memory."""

    curve: np.ndarray
    held_out: float
    tokens_a_second: float
    program: int
    peak: int | None


FULL = Setting(Sizes(768, 12, 12, 512), 25_088, 48_000_000, steps=1000, batch=16, chunk=50)
QUICK = Setting(Sizes(32, 2, 1, 16), 512, 200_000, steps=10, batch=4, chunk=5)


def nadamw(moments: DTypeLike | None = None) -> Maker:
    """The optimizer with moments in a format."""

    def make(schedule: optax.Schedule) -> Any:
        nadam = optax_nadam.nadamw(schedule, b2=B2, weight_decay=WEIGHT_DECAY, m_dtype=moments, v_dtype=moments)
        return optax.chain(optax.clip_by_global_norm(1.0), nadam)

    return make


def compensated(inner: Maker, remainder_dtype: DTypeLike | None) -> Maker:
    """The optimizer with what rounding drops stored beside the weights."""
    return lambda schedule: optax_nadam.compensated(inner(schedule), remainder_dtype=remainder_dtype)


FLOAT32 = Format("float32", nadamw(), jnp.float32)
FORMATS = [  # from the smallest to the largest, so that the peak of each is seen
    Format("8-bit moments, stochastically rounded bfloat16 weights", compensated(nadamw("int8"), None), jnp.bfloat16),
    Format("8-bit moments, compensated bfloat16 weights", compensated(nadamw("int8"), "int8"), jnp.bfloat16),
    Format("8-bit moments", nadamw("int8"), jnp.float32),
    Format("naive bfloat16 weights, float32 moments", nadamw(), jnp.bfloat16),
    FLOAT32,
]


def files(limit: int) -> Iterator[bytes]:
    """Texts in Python's folders, none twice, in an order that does not depend on the machine, up to a size."""
    roots = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")}
    paths = {path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    seen: set[bytes] = set()
    for path in sorted(paths, key=lambda path: hashlib.sha256("/".join(path.parts[-3:]).encode()).digest()):
        content = path.read_bytes()[:limit]
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            limit -= len(content)
            yield content
        if limit <= 0:
            return


def tokenized(texts: Sequence[bytes], vocabulary: int) -> list[np.ndarray]:
    """Each text as numbers: of the most frequent pieces of all, and of the bytes of other pieces."""
    pieces = [PIECE.findall(text) for text in texts]
    counts = collections.Counter(itertools.chain.from_iterable(pieces))
    frequent = [piece for piece, _ in counts.most_common() if len(piece) > 1][: vocabulary - 256]
    number = {piece: (256 + place,) for place, piece in enumerate(frequent)}
    table = {piece: number.get(piece, tuple(piece)) for piece in counts}
    return [np.fromiter(itertools.chain.from_iterable(map(table.__getitem__, text)), np.int32) for text in pieces]


def read_text(setting: Setting) -> Text:
    """What Python's folders hold, as tokens."""
    contents = list(files(setting.bytes))
    joined = (b"\n".join(contents[1::HELD_OUT]), b"\n".join(x for k, x in enumerate(contents) if k % HELD_OUT != 1))
    held_out, seen = tokenized(joined, setting.vocabulary)
    digest = hashlib.sha256(joined[1]).hexdigest()[:16]
    return Text(seen, held_out, setting.vocabulary, len(contents), sum(map(len, contents)), digest)


def first_weights(setting: Setting, dtype: DTypeLike, seed: int = 0) -> Params:
    """The same for every format; the blocks are stacked, so that the layers are one program."""
    params = _tasks.transformer(jax.random.key(2 * seed), setting.vocabulary, setting.sizes)
    params["blocks"] = jax.tree.map(lambda *blocks: jnp.stack(blocks), *params["blocks"])
    return jax.tree.map(lambda x: x.astype(dtype), params)


def loss(setting: Setting, params: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy, the model in bfloat16."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    h = params["embed"][batch[0]] + params["position"]
    heads = setting.sizes.heads
    h, _ = jax.lax.scan(lambda h, block: (_tasks.layer(h, block, jax.nn.gelu, heads), None), h, params["blocks"])
    logits = (_tasks.scaled(h, params["gain"]) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def draw_batch(setting: Setting, text: jax.Array, seed: int, step: jax.Array) -> Batch:
    """The batch of a step."""
    context, key = setting.sizes.context, jax.random.fold_in(jax.random.key(2 * seed + 1), step)
    starts = jax.random.randint(key, (setting.batch,), 0, len(text) - context)
    return _tasks.windows(text, starts, context)


def trained(setting: Setting, tx: Any, seed: int, params: Params, state: Any, text: jax.Array, start: jax.Array) -> Any:
    """Params, state and losses after a chunk of steps."""

    def step(carry: tuple[Params, Any], index: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = carry
        batch = draw_batch(setting, text, seed, index)
        value, grads = jax.value_and_grad(functools.partial(loss, setting))(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, state), start + jnp.arange(setting.chunk))
    return params, state, losses


def run(setting: Setting, form: Format, text: Text, seed: int) -> Run:
    """Trains in one format, a chunk of steps at a time; the first chunk is not counted for the speed."""
    tx = form.make(schedule(setting))
    params = jax.jit(lambda: first_weights(setting, form.weights, seed))()
    state = jax.jit(tx.init)(params)
    seen, start = jnp.asarray(text.seen), jnp.int32(0)
    chunk = jax.jit(functools.partial(trained, setting, tx, seed), donate_argnums=(0, 1))
    program = chunk.lower(params, state, seen, start).compile()
    curve, seconds = [], []
    for first in range(0, setting.steps, setting.chunk):
        started = time.perf_counter()
        params, state, losses = program(params, state, seen, jnp.int32(first))
        curve.append(np.asarray(losses))
        seconds.append(time.perf_counter() - started)
    weights = params
    if isinstance(state, optax_nadam.CompensatedState):
        weights = jax.jit(optax_nadam.master_params)(state, params)
    tokens = setting.chunk * setting.batch * setting.sizes.context
    speed = tokens / float(np.median(seconds[1:] or seconds))
    return Run(np.concatenate(curve), held_out_loss(setting, weights, text), speed, size_of(program), peak())


def schedule(setting: Setting) -> optax.Schedule:
    """A learning rate that warms up for a tenth of the run and ends at zero."""
    return optax.warmup_cosine_decay_schedule(0.0, PEAK, max(1, setting.steps // 10), setting.steps)


def held_out_loss(setting: Setting, weights: Params, text: Text) -> float:
    """The mean over windows that are evenly spaced over what was held out."""
    context = setting.sizes.context
    number = min(16 * setting.batch, (len(text.held_out) - 1) // context)
    starts = np.linspace(0, len(text.held_out) - context - 1, number).astype(np.int32)
    tokens, measure = jnp.asarray(text.held_out), jax.jit(functools.partial(loss, setting))
    batches = [starts[k : k + setting.batch] for k in range(0, number - setting.batch + 1, setting.batch)]
    return float(np.mean([measure(weights, _tasks.windows(tokens, jnp.asarray(x), context)) for x in batches]))


def size_of(program: Any) -> int:
    """Bytes that a program takes while it runs."""
    memory = program.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + made)


def peak() -> int | None:
    """The most bytes that were in use on the device, where the backend counts them."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def bytes_a_parameter(setting: Setting, form: Format) -> tuple[float, float]:
    """Of weights and state."""
    params = jax.eval_shape(lambda: first_weights(setting, form.weights))
    trees = params, jax.eval_shape(form.make(schedule(setting)).init, params)
    size = number_of_weights(setting)
    weights, state = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / size for tree in trees)
    return weights, state


def number_of_weights(setting: Setting) -> int:
    """Of the model."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: first_weights(setting, jnp.float32))))


def rows(setting: Setting, found: dict[str, list[Run]]) -> list[list[Any]]:
    """A row for each format that was run; ratios once float32 was. Speed and memory are those of the last seed."""
    float32 = found.get(FLOAT32.name, [])
    table = []
    for form in (form for form in FORMATS if form.name in found):
        runs = found[form.name]
        weights, state = bytes_a_parameter(setting, form)
        cells = []
        for of in (last, lambda one: one.held_out):
            ratios = [of(one) / of(other) for one, other in zip(runs, float32, strict=False)]
            cells += [f"{np.mean([of(one) for one in runs]):.4f}", mean_of(np.array(ratios))]
        *_, speed, program, most = runs[-1]
        cells += [f"{speed:,.0f}", f"{program / 1e9:.2f}", "not counted" if most is None else f"{most / 1e9:.2f}"]
        table.append([form.name, f"{weights:.2f} + {state:.2f}", *cells])
    return table


def mean_of(ratios: np.ndarray) -> str:
    """With its standard error, where there are several."""
    if len(ratios) < 2:
        return "".join(f"{x:.4f}" for x in ratios)
    mean, error = _report.mean_and_error(ratios)
    return f"{mean:.4f} ± {error:.4f}"


def last(one: Run) -> float:
    """The mean loss of the last tenth of the batches."""
    return float(one.curve[-max(1, len(one.curve) // 10) :].mean())


def draw(curves: dict[str, np.ndarray], path: Path) -> Path | None:
    """The losses of all formats, and by how much they exceed those of float32, as means over a fiftieth of the run."""
    if importlib.util.find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed. --draw makes it later, also elsewhere.")
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = {name: np.array([part.mean() for part in np.array_split(x, min(50, len(x)))]) for name, x in curves.items()}
    for name, mean in means.items():
        steps = np.linspace(0, len(curves[name]), len(mean))
        left.plot(steps, mean, label=name, lw=1.2)
        right.plot(steps, 100 * (mean / means[FLOAT32.name] - 1), lw=1.2)
    left.set(xlabel="step", ylabel="loss of the batches")
    left.legend(fontsize=7)
    right.set(xlabel="step", ylabel="over float32's, %")
    right.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def answer(table: _report.Rows) -> _report.Answer:
    """The loss of 8-bit moments with 24-bit weights over that of float32."""
    small = table[min(1, len(table) - 1)]
    return _report.Answer(
        f"With {small[0]} the train loss is {small[3]} of float32's{'' if '±' in small[3] else ', one seed'}.",
        f"{small[3].partition(' ')[0] or '?'} of float32's loss",
    )


def curves_path() -> Path:
    """Where the losses of the batches are, for the picture."""
    return _report.RESULTS / f"gpt2-{jax.default_backend()}.npz"


def note(setting: Setting, text: Text, seeds: int) -> str:
    """What was trained on what."""
    sizes: dict[str, Any] = setting.sizes._asdict() | {"steps": setting.steps, "batch": setting.batch}
    source: dict[str, Any] = {"files": text.files, "bytes": text.bytes, "tokens": len(text.seen) + len(text.held_out)}
    source |= {"digest": text.digest, "vocabulary": text.vocabulary, "suffixes": ", ".join(sorted(SUFFIXES))}
    optimizer = {"b2": B2, "decay": WEIGHT_DECAY, "peak": PEAK, "held_out": HELD_OUT}
    return NOTE.format(parameters=number_of_weights(setting), seeds=seeds, **sizes, **source, **optimizer)


def write(setting: Setting, text: Text, found: dict[str, list[Run]]) -> None:
    """The result so far."""
    _report.RESULTS.mkdir(exist_ok=True)
    curves: dict[str, Any] = {name: np.mean([one.curve for one in runs], axis=0) for name, runs in found.items()}
    np.savez(curves_path(), **curves)
    about: dict[str, Any] = {"answer": answer, "picture": draw(curves, PICTURE) if FLOAT32.name in found else None}
    _report.save(
        "gpt2", QUESTION, COLUMNS, rows(setting, found), note(setting, text, len(found[FORMATS[0].name])), **about
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every format on the same batches."""
    parser = _report.parser(__doc__, "a tiny model, float32, ten steps")
    parser.add_argument("--steps", type=int, help=f"of a run; {FULL.steps}, a multiple of {FULL.chunk}")
    parser.add_argument("--batch", type=int, help=f"texts in a batch; {FULL.batch}")
    parser.add_argument("--seeds", type=int, default=1, help="how many; 1")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all seeds, if given")
    parser.add_argument("--draw", action="store_true", help="draws the picture of the last result on this backend")
    options = parser.parse_args(arguments)
    if options.draw:
        draw(dict(np.load(curves_path())), PICTURE)
        return
    setting = QUICK if options.quick else FULL
    setting = setting._replace(steps=options.steps or setting.steps, batch=options.batch or setting.batch)
    if setting.steps % setting.chunk:
        parser.error(f"--steps must be a multiple of {setting.chunk}, got {setting.steps}")
    text = read_text(setting)
    print(f"{len(text.seen):,} tokens of {text.files:,} files", flush=True)
    found: dict[str, list[Run]] = {}
    began = time.perf_counter()
    for seed in range(options.seeds):
        if (time.perf_counter() - began) * (seed + 1) > 60 * options.minutes * max(1, seed):
            print(f"{seed} of {options.seeds} seeds: the next would not end within {options.minutes:g} minutes")
            break
        for form in (FLOAT32,) if options.quick else FORMATS:
            started = time.perf_counter()
            one = run(setting, form, text, seed)
            found.setdefault(form.name, []).append(one)
            print(f"{form.name}, seed {seed}: {last(one):.4f}, {time.perf_counter() - started:.0f} s", flush=True)
            if not options.quick:
                write(setting, text, found)
    if options.quick:
        print(*rows(setting, found), sep="\n")


if __name__ == "__main__":
    main()
