"""Does Nadam train better than Adam, and with which rule?

python -m benchmarks.convergence            three tasks, ten optimizers, each at a learning rate tuned for it
python -m benchmarks.convergence --quick    one task, two steps; writes nothing
"""

import functools
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
from benchmarks import _tasks
from benchmarks._report import Answer, Rows, is_quick, save
from benchmarks._tasks import Batch, Params, Task

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "convergence.png"
GRID_SIZE, TUNING_SEEDS = 6, 2
SEEDS = GRID_SIZE * TUNING_SEEDS  # so that tuning and evaluation are one compiled program
FEWER = SEEDS // 2
FIRST_TUNING_SEED = 1000
CLEAR = 3.0  # standard errors; there are many comparisons
DECAY, MOMENTUM = 0.1, 0.9
RIDGE = 1e-2  # without it the network overfits the few patients
ADAM, SGD, DEFAULT = "optax.adam", "SGD, Nesterov", "scheduled"
ADAMW, NADAMW = "optax.adamw", "nadamw, scheduled"
QUESTION = "Does Nadam train better than Adam, and with which rule?"
COLUMNS = ["task", "optimizer", "learning rate", "loss of batches, at a quarter", "at half"]
COLUMNS += ["train loss", "train loss minus Adam's", "train loss minus the default's"]
COLUMNS += ["finer grid: train loss minus Adam's", "finer grid: train loss minus the default's"]
COLUMNS += ["held-out loss", "held-out loss minus Adam's", "held-out loss minus the default's"]

Maker = Callable[[optax.Schedule], Any]

OPTIMIZERS: dict[str, Maker] = {
    DEFAULT: optax_nadam.nadam,
    "scheduled, decay 1": functools.partial(optax_nadam.nadam, momentum_decay=1.0),
    "constant": functools.partial(optax_nadam.nadam, rule="constant"),
    "simplified": functools.partial(optax_nadam.nadam, rule="simplified"),
    "dozat2016": functools.partial(optax_nadam.nadam, rule="dozat2016"),
    "optax.nadam": optax.nadam,
    ADAM: optax.adam,
    SGD: functools.partial(optax.sgd, momentum=MOMENTUM, nesterov=True),
    NADAMW: functools.partial(optax_nadam.nadamw, weight_decay=DECAY),
    ADAMW: functools.partial(optax.adamw, weight_decay=DECAY),
}


class Study(NamedTuple):
    """A task, and the learning rates to try.

    Attributes:
      task: the training task.
      lowest: the lowest learning rate of the grid, for all but SGD; each next one is twice as high.
      lowest_sgd: the same for SGD.
    """

    task: Task
    lowest: float
    lowest_sgd: float

    def grid(self, optimizer: str) -> np.ndarray:
        """The learning rates that an optimizer is tuned over."""
        return (self.lowest_sgd if optimizer == SGD else self.lowest) * 2.0 ** np.arange(GRID_SIZE)


class Runs(NamedTuple):
    """Losses of runs; the axes are optimizers and runs, and steps for the curves.

    Attributes:
      curves: the loss of each batch.
      train: the final loss on the training data.
      held_out: the final loss on the held-out data.
    """

    curves: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


Program = Callable[[np.ndarray, np.ndarray], Runs]


def studies() -> list[Study]:
    """The tasks; runs are short and batches small, so that everything takes minutes on two cores."""
    text, digits = _tasks.language_model(), _tasks.digits()
    text = text._replace(steps=200, train=_thinned(text.train), held_out=_thinned(text.held_out))
    return [
        Study(_with_batches_of(8, text), 1e-3, 16e-3),
        Study(_with_batches_of(32, digits._replace(steps=200)), 4e-3, 32e-3),
        Study(diabetes(), 8e-3, 8e-3),
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

    return Task("diabetes", 600, 1e-2, _layers, _squared_error, draw, (x, y), (x_held_out, y_held_out), 0.0)


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


def program(task: Task, optimizers: Sequence[Maker]) -> Program:
    """A function of a learning rate for each optimizer and run and a seed for each run, to losses; compiled once.

    All optimizers take a step together and their gradients are one loop: to compile each alone would take longer than
    the runs.
    """
    warmup_cosine = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, task.steps // 10), task.steps)

    def update(make: Maker, peak: jax.Array, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        updates, state = make(lambda count: peak * warmup_cosine(count)).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(peaks: jax.Array, seeds: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights, orders = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)), out_axes=1)(seeds)

        def step(carry: tuple[Params, list[Any]], index: jax.Array) -> tuple[tuple[Params, list[Any]], jax.Array]:
            params, states = carry
            batches = jax.vmap(lambda order: task.draw(jax.random.fold_in(order, index)))(orders)
            losses, grads = jax.lax.map(lambda p: jax.vmap(jax.value_and_grad(task.loss))(p, batches), params)
            new = [
                jax.vmap(functools.partial(update, make))(peaks[i], _at(grads, i), states[i], _at(params, i))
                for i, make in enumerate(optimizers)
            ]
            return (_stacked([params for params, _ in new]), [state for _, state in new]), losses

        start = jax.vmap(task.init)(weights)
        states = [jax.vmap(make(warmup_cosine).init)(start) for make in optimizers]
        carry = _stacked([start] * len(optimizers)), states
        (params, _), curves = jax.lax.scan(step, carry, jnp.arange(task.steps))
        return (
            jnp.moveaxis(curves, 0, -1),
            _each(task.loss, params, task.train),
            _each(task.loss, params, task.held_out),
        )

    compiled = jax.jit(train)
    return lambda peaks, seeds: Runs(*jax.device_get(compiled(jnp.float32(peaks), jnp.int32(seeds))))


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _each(loss: Callable[[Params, Batch], jax.Array], params: Params, part: Batch) -> jax.Array:
    """The loss of every optimizer and run, one after the other, since the data are large."""
    return jax.lax.map(lambda runs: jax.lax.map(lambda p: loss(p, part), runs), params)


def tuned(study: Study, run: Program) -> np.ndarray:
    """For each optimizer the index of the learning rate with the lowest mean train loss, on tuning seeds."""
    seeds = np.repeat(np.arange(TUNING_SEEDS) + FIRST_TUNING_SEED, GRID_SIZE)
    learning_rates = np.stack([np.tile(study.grid(name), TUNING_SEEDS) for name in OPTIMIZERS])
    losses = run(learning_rates, seeds).train.reshape(len(OPTIMIZERS), TUNING_SEEDS, GRID_SIZE).mean(axis=1)
    return np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=1)


def evaluated(study: Study, run: Program, chosen: np.ndarray) -> Runs:
    """Every optimizer at its learning rate, on seeds that it was not tuned with."""
    return run(np.repeat(learning_rates_of(study, chosen), SEEDS, axis=1), np.arange(SEEDS))


def between(study: Study, run: Program, chosen: np.ndarray) -> Runs:
    """Half of the seeds, at learning rates half a step of the grid lower and then higher."""
    shifts = np.repeat(np.sqrt([0.5, 2.0]), FEWER)
    return run(learning_rates_of(study, chosen) * shifts, np.tile(np.arange(FEWER), 2))


def learning_rates_of(study: Study, chosen: np.ndarray) -> np.ndarray:
    """The chosen learning rates, a row for each optimizer."""
    return np.array([[study.grid(name)[i]] for name, i in zip(OPTIMIZERS, chosen, strict=True)])


def refined(train: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """Train losses of half of the seeds, at the one of three learning rates with the lowest mean."""
    losses = np.stack([train[:, :FEWER], *np.split(beside, 2, axis=1)])
    means = losses.mean(axis=-1)
    best = np.argmin(np.where(np.isfinite(means), means, np.inf), axis=0)
    return losses[best, np.arange(len(train))]


def learning_rate_in_words(grid: np.ndarray, chosen: int) -> str:
    """A learning rate, marked if a better one may lie outside its grid."""
    return f"{grid[chosen]:.2g}" + ("" if 0 < chosen < len(grid) - 1 else " (edge of the grid)")


def rows(study: Study, chosen: np.ndarray, runs: Runs, beside: Runs) -> list[list[str]]:
    """The rows of the table, one for each optimizer."""
    names = list(OPTIMIZERS)
    batches = [loss_of_batches(runs.curves, fraction) for fraction in (0.25, 0.5)]
    finer = refined(runs.train, beside.train)

    def row(name: str) -> list[str]:
        i, others = names.index(name), [names.index(other) for other in compared_with(name)]
        medians = [median_and_quartiles(losses[i]) for losses in (*batches, runs.train, runs.held_out)]
        train, fine, held_out = (
            [difference(losses[i], losses[j]) for j in others] for losses in (runs.train, finer, runs.held_out)
        )
        learning_rate = learning_rate_in_words(study.grid(name), int(chosen[i]))
        return [study.task.name, name, learning_rate, *medians[:3], *train, *fine, medians[3], *held_out]

    return [row(name) for name in names]


def compared_with(name: str) -> tuple[str, str]:
    """Adam and the default rule; those with weight decay, if the optimizer has weight decay."""
    return (ADAMW, NADAMW) if name in (ADAMW, NADAMW) else (ADAM, DEFAULT)


def loss_of_batches(curves: np.ndarray, fraction: float) -> np.ndarray:
    """Mean over the tenth of the run that ends at a fraction of it."""
    steps = curves.shape[-1]
    end = max(1, round(fraction * steps))
    return curves[..., max(0, end - max(1, steps // 10)) : end].mean(axis=-1)


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


def draw(results: dict[str, Runs], path: Path) -> None:
    """The loss over the run of four optimizers, and the final loss of every run."""
    figure = Figure(figsize=(8.6, 7), layout="constrained")
    top, bottom = figure.subplots(2, len(results), squeeze=False, height_ratios=(2, 3))
    for above, below, (task, runs) in zip(top, bottom, results.items(), strict=True):
        draw_curves(above, runs)
        draw_ends(below, runs)
        above.set_title(task)
        below.set_yticks(range(len(OPTIMIZERS)), [""] * len(OPTIMIZERS))
    top[0].set_ylabel("loss of batches")
    bottom[0].set_yticklabels(OPTIMIZERS)
    figure.legend(*top[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(
        "train loss at the end, % above that of Adam on the same seed\nline: median, bar: quartiles", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_curves(axes: Any, runs: Runs) -> None:
    """Medians over the seeds of means over fiftieths of the run from the warm-up on, quartiles shaded."""
    steps = runs.curves.shape[-1]
    ends = np.linspace(0, steps, 1 + min(50, steps)).round().astype(int)[1:]
    late = ends > steps // 10
    for name, colour in zip((DEFAULT, "constant", ADAM, SGD), ("C0", "C2", "C1", "C7"), strict=True):
        parts = np.split(runs.curves[list(OPTIMIZERS).index(name)], ends[:-1], axis=-1)
        means = np.stack([part.mean(axis=-1) for part in parts], axis=-1)[:, late]
        low, middle, high = np.quantile(means, (0.25, 0.5, 0.75), axis=0)
        axes.plot(ends[late], middle, color=colour, label=name, lw=1.3)
        axes.fill_between(ends[late], low, high, color=colour, alpha=0.2, lw=0)
    axes.set_xlabel("step")
    axes.grid(alpha=0.2)


def draw_ends(axes: Any, runs: Runs) -> None:
    """A line of dots for each optimizer, a dot for each seed."""
    names = list(OPTIMIZERS)
    for place, name in enumerate(names):
        adam, _ = compared_with(name)
        excess = 100 * (runs.train[place] / runs.train[names.index(adam)] - 1)
        low, middle, high = np.quantile(excess, (0.25, 0.5, 0.75))
        axes.plot([low, high], [place, place], color="C0", alpha=0.3, lw=9, solid_capstyle="butt")
        axes.plot(excess, place + np.linspace(-0.25, 0.25, len(excess)), ".", color="C0", ms=4)
        axes.plot([middle, middle], [place - 0.35, place + 0.35], color="black", lw=1.5)
    axes.axvline(0, color="grey", lw=0.8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.2)


def note() -> str:
    """The text below the table."""
    return f"""\
{SEEDS} seeds. Each optimizer has the learning rate with the lowest mean train loss on {TUNING_SEEDS} other seeds, out
of {GRID_SIZE}, each twice the one before. It rises for a tenth of the run and falls to zero on a cosine. For a seed,
all optimizers have the same weights and batches; nothing is clipped. Losses are medians with quartiles over the seeds;
losses of batches are over the tenth of the run that ends at a quarter and at half of it. Differences are means over the
seeds, seed by seed, with their standard error; a difference of at most {CLEAR:g} standard errors is "unclear". On the
finer grid each optimizer has the best of its learning rate, that divided and that multiplied by the root of two, on the
first {FEWER} seeds. Adam is `{ADAM}` and the default `{DEFAULT}`; for the two optimizers with weight decay ({DECAY})
they are `{ADAMW}` and `{NADAMW}`. All other arguments are the defaults; the momentum of SGD is {MOMENTUM}."""


def answer(rows: Rows) -> Answer:
    """On how many tasks the default's train loss is lower than Adam's."""
    found = [row[6].rsplit(", ")[-1] for row in rows if row[1] == DEFAULT]
    return Answer(
        f"Its train loss is lower on {found.count('lower')} of {len(found)} tasks, higher on {found.count('higher')};"
        " how the rules differ depends on the task."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes and evaluates, task by task, and writes the result."""
    quick = is_quick(__doc__, "one task, two steps", arguments)
    table: list[list[str]] = []
    results: dict[str, Runs] = {}
    for study in studies()[-1:] if quick else studies():
        if quick:
            study = study._replace(task=study.task._replace(steps=2))
        run = program(study.task, list(OPTIMIZERS.values()))
        chosen = tuned(study, run)
        runs = results[study.task.name] = evaluated(study, run, chosen)
        table += rows(study, chosen, runs, between(study, run, chosen))
        print(*table[-len(OPTIMIZERS) :], sep="\n", flush=True)
    if not quick:
        save(
            "convergence", QUESTION, COLUMNS, table, note(), answer=answer, picture=PICTURE, packages=("scikit-learn",)
        )
        draw(results, PICTURE)


if __name__ == "__main__":
    main()
