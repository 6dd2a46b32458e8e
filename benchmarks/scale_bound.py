"""Would 8-bit moments do with a bound of the largest magnitude of a row, which needs no second reading of the codes?

The new largest magnitude is at most the average of the last scale and the largest new value. As a scale, this bound
saves the reading of the codes before they are written. But the largest new values of different steps belong to
different elements, so the bound is loose, and the codes are coarser.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import numpy as jnp

import optax_nadam
from benchmarks import ahead_of_time as aot
from benchmarks._report import Answer, Rows, is_quick, row_of, save
from benchmarks.flashoptim import CASES, WHATS, Case, errors_of, float32, ours, runner
from optax_nadam import _moments, _quantized
from optax_nadam._moments import Moment
from optax_nadam._rounding import RandomBits

NAME = "scale_bound"
QUESTION = "How exact are 8-bit moments whose scale is a bound?"
COMPILED_QUESTION = "What traffic would a bound as the scale of 8-bit moments save on a {target}?"
NOTE = """\
`compensated(nadamw(rule="adam", m_dtype="int8", v_dtype="int8"))` on the gradients of `flashoptim`, beside the same
with scales that are bounds: `(1 - w) scale + w max |new|` with the weight `w` of the new value. Relative errors after
1000 steps against float32, medians of three seeds. The library keeps the largest magnitude itself."""
COMPILED_NOTE = """\
One leaf of 8192 x 8192, the whole step of `nadamw`, compiled ahead of time and not run. Codes can only be written once
the scale of their row is known. The largest magnitude needs gradients and codes for it, read once more; the bound needs
the gradients only. The least, 16 or 10, would need a scale that depends on nothing in the row."""
LARGEST, BOUND = "largest magnitude", "bound"


def bounded(stored: Moment, new: jax.Array, weight: jax.Array, bits: RandomBits) -> tuple[jax.Array, Moment]:
    """A step of an average as in the library, but for the scale of its codes."""
    if not isinstance(stored, _quantized.Quantized):
        return _moments.average(stored, new, weight, bits)
    largest = _quantized.largest_of_rows(new)
    bound = _moments._lerp(stored.scale.astype(new.dtype), largest, weight) * (1 + 2**-20)
    value = _moments._lerp(stored.decode(new.dtype), new, weight)
    with mock.patch.object(_quantized, "largest_of_rows", return_value=bound):
        encoded = _quantized.quantize(value, stored, bits)
    return encoded.decode(new.dtype), encoded


@contextlib.contextmanager
def scale(which: str) -> Iterator[None]:
    """Within it, programs are traced with one of the two scales."""
    jax.clear_caches()
    average = bounded if which == BOUND else _moments.average
    with mock.patch("optax_nadam._nadam.average", average):
        yield
    jax.clear_caches()


def error_rows(cases: dict[str, Case], steps: int, seeds: int) -> Iterator[list[Any]]:
    """Errors with both scales, two rows a case."""
    for name, case in cases.items():
        expected = runner(float32(b2=case.b2), case, steps, jnp.float32)
        found = []
        for which in (LARGEST, BOUND):
            with scale(which):
                got = runner(ours(b2=case.b2), case, steps, jnp.bfloat16)
                keys = map(jax.random.key, range(seeds))
                pairs = [(jax.device_get(got(key)), jax.device_get(expected(key))) for key in keys]
            found.append(np.median([errors_of(*pair) for pair in pairs], axis=0))
        rows = ([what, name, f"{x:.2g}", f"{y:.2g}", f"{y / x:.2f}"] for what, x, y in zip(WHATS, *found, strict=True))
        yield from itertools.islice(rows, 0, None, 2)  # the change of the weights, and v


def traffic_rows(target: str) -> Iterator[list[Any]]:
    """Traffic with both scales."""
    tx = optax_nadam.nadamw(1e-3, m_dtype="int8", v_dtype="int8")
    size = aot.LARGE["w"][0] * aot.LARGE["w"][1]
    for which, dtype in itertools.product((LARGEST, BOUND), (jnp.float32, jnp.bfloat16)):
        with scale(which):
            compiled = aot.compiled_step(tx, aot.LARGE, aot.mesh_of(target, 1), dtype)
        yield [which, jnp.dtype(dtype).name, f"{aot.traffic(compiled) / size:.2f}"]


def answer(rows: Rows) -> Answer:
    """How much larger the errors of the weights are."""
    larger = [float(row[4]) for row in rows if row[0] == WHATS[0]]
    return Answer(
        f"Less: the error of the weights is {min(larger):.2f} to {max(larger):.2f} times as large, so the library does"
        " not take it.",
        f"{np.median(larger):.2f} of the error",
    )


def compiled_answer(rows: Rows) -> Answer:
    """The traffic with float32 weights."""
    largest, bound = (row_of(rows, which, "float32")[2] for which in (LARGEST, BOUND))
    return Answer(
        f"One reading of the codes: {bound} bytes a parameter in place of {largest}.",
        f"{float(bound) / float(largest):.2f} of the traffic",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles for TPU and GPU where the extra ``aot`` is installed, and measures errors elsewhere."""
    quick = is_quick(__doc__, "one case of gradients, twenty steps", arguments)
    if aot.installed():
        aot.save_all_compiled(
            NAME,
            COMPILED_QUESTION,
            ["scale", "weights and gradients", "traffic a parameter"],
            traffic_rows,
            COMPILED_NOTE,
            answer=compiled_answer,
            quick=quick,
        )
        return
    cases = dict(itertools.islice(CASES.items(), 1 if quick else None))
    rows = list(error_rows(cases, *((20, 1) if quick else (1000, 3))))
    columns = ["error", "gradients", LARGEST, BOUND, "ratio"]
    save(NAME, QUESTION, columns, rows, NOTE, answer=answer, quick=quick)


if __name__ == "__main__":
    main()
