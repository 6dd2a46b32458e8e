"""How do 8-bit moments and 24-bit weights compare with those of FlashOptim's port to JAX?

Needs ``flashoptim-jax``, whose kernel runs on an NVIDIA GPU only. Where there is one, it is timed beside ours, and its
errors are those of the kernel; on a processor it is interpreted and, with the extra ``aot``, compiled for NVIDIA H100.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import optax_nadam
from benchmarks import _tasks
from benchmarks import ahead_of_time as aot
from benchmarks._report import Answer, Rows, interleaved, is_quick, milliseconds, row_of, save
from benchmarks._rivals import in_a_loop
from benchmarks.memory_quality import mean_and_error, warmup_cosine
from benchmarks.step_time import LOOP
from benchmarks.tracing import whole_step

EPS, DECAY = 1e-8, 1e-2
STEPS, SEEDS, SHAPE = 1000, 3, (64, 256)
MEANS, CHOSEN, WEIGHTS = (10**6 + k for k in range(3))  # beside the numbers of steps, for random keys
ODD: aot.Shapes = {"a": (1000, 33), "b": (4097,), "c": (3, 3, 5, 7), "d": (129, 65)}
SMALL: aot.Shapes = {f"b{k}": (768,) for k in range(100)}
LEAVES = {
    "one of 8192 x 8192": aot.LARGE,
    "GPT-2 small": aot.GPT2,
    "1000 x 33, 4097, 3 x 3 x 5 x 7, 129 x 65": ODD,
    "100 of 768": SMALL,
}
COMPILED_LEAVES = dict(itertools.islice(LEAVES.items(), 2))
TIMED_LEAVES = {name: LEAVES[name] for name in (*COMPILED_LEAVES, "100 of 768")}
NAME, RIVAL = "flashoptim", "flashoptim-jax"
MISSING = "Left out: needs flashoptim-jax, pip install flashoptim-jax."
QUESTION = "How do 8-bit moments and 24-bit weights compare with FlashOptim's?"
COLUMNS = ["what", "case", "flashoptim-jax", "optax_nadam"]
NOTE = f"""\
`flash_adamw` beside `compensated(nadamw(rule="adam", m_dtype="int8", v_dtype="int8"))`, with a weight decay of {DECAY}
and an `eps` of {EPS}; weights and gradients are bfloat16, unless stated. State: moments, their scales, what completes
the weights to 24 bits, counters.

Error: {STEPS} steps of a leaf of {SHAPE[0]} x {SHAPE[1]} with given gradients, the same for both, at a constant
learning rate of 1e-3. Each element's gradient is noise about a mean of its own, 0.3 standard deviations away from zero.
The reference is `optax.adamw` on float32 weights. Shown is the norm of the difference over the norm of the reference,
for the change of the weights (with all their bits) over the run, for `m` and for `v`; and the median over elements of
the relative error of `v`. All are medians of {SEEDS} seeds.

{{here}}

flashoptim-jax stores the square root of `v` in 255 even steps, to the nearest, of the largest in a group of 32: under a
510th of that it is zero, and where `m` is not, the next change is as large as `eps` allows. Its scales are float16,
whose smallest number is 6e-8."""
INTERPRETED = """\
Their kernel is interpreted by JAX (Pallas), whose arithmetic may round otherwise than a GPU's.

Training: the mean ratio of the final train loss to that of `optax.adamw` in float32 with the same seed, with its
standard error, and the largest of the seeds, on the tasks of `memory_quality`; in brackets, `optax_nadam` in float32:
the same formula with other rounding errors. The largest change is over all weights, steps and seeds, in units of the
highest learning rate; in brackets, that of `optax.adamw`."""
BY_THE_KERNEL = f"""\
A step: {LOOP} of them are one program, the time is that of one, of optimizer and weights alone; both take turns."""
PLACES_QUESTION = "Where do 8-bit moments with 24-bit weights run, FlashOptim's and ours?"
PLACES_COLUMNS = ["where", "flashoptim-jax, its kernel", "flashoptim-jax, `fused=False`", "optax_nadam"]
PLACES_NOTE = """\
Each cell was tried, with the versions above; errors are quoted to their first sentence. `flash_adamw` beside
`compensated(nadamw(rule="adam", m_dtype="int8", v_dtype="int8"))`, bfloat16 leaves unless stated. Compiled: ahead of
time, with no such chip present, and not run. Interpreted: by JAX on the processor, which shows what the kernel
computes and not that it compiles; the `TypeError` under "split" is of the interpreter. Errors are of the first step,
relative to its length; 8-bit moments and 24-bit weights alone make some 1e-3; of a complex leaf, flashoptim-jax drops
the imaginary part. Split: leaves, moments and scales, along their first axis. In place: results that take the memory of
a donated argument."""
TRAFFIC_QUESTION = "How much memory traffic has a step of FlashOptim's port to JAX, and of ours, on an H100?"
TRAFFIC_COLUMNS = ["leaves", "gradients", "optimizer", "traffic a parameter", "temporaries", "kernels", "in place"]
TRAFFIC_NOTE = """\
The whole step of AdamW on bfloat16 weights, compiled ahead of time and not run; needs the extra `aot`. Traffic is what
passes between the chip and its memory, if every kernel reads its operands whole, in bytes a parameter; temporaries too.
The kernel takes float32 gradients: bfloat16 ones are first written out as float32, 10 bytes in place of 2."""

Grads = Callable[[jax.Array, jax.Array], jax.Array]


class Contender(NamedTuple):
    """An optimizer that changes params itself.

    Attributes:
      tx: as its library makes it.
      step: new params and state from params, state and gradients.
      weights: the weights with all their bits, from params and state.
      moments: ``m`` and ``v`` as float32, from a state.
    """

    tx: Any
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    weights: Callable[[Any, Any], Any]
    moments: Callable[[Any], tuple[Any, Any]]


def ours(
    learning_rate: optax.ScalarOrSchedule = 1e-3, b2: float = 0.999, m_dtype: Any = "int8", v_dtype: Any = "int8"
) -> Contender:
    """8-bit AdamW with 24-bit weights, of this library."""
    inner = optax_nadam.nadamw(
        learning_rate, b2=b2, eps=EPS, rule="adam", m_dtype=m_dtype, v_dtype=v_dtype, weight_decay=DECAY
    )
    tx = optax_nadam.compensated(inner)

    def moments(state: Any) -> tuple[Any, Any]:
        whole = optax_nadam.get_state(optax_nadam.convert_moments(state, m_dtype=None, v_dtype=None))
        return whole.m, whole.v

    return Contender(tx, whole_step(tx, apply=True), lambda p, state: optax_nadam.master_params(state, p), moments)


def theirs(
    learning_rate: optax.ScalarOrSchedule = 1e-3, b2: float = 0.999, fused: bool = True, **options: Any
) -> Contender:
    """8-bit AdamW with 24-bit weights, of flashoptim-jax, by its kernel or without."""
    import flashoptim_jax as flash

    tx = flash.flash_adamw(learning_rate, b2=b2, eps=EPS, weight_decay=DECAY, fused=fused, **options)

    def moments(state: Any) -> tuple[Any, Any]:
        def whole(decode: Any, tree: Any) -> Any:
            return jax.tree.map(decode, tree, is_leaf=lambda x: isinstance(x, flash.QuantizedArray))

        return whole(flash.dequantize_momentum, state.mu), whole(flash.dequantize_variance, state.nu)

    return Contender(tx, tx.step, lambda p, state: flash.reconstruct_weights(p, state.ecc), moments)


def float32(learning_rate: optax.ScalarOrSchedule = 1e-3, b2: float = 0.999) -> Contender:
    """AdamW of Optax, all in float32: the reference."""
    return _in_float32(optax.adamw(learning_rate, b2=b2, eps=EPS, weight_decay=DECAY), ("mu", "nu"))


def other_roundings(learning_rate: optax.ScalarOrSchedule = 1e-3, b2: float = 0.999) -> Contender:
    """The same formula as the reference, computed otherwise."""
    return _in_float32(optax_nadam.nadamw(learning_rate, b2=b2, eps=EPS, rule="adam", weight_decay=DECAY), ("m", "v"))


def _in_float32(tx: Any, moments: tuple[str, str]) -> Contender:
    step = whole_step(tx, apply=True)

    def wide_step(params: Any, state: Any, grads: Any) -> Any:
        return step(params, state, jax.tree.map(_wide, grads))

    def found(state: Any) -> Any:
        return tuple(optax.tree.get(state, name) for name in moments)

    return Contender(tx, wide_step, lambda params, _: params, found)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def on_gpu() -> bool:
    """Whether their kernel can run."""
    return jax.default_backend() == "gpu"


def interpreted() -> Any:
    """In this context Pallas kernels are interpreted, so that a processor runs them; theirs has no option for that."""
    if on_gpu():
        return contextlib.nullcontext()
    return mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def bytes_a_parameter(contender: Contender, shapes: aot.Shapes) -> float:
    """The whole state, beside bfloat16 params."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    state = jax.tree.leaves(jax.eval_shape(contender.tx.init, params))
    return sum(x.size * x.dtype.itemsize for x in state) / sum(map(math.prod, shapes.values()))


def noise(key: jax.Array, index: jax.Array) -> jax.Array:
    """Gradients of one step: normal, about a mean that each element keeps."""
    return _normal(jax.random.fold_in(key, index)) + 0.3 * _normal(jax.random.fold_in(key, MEANS))


def heavy_tailed(key: jax.Array, index: jax.Array) -> jax.Array:
    """The same, with Student's t distribution of two degrees of freedom for the noise."""
    drawn = jax.random.t(jax.random.fold_in(key, index), 2.0, SHAPE)
    return drawn + 0.3 * _normal(jax.random.fold_in(key, MEANS))


def powers_of_ten(key: jax.Array, index: jax.Array) -> jax.Array:
    """Elements whose gradients differ by powers of ten."""
    return noise(key, index) * 10 ** _normal(jax.random.fold_in(key, CHOSEN))


def outliers(key: jax.Array, index: jax.Array) -> jax.Array:
    """One element in a thousand has gradients a thousand times as large."""
    chosen = jax.random.bernoulli(jax.random.fold_in(key, CHOSEN), 1e-3, SHAPE)
    return noise(key, index) * jnp.where(chosen, 1e3, 1.0)


def sparse(key: jax.Array, index: jax.Array) -> jax.Array:
    """Rows that have a gradient in one step of twenty, as those of an embedding."""
    chosen = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, CHOSEN), index), 0.05, (SHAPE[0], 1))
    return noise(key, index) * chosen


def decaying(key: jax.Array, index: jax.Array) -> jax.Array:
    """Gradients that shrink by a factor of 10^4 over the run."""
    return noise(key, index) * 10 ** (-4 * index / STEPS)


def _normal(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, SHAPE)


class Case(NamedTuple):
    """Gradients, as a function of a key and the step; a factor for all of them; b2."""

    grads: Grads
    scale: float = 1e-2
    b2: float = 0.999


CASES = {
    "normal, of size 1e-2": Case(noise),
    "normal, 1e-5": Case(noise, 1e-5),
    "normal, 1e-8": Case(noise, 1e-8),
    "normal, 1e-2, b2 = 0.95": Case(noise, b2=0.95),
    "normal, 1e-2, b2 = 0.9999": Case(noise, b2=0.9999),
    "heavy-tailed": Case(heavy_tailed),
    "decaying by 1e4": Case(decaying),
    "sparse rows": Case(sparse),
    "elements differ by powers of ten": Case(powers_of_ten),
    "one in 1000 is 1000 times as large": Case(outliers),
}


class Run(NamedTuple):
    """What a run has come to: the change of the weights, and the moments."""

    change: Any
    m: Any
    v: Any


def runner(contender: Contender, case: Case, steps: int, dtype: DTypeLike) -> Callable[[jax.Array], Run]:
    """A compiled function of a key, to the end of a run."""

    def run(key: jax.Array) -> Run:
        first = (0.02 * _normal(jax.random.fold_in(key, WEIGHTS))).astype(jnp.bfloat16).astype(dtype)

        def step(carry: Any, index: jax.Array) -> Any:
            grads = (case.scale * case.grads(key, index)).astype(jnp.bfloat16)
            params, state = carry
            return contender.step(params, state, {"w": grads}), None

        params = {"w": first}
        (params, state), _ = jax.lax.scan(step, (params, contender.tx.init(params)), jnp.arange(steps))
        m, v = contender.moments(state)
        return Run(contender.weights(params, state)["w"] - _wide(first), m["w"], v["w"])

    return jax.jit(run)


def errors_of(got: Run, expected: Run) -> list[float]:
    """Relative errors of the weights' change, of m and v, and of the median element of v."""
    norms = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, expected, strict=True)]
    return [*norms, float(np.median(np.abs(got.v - expected.v) / expected.v))]


WHATS = ("error of the weights' change", "error of m", "error of v", "error of v, median element")


def error_rows(cases: dict[str, Case], steps: int, seeds: int) -> Iterator[list[Any]]:
    """Errors of both on given gradients, four rows a case."""
    for name, case in cases.items():
        reference = runner(float32(b2=case.b2), case, steps, jnp.float32)
        expected = [jax.device_get(reference(jax.random.key(seed))) for seed in range(seeds)]
        found = []
        with interpreted():
            for make in (theirs, ours):
                run = runner(make(b2=case.b2), case, steps, jnp.bfloat16)
                got = [jax.device_get(run(jax.random.key(seed))) for seed in range(seeds)]
                found.append(np.median([errors_of(*pair) for pair in zip(got, expected, strict=True)], axis=0))
        yield from ([what, name, *(f"{x:.2g}" for x in pair)] for what, *pair in zip(WHATS, *found, strict=True))


def trained(task: _tasks.Task, contender: Contender, dtype: DTypeLike, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The final train loss of each seed, and the largest change of a weight in a step, over the peak rate."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return task.loss(jax.tree.map(_wide, params), batch)

    def train(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, order = jax.random.split(jax.random.key(seed))

        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params, task.draw(jax.random.fold_in(order, index)))
            new = contender.step(params, state, grads)
            before, after = (jax.tree.leaves(contender.weights(*x)) for x in (carry, new))
            return new, functools.reduce(jnp.maximum, map(_largest_change, before, after))

        params = jax.tree.map(lambda x: x.astype(dtype), task.init(first))
        (params, state), changes = jax.lax.scan(step, (params, contender.tx.init(params)), jnp.arange(task.steps))
        return loss(contender.weights(params, state), task.train), jnp.max(changes) / task.peak

    with interpreted():
        program: Any = jax.jit(train).lower(jnp.int32(0)).compile()
    losses, changes = zip(*(jax.device_get(program(jnp.int32(seed))) for seed in range(seeds)), strict=True)
    return np.array(losses), np.array(changes)


def _largest_change(before: jax.Array, after: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(after - before))


def ratios(values: np.ndarray) -> str:
    """Mean with its standard error and the largest, of those that are finite."""
    finite = values[np.isfinite(values)]
    mean, error = mean_and_error(finite)
    lost = f"; {len(values) - len(finite)} not finite" if len(finite) < len(values) else ""
    return f"{mean:.4f} ± {error:.4f}, at most {finite.max():.4f}{lost}"


class Training(NamedTuple):
    """A task, b2 and the number of seeds."""

    task: Callable[[], _tasks.Task]
    b2: float
    seeds: int


def training_rows(trainings: Sequence[Training], steps: int | None) -> Iterator[list[Any]]:
    """Losses and changes of weights on real data, two rows for each."""
    for make_task, b2, seeds in trainings:
        task = make_task()
        task = task._replace(steps=steps or task.steps)
        schedule = warmup_cosine(task)
        reference, other = (
            trained(task, make(schedule, b2), jnp.float32, seeds) for make in (float32, other_roundings)
        )
        found = [trained(task, make(schedule, b2), jnp.bfloat16, seeds) for make in (theirs, ours)]
        losses = [ratios(loss / reference[0]) for loss, _ in (*found, other)]
        changes = [f"{change.max():.3g}" for _, change in (*found, reference)]
        case = f"{task.name}, b2 = {b2}, {seeds} seeds"
        yield ["train loss over float32's", case, losses[0], f"{losses[1]} ({losses[2]})"]
        yield ["largest change of a weight in a step", case, changes[0], f"{changes[1]} ({changes[2]})"]


LANGUAGE_MODEL = functools.partial(_tasks.language_model, jax.nn.gelu)
TRAININGS = (Training(_tasks.digits, 0.999, 10), Training(_tasks.digits, 0.95, 10), Training(LANGUAGE_MODEL, 0.999, 3))


def looped(contender: Contender, shapes: aot.Shapes, grads_dtype: DTypeLike) -> Callable[[], Any]:
    """A call that takes a loop of steps on bfloat16 weights, from where the last one ended."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = {
        name: jax.random.normal(key, shape).astype(grads_dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params = jax.tree.map(lambda g: 0.02 * g.astype(jnp.bfloat16), grads)
    carry = [params, contender.tx.init(params)]  # under jit, theirs is folded at compile time, in seconds
    steps = jax.jit(in_a_loop(contender.step), donate_argnums=(0, 1))
    scales = jnp.ones(LOOP, grads_dtype)

    def call() -> Any:
        carry[:] = steps(*carry, grads, scales)
        return jax.block_until_ready(carry)

    return call


def time_rows(leaves: dict[str, aot.Shapes], repeats: int) -> Iterator[list[Any]]:
    """The time of a step of both, by leaves and dtype of the gradients."""
    for (name, shapes), dtype in itertools.product(leaves.items(), (jnp.bfloat16, jnp.float32)):
        calls = {who: looped(MAKERS[who](), shapes, dtype) for who in (KERNEL, OURS)}
        seconds = interleaved(calls, repeats)
        times = (milliseconds([x / LOOP for x in seconds[who]]) for who in (KERNEL, OURS))
        yield ["a step", f"{name}, {jnp.dtype(dtype).name} gradients", *times]


def measured(quick: bool) -> Iterator[Rows]:
    """Parts of the table: bytes, and times where their kernel runs; errors; losses where it does not."""
    sizes: Rows = [
        ["state, bytes a parameter", name, *(f"{bytes_a_parameter(make(), shapes):.3f}" for make in (theirs, ours))]
        for name, shapes in LEAVES.items()
    ]
    timed = {"100 of 768": SMALL} if quick else TIMED_LEAVES
    yield [*sizes, *(time_rows(timed, 3 if quick else 21) if on_gpu() else [])]
    cases = dict(itertools.islice(CASES.items(), 1 if quick else None))
    yield list(error_rows(cases, 20 if quick else STEPS, 1 if quick else SEEDS))
    if not on_gpu():
        trainings = [Training(_tasks.digits, 0.999, 2)] if quick else TRAININGS
        yield list(training_rows(trainings, 10 if quick else None))


def compiled(
    contender: Contender, shapes: aot.Shapes, mesh: Any, grads: DTypeLike = jnp.bfloat16, vmapped: bool = False
) -> Any:
    """The executable of a step on bfloat16 params, which donates params and state; everything is split over a mesh."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    init, step = (jax.vmap(x) if vmapped else x for x in (contender.tx.init, contender.step))
    donated = (aot.laid_out(x, mesh, aot.SPLIT) for x in (params, jax.eval_shape(init, params)))
    given = {name: jax.ShapeDtypeStruct(shape, grads) for name, shape in shapes.items()}
    return jax.jit(step, donate_argnums=(0, 1)).lower(*donated, aot.laid_out(given, mesh, aot.SPLIT)).compile()


KERNEL, PLAIN, OURS = PLACES_COLUMNS[1:]
Makers = Mapping[str, Callable[[], Contender]]
MAKERS: dict[str, Callable[[], Contender]] = {KERNEL: theirs, PLAIN: functools.partial(theirs, fused=False), OURS: ours}
WITHOUT_BITS: Makers = MAKERS | {
    KERNEL: functools.partial(theirs, master_weight_bits=None),
    PLAIN: functools.partial(theirs, fused=False, master_weight_bits=None),
}
NOT_QUANTIZED: Makers = {
    KERNEL: functools.partial(theirs, quantize=False, master_weight_bits=None),
    PLAIN: functools.partial(theirs, fused=False, quantize=False, master_weight_bits=None),
    OURS: functools.partial(ours, m_dtype=None, v_dtype=None),
}


def traffic_rows(leaves: dict[str, aot.Shapes]) -> Iterator[list[Any]]:
    """What a step compiles to for one H100."""
    mesh = aot.mesh_of("gpu", 1)
    for (name, shapes), grads in itertools.product(leaves.items(), (jnp.bfloat16, jnp.float32)):
        size = sum(map(math.prod, shapes.values()))
        for who, make in MAKERS.items():
            program = compiled(make(), shapes, mesh, grads)
            yield [
                name,
                jnp.dtype(grads).name,
                who,
                f"{aot.traffic(program) / size:.2f}",
                f"{program.memory_analysis().temp_size_in_bytes / size:.3f}",
                ", ".join(f"{count} {kind}" for kind, count in sorted(aot.kernels(program).items())),
                _in_place(program),
            ]


def _in_place(program: Any) -> str:
    return f"{aot.in_place(program)} of {len(jax.tree.leaves(program.output_shardings))}"


class Place(NamedTuple):
    """What to do with a contender, and how each is made."""

    do: Callable[[Contender], str]
    makers: Makers = MAKERS


def attempt(place: Place, who: str) -> str:
    """What a contender does in a place, or the first sentence of its error."""
    try:
        return place.do(place.makers[who]())
    except Exception as error:
        first = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        return f"{type(error).__name__}: {first}" if first else f"{type(error).__name__}, without a message"


def leaf(dtype: DTypeLike, shape: tuple[int, ...] = (64, 64)) -> dict[str, jax.Array]:
    """Params or gradients of one leaf that are exact in every dtype, and different along its last axis."""
    unit = 0.5 + 0.5j if jnp.issubdtype(dtype, jnp.complexfloating) else 0.5
    return {"w": jnp.broadcast_to(unit * (1 + jnp.arange(shape[-1]) % 2), shape).astype(dtype)}


def on_this_processor(contender: Contender, dtype: DTypeLike = jnp.bfloat16) -> str:
    """The error of the first step, relative to its length."""
    params = leaf(dtype)
    new, state = jax.jit(contender.step)(params, contender.tx.init(params), leaf(dtype))
    first, got = (np.asarray(x["w"]).astype(np.complex128) for x in (params, contender.weights(new, state)))
    expected = first - 1e-3 * (first / (np.abs(first) + EPS) + DECAY * first)
    return f"runs, error {np.linalg.norm(got - expected) / np.linalg.norm(expected - first):.0e}"


def interpreted_here(contender: Contender, dtype: DTypeLike = jnp.bfloat16) -> str:
    """The same, by the interpreted kernel where there is one."""
    with interpreted():
        return on_this_processor(contender, dtype)


def in_double_precision(contender: Contender) -> str:
    """A step of a float64 leaf."""
    with jax.enable_x64(True):
        return interpreted_here(contender, jnp.float64)


def compiled_for(target: str, chips: int, contender: Contender, vmapped: bool = False) -> str:
    """Collectives and results in place of the program for chips that are not here."""
    shapes: aot.Shapes = {"w": (16, 64, 64)} if vmapped else aot.LARGE
    program = compiled(contender, shapes, aot.mesh_of(target, chips), vmapped=vmapped)
    size = math.prod(next(iter(shapes.values()))) / (1 if vmapped else chips)
    return (
        f"compiled, {sum(aot.collectives(program).values())} collectives, in place {_in_place(program)},"
        f" temporaries {program.memory_analysis().temp_size_in_bytes / size:.2f} bytes a parameter"
    )


def split_here(contender: Contender) -> str:
    """A step on four virtual devices, beside the same step on one."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    whole = leaf(jnp.bfloat16), contender.tx.init(leaf(jnp.bfloat16)), leaf(jnp.bfloat16)

    def place(x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, aot.SPLIT if x.ndim else PartitionSpec()))

    with interpreted():
        program = jax.jit(contender.step).lower(*jax.tree.map(place, whole)).compile()
        results = program(*jax.tree.map(place, whole)), jax.jit(contender.step)(*whole)
    same = all(bool(jnp.array_equal(jax.device_get(x), y)) for x, y in zip(*map(jax.tree.leaves, results), strict=True))
    return f"{'same' if same else 'other'} bits, {sum(aot.collectives(program).values())} collectives"


def chained(contender: Contender) -> str:
    """A step of a chain that clips the gradients first."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), contender.tx)
    params = leaf(jnp.bfloat16)
    tx.update(leaf(jnp.bfloat16), tx.init(params), params)
    return "runs"


def vmapped_here(contender: Contender) -> str:
    """A step of three models, beside the step of each."""
    many = leaf(jnp.bfloat16, (3, 64, 64))
    with interpreted():
        together, _ = jax.jit(jax.vmap(contender.step))(many, jax.vmap(contender.tx.init)(many), many)
        one = leaf(jnp.bfloat16)
        alone, _ = jax.jit(contender.step)(one, contender.tx.init(one), one)
    same = bool(jnp.all(together["w"] == alone["w"]))
    return f"runs, {'same' if same else 'other'} bits as alone"


PLACES = {
    "a processor": Place(on_this_processor),
    "a processor, kernels interpreted": Place(interpreted_here),
    "split over 4 virtual processors, kernels interpreted": Place(split_here),
    "`optax.chain` after clipping": Place(chained),
    "`jax.vmap` over three models, kernels interpreted": Place(vmapped_here),
    "float16 leaf, kernels interpreted": Place(functools.partial(interpreted_here, dtype=jnp.float16)),
    "float32 leaf, kernels interpreted": Place(functools.partial(interpreted_here, dtype=jnp.float32)),
    "the same, `master_weight_bits=None`": Place(functools.partial(interpreted_here, dtype=jnp.float32), WITHOUT_BITS),
    "complex64 leaf, `master_weight_bits=None`, kernels interpreted": Place(
        functools.partial(interpreted_here, dtype=jnp.complex64), WITHOUT_BITS
    ),
    "float64 leaf, the same": Place(in_double_precision, WITHOUT_BITS),
    "float64 leaf, the same, moments not quantized": Place(in_double_precision, NOT_QUANTIZED),
}
COMPILED_PLACES = {
    "one NVIDIA H100, compiled": Place(functools.partial(compiled_for, "gpu", 1)),
    "split over 8 NVIDIA H100, compiled": Place(functools.partial(compiled_for, "gpu", 8)),
    "`jax.vmap` over 16 models, NVIDIA H100, compiled": Place(functools.partial(compiled_for, "gpu", 1, vmapped=True)),
    "one TPU v5e, compiled": Place(functools.partial(compiled_for, "tpu", 1)),
    "split over 16 TPU v5e, compiled": Place(functools.partial(compiled_for, "tpu", 16)),
}


def place_rows(places: dict[str, Place]) -> Iterator[list[Any]]:
    """Every contender in every place."""
    for name, place in places.items():
        yield [name, *(attempt(place, who) for who in MAKERS)]


def traffic_answer(rows: Rows) -> Answer:
    """The traffic with bfloat16 gradients, as its kernel takes them and as ours."""
    theirs, ours = (next(row for row in rows if row[1] == "bfloat16" and row[2].startswith(x)) for x in (NAME, "optax"))
    return Answer(
        f"With bfloat16 gradients its kernel moves {theirs[3]} bytes a parameter, ours {ours[3]}; with float32 ones its"
        " is less.",
        f"{float(ours[3]) / float(theirs[3]):.2f} of its traffic",
    )


def places_answer(rows: Rows) -> Answer:
    """In how many places each runs."""
    without = [sum("Error" in row[k] or "error:" in row[k] for row in rows) for k in (1, 2, 3)]
    return Answer(
        f"Of {len(rows)} places its kernel fails in {without[0]}, its plain form in {without[1]}, ours in {without[2]}."
    )


def answer(rows: Rows) -> Answer:
    """The state, and in how many cases ours is nearer to float32."""
    state = row_of(rows, "state, bytes a parameter", "one of 8192 x 8192")
    errors = [row for row in rows if row[0] == "error of the weights' change"]
    smaller = sum(float(row[3]) < float(row[2]) for row in errors)
    return Answer(
        f"The state takes {state[3]} bytes a parameter for its {state[2]}; the weights are nearer to float32 in"
        f" {smaller} of {len(errors)} cases.",
        f"{float(state[3]) / float(state[2]):.2f} of its bytes",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Tries both everywhere, measures on this processor, and compiles for H100 where the extra ``aot`` is installed."""
    quick = is_quick(__doc__, "one case of gradients, twenty steps, small leaves", arguments)
    if importlib.util.find_spec("flashoptim_jax") is None:
        raise SystemExit(MISSING)
    with contextlib.suppress(RuntimeError):  # where another script has started JAX already
        jax.config.update("jax_num_cpu_devices", 4)
    if aot.installed():
        aot.mesh_of("gpu", 1)  # before the processor is used, or its plugin is not registered
        leaves: dict[str, aot.Shapes] = {"64 x 64": {"w": (64, 64)}} if quick else COMPILED_LEAVES
        chips = aot.TARGETS["gpu"]
        about: dict[str, Any] = {"hardware": chips.hardware, "packages": (RIVAL, chips.package)}
        rows = list(traffic_rows(leaves))
        about |= {"answer": traffic_answer, "backend": "for-gpu", "quick": quick}
        save(NAME, TRAFFIC_QUESTION, TRAFFIC_COLUMNS, rows, TRAFFIC_NOTE, **about)
        if quick:  # the rest needs no compilers: it is as quick without them
            return
    if not on_gpu():  # the places are seen from a processor
        try_places(quick)
    about = {"answer": answer, "packages": (RIVAL, "scikit-learn"), "quick": quick}
    note = NOTE.format(here=BY_THE_KERNEL if on_gpu() else INTERPRETED)
    rows = []
    for some in measured(quick):  # the result is written after each, so that a run that is cut short leaves what it has
        rows += some
        save(NAME, QUESTION, COLUMNS, rows, note, **about)


def try_places(quick: bool) -> None:
    """Writes where each runs."""
    places = PLACES | (COMPILED_PLACES if aot.installed() and not quick else {})
    rows = list(itertools.islice(place_rows(places), 3 if quick else None))
    about: dict[str, Any] = {"answer": places_answer, "backend": "places", "packages": (RIVAL,), "quick": quick}
    save(NAME, PLACES_QUESTION, PLACES_COLUMNS, rows, PLACES_NOTE, **about)


if __name__ == "__main__":
    main()
