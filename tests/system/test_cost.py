"""What a step costs, in figures that do not depend on the machine; XLA:CPU compiles it.

- One equation a leaf for the update, five for a whole step of ``nadamw`` (Optax 22).
- 44 bytes a parameter, 34 with bfloat16 params and gradients, every rule; donated params and moments are updated in
  place, and no temporary grows with the leaves.
- Three kernels a leaf; under ``optax.flatten`` three for all leaves together and one for each.
- Clipping and caution read what they need once more and copy nothing: 4 to 16 bytes a parameter more. The codes of
  8-bit moments are computed once a step: 71 bytes a parameter.
- One compilation of a run, with a schedule too; one of a sweep of hyperparameters, injected or outside jit.
"""

import functools
import subprocess
import sys

import jax
import optax
import pytest
from jax import numpy as jnp

from benchmarks.ahead_of_time import in_place, kernels
from benchmarks.options import OPTIONS, compiled_step
from benchmarks.tracing import equations_a_leaf, five_steps, leaves, sweep, whole_step
from optax_nadam import _nadam, _rules, nadam, nadamw, scale_by_nadam
from tests.reference import RULES

both = pytest.mark.parametrize("make", [nadam, nadamw])
every_rule = pytest.mark.parametrize("rule", RULES)


def compiled(tx, params):
    """A whole step that donates params and state."""
    return compiled_step(tx, params)[1]


def leaf(size=512, dtype=jnp.float32):
    return jnp.ones((size, size), dtype)


def bytes_a_parameter(step):
    """XLA's count, of a leaf and some scalars: at most 150 bytes of them, 0.0006 a parameter."""
    return step.cost_analysis()["bytes accessed"] / leaf().size


@every_rule
@pytest.mark.parametrize(
    ("make", "make_step", "a_leaf"),
    [
        (scale_by_nadam, lambda tx: lambda params, state, grads: tx.update(grads, state, params), 1),
        (nadamw, functools.partial(whole_step, apply=True), 5),
    ],
    ids=["scale_by_nadam", "whole step of nadamw"],
)
def test_equations_a_leaf(make, make_step, a_leaf, rule):
    tx = make(rule=rule)
    step = make_step(tx)
    assert equations_a_leaf(tx, step) == a_leaf
    assert len(jax.make_jaxpr(step)({}, tx.init({}), {}).eqns) <= 6


@pytest.fixture
def traced(monkeypatch):
    """A list that grows by a name each time a function is traced."""
    calls: list[str] = []

    def watch(module, name, shown):
        original = getattr(module, name)

        def watched(*args):
            calls.append(shown(*args))
            return original(*args)

        monkeypatch.setattr(module, name, watched)

    watch(_nadam, "abs_squared", lambda x: f"leaf {x.shape}")
    watch(_rules, "_log", lambda base: "coefficients")
    jax.clear_caches()
    return calls


def test_traced_once_a_shape(traced):
    tx, params = scale_by_nadam(), {f"w{i}": jnp.ones((7, 11)) for i in range(30)} | {"other": jnp.ones((3, 5))}
    jax.jit(tx.update).lower(params, tx.init(params))
    assert sorted(traced) == ["coefficients", "leaf (3, 5)", "leaf (7, 11)"]


def test_eager_sweep(traced):
    params = leaves(3) | {"other": jnp.ones((3, 5))}
    for k in range(5):
        tx = scale_by_nadam(b1=jnp.float32(0.8 + 0.01 * k), b2=jnp.float32(0.99))
        tx.update(params, tx.init(params))
    assert sorted(traced) == ["coefficients", "leaf (3, 5)", "leaf (64,)"]


@pytest.mark.lenient("Optax's schedule mixes dtypes")
@pytest.mark.parametrize("rate", [1e-3, optax.cosine_decay_schedule(1e-3, 100)], ids=["number", "schedule"])
@both
def test_one_compilation(make, rate):
    assert five_steps(lambda _: make(rate), number=3) == 1


def test_injected_sweep():
    assert sweep(nadamw, number=3) == 1


# XLA:CPU makes a kernel of each result: m reads g and m, v reads g and v, the params read p, g, m and v.
@pytest.mark.parametrize(
    ("make", "rule"), [*((nadamw, rule) for rule in RULES), (nadam, "scheduled"), (nadam, "constant")]
)
@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 12 + 12 + 20), (jnp.bfloat16, 10 + 10 + 14)])
def test_bytes_in_place(make, rule, dtype, size):
    tx, params = make(1e-3, rule=rule), leaf(dtype=dtype)
    step = compiled(tx, params)
    assert bytes_a_parameter(step) < size + 0.001
    without_product = rule in ("constant", "simplified")  # their coefficients do not read the state's mu_product
    assert in_place(step) == len(jax.tree.leaves((params, tx.init(params)))) - without_product


# Flattened, all leaves share the three kernels of the update, and each takes one more to be cut out and applied.
@pytest.mark.parametrize(("wrap", "number"), [(lambda tx: tx, 3 * 20), (optax.flatten, 3 + 20)], ids=["plain", "flat"])
@both
def test_kernels(make, wrap, number):
    assert kernels(compiled(wrap(make(1e-3)), leaves(20)))["fusion"] == number


@both
def test_temporaries(make):
    def temporaries(size):
        return compiled(make(1e-3), [leaf(size)] * 2).memory_analysis().temp_size_in_bytes

    assert temporaries(512) == temporaries(256) < 1024


# Beside the 44 bytes of the step: the norm reads the gradients once more; the mask of caution and the squares of the
# update's clipping take two arrays and are written and read; accumulation reads and writes its mean, in place, and XLA
# adds up the call that takes a step and the call that does not. Moments of bytes are computed, as float32, before the
# largest of each row and each column and then the codes; where the update shares in that, as it does without a branch
# before it, 13 bytes of temporaries are needed. Bounds of bytes a parameter and of temporaries, as XLA counts them:
RECENT = jax.__version_info__ >= (0, 10)  # before, sums were not computed from squares
COSTS = {
    "clip_global_norm": (44 + 4.01, 0.01) if RECENT else (60.01, 4.01),
    "clip_norm, a leaf": (44 + 4.01, 0.01) if RECENT else (60.01, 4.01),
    "cautious": (44 + 8 + 8.01, 4.01),
    "clip_by_gradient_rms": (44 + 8 + 8.01, 4.01),
    "accumulate_steps": (44 + 12 + 20.01, 0.01),
    "int8": (71.3, 10.1 if RECENT else 11.1),
}


@pytest.mark.parametrize(("option", "size", "temporaries"), [(name, *bounds) for name, bounds in COSTS.items()])
def test_options(option, size, temporaries):
    step = compiled(OPTIONS.get(option) or nadamw(1e-3, m_dtype="int8", v_dtype="int8"), leaf())
    assert bytes_a_parameter(step) < size
    assert step.memory_analysis().temp_size_in_bytes / leaf().size < temporaries


@pytest.mark.lenient("optax.nadam itself mixes dtypes")
def test_no_more_than_optax():
    ours, theirs = compiled(nadam(1e-3), leaf()), compiled(optax.nadam(1e-3), leaf())
    assert bytes_a_parameter(ours) <= bytes_a_parameter(theirs) + 0.001
    assert kernels(ours).total() <= kernels(theirs).total()


def test_import_starts_no_backend():
    """After it, the number of devices may still be chosen, and ``jax.distributed.initialize`` be called."""
    code = "import optax_nadam, jax; jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    subprocess.run([sys.executable, "-c", code], check=True)
