"""A step whose state is in host memory: what it copies, and what it needs on the chip.

- Each moment is copied from the host once and back once: 8, 4 or 2 bytes a parameter each way; of a split state each
  chip copies its part, and nothing is sent.
- Leaf by leaf, a GPU needs room for one leaf, and a TPU fits what does not fit whole.
"""

import math

import jax
import pytest

from benchmarks.ahead_of_time import LARGE, TARGETS, collectives, in_place, traffic
from benchmarks.host_memory import Case, cases, compiled_step, host_copies, row

OPTIMIZERS = {case.moments: (case.tx, case.weights) for case in cases("gpu")}
HOST_BYTES = {"float32": 8, "bfloat16": 4, "int8": 2, "int8, compensated": 3}
TRAFFIC = {"float32": 28, "bfloat16": 20, "int8": 22, "int8, compensated": 16}  # with the state on the chip
MORE: dict[tuple[str, str], float] = {("tpu", "float32"): 16, ("tpu", "int8, compensated"): 6}  # split fusions
MORE |= {("gpu", "int8"): 6.51, ("gpu", "int8, compensated"): 4.51}  # maxima of columns
TEMPORARIES = {"float32": 16, "bfloat16": 8, "int8": 4, "int8, compensated": 6.03}
MANY = {f"w{k}": (2048, 2048) for k in range(8)}
LEAF = 2048 * 2048

pytestmark = pytest.mark.lenient("optax.apply_updates adds float32 updates to bfloat16 params")


def compiled(moments, target, shapes=LARGE, chips=1, by_leaf=False):
    tx, weights = OPTIMIZERS[moments]
    return compiled_step(Case(moments, tx, weights, "", shapes, chips, by_leaf), target)


def size(shapes):
    return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("moments", HOST_BYTES)
@pytest.mark.parametrize("target", TARGETS)
def test_copied_once(target, moments):
    step, n, each = compiled(moments, target), size(LARGE), HOST_BYTES[moments]
    assert host_copies(step) == pytest.approx((each * n, each * n), rel=2e-3)  # scales are some bytes a row
    expected = TRAFFIC[moments] + 2 * each + MORE.get((target, moments), 0)
    assert traffic(step) / n == pytest.approx(expected, abs=0.02)
    assert step.memory_analysis().temp_size_in_bytes / n <= TEMPORARIES[moments] + (0.27 if target == "gpu" else 0.02)
    assert in_place(step) == len(jax.tree.leaves(step.output_shardings))


@pytest.mark.parametrize(("target", "chips", "moments"), [("tpu", 16, "bfloat16"), ("gpu", 8, "int8")])
def test_split_state(target, chips, moments):
    step, n = compiled(moments, target, chips=chips), size(LARGE) // chips
    assert host_copies(step) == pytest.approx((HOST_BYTES[moments] * n,) * 2, rel=5e-3)
    assert collectives(step) == ({"all-reduce": 1} if moments == "int8" else {})


def test_by_leaf_on_a_gpu():
    whole, by_leaf = (compiled("float32", "gpu", MANY, by_leaf=by_leaf) for by_leaf in (False, True))
    assert whole.memory_analysis().temp_size_in_bytes > 0.9 * 8 * size(MANY)
    assert by_leaf.memory_analysis().temp_size_in_bytes <= 3 * 16 * LEAF
    assert host_copies(whole) == host_copies(by_leaf) == (8 * size(MANY), 8 * size(MANY))


def test_by_leaf_on_a_tpu():
    large = [case for case in cases("tpu") if case.moments == "float32" and case.arrays.startswith("20 of")]
    whole, by_leaf = (row(case, "tpu")[-2] for case in large)
    assert whole == "do not fit"
    assert float(by_leaf) < 5


def test_split_bytes_on_tpus():
    """The compiler cannot do it yet; where this fails, say so in docs/memory.md and drop the layout."""
    (case,) = (case for case in cases("tpu") if case.moments == "int8" and case.chips == 16)
    assert row(case, "tpu")[-2] == "internal error of the compiler"
