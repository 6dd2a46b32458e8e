"""What does a step move and need where the optimizer state is in host memory? Compiled ahead of time, not run."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

import optax_nadam
from benchmarks import ahead_of_time as aot
from benchmarks._report import Answer, Rows, is_quick, row_of
from benchmarks.ahead_of_time import GPT2, LARGE, SPLIT, TARGETS, Shapes

Step = Callable[[Any, Any, Any], tuple[Any, Any]]

COLUMNS = ["moments", "weights and gradients", "arrays", "chips", "state moves", "to the chip", "to the host"]
COLUMNS += ["traffic", "temporaries", "temporaries, GB"]
NOTE = """\
Compiled ahead of time, not run; needs the group `aot`. All but the last column are bytes a parameter, of one chip. The
whole step of `nadamw`: the program copies the state from host memory (`pinned_host`) and copies the new one back;
params and state are donated. Traffic is what passes between the chip and its memory, these copies included.
Temporaries are what the chip needs beside params and gradients. The state moves whole, by one `device_put`, or leaf by
leaf, each after the one before was updated. The last rows have as many leaves of 8192 x 8192 as fill two thirds of the
memory with params and gradients alone.
"""
NOTES = {
    "tpu": NOTE
    + """
The codes of 8-bit moments have the layout of wider arrays in host memory, `Layout((0, 1), ((8, 128), (4, 1)))`; with
the default layout, and on several chips with either, the compiler ends with an internal error. The scheduler copies as
early as there is memory for: leaf by leaf, temporaries are large where there is room for them.""",
    "gpu": NOTE,
}
MANY = {"tpu": 20, "gpu": 100}
FAILURES = {"RESOURCE_EXHAUSTED": "do not fit", "CopyDone arguments": "internal error of the compiler"}
INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
BFLOAT16: Any = {"m_dtype": "bfloat16", "v_dtype": "bfloat16"}
ROWS_OF_BYTES = (0, 1), ((8, 128), (4, 1))

_COPY = re.compile(r"\((\w+\[[\d,]*\]\S*), (\w+\[[\d,]*\]\S*), u32\[\]\S*\) copy-start\(")


class OnChip(NamedSharding):
    """A sharding whose memory is known: JAX forgets it for GPUs that are not there."""

    kind = "device"

    @property
    def memory_kind(self) -> str:
        """The kind of memory."""
        return self.kind

    def __eq__(self, other: object) -> bool:
        """Whether the other is the same, in the same memory."""
        return type(self) is type(other) and (self.mesh, self.spec) == (other.mesh, other.spec)

    def __hash__(self) -> int:
        """A hash of what is compared."""
        return hash((self.kind, self.mesh, self.spec))


class OnHost(OnChip):
    """A sharding in host memory."""

    kind = "pinned_host"


class Case(NamedTuple):
    """A row of the table: an optimizer, the dtype of its weights, arrays, and how its state moves."""

    moments: str
    tx: Any
    weights: DTypeLike
    arrays: str
    shapes: Shapes
    chips: int
    by_leaf: bool


def moved_whole(tx: Any, on_chip: Any) -> Step:
    """A step whose state is copied from host memory at once."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, jax.device_put(state, on_chip), params)
        return optax.apply_updates(params, updates), state

    return step


def moved_by_leaf(tx: Any, on_chip: Any) -> Step:
    """A step of one state for each entry of the params, each copied after the entry before was updated."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        params, state, before = dict(params), dict(state), None
        for name in params:
            if before:
                params[before], state[name] = jax.lax.optimization_barrier((params[before], state[name]))
            here = jax.device_put(state[name], on_chip[name])
            updates, state[name] = tx.update(grads[name], here, params[name])
            params[name], before = optax.apply_updates(params[name], updates), name
        return params, state

    return step


def compiled_step(case: Case, target: str) -> Any:
    """The executable of a step whose state is in host memory before and after."""
    mesh, tx = aot.mesh_of(target, case.chips), case.tx
    params = {name: jax.ShapeDtypeStruct(shape, case.weights) for name, shape in case.shapes.items()}
    params = aot.laid_out(params, mesh, SPLIT)
    init = functools.partial(jax.tree.map, tx.init) if case.by_leaf else tx.init
    state = aot.initial_state(init, params, mesh)
    on_chip = jax.tree.map(lambda x: OnChip(mesh, x.sharding.spec), (params, state))
    on_host = jax.tree.map(lambda x: host_format(x, mesh, target), state)
    step = (moved_by_leaf if case.by_leaf else moved_whole)(tx, on_chip[1])
    options: dict[str, Any] = {"out_shardings": (on_chip[0], on_host)}
    if target == "gpu":  # which is not there to tell the memory of the results, so the program moves them itself
        step, options = returning(step, on_host), {}
    params, state = placed(params, on_chip[0]), placed(state, on_host)
    return jax.jit(step, donate_argnums=(0, 1), **options).lower(params, state, params).compile()


def host_format(x: Any, mesh: Mesh, target: str) -> Any:
    """Where a leaf of the state is in host memory, and for TPU how bytes are laid out there."""
    from jax.experimental.layout import Format, Layout  # here, since the steps are tested with JAX before 0.7 too

    sharding = OnHost(mesh, x.sharding.spec)
    rows_of_bytes = x.ndim == 2 and x.dtype.itemsize == 1
    return Format(Layout(*ROWS_OF_BYTES), sharding) if target == "tpu" and rows_of_bytes else sharding


def placed(tree: Any, where: Any) -> Any:
    """Abstract arrays with these shardings or formats."""
    return jax.tree.map(lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree, where)


def returning(step: Step, on_host: Any) -> Step:
    """The step with a copy of the new state to host memory at its end."""

    def whole(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        params, state = step(params, state, grads)
        return params, jax.device_put(state, on_host)

    return whole


def host_copies(compiled: Any) -> tuple[int, int]:
    """Bytes of arrays that a program copies from the host to a chip, and back."""
    to_chip = to_host = 0
    for result, source in _COPY.findall(compiled.as_text()):
        into, out_of = ("S(5)" in x for x in (result, source))
        to_chip += aot.bytes_of(source) if out_of and not into else 0
        to_host += aot.bytes_of(source) if into and not out_of else 0
    return to_chip, to_host


def cases(target: str) -> Iterator[Case]:
    """All formats on one leaf; float32 and 8 bits on several chips, the leaves of GPT-2 and as many as fit."""
    one, several = "8192 x 8192", list(TARGETS[target].topologies)[1]
    optimizers: dict[str, tuple[Any, Any]] = {
        "float32": (optax_nadam.nadamw(1e-3), jnp.float32),
        "bfloat16": (optax_nadam.nadamw(1e-3, **BFLOAT16), jnp.float32),
        "int8": (optax_nadam.nadamw(1e-3, **INT8), jnp.float32),
        "int8, compensated": (optax_nadam.compensated(optax_nadam.nadamw(1e-3, **INT8)), jnp.bfloat16),
    }
    for name, optimizer in optimizers.items():
        yield Case(name, *optimizer, one, LARGE, 1, by_leaf=False)
    many: Shapes = {f"w{i}": (8192, 8192) for i in range(MANY[target])}
    for name in ("float32", "bfloat16", "int8"):
        yield Case(name, *optimizers[name], one, LARGE, several, by_leaf=False)
    for name in ("float32", "int8"):
        for arrays, shapes in (("GPT-2 small", GPT2), (f"{MANY[target]} of {one}", many)):
            for by_leaf in (False, True):
                yield Case(name, *optimizers[name], arrays, shapes, 1, by_leaf)


def row(case: Case, target: str) -> list[Any]:
    """One row of the table; the compiler for TPU refuses what does not fit, that for GPU only warns."""
    size = sum(map(math.prod, case.shapes.values())) // case.chips
    moves = "leaf by leaf" if case.by_leaf else "whole"
    cells = [case.moments, jnp.dtype(case.weights).name, case.arrays, case.chips, moves]
    try:
        compiled = compiled_step(case, target)
    except jax.errors.JaxRuntimeError as error:
        known = [text for sign, text in FAILURES.items() if sign in str(error)]
        if not known:
            raise
        return [*cells, "", "", "", *known, ""]
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    moved = (*host_copies(compiled), aot.traffic(compiled), temporaries)
    return [*cells, *(f"{x / size:.2f}" for x in moved), f"{temporaries / 1e9:.3g}"]


def answer(rows: Rows) -> Answer:
    """What the state of one float32 leaf moves, and the temporaries with as many leaves as fit."""
    one = row_of(rows, "float32", "float32", "8192 x 8192", 1, "whole")
    last = next(row for row in reversed(rows) if row[0] == "float32" and row[4] == "leaf by leaf")
    return Answer(
        f"In each step the state crosses to the chip and back, {one[5]} bytes a parameter each way in float32. Leaf by"
        f" leaf, {last[2]} need {last[9]} GB of temporaries.",
        f"{float(one[7]) / 28:.2f} of the memory traffic on the chip",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and reads, and runs nothing."""
    quick = is_quick(__doc__, "float32 and bfloat16, one leaf", arguments)
    aot.check_installed()
    aot.save_all_compiled(
        "host_memory",
        "What does a step cost with the optimizer state in host memory, on a {target}?",
        COLUMNS,
        lambda target: (row(case, target) for case in cases(target)),
        NOTES,
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
