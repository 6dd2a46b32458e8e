"""What do narrow moments and narrow weights cost in quality?

python -m benchmarks.memory_quality            both tasks, ten seeds
python -m benchmarks.memory_quality --quick    two seeds, few steps; writes nothing
python -m benchmarks.memory_quality --tune     float32 over a grid of learning rates; writes nothing
"""

import argparse
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
from benchmarks import _tasks
from benchmarks._report import save
from benchmarks._tasks import Task

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "memory_quality.png"
SEEDS, TARGET, TOO_HIGH = 10, 1.001, 1.5
TASKS = (functools.partial(_tasks.language_model, jax.nn.gelu), _tasks.digits)
EDGE, TICKS = 10.0, (-0.01, -0.001, 0.0, 0.001, 0.01, 0.1, 1.0)
RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
QUESTION = "What do narrow moments and narrow weights cost in quality?"
COLUMNS = ["task", "weights and moments", "bytes a parameter, weights + state", "train loss", "over float32"]
COLUMNS += ["held-out loss", "over float32", "unstable"]
NOTE = """\
Each seed has weights and an order of batches of its own, the same in every format. Losses are medians with quartiles,
in nats, on fixed data, with the weights that `master_params` gives where they are compensated. Over float32: the mean
ratio to float32 of the same seed, with its standard error; the median and the largest ratio. The second row is the same
formula rounded elsewhere, the third what the order of batches does to the ratio. Once runs have parted they end as far
apart as chance has it, whatever parted them: so one seed says little at a thousandth, and the mean says it to within
its standard error. Unstable: of the seeds, those that end half as high again as in float32, or whose batches, over any
fiftieth of the run after the warm-up, are half as high again as those of any seed in float32, or that are not finite.
`optax.nadam` in all rows: `rule="constant"`, `eps=1e-8`.

The language model is a transformer over bytes, of two layers and width 64 with GELU. It reads nine tenths of the help
texts of Python {python} (`pydoc_data.topics`); the rest is held out. The digits are those of
`examples/train_digits.py`, with the network there, and labels smoothed by 0.1. The learning rate, which warms up and
falls to zero on a cosine, was chosen once, for float32 (`--tune`). All is reckoned in float32; gradients have the dtype
of the weights. The picture is `docs/img/memory_quality.png`.

"""
CAPTION = """\
train loss of every run against that of the same seed in float32; line: median, bar: quartiles, red: the target;
at the right edge: eleven times as high and more, or not finite"""

Maker = Callable[[optax.Schedule], Any]


class Even(NamedTuple):
    """Numbers as a share, in 255ths, of the largest in their row."""

    codes: jax.Array
    largest: jax.Array


class Format(NamedTuple):
    """What a run keeps its weights and moments in.

    Attributes:
      name: what the tables call it.
      make: the optimizer for a learning rate.
      weights: dtype of the params.
      order: which of the orders of batches that a seed has.
    """

    name: str
    make: Maker
    weights: DTypeLike = jnp.float32
    order: int = 0


class Runs(NamedTuple):
    """What the seeds of a format came to; the first axis is that of the seeds."""

    curves: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def nadam(m_dtype: DTypeLike | None = None, v_dtype: DTypeLike | None = None) -> Maker:
    """Ours by Optax's rule."""
    return lambda rate: optax_nadam.nadam(rate, eps=1e-8, rule="constant", m_dtype=m_dtype, v_dtype=v_dtype)


def compensated(inner: Maker, remainder_dtype: DTypeLike) -> Maker:
    """The weights with what rounding drops kept beside them."""
    return lambda rate: optax_nadam.compensated(inner(rate), remainder_dtype=remainder_dtype)


def evenly_spaced_v(rate: optax.Schedule) -> optax.GradientTransformation:
    """Nadam with ``v`` in a byte done naively, which is known to fail: even spacing, rounded to the nearest."""
    inner = nadam()(rate)

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
]
FORMATS = [
    FLOAT32,
    Format("float32, optax.nadam", optax.nadam),
    Format("float32, batches in another order", nadam(), order=1),
    Format("bfloat16 moments", nadam(jnp.bfloat16, jnp.bfloat16)),
    *OFFERED,
    Format("optax.nadam, mu_dtype=bfloat16", lambda rate: optax.nadam(rate, mu_dtype=jnp.bfloat16)),
    Format("naive bfloat16 weights, float32 moments", nadam(), jnp.bfloat16),
    Format("naive bfloat16 weights and moments, optax.nadam", optax.nadam, jnp.bfloat16),
    Format("naive 8-bit v: evenly spaced, to the nearest", evenly_spaced_v),
]


def warmup_cosine(task: Task) -> optax.Schedule:
    """A learning rate that ends at zero, so that the last losses can be compared."""
    return optax.warmup_cosine_decay_schedule(0.0, task.peak, max(1, task.steps // 10), task.steps)


def trainer(task: Task, form: Format) -> Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """From a seed to the loss of each batch, and of the two parts of the data when all is done; compiled."""
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
    """Of the weights and of the whole optimizer state, scales, counters and leaves too small to be narrow included."""
    params = _cast(task.init(jax.random.key(0)), form.weights)
    trees = params, form.make(warmup_cosine(task)).init(params)
    size = sum(x.size for x in jax.tree.leaves(params))
    weights, state = (sum(x.nbytes for x in jax.tree.leaves(tree)) / size for tree in trees)
    return weights, state


def unstable(runs: Runs, float32: Runs) -> np.ndarray:
    """Which seeds ended or went half as high again as float32, or were lost.

    The end is compared with that of the same seed. On the way, after the warm-up, the mean of a fiftieth of the run is
    compared with the highest that any seed has there in float32.
    """
    ends_well = runs.train <= TOO_HIGH * float32.train
    peaks = _stretches(float32.curves).max(axis=0)
    stays_low = (_stretches(runs.curves) <= TOO_HIGH * peaks).all(axis=1)
    return ~(ends_well & stays_low & np.isfinite(runs.held_out))


def _stretches(curves: np.ndarray) -> np.ndarray:
    """Means over fiftieths of a run, those of the warm-up left out."""
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
    """Whether the mean is within the target, and whether two standard errors could turn that."""
    mean, error = mean_and_error(values)
    met = "Met" if mean <= TARGET else "Missed"
    close = abs(mean - TARGET) <= 2 * error
    return f"- {met}{' within the noise' if close else ''}: {what}: {mean:.5f} ± {error:.5f}, target at most {TARGET}."


def row(task: Task, form: Format, runs: Runs, float32: Runs) -> list[Any]:
    """A row of the table."""
    weights, state = bytes_a_parameter(task, form)
    train, held_out = runs.train / float32.train, runs.held_out / float32.held_out
    shares = [losses(runs.train), ratios(train), losses(runs.held_out), ratios(held_out)]
    return [task.name, form.name, f"{weights:.2f} + {state:.2f}", *shares, f"{unstable(runs, float32).sum()}"]


def measured(task: Task, seeds: int) -> dict[str, Runs]:
    """The runs of every format on a task."""
    return {form.name: runs_of(task, form, seeds) for form in FORMATS}


def verdicts(task: Task, found: dict[str, Runs]) -> list[str]:
    """What became of the target, and how flat the losses are in the end."""
    float32 = found[FLOAT32.name]
    lines = [flatness(task, float32)]
    for form in OFFERED:
        train = found[form.name].train
        lines.append(verdict(f"{task.name}, {form.name}, train loss over float32", train / float32.train))
        if task.floor:
            above = (train - task.floor) / (float32.train - task.floor)
            lines.append(f"  Of what is above {task.floor:.4f}, the least there could be: {ratios(above)}.")
    return lines


def flatness(task: Task, float32: Runs) -> str:
    """How much the loss of the batches still falls."""
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
    for rate in RATES:
        runs = runs_of(task._replace(peak=rate), FLOAT32, seeds)
        print(
            f"{task.name}, learning rate {rate:g}: {losses(runs.train)}, held out {losses(runs.held_out)}", flush=True
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains everything, and writes what there is after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, twenty steps; writes nothing")
    parser.add_argument("--tune", action="store_true", help="float32 over a grid of learning rates; writes nothing")
    parser.add_argument("--seeds", type=int, help=f"other than {SEEDS}; writes nothing")
    parser.add_argument("--steps", type=int, help="other than the tasks'; writes nothing")
    options = parser.parse_args(arguments)
    seeds = options.seeds or (2 if options.quick else SEEDS)
    steps = options.steps or (20 if options.quick else None)
    short = options.seeds or steps
    table: list[list[Any]] = []
    notes: list[str] = []
    results: dict[str, dict[str, Runs]] = {}
    for make in TASKS:
        task = make()
        task = task._replace(steps=steps or task.steps)
        if options.tune:
            tune(task, seeds)
            continue
        found = results[task.name] = measured(task, seeds)
        table += [row(task, form, found[form.name], found[FLOAT32.name]) for form in FORMATS]
        notes += verdicts(task, found)
        if short:
            print(*table, *notes, sep="\n")
        else:
            note = NOTE.format(python=platform.python_version()) + "\n".join(notes)
            save("memory_quality", QUESTION, COLUMNS, table, note, packages=("scikit-learn",))
            draw(results, PICTURE)


if __name__ == "__main__":
    main()
