"""Would a custom kernel for 8-bit moments be better than the program that XLA makes of the step?

The kernel is the library's own leaf update on a block of rows. It reads and writes everything once, in place.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import optax_nadam
from benchmarks._report import Answer, Rows, is_quick, row_of
from benchmarks.ahead_of_time import (
    LARGE,
    check_installed,
    collectives,
    compiled_step,
    mesh_of,
    save_compiled,
    traffic,
)
from optax_nadam._moments import average
from optax_nadam._nadam import direction
from optax_nadam._quantized import Quantized
from optax_nadam._rounding import _hash
from optax_nadam._rules import RULES, Coefficients, Hyperparameters, scalars_of_step

ROWS = 128  # of a block
FIELDS = len(Coefficients._fields)
_CompilerParams: Any = getattr(pltpu, "CompilerParams", getattr(pltpu, "TPUCompilerParams", None))  # before jax 0.7
NOTE = """\
The whole step of `nadamw` on one leaf of 8192 x 8192. The kernel (Pallas) reads and writes everything once, in place:
12 bytes in float32. XLA cannot fuse it with the transformations that follow, so the update is written out and read
again. XLA cannot split it over chips either. XLA's own program has neither cost; it reads gradients and codes twice.
So the library has no kernel."""


class BlockBits(NamedTuple):
    """The random bits of a block of rows: the same that ``RandomBits`` draws for the whole leaf.

    Attributes:
      seed: an integer scalar.
      high: whether these are the high half of the 32 bits.
      first: index in the leaf of the block's first element.
    """

    seed: jax.Array
    high: bool
    first: jax.Array

    def draw(self, shape: tuple[int, ...]) -> jax.Array:
        """16 random bits for each element."""
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        index = (self.first + row * shape[1] + column).astype(jnp.uint32)
        hashed = _hash(index ^ _hash(self.seed.astype(jnp.uint32)))
        return ((hashed >> 16) if self.high else (hashed & 0xFFFF)).astype(jnp.int32)


def kernel(step: Any, scalars: Any, g: Any, m: Any, m_scale: Any, v: Any, v_scale: Any, *results: Any) -> None:
    """The leaf update on a block of rows; every argument is a reference into memory."""
    c = Coefficients(*(scalars[k] for k in range(FIELDS)))
    first = pl.program_id(0) * math.prod(g.shape)
    grad = g[...].astype(jnp.float32)
    m_t, m_stored = average(_moment(m, m_scale), grad, c.m_weight, _bits(step, first, high=False))
    v_t, v_stored = average(_moment(v, v_scale), grad * grad, c.v_weight, _bits(step, first, high=True))
    u = direction(grad, m_t, v_t, c, 0.5).astype(g.dtype)
    for to, x in zip(results, (u, *_with_column(m_stored), *_with_column(v_stored)), strict=True):
        to[...] = x


def _moment(codes: Any, scale: Any) -> Quantized:
    return Quantized(codes[...], scale[...].reshape(-1))


def _with_column(stored: Any) -> tuple[jax.Array, jax.Array]:
    return stored.codes, stored.scale.reshape(-1, 1)


def _bits(step: Any, first: Any, high: bool) -> Any:
    return BlockBits(step[0], high, first)


def update_by_kernel(
    g: jax.Array, m: Quantized, v: Quantized, c: Coefficients, step: jax.Array, interpret: bool = False
) -> tuple[jax.Array, Quantized, Quantized]:
    """One step of a leaf of two axes, by one kernel that overwrites the moments."""
    block, column = (pl.BlockSpec((ROWS, width), lambda i: (i, 0)) for width in (g.shape[1], 1))
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    leaves = [g, *_with_column(m), *_with_column(v)]
    u, m_codes, m_scale, v_codes, v_scale = pl.pallas_call(
        kernel,
        grid=(g.shape[0] // ROWS,),
        in_specs=[scalar, scalar, block, block, column, block, column],
        out_specs=[block, block, column, block, column],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],
        input_output_aliases={3: 1, 4: 2, 5: 3, 6: 4},
        interpret=interpret,
        compiler_params=_CompilerParams(vmem_limit_bytes=100 * 2**20),
    )(step.reshape(1), jnp.stack([x.astype(jnp.float32) for x in c]), *leaves)
    return u, Quantized(m_codes, m_scale[:, 0]), Quantized(v_codes, v_scale[:, 0])


INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
OURS = optax_nadam.scale_by_nadam(**INT8)


def scale_by_kernel(interpret: bool = False) -> optax.GradientTransformation:
    """``scale_by_nadam`` with 8-bit moments, a kernel a leaf."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = optax.safe_increment(state.count)
        h = Hyperparameters(0.9, 0.999, 1e-7, 0.0, 4e-3)
        product, c = scalars_of_step(RULES["scheduled"], count, state.mu_product, h)
        step = functools.partial(update_by_kernel, c=c, step=count, interpret=interpret)
        stepped = {name: step(g, state.m[name], state.v[name]) for name, g in updates.items()}
        u, m, v = ({name: triple[k] for name, triple in stepped.items()} for k in range(3))
        return u, state._replace(count=count, mu_product=product, m=m, v=v)

    return optax.GradientTransformation(OURS.init, update)


def rows() -> list[list[Any]]:
    """XLA's program beside the kernel, in a chain, on one chip and on sixteen."""
    size = sum(map(math.prod, LARGE.values()))
    results = []
    for name, tx in {"XLA": OURS, "kernel": scale_by_kernel()}.items():
        whole = optax.chain(tx, optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3))
        for dtype in (jnp.float32, jnp.bfloat16):
            compiled = compiled_step(whole, LARGE, mesh_of("tpu", 1), dtype)
            results.append(
                [
                    name,
                    jnp.dtype(dtype).name,
                    f"{traffic(compiled) / size:.2f}",
                    f"{compiled.memory_analysis().temp_size_in_bytes / size:.2f}",
                    on_many(whole, dtype),
                ]
            )
    return results


def on_many(tx: Any, dtype: Any) -> str:
    """How many collectives leaves split over sixteen chips need, or the compiler's error."""
    try:
        compiled = compiled_step(tx, LARGE, mesh_of("tpu", 16), dtype)
    except NotImplementedError as error:
        return str(error)
    return f"{sum(collectives(compiled).values())} collectives"


def answer(rows: Rows) -> Answer:
    """The traffic of both, with float32 weights."""
    xla, kernel = (row_of(rows, name, "float32")[2] for name in ("XLA", "kernel"))
    return Answer(
        f"No: with what follows in the chain it moves {kernel} bytes a parameter, XLA's own fusions {xla}.",
        f"{float(kernel) / float(xla):.2f} of XLA's",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and reads, and runs nothing."""
    quick = is_quick(__doc__, "one way of two", arguments)
    check_installed()
    save_compiled(
        "byte_kernel",
        "Would a custom kernel be better for 8-bit moments?",
        ["update of a leaf by", "weights and gradients", "traffic a parameter", "temporaries", "on 16 chips"],
        list(itertools.islice(rows(), 1 if quick else None)),
        NOTE,
        "tpu",
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
