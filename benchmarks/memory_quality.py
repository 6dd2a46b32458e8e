"""How much quality do narrow moments and narrow weights cost?

python -m benchmarks.memory_quality            both tasks, ten seeds
python -m benchmarks.memory_quality --quick    the digits, 8-bit moments, two seeds, twenty steps; writes nothing
python -m benchmarks.memory_quality --tune     float32 over a grid of learning rates; writes nothing
"""

import functools
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.typing import DTypeLike
from matplotlib.figure import Figure

import optax_nadam
from benchmarks import _report, _tasks
from benchmarks._report import save
from benchmarks._tasks import Task

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "memory_quality.png"
SEEDS, TARGET, TOO_HIGH = 10, 1.001, 1.5
TASKS = (functools.partial(_tasks.language_model, jax.nn.gelu), _tasks.digits)
EDGE, TICKS = 10.0, (-0.01, -0.001, 0.0, 0.001, 0.01, 0.1, 1.0)
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
QUESTION = "How much quality do narrow moments and narrow weights cost?"
COLUMNS = ["task", "weights and moments", "bytes a parameter, weights + state", "train loss", "over float32"]
COLUMNS += ["held-out loss", "over float32", "unstable"]
NOTE = """\
Each seed has its own weights and order of batches, the same in every format. Losses are medians with quartiles, in
nats, on fixed data, with the weights of `master_params` where they are compensated. Over float32: the mean ratio to
float32 of the same seed, with its standard error; the median and the largest ratio. The second row is the same formula
with other rounding errors, the third shows the effect of the order of batches. Any difference
in rounding grows in the course of a run, so two runs end with losses that differ by a random amount. One seed cannot
show a difference of a thousandth; the mean shows it to within its standard error. Unstable: the number of seeds whose
final loss is over 1.5 times that in float32, or whose loss of batches, over any fiftieth of the run after the warm-up,
is over 1.5 times that of every seed in float32, or not finite. All rows follow the rule of `optax.nadam`:
`rule="constant"`, `eps=1e-8`.

The language model is a transformer over bytes, of two layers and width 64 with GELU. It is trained on nine tenths of
the help texts of Python {python} (`pydoc_data.topics`); the rest is held out. The digits are those of
`examples/train_digits.py`, with the network there, and labels smoothed by 0.1. The learning rate, which warms up and
falls to zero on a cosine, was chosen once, for float32 (`--tune`). Everything is computed in float32; gradients have
the dtype of the weights. The picture is `docs/img/memory_quality.png`.

"""
CAPTION = """\
train loss of every run against that of the same seed in float32; line: median, bar: quartiles, red: the target;
at the right edge: eleven times as high and more, or not finite"""

Maker = Callable[[optax.Schedule], Any]


class Even(NamedTuple):
    """Numbers as fractions, in 255ths, of the largest in their row."""

    codes: jax.Array
    largest: jax.Array


class Format(NamedTuple):
    """The format of the weights and moments of a run.

    Attributes:
      name: as in the tables.
      make: the optimizer for a learning rate.
      weights: dtype of the params.
      order: which of a seed's two orders of batches.
    """

    name: str
    make: Maker
    weights: DTypeLike = jnp.float32
    order: int = 0


class Runs(NamedTuple):
    """Losses of the runs of a format; the first axis is that of the seeds."""

    curves: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def nadam(m_dtype: DTypeLike | None = None, v_dtype: DTypeLike | None = None) -> Maker:
    """Ours, with Optax's rule."""
    return lambda schedule: optax_nadam.nadam(schedule, eps=1e-8, rule="constant", m_dtype=m_dtype, v_dtype=v_dtype)


def compensated(inner: Maker, remainder_dtype: DTypeLike | None) -> Maker:
    """The optimizer with what rounding drops stored beside the weights."""
    return lambda schedule: optax_nadam.compensated(inner(schedule), remainder_dtype=remainder_dtype)


def evenly_spaced_v(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Nadam with a naive 8-bit ``v``, which is known to fail: evenly spaced codes, rounded to the nearest."""
    inner = nadam()(schedule)

    def pack(state: Any) -> Any:
        return (state[0]._replace(v=jax.tree.map(_even, state[0].v)), *state[1:])

    def unpack(state: Any) -> Any:
        return (state[0]._replace(v=jax.tree.map(_as_number, state[0].v, is_leaf=_is_even)), *state[1:])

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(grads, unpack(state), params)
        return updates, pack(state)

    return optax.GradientTransformation(lambda params: pack(inner.init(params)), update)


def _even(v: jax.Array) -> Any:
    if v.size < 1024:  # as ours
        return v
    largest = v.max(axis=-1, keepdims=True)
    return Even(jnp.round(255 * v / jnp.where(largest > 0, largest, 1)).astype(jnp.uint8), largest)


def _as_number(v: Any) -> jax.Array:
    return v.codes / jnp.float32(255) * v.largest if _is_even(v) else v


def _is_even(node: Any) -> bool:
    return isinstance(node, Even)


BYTES = nadam("int8", "int8")
FLOAT32 = Format("float32", nadam())
OFFERED = [
    Format("8-bit moments", BYTES),
    Format("8-bit moments, compensated bfloat16 weights, int8", compensated(BYTES, jnp.int8), jnp.bfloat16),
    Format("8-bit moments, compensated bfloat16 weights, int16", compensated(BYTES, jnp.int16), jnp.bfloat16),
    Format("8-bit moments, stochastically rounded bfloat16 weights", compensated(BYTES, None), jnp.bfloat16),
]
FORMATS = [
    FLOAT32,
    Format("float32, optax.nadam", optax.nadam),
    Format("float32, batches in another order", nadam(), order=1),
    Format("bfloat16 moments", nadam(jnp.bfloat16, jnp.bfloat16)),
    *OFFERED,
    Format("optax.nadam, mu_dtype=bfloat16", lambda schedule: optax.nadam(schedule, mu_dtype=jnp.bfloat16)),
    Format("naive bfloat16 weights, float32 moments", nadam(), jnp.bfloat16),
    Format("naive bfloat16 weights and moments, optax.nadam", optax.nadam, jnp.bfloat16),
    Format("naive 8-bit v: evenly spaced, to the nearest", evenly_spaced_v),
]


def warmup_cosine(task: Task) -> optax.Schedule:
    """A learning rate that ends at zero, so that the last losses can be compared."""
    return optax.warmup_cosine_decay_schedule(0.0, task.peak, max(1, task.steps // 10), task.steps)


def trainer(task: Task, form: Format) -> Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """A compiled function of a seed, to the loss of each batch and the final losses on both parts of the data."""
    tx = form.make(warmup_cosine(task))

    def loss(params: Any, batch: _tasks.Batch) -> jax.Array:
        return task.loss(_cast(params, jnp.float32), batch)

    def train(seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights, *orders = jax.random.split(jax.random.key(seed), 3)

        def step(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, task.draw(jax.random.fold_in(orders[form.order], index)))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        params = _cast(task.init(weights), form.weights)
        (params, state), curve = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.steps))
        if isinstance(state, optax_nadam.CompensatedState):
            params = optax_nadam.master_params(state, params)
        return curve, loss(params, task.train), loss(params, task.held_out)

    return jax.jit(train).lower(jnp.int32(0)).compile()


def _cast(params: Any, dtype: DTypeLike) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def runs_of(task: Task, form: Format, seeds: int) -> Runs:
    """All seeds of a format, as many at a time as there are cores."""
    train = trainer(task, form)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(lambda seed: jax.device_get(train(jnp.int32(seed))), range(seeds))
        return Runs(*map(np.stack, zip(*outcomes, strict=True)))


def bytes_a_parameter(task: Task, form: Format) -> tuple[float, float]:
    """Of the weights and of the whole optimizer state, with scales, counters and leaves too small to be narrow."""
    params = jax.eval_shape(lambda key: _cast(task.init(key), form.weights), jax.random.key(0))
    trees = params, jax.eval_shape(form.make(warmup_cosine(task)).init, params)
    size = sum(x.size for x in jax.tree.leaves(params))
    weights, state = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / size for tree in trees)
    return weights, state


def unstable(runs: Runs, float32: Runs) -> np.ndarray:
    """Which seeds had over 1.5 times the loss of float32, at the end or during the run, or a loss that is not finite.

    The final loss is compared with that of the same seed. During the run, after the warm-up, the mean over a fiftieth
    of it is compared with the highest of all seeds in float32.
    """
    ends_well = runs.train <= TOO_HIGH * float32.train
    peaks = _stretches(float32.curves).max(axis=0)
    stays_low = (_stretches(runs.curves) <= TOO_HIGH * peaks).all(axis=1)
    return ~(ends_well & stays_low & np.isfinite(runs.held_out))


def _stretches(curves: np.ndarray) -> np.ndarray:
    """Means over fiftieths of a run, without those of the warm-up."""
    parts = np.array_split(curves, min(50, curves.shape[1]), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)[:, len(parts) // 10 :]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def losses(values: np.ndarray) -> str:
    """Median and quartiles as text."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def ratios(values: np.ndarray) -> str:
    """Mean with its standard error, median and worst as text."""
    mean, error = mean_and_error(values)
    return f"{mean:.4f} ± {error:.4f}; {np.median(values):.4f}, at most {values.max():.4f}"


def verdict(what: str, values: np.ndarray) -> str:
    """Whether the mean is within the target, and whether it is within two standard errors of it."""
    mean, error = mean_and_error(values)
    met = "Met" if mean <= TARGET else "Missed"
    close = abs(mean - TARGET) <= 2 * error
    return f"- {met}{' within the noise' if close else ''}: {what}: {mean:.5f} ± {error:.5f}, target at most {TARGET}."


def row(task: Task, form: Format, runs: Runs, float32: Runs) -> list[Any]:
    """A row of the table."""
    weights, state = bytes_a_parameter(task, form)
    train, held_out = runs.train / float32.train, runs.held_out / float32.held_out
    cells = [losses(runs.train), ratios(train), losses(runs.held_out), ratios(held_out)]
    return [task.name, form.name, f"{weights:.2f} + {state:.2f}", *cells, f"{unstable(runs, float32).sum()}"]


def measured(task: Task, formats: Sequence[Format], seeds: int) -> dict[str, Runs]:
    """The runs of each format on a task."""
    return {form.name: runs_of(task, form, seeds) for form in formats}


def verdicts(task: Task, found: dict[str, Runs]) -> list[str]:
    """Whether the targets are met, and how flat the losses are at the end."""
    float32 = found[FLOAT32.name]
    lines = [flatness(task, float32)]
    for form in (form for form in OFFERED if form.name in found):
        train = found[form.name].train
        lines.append(verdict(f"{task.name}, {form.name}, train loss over float32", train / float32.train))
        if task.floor:
            above = (train - task.floor) / (float32.train - task.floor)
            lines.append(f"  Of the part above {task.floor:.4f}, the lowest possible loss: {ratios(above)}.")
    return lines


def flatness(task: Task, float32: Runs) -> str:
    """How much the loss of the batches still falls at the end."""
    tenth = task.steps // 10
    before, last = float32.curves[:, -2 * tenth : -tenth].mean(), float32.curves[:, -tenth:].mean()
    return f"- {task.name}, float32: the loss of the last tenth of the batches is {last / before:.3f} of that before."


def draw(results: dict[str, dict[str, Runs]], path: Path) -> None:
    """Every run as a dot, by how much its train loss exceeds that of the same seed in float32."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (task, found) in zip(panels, results.items(), strict=True):
        draw_task(axes, found)
        axes.set_title(f"{task}, {len(found[FLOAT32.name].train)} seeds", fontsize=10)
    panels[0].set_yticks(range(len(FORMATS)), [form.name for form in FORMATS], fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel(CAPTION, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_task(axes: Any, found: dict[str, Runs]) -> None:
    """One panel: a line of dots for each format, and the target."""
    for place, runs in enumerate(found.values()):
        excess = np.nan_to_num(runs.train / found[FLOAT32.name].train - 1, nan=np.inf).clip(-EDGE, EDGE)
        low, middle, high = np.quantile(excess, (0.25, 0.5, 0.75))
        axes.plot(excess, place + np.linspace(-0.25, 0.25, len(excess)), ".", color="C0", alpha=0.7, clip_on=False)
        axes.plot([low, high], [place, place], color="C0", alpha=0.3, lw=8, solid_capstyle="butt")
        axes.plot([middle, middle], [place - 0.35, place + 0.35], color="black", lw=1.2)
    axes.axvline(TARGET - 1, color="C3", lw=0.8, ls="--")
    axes.set_xscale("symlog", linthresh=1e-3, linscale=1.5)
    axes.set(xlim=(-0.1, EDGE))
    axes.set_xticks(TICKS, [f"{100 * tick:g}%" for tick in TICKS], fontsize=7)
    axes.grid(axis="x", alpha=0.3)


def tune(task: Task, seeds: int) -> None:
    """Prints the loss of float32 for every learning rate of a grid."""
    for peak in LEARNING_RATES:
        runs = runs_of(task._replace(peak=peak), FLOAT32, seeds)
        print(
            f"{task.name}, learning rate {peak:g}: {losses(runs.train)}, held out {losses(runs.held_out)}", flush=True
        )


def answer(rows: _report.Rows) -> _report.Answer:
    """The train loss of 8-bit moments, with float32 and with 24-bit weights."""
    task = rows[0][0]
    alone, compensated_ = (_report.row_of(rows, task, form.name)[4].split(";")[0] for form in OFFERED[:2])
    return _report.Answer(
        f"The train loss of the {task} is {alone} of float32's with 8-bit moments, {compensated_} with compensated"
        " bfloat16 weights too.",
        f"{alone.split(' ')[0]} of float32's loss",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains everything, and writes the results so far after each task."""
    parser = _report.parser(__doc__, "the digits, 8-bit moments, two seeds, twenty steps")
    parser.add_argument("--tune", action="store_true", help="float32 over a grid of learning rates; writes nothing")
    parser.add_argument("--seeds", type=int, help=f"other than {SEEDS}; writes nothing")
    parser.add_argument("--steps", type=int, help="other than the tasks'; writes nothing")
    parser.add_argument("--only", help="float32 and the formats with this in their name; writes nothing")
    options = parser.parse_args(arguments)
    seeds = options.seeds or (2 if options.quick else SEEDS)
    steps = options.steps or (20 if options.quick else None)
    short = options.seeds or steps or options.only
    table: list[list[Any]] = []
    notes: list[str] = []
    results: dict[str, dict[str, Runs]] = {}
    formats = [FLOAT32, *OFFERED[:1]] if options.quick else FORMATS
    if options.only:
        formats = [FLOAT32, *(form for form in FORMATS[1:] if options.only in form.name)]
    for make in TASKS[-1:] if options.quick else TASKS:
        task = make()
        task = task._replace(steps=steps or task.steps)
        if options.tune:
            tune(task, seeds)
            continue
        found = results[task.name] = measured(task, formats, seeds)
        table += [row(task, form, found[form.name], found[FLOAT32.name]) for form in formats]
        notes += verdicts(task, found)
        if short:
            print(*table, *notes, sep="\n")
        else:
            note = NOTE.format(python=platform.python_version()) + "\n".join(notes)
            save(
                "memory_quality",
                QUESTION,
                COLUMNS,
                table,
                note,
                answer=answer,
                picture=PICTURE,
                packages=("scikit-learn",),
            )
            draw(results, PICTURE)


if __name__ == "__main__":
    main()
