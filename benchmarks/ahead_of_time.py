"""What does a step compile to on TPU and GPU? Needs neither, only the compilers of the group ``aot``."""

import collections
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import optax_nadam
from benchmarks._report import Answer, Rows, is_quick, row_of, save
from benchmarks.step_time import gpt2_small
from benchmarks.tracing import whole_step
from tests.reference import RULES

Shapes = dict[str, tuple[int, ...]]

LARGE: Shapes = {"w": (8192, 8192)}
SEVERAL: Shapes = LARGE | {"u": (1024, 4096), "b": (4096,)}
GPT2: Shapes = {f"w{i}": shape for i, shape in enumerate(gpt2_small())}
SPLIT = PartitionSpec("data")


class Target(NamedTuple):
    """Chips to compile for, which need not be present.

    Attributes:
      platform: its name in JAX.
      hardware: what the tables say of it.
      package: the package with the compiler.
      topologies: for a number of chips, the arguments that ask for it.
    """

    platform: str
    hardware: str
    package: str
    topologies: dict[int, dict[str, Any]]


H100 = """
device_description_str: "NVIDIA H100 80GB HBM3"
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 patch: 0 }
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  device_memory_size: 84929347584  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  threads_per_core_limit: 2048  threads_per_block_limit: 1024  threads_per_warp: 32
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
}
"""
TARGETS = {
    "tpu": Target(
        "tpu",
        "compiled for TPU v5e, with none present",
        "libtpu",
        {
            1: {"topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)},
            16: {"topology_name": "v5e:4x4"},
            256: {"topology_name": "v5e:16x16"},
        },
    ),
    "gpu": Target(
        "cuda",
        "compiled for NVIDIA H100, with none present",
        "jax-cuda12-plugin",
        {
            1: {"topology": "1x1x1", "target_config": H100},
            8: {"topology": "1x1x8", "target_config": H100},
            256: {"topology": "1x32x8", "target_config": H100},
        },
    ),
}
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu waits for a metadata server to say which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process that compiles at the same time fails
}
NOTE = """\
Compiled ahead of time, not run; needs the group `aot` (`pip install -e . --group aot`). A whole step: update, weight
decay, learning rate, `apply_updates`; gradients given, params and state donated. All figures are of one chip. Arrays
are one float32 leaf, the same in bfloat16, or the 148 float32 leaves of GPT-2 small. Params, gradients and moments are
split over the chips. Under ZeRO-1 every chip has whole params, and bytes are per parameter of the whole model.

Traffic is what passes between the chip and its memory, read from the program. The minimum is 28 in float32 (read
params, gradients and two moments; write params and moments) and 22 for bfloat16 params and gradients with float32
moments; `optax.nadam` has bfloat16 moments there, hence 14. """
NOTES = {
    "tpu": NOTE
    + """\
In place: results that take a donated argument's memory; two rules do not read the product of the
momenta, a scalar, so its memory is not reused.

Under ZeRO-1 on TPU, gather the updates (with a transformation that constrains their sharding). Where `out_shardings`
alone asks for whole params, the compiler gathers the new params and copies all params twice; the traffic shown there is
an upper bound, since it counts the old params as read whole.""",
    "gpu": NOTE
    + """\
Temporaries are some hundreds of bytes a leaf, whatever its size. In place: results that take a
donated argument's memory; two rules do not read the product of the momenta, a scalar, so its memory is not reused.

Under ZeRO-1 on GPU, leave the gathering to `out_shardings`: the compiler steps the shard of the params and gathers the
new ones. The traffic shown there is an upper bound, since it counts the old params as read whole; the lower bound is
8.""",
}


@functools.cache
def mesh_of(target: str, chips: int) -> Mesh:
    """A mesh of chips that need not exist, with one axis, ``data``."""
    platform, *_, ways = TARGETS[target]
    for name, value in NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # or plugins look for their chips and fail without them
    devices = topologies.get_topology_desc(platform=platform, **ways[chips]).devices
    return Mesh(np.asarray(devices), ("data",))


def installed() -> bool:
    """Whether the compilers for all targets are installed, as with the group ``aot``; a machine with chips has one."""
    return all(importlib.util.find_spec(target.package.replace("-", "_")) for target in TARGETS.values())


def check_installed() -> None:
    """Ends a script that can do nothing without the compilers."""
    if not installed():
        raise SystemExit("Left out: needs the compilers for TPU and GPU, pip install -e . --group aot.")


def laid_out(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Abstract arrays, split over the chips as the spec says; scalars are on every chip."""
    everywhere = PartitionSpec()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim else everywhere)),
        tree,
    )


def compiled_step(
    tx: Any,
    shapes: Shapes,
    mesh: Mesh,
    dtype: DTypeLike = jnp.float32,
    params_spec: PartitionSpec = SPLIT,
    pin: bool = False,
) -> Any:
    """The executable of a step that donates params and state; gradients and moments are split over the chips.

    The compiler chooses the sharding of the results or, pinned, they have that of the params and the state.
    """
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    donated = laid_out(params, mesh, params_spec), initial_state(tx.init, laid_out(params, mesh, SPLIT), mesh)
    results = jax.tree.map(lambda x: x.sharding, donated) if pin else None
    step = jax.jit(whole_step(tx, apply=True), donate_argnums=(0, 1), out_shardings=results)
    return step.lower(*donated, laid_out(params, mesh, SPLIT)).compile()


def initial_state(init: Callable[[Any], Any], params: Any, mesh: Mesh) -> Any:
    """The abstract state of abstract params; where it has 8-bit scales, split as the compiler splits them."""
    state = jax.eval_shape(init, params)
    if not optax.tree.get_all_with_path(state, "scales"):
        return laid_out(state, mesh, SPLIT)
    shardings = jax.jit(init).lower(params).compile().output_shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def gathered(tx: Any, mesh: Mesh) -> Any:
    """An optimizer whose updates are gathered on every chip (ZeRO-1: whole params, split moments)."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    gather = optax.stateless(lambda updates, _: jax.lax.with_sharding_constraint(updates, everywhere))
    return optax.chain(tx, gather)


class Instruction(NamedTuple):
    """One instruction of a compiled program: the type of its result, what it does, the types of its operands.

    A conditional also has the names of its branches.
    """

    type: str
    operation: str
    operands: list[str]
    branches: list[str]


_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%(\S+) = (.*?) ([a-z-]+)\((.*?)\)"
    r'(?:,.*custom_call_target="(\w+)")?(?:,.*branch_computations=\{(.*?)\})?',
    re.M,
)
_ARRAY = re.compile(r"[a-z](\d*)\[(\d[\d,]*)\](\S*)")  # bits, none for booleans; shape; layout
_COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
_FETCHED = {"copy-done", "slice-done"}
_NO_WORK = {"parameter", "tuple", "get-tuple-element", "bitcast", "ConcatBitcast"}
_NO_WORK |= {"copy-start", "slice-start", "all-gather-done", "conditional"}
_TYPED_BY_BOTH = {"all-gather-start"}  # the type of its result has what it reads in it


def instructions(compiled: Any, computation: str = "ENTRY") -> Iterator[Instruction]:
    """The instructions of a computation, the entry or one with a name, that read or make arrays."""
    types: dict[str, str] = {}
    start = "\nENTRY" if computation == "ENTRY" else f"\n%{computation} ("
    text = compiled.as_text().split(start)[1].split("\n}")[0]
    for name, type_, operation, operands, target, branches in _INSTRUCTION.findall(text):
        types[name] = type_
        read, run = (re.findall(r"%([\w.-]+)", names) for names in (operands, branches))
        instruction = Instruction(type_, target or operation, [types[x] for x in read], run)
        if any(map(_ARRAY.search, (type_, *instruction.operands))):
            yield instruction


def kernels(compiled: Any) -> collections.Counter[str]:
    """The number of kernels of each kind that work on arrays; prefetching and renaming are not work."""
    operations = (x.operation for x in instructions(compiled))
    return collections.Counter(x for x in operations if x not in _NO_WORK | _FETCHED)


def collectives(compiled: Any) -> collections.Counter[str]:
    """The number of collectives of each kind, anywhere in the program."""
    return collections.Counter(_COLLECTIVE.findall(compiled.as_text()))


def in_place(compiled: Any) -> int:
    """The number of results that take the memory of a donated argument."""
    return compiled.as_text().split("\n")[0].count("-alias)")


def traffic(compiled: Any, computation: str = "ENTRY", branch: Callable[[Iterable[int]], int] = max) -> int:
    """Bytes of arrays that pass between one chip and its memory, if every kernel reads its operands whole.

    XLA's own figure, ``bytes accessed``, includes scalars, counts prefetched arrays several times and adds up all
    branches of a conditional. Here ``branch`` chooses: the one that moves most, unless told otherwise.
    """
    total = 0
    for type_, operation, operands, branches in instructions(compiled, computation):
        if operation in _FETCHED | _TYPED_BY_BOTH:
            total += bytes_of(type_)
        elif operation not in _NO_WORK:
            total += sum(bytes_of(x, on_chip=False) for x in (type_, *operands))
        elif branches:
            total += branch(traffic(compiled, name, branch) for name in branches)
    return total


def bytes_of(type_: str, on_chip: bool = True) -> int:
    """The size of the arrays of a type, with or without those in the chip's own memory."""
    return sum(
        math.prod(map(int, shape.split(","))) * int(bits or 8) // 8
        for bits, shape, layout in _ARRAY.findall(type_)
        if on_chip or "S(1)" not in layout
    )


def row(name: str, arrays: str, compiled: Any, shapes: Shapes, chips: int, replicated: bool = False) -> list[Any]:
    """One row of the table, for one chip and the parameters on it."""
    size = sum(map(math.prod, shapes.values()))
    here = size if replicated else size // chips
    return [
        name,
        arrays,
        chips,
        f"{traffic(compiled) / here:.2f}",
        ", ".join(f"{count / len(shapes):g} {kind}" for kind, count in sorted(kernels(compiled).items())),
        sum(collectives(compiled).values()),
        compiled.memory_analysis().temp_size_in_bytes,
        f"{in_place(compiled)} of {len(jax.tree.leaves(compiled.output_shardings))}",
    ]


OURS = {f"nadam, {rule}": optax_nadam.nadam(1e-3, rule=cast("optax_nadam.RuleName", rule)) for rule in RULES}
OURS["nadamw"] = optax_nadam.nadamw(1e-3)
RIVALS = {"optax.nadam": optax.nadam(1e-3), "optax.nadamw": optax.nadamw(1e-3), "optax.adamw": optax.adamw(1e-3)}
PAIR = {"nadam, scheduled": OURS["nadam, scheduled"], "optax.nadam": RIVALS["optax.nadam"]}


def rows(target: str) -> Iterator[list[Any]]:
    """All optimizers on one chip and on many; ours and ``optax.nadam`` on other arrays and under ZeRO-1 too."""
    meshes = {chips: mesh_of(target, chips) for chips in TARGETS[target].topologies}
    one, several = meshes[1], list(meshes)[1]
    for name, tx in (OURS | RIVALS).items():
        for chips, mesh in meshes.items():
            yield row(name, "8192 x 8192", compiled_step(tx, LARGE, mesh), LARGE, chips)
    for name, tx in PAIR.items():
        yield row(name, "8192 x 8192, bfloat16", compiled_step(tx, LARGE, one, jnp.bfloat16), LARGE, 1)
    for name, tx in PAIR.items():
        yield row(name, "GPT-2 small", compiled_step(tx, GPT2, one), GPT2, 1)
    for name, tx in PAIR.items():
        for what, ending in (("updates", gathered(tx, meshes[several])), ("params", tx)):
            compiled = compiled_step(ending, LARGE, meshes[several], params_spec=PartitionSpec(), pin=True)
            yield row(f"{name}, {what} gathered", "8192 x 8192, ZeRO-1", compiled, LARGE, several, replicated=True)


def answer(rows: Rows) -> Answer:
    """The traffic beside that of ``optax.nadam``, and what many chips send."""
    ours, theirs = (row_of(rows, name, "8192 x 8192", 1) for name in PAIR)
    chips = max(row[2] for row in rows)
    sent = row_of(rows, ours[0], "8192 x 8192", chips)[5]
    return Answer(
        f"To {ours[4]} a leaf, which moves {ours[3]} bytes a parameter; {chips} chips send {sent or 'nothing'}.",
        f"{float(ours[3]) / float(theirs[3]):.2f} of `optax.nadam`",
    )


def save_compiled(
    name: str,
    question: str,
    columns: list[str],
    rows: Rows,
    note: str,
    target: str,
    *,
    answer: Callable[[Rows], Answer],
    quick: bool = False,
) -> None:
    """Writes a result about compiled programs, which is not about this machine."""
    chips = TARGETS[target]
    packages = (chips.package,)
    backend, hardware = f"for-{target}", chips.hardware
    about: Any = {"backend": backend, "hardware": hardware, "packages": packages}
    save(name, question, columns, rows, note, answer=answer, quick=quick, **about)


def save_all_compiled(
    name: str,
    question: str,
    columns: list[str],
    rows: Callable[[str], Iterator[list[Any]]],
    notes: dict[str, str] | str,
    *,
    answer: Callable[[Rows], Answer],
    quick: bool,
) -> None:
    """Writes a result for each target, which the question names in a field; quick, tries one row."""
    for target in TARGETS:
        found = list(itertools.islice(rows(target), 1 if quick else None))
        note = notes if isinstance(notes, str) else notes[target]
        asked = question.format(target=target.upper())
        save_compiled(name, asked, columns, found, note, target, answer=answer, quick=quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and reads, and runs nothing."""
    quick = is_quick(__doc__, "one optimizer on one chip", arguments)
    check_installed()
    save_all_compiled(
        "ahead_of_time",
        "What does a step compile to on {target}?",
        [
            "optimizer",
            "arrays",
            "chips",
            "traffic a parameter",
            "kernels a leaf",
            "collectives",
            "temporaries, bytes",
            "in place",
        ],
        rows,
        NOTES,
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
