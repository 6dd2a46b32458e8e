"""How do 8-bit moments and 24-bit weights compare with those of FlashOptim's port to JAX, ``flashoptim-jax``?"""

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import optax_nadam
from benchmarks import ahead_of_time as aot
from benchmarks._report import Answer, Rows, is_quick, row_of, save
from benchmarks.precision import error
from benchmarks.tracing import whole_step

EPS, DECAY = 1e-8, 1e-2
STEPS, SEEDS, SHAPE = 1000, 3, (64, 256)
MEANS, CHOSEN, WEIGHTS = (10**6 + k for k in range(3))  # beside the numbers of steps, for random keys
LEAVES: dict[str, aot.Shapes] = {
    "one of 8192 x 8192": aot.LARGE,
    "GPT-2 small": aot.GPT2,
    "1000 x 33, 4097, 3 x 3 x 5 x 7, 129 x 65": {"a": (1000, 33), "b": (4097,), "c": (3, 3, 5, 7), "d": (129, 65)},
    "100 of 768": {f"b{k}": (768,) for k in range(100)},
}
NAME, RIVAL, STATE, ERROR = "flashoptim", "flashoptim-jax", "state, bytes a parameter", "error of the weights' change"
QUESTION = "How do 8-bit moments and 24-bit weights compare with FlashOptim's?"
COLUMNS = ["what", "case", "flashoptim-jax", "optax_nadam"]
NOTE = f"""\
`flash_adamw` beside `compensated(nadamw(rule="adam", m_dtype="int8", v_dtype="int8"))`, with a weight decay of {DECAY}
and an `eps` of {EPS}; weights and gradients are bfloat16. State: moments, their scales, what completes the weights to
24 bits, counters.

Error: {STEPS} steps of a leaf of {SHAPE[0]} x {SHAPE[1]} with given gradients, the same for both, at a constant
learning rate of 1e-3. Each element's gradient is noise about a mean of its own, 0.3 standard deviations away from zero.
The reference is `optax.adamw` on float32 weights. The error is the norm of the difference over the norm of the
reference, for the change of the weights (with all their bits) over the run; the median of {SEEDS} seeds. On a
processor JAX interprets the kernel of flashoptim-jax (Pallas), with arithmetic that may round otherwise than a GPU's.

flashoptim-jax stores the square root of `v` in 255 even steps, to the nearest, of the largest in a group of 32: under a
510th of that it is zero, and where `m` is not, the next change is as large as `eps` allows. Its scales are float16,
whose smallest number is 6e-8."""
PLACES_QUESTION = "Where do 8-bit moments with 24-bit weights run, FlashOptim's and ours?"
PLACES_COLUMNS = ["where", "flashoptim-jax, its kernel", "flashoptim-jax, `fused=False`", "optax_nadam"]
PLACES_NOTE = """\
Each cell was tried, with the versions above; errors are quoted to their first sentence. `flash_adamw` beside
`compensated(nadamw(rule="adam", m_dtype="int8", v_dtype="int8"))`, bfloat16 leaves unless stated. Compiled: ahead of
time, with no such chip present, and not run. Interpreted: by JAX on the processor, which shows what the kernel
computes and not that it compiles. Errors are of the first step, relative to its length; 8-bit moments and 24-bit
weights alone make some 1e-3. Split: leaves, moments and scales, along their first axis, also our scales of columns,
which our own `init` leaves whole. In place: results that take the memory of a donated argument."""
TRAFFIC_QUESTION = "How much memory traffic has a step of FlashOptim's port to JAX, and of ours, on an H100?"
TRAFFIC_COLUMNS = ["leaves", "gradients", "optimizer", "traffic a parameter", "temporaries"]
TRAFFIC_NOTE = """\
The whole step of AdamW on bfloat16 weights, compiled ahead of time and not run; needs the group `aot`. Traffic is what
passes between the chip and its memory, if every kernel reads its operands whole, in bytes a parameter; temporaries too.
The kernel takes float32 gradients: bfloat16 ones are first written out as float32, 10 bytes in place of 2."""


class Contender(NamedTuple):
    """An optimizer as its library makes it, a step that changes params, and the weights with all their bits."""

    tx: Any
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    weights: Callable[[Any, Any], Any]  # of params and state


def ours(b2: float = 0.999, moments: Any = "int8") -> Contender:
    """8-bit AdamW with 24-bit weights, of this library."""
    inner = optax_nadam.nadamw(1e-3, b2=b2, eps=EPS, rule="adam", m_dtype=moments, v_dtype=moments, weight_decay=DECAY)
    tx = optax_nadam.compensated(inner)
    return Contender(tx, whole_step(tx, apply=True), lambda params, state: optax_nadam.master_params(state, params))


def theirs(b2: float = 0.999, fused: bool = True, **options: Any) -> Contender:
    """8-bit AdamW with 24-bit weights, of flashoptim-jax, by its kernel or without."""
    import flashoptim_jax as flash

    tx = flash.flash_adamw(1e-3, b2=b2, eps=EPS, weight_decay=DECAY, fused=fused, **options)
    return Contender(tx, tx.step, lambda params, state: flash.reconstruct_weights(params, state.ecc))


def float32(b2: float = 0.999) -> Contender:
    """AdamW of Optax, all in float32: the reference."""
    tx = optax.adamw(1e-3, b2=b2, eps=EPS, weight_decay=DECAY)
    step = whole_step(tx, apply=True)
    return Contender(tx, lambda p, state, grads: step(p, state, jax.tree.map(_wide, grads)), lambda p, state: p)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def interpreted() -> Any:
    """In this context Pallas kernels are interpreted, so that a processor runs them; theirs has no option for that."""
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    return mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def bytes_a_parameter(contender: Contender, shapes: aot.Shapes) -> float:
    """The whole state, beside bfloat16 params."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    state = jax.tree.leaves(jax.eval_shape(contender.tx.init, params))
    return sum(x.size * x.dtype.itemsize for x in state) / sum(map(math.prod, shapes.values()))


def _normal(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, SHAPE)


class Case(NamedTuple):
    """Gradients of a run: their scale, the noise from a key, a factor for each element from a key and the step; b2."""

    scale: float = 1e-2
    noise: Callable[[jax.Array], jax.Array] = _normal
    factor: Callable[[jax.Array, jax.Array], Any] = lambda key, index: 1.0
    b2: float = 0.999


def gradients(case: Case, key: jax.Array, index: jax.Array) -> jax.Array:
    """Those of a step: noise about a mean that each element keeps."""
    drawn = case.noise(jax.random.fold_in(key, index)) + 0.3 * _normal(jax.random.fold_in(key, MEANS))
    return (case.scale * (drawn * case.factor(jax.random.fold_in(key, CHOSEN), index))).astype(jnp.bfloat16)


def _sparse(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.bernoulli(jax.random.fold_in(key, index), 0.05, (SHAPE[0], 1))


def _outliers(key: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1e-3, SHAPE), 1e3, 1.0)


CASES = {
    "normal, of size 1e-2": Case(),
    "normal, 1e-5": Case(1e-5),
    "normal, 1e-8": Case(1e-8),
    "normal, 1e-2, b2 = 0.95": Case(b2=0.95),
    "normal, 1e-2, b2 = 0.9999": Case(b2=0.9999),
    "heavy-tailed": Case(noise=lambda key: jax.random.t(key, 2.0, SHAPE)),
    "decaying by 1e4": Case(factor=lambda key, index: 10 ** (-4 * index / STEPS)),
    "sparse rows": Case(factor=_sparse),
    "elements differ by powers of ten": Case(factor=lambda key, index: 10 ** _normal(key)),
    "one in 1000 is 1000 times as large": Case(factor=_outliers),
}


def runner(contender: Contender, case: Case, steps: int, dtype: DTypeLike) -> Callable[[jax.Array], jax.Array]:
    """A compiled function of a key, to the change of the weights over a run."""

    def run(key: jax.Array) -> jax.Array:
        first = (0.02 * _normal(jax.random.fold_in(key, WEIGHTS))).astype(jnp.bfloat16).astype(dtype)

        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            return contender.step(params, state, {"w": gradients(case, key, index)}), None

        params = {"w": first}
        (params, state), _ = jax.lax.scan(step, (params, contender.tx.init(params)), jnp.arange(steps))
        return contender.weights(params, state)["w"] - _wide(first)

    return jax.jit(run)


def error_rows(cases: dict[str, Case], steps: int, seeds: int) -> Iterator[list[Any]]:
    """Errors of both on given gradients."""
    keys = [jax.random.key(seed) for seed in range(seeds)]
    for name, case in cases.items():
        reference = runner(float32(case.b2), case, steps, jnp.float32)
        expected = [jax.device_get(reference(key)) for key in keys]
        found = []
        with interpreted():
            for make in (theirs, ours):
                run = runner(make(case.b2), case, steps, jnp.bfloat16)
                errors = [error(jax.device_get(run(key)), x) for key, x in zip(keys, expected, strict=True)]
                found.append(f"{np.median(errors):.2g}")
        yield [ERROR, name, *found]


def compiled(contender: Contender, shapes: aot.Shapes, mesh: Any, grads: DTypeLike = jnp.bfloat16) -> Any:
    """The executable of a step on bfloat16 params, which donates params and state; everything is split over a mesh."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    donated = (aot.laid_out(x, mesh, aot.SPLIT) for x in (params, jax.eval_shape(contender.tx.init, params)))
    given = aot.laid_out({name: jax.ShapeDtypeStruct(x.shape, grads) for name, x in params.items()}, mesh, aot.SPLIT)
    return jax.jit(contender.step, donate_argnums=(0, 1)).lower(*donated, given).compile()


MAKERS: list[Callable[[], Contender]] = [theirs, functools.partial(theirs, fused=False), ours]  # of PLACES_COLUMNS


def traffic_rows(leaves: dict[str, aot.Shapes]) -> Iterator[list[Any]]:
    """What a step compiles to for one H100."""
    mesh = aot.mesh_of("gpu", 1)
    for (name, shapes), grads in itertools.product(leaves.items(), (jnp.bfloat16, jnp.float32)):
        size = sum(map(math.prod, shapes.values()))
        for who, make in zip(PLACES_COLUMNS[1:], MAKERS, strict=True):
            program = compiled(make(), shapes, mesh, grads)
            temporaries = program.memory_analysis().temp_size_in_bytes / size
            yield [name, jnp.dtype(grads).name, who, f"{aot.traffic(program) / size:.2f}", f"{temporaries:.3f}"]


def attempt(do: Callable[[Contender], str], make: Callable[[], Contender]) -> str:
    """What a contender does in a place, or the first sentence of its error."""
    try:
        return do(make())
    except Exception as error:
        first = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        return f"{type(error).__name__}: {first}" if first else f"{type(error).__name__}, without a message"


def leaf(dtype: DTypeLike = jnp.bfloat16) -> dict[str, jax.Array]:
    """Params or gradients of one leaf that are exact in every dtype, and different along its last axis."""
    return {"w": jnp.broadcast_to(0.5 * (1 + jnp.arange(64) % 2), (64, 64)).astype(dtype)}


def as_it_is(contender: Contender, dtype: DTypeLike = jnp.bfloat16) -> str:
    """The error of the first step, relative to its length."""
    params = leaf(dtype)
    new, state = jax.jit(contender.step)(params, contender.tx.init(params), leaf(dtype))
    first, last = (np.asarray(x["w"]).astype(np.float64) for x in (params, contender.weights(new, state)))
    return f"runs, error {error(last - first, -1e-3 * (first / (np.abs(first) + EPS) + DECAY * first)):.0e}"


def by_interpreter(contender: Contender, dtype: DTypeLike = jnp.bfloat16) -> str:
    """The same, by the interpreted kernel where there is one."""
    with interpreted():
        return as_it_is(contender, dtype)


def compiled_for(target: str, chips: int, contender: Contender) -> str:
    """Collectives and results in place of the program for chips that are not here."""
    program = compiled(contender, aot.LARGE, aot.mesh_of(target, chips))
    temporaries = program.memory_analysis().temp_size_in_bytes / (math.prod(aot.LARGE["w"]) / chips)
    return (
        f"compiled, {sum(aot.collectives(program).values())} collectives, in place {aot.in_place(program)} of"
        f" {len(jax.tree.leaves(program.output_shardings))}, temporaries {temporaries:.2f} bytes a parameter"
    )


def split_here(contender: Contender) -> str:
    """A step on four virtual devices, beside the same step on one."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    whole = leaf(), contender.tx.init(leaf()), leaf()

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
    tx.update(leaf(), tx.init(leaf()), leaf())
    return "runs"


PLACES: list[tuple[str, Callable[[Contender], str]]] = [
    ("a processor", as_it_is),
    ("a processor, kernels interpreted", by_interpreter),
    ("split over 4 virtual processors, kernels interpreted", split_here),
    ("`optax.chain` after clipping", chained),
    ("float16 leaf, kernels interpreted", functools.partial(by_interpreter, dtype=jnp.float16)),
]
COMPILED_PLACES: list[tuple[str, Callable[[Contender], str]]] = [
    ("one NVIDIA H100, compiled", functools.partial(compiled_for, "gpu", 1)),
    ("split over 8 NVIDIA H100, compiled", functools.partial(compiled_for, "gpu", 8)),
    ("one TPU v5e, compiled", functools.partial(compiled_for, "tpu", 1)),
    ("split over 16 TPU v5e, compiled", functools.partial(compiled_for, "tpu", 16)),
]


def traffic_answer(rows: Rows) -> Answer:
    """The traffic of its kernel and of ours."""
    kernel, ours = ([row[3] for row in rows if row[2] == who] for who in PLACES_COLUMNS[1::2])
    return Answer(
        f"With bfloat16 gradients its kernel moves {kernel[0]} bytes a parameter, ours {ours[0]}; with float32 ones"
        f" {kernel[1]} and {ours[1]}.",
        f"{float(ours[0]) / float(kernel[0]):.2f} of its traffic",
    )


def places_answer(rows: Rows) -> Answer:
    """In how many places each runs."""
    kernel, plain, ours = (sum("Error" in row[k] or "error:" in row[k] for row in rows) for k in (1, 2, 3))
    return Answer(
        f"Of {len(rows)} settings FlashOptim's kernel fails in {kernel}, `fused=False` in {plain}, ours in {ours}."
    )


def answer(rows: Rows) -> Answer:
    """The state, and in how many cases ours is nearer to float32."""
    *_, theirs, ours = row_of(rows, STATE, "one of 8192 x 8192")
    nearer = [float(row[3]) < float(row[2]) for row in rows if row[0] == ERROR]
    return Answer(
        f"The state takes {ours} bytes a parameter, FlashOptim's {theirs}; our weights are nearer to float32 in"
        f" {sum(nearer)} of {len(nearer)} cases.",
        f"{float(ours) / float(theirs):.2f} of its bytes",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Tries both everywhere, measures on this processor, and compiles for H100 where the group ``aot`` is installed."""
    quick = is_quick(__doc__, "one case of gradients, twenty steps, small leaves", arguments)
    if importlib.util.find_spec("flashoptim_jax") is None:
        raise SystemExit("Left out: needs flashoptim-jax, pip install flashoptim-jax.")
    try:
        jax.config.update("jax_num_cpu_devices", 4)
    except RuntimeError:  # another script has started JAX, and one device is not enough to split over
        if not quick:
            raise SystemExit("Left out: must be run alone.") from None
    if aot.installed():
        aot.mesh_of("gpu", 1)  # before the processor is used, or its plugin is not registered
        shapes: dict[str, aot.Shapes] = {"64 x 64": {"w": (64, 64)}} if quick else dict([*LEAVES.items()][:2])
        rows, chips = list(traffic_rows(shapes)), aot.TARGETS["gpu"]
        about: dict[str, Any] = {"hardware": chips.hardware, "packages": (RIVAL, chips.package)}
        about |= {"answer": traffic_answer, "backend": "for-gpu", "quick": quick}
        save(NAME, TRAFFIC_QUESTION, TRAFFIC_COLUMNS, rows, TRAFFIC_NOTE, **about)
        if quick:  # the rest needs no compilers: it is as quick without them
            return
    if jax.default_backend() == "cpu":
        places = [*PLACES, *(COMPILED_PLACES if aot.installed() else [])][slice(1, 3) if quick else slice(None)]
        rows = [[name, *(attempt(do, make) for make in MAKERS)] for name, do in places]
        about = {"answer": places_answer, "backend": "places", "packages": (RIVAL,), "quick": quick}
        save(NAME, PLACES_QUESTION, PLACES_COLUMNS, rows, PLACES_NOTE, **about)
    cases = dict(itertools.islice(CASES.items(), 1 if quick else None))
    rows = [
        [STATE, name, *(f"{bytes_a_parameter(make(), shapes):.3f}" for make in (theirs, ours))]
        for name, shapes in LEAVES.items()
    ]
    rows += error_rows(cases, 20 if quick else STEPS, 1 if quick else SEEDS)
    save(NAME, QUESTION, COLUMNS, rows, NOTE, answer=answer, packages=(RIVAL,), quick=quick)


if __name__ == "__main__":
    main()
