"""Does Nadam train better than Adam once b1 is tuned too, and with which rule?

python -m benchmarks.convergence                  four tasks, three rules, learning rate and b1 tuned for each; a task
                                                  that was measured before is not measured again
python -m benchmarks.convergence --task digits    one of the tasks, again
python -m benchmarks.convergence --quick          one task, two rules, two steps; writes nothing
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

import optax_nadam
from benchmarks import _report, _tasks
from benchmarks._report import Answer, Rows, save
from benchmarks._tasks import Batch, Params, Task

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "convergence.png"
LOSSES = _report.RESULTS / "convergence"
B1 = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)
TUNING_SEEDS, SEEDS = 4, 12
TOGETHER = 4  # runs at a time
FIRST_TUNING_SEED = 1000
LINEAR = 0.01  # the picture is linear up to this difference, and then logarithmic
CLEAR = 3.0  # standard errors; there are many comparisons
RIDGE = 1e-2  # without it the network overfits the few patients
ADAM, EPS = "adam", 1e-8  # Adam is the first of the rules
QUESTION = "Does Nadam train better than Adam once b1 is tuned too, and with which rule?"
SHOWN = (0.9, 0.95, 0.98)
COLUMNS = ["task", "rule", "b1", "learning rate", "train loss", "train loss minus Adam's"]
COLUMNS += [f"the same at b1 {b1:g}" for b1 in SHOWN] + ["held-out loss", "held-out loss minus Adam's"]

Maker = Callable[[optax.Schedule, jax.Array], Any]
RULES: dict[str, Maker] = {
    ADAM: functools.partial(optax_nadam.nadam, rule="adam", eps=EPS),
    "constant": functools.partial(optax_nadam.nadam, rule="constant", eps=EPS),
    "scheduled": functools.partial(optax_nadam.nadam, eps=EPS),
}


class Study(NamedTuple):
    """A task, and the learning rates to try.

    Attributes:
      task: the training task.
      lowest: the lowest learning rate of the grid; each next one is twice as high.
      rates: how many there are.
    """

    task: Task
    lowest: float
    rates: int = 7

    @property
    def grid(self) -> np.ndarray:
        """The learning rates that each rule is tuned over, at each b1."""
        return self.lowest * 2.0 ** np.arange(self.rates)


class Losses(NamedTuple):
    """What a task has shown; the axes are rules and b1, and then learning rates or seeds.

    Attributes:
      tuning: mean train loss of the tuning seeds at each learning rate.
      train: final loss on the training data, at the best of the learning rates, on other seeds.
      held_out: final loss on the held-out data, of the same runs.
    """

    tuning: np.ndarray
    train: np.ndarray
    held_out: np.ndarray

    @property
    def learning_rates(self) -> np.ndarray:
        """The index of the learning rate for each rule and b1."""
        return np.argmin(np.where(np.isfinite(self.tuning), self.tuning, np.inf), axis=-1)

    @property
    def b1(self) -> np.ndarray:
        """The index of the b1 for each rule: by the tuning seeds; Adam's by the others, which favours Adam."""
        best = np.where(np.isfinite(self.tuning), self.tuning, np.inf).min(axis=-1)
        best[0] = self.train[0].mean(axis=-1)
        return np.argmin(best, axis=-1)

    @property
    def adam(self) -> tuple[np.ndarray, np.ndarray]:
        """Train and held-out losses of Adam at its best b1, which all others are compared with."""
        return self.train[0, self.b1[0]], self.held_out[0, self.b1[0]]


Program = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def studies() -> list[Study]:
    """The tasks; runs are short and batches small, so that all of it takes about two hours of one processor."""
    text, digits = _tasks.language_model(), _tasks.digits()
    text = _with_batches_of(8, text._replace(train=_thinned(text.train), held_out=_thinned(text.held_out)))
    long = text._replace(steps=800, name="language model, four times as long")
    return [
        Study(text._replace(steps=200), 5e-4),
        Study(long, 1e-3, 5),
        Study(_with_batches_of(32, digits._replace(steps=200)), 2e-3),
        Study(diabetes(), 4e-3),
    ]


def diabetes() -> Task:
    """A network that predicts the course of a disease; the loss is the unexplained variance, with a ridge."""
    x, y = (part.astype(np.float32) for part in load_diabetes(return_X_y=True))
    y = (y - y.mean()) / y.std()
    parts = train_test_split(x / x.std(axis=0), y, test_size=0.25, random_state=0)
    x, x_held_out, y, y_held_out = map(jnp.asarray, parts)

    def draw(key: jax.Array) -> Batch:
        drawn = jax.random.choice(key, len(x), (32,), replace=False)
        return x[drawn], y[drawn]

    return Task("diabetes", 600, _layers, _squared_error, draw, (x, y), (x_held_out, y_held_out))


def _layers(key: jax.Array) -> Params:
    sizes = (10, 16, 1)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": fan_in**-0.5 * jax.random.normal(key, (fan_in, fan_out)), "b": jnp.zeros(fan_out)}
        for key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _squared_error(params: Params, batch: Batch) -> jax.Array:
    h, y = batch
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    error = h @ params[-1]["w"] + params[-1]["b"] - y[:, None]
    return jnp.mean(error**2) + RIDGE * sum(jnp.sum(layer["w"] ** 2) for layer in params)


def _thinned(part: Batch) -> Batch:
    return part[0][::4], part[1][::4]


def _with_batches_of(size: int, task: Task) -> Task:
    def draw(key: jax.Array) -> Batch:
        x, y = task.draw(key)
        return x[:size], y[:size]

    return task._replace(draw=draw)


def program(task: Task, make: Maker) -> Program:
    """A function of a learning rate, a b1 and a seed for each run, to train and held-out losses; compiled once."""
    warmup_cosine = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, task.steps // 10), task.steps)

    def one(peak: jax.Array, b1: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, order = jax.random.split(jax.random.key(seed))
        tx = make(lambda count: peak * warmup_cosine(count), b1)

        def step(carry: tuple[Params, Any], index: jax.Array) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            grads = jax.grad(task.loss)(params, task.draw(jax.random.fold_in(order, index)))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = task.init(weights)
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(task.steps))
        return task.loss(params, task.train), task.loss(params, task.held_out)

    compiled = jax.jit(lambda *runs: jax.lax.map(lambda run: one(*run), runs, batch_size=TOGETHER))
    return lambda peaks, b1, seeds: jax.device_get(compiled(jnp.float32(peaks), jnp.float32(b1), jnp.int32(seeds)))


def measured(study: Study, rules: int | None = None) -> Losses:
    """Each rule, or the first few, at each b1: tuned on four seeds, then run on twelve others."""
    found = [of_rule(study, program(study.task, make)) for make in [*RULES.values()][:rules]]
    return Losses(*(np.stack(part) for part in zip(*found, strict=True)))


def of_rule(study: Study, run: Program) -> Losses:
    """A rule at each b1; the axes are b1, and then learning rates or seeds."""
    b1, seeds, rates = np.meshgrid(B1, FIRST_TUNING_SEED + np.arange(TUNING_SEEDS), study.grid, indexing="ij")
    train, _ = run(rates.ravel(), b1.ravel(), seeds.ravel())
    tuning = train.reshape(rates.shape).mean(axis=1)
    chosen = study.grid[Losses(tuning, tuning, tuning).learning_rates]
    train, held_out = run(np.repeat(chosen, SEEDS), np.repeat(B1, SEEDS), np.tile(np.arange(SEEDS), len(B1)))
    return Losses(tuning, train.reshape(len(B1), SEEDS), held_out.reshape(len(B1), SEEDS))


def rows(study: Study, losses: Losses) -> Rows:
    """The rows of the table, one for each rule."""
    train, held_out = losses.adam

    def row(i: int, rule: str) -> list[str]:
        best = i, losses.b1[i]
        return [
            study.task.name,
            rule,
            marked(np.array(B1), losses.b1[i]),
            marked(study.grid, losses.learning_rates[best]),
            median_and_quartiles(losses.train[best]),
            difference(losses.train[best], train),
            *(difference(losses.train[i, B1.index(b1)], train) for b1 in SHOWN),
            median_and_quartiles(losses.held_out[best]),
            difference(losses.held_out[best], held_out),
        ]

    return [row(i, rule) for i, rule in zip(range(len(losses.train)), RULES, strict=False)]


def marked(grid: np.ndarray, chosen: int) -> str:
    """A value, marked if a better one may lie outside its grid."""
    return f"{grid[chosen]:.2g}" + ("" if 0 < chosen < len(grid) - 1 else " (edge of the grid)")


def median_and_quartiles(losses: np.ndarray) -> str:
    """Over the seeds."""
    low, middle, high = np.quantile(losses, (0.25, 0.5, 0.75))
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def difference(losses: np.ndarray, others: np.ndarray) -> str:
    """Mean and standard error of the difference, seed by seed, and whether it is clear."""
    differences = losses - others
    if not differences.any():
        return ""
    mean, error = differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5
    word = "unclear" if abs(mean) <= CLEAR * error else "lower" if mean < 0 else "higher"
    return f"{mean:+.4f} ± {error:.4f}, {word}"


def draw(results: dict[str, Losses], path: Path) -> None:
    """The train loss over b1 for each rule, beside Adam's at its best b1."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for axes, (task, losses) in zip(figure.subplots(2, 2).flat, results.items(), strict=False):
        draw_curves(axes, losses)
        axes.set_title(task, fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(RULES), frameon=False)
    figure.supxlabel("b1", fontsize=10)
    figure.supylabel("train loss at the end, minus that of Adam at its best b1", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_curves(axes: Any, losses: Losses) -> None:
    """Means over the seeds of the difference, with three standard errors."""
    baseline, _ = losses.adam
    places = -np.log10(1 - np.array(B1))
    for i, (rule, colour) in enumerate(zip(RULES, ("C1", "C2", "C0"), strict=True)):
        differences = losses.train[i] - baseline
        mean, error = differences.mean(axis=-1), differences.std(axis=-1, ddof=1) / SEEDS**0.5
        axes.plot(places, mean, ".-", color=colour, label=rule, lw=1.4)
        axes.fill_between(places, mean - CLEAR * error, mean + CLEAR * error, color=colour, alpha=0.15, lw=0)
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=1.5)
    ticks = (-3 * LINEAR, -LINEAR, -LINEAR / 2, 0.0, LINEAR / 2, LINEAR, 3 * LINEAR, 10 * LINEAR, 30 * LINEAR)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(-4 * LINEAR, 100 * LINEAR)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xticks(places, [f"{b1:g}" for b1 in B1])
    axes.grid(alpha=0.2)


def note() -> str:
    """The text below the table."""
    return f"""\
Each rule has, at each of the {len(B1)} values of b1, the learning rate with the lowest mean train loss on
{TUNING_SEEDS} seeds, out of seven (the long runs: five), each twice the one before; its b1 is the one with the lowest
loss there. Losses and differences are of {SEEDS} other seeds: medians with quartiles, and means, seed by seed, with
their standard error; a difference of at most {CLEAR:g} standard errors is "unclear". Adam is `rule="adam"`. Its b1 is
the best on the {SEEDS} seeds themselves, which favours it. "At b1 0.9": with the learning rate tuned for that b1. For a
seed all runs have the same weights and batches. The learning rate rises for a tenth of the run and falls to zero on a
cosine; eps is {EPS:g} and b2 .999; nothing is clipped. The band in the picture is three standard errors."""


def answer(rows: Rows) -> Answer:
    """On how many tasks each rule's train loss is lower than Adam's."""
    found = {rule: [row[5].rsplit(", ")[-1] for row in rows if row[1] == rule] for rule in RULES if rule != ADAM}
    counts = "; ".join(f"`{rule}` {words.count('lower')}" for rule, words in found.items())
    return Answer(f"Train loss clearly below Adam's, of {len(next(iter(found.values())))} tasks: {counts}.")


def stored(task: str) -> Path:
    """Where the losses of a task are."""
    return LOSSES / f"{task.replace(', ', '-').replace(' ', '-')}.json"


def loaded(task: str) -> Losses:
    """The losses that were measured before."""
    return Losses(*(np.array(part) for part in json.loads(stored(task).read_text()).values()))


def store(task: str, losses: Losses) -> None:
    """Writes the losses of a task, in the five decimals that differences need."""
    LOSSES.mkdir(parents=True, exist_ok=True)
    parts = {name: np.round(part.astype(float), 5).tolist() for name, part in losses._asdict().items()}
    stored(task).write_text(json.dumps(parts) + "\n")


def report() -> None:
    """Writes the table and the picture of the tasks so far."""
    found = [(study, loaded(study.task.name)) for study in studies() if stored(study.task.name).exists()]
    table = [row for study, losses in found for row in rows(study, losses)]
    save("convergence", QUESTION, COLUMNS, table, note(), answer=answer, picture=PICTURE, packages=("scikit-learn",))
    draw({study.task.name: losses for study, losses in found}, PICTURE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes and evaluates, task by task, and writes the result."""
    parser = _report.parser(__doc__, "one task, two rules, two steps")
    parser.add_argument("--task", choices=[study.task.name for study in studies()], help="one of the tasks, again")
    options = parser.parse_args(arguments)
    if options.quick:
        study = studies()[-1]
        study = study._replace(task=study.task._replace(steps=2), rates=3)  # as many runs as seeds: one program
        print(*rows(study, measured(study, 2)), sep="\n", flush=True)
        return
    for study in studies():
        name = study.task.name
        if name == options.task or (options.task is None and not stored(name).exists()):
            store(name, measured(study))
            report()


if __name__ == "__main__":
    main()
