"""What a step costs on TPUs and GPUs, read from the programs compiled for them.

- On 1, 16 and 256 TPUs, and 1, 8 and 256 GPUs: 28 bytes a parameter, one fusion a leaf, in place, nothing sent, no
  temporary the size of a leaf; 22 bytes with bfloat16 params and gradients.
- Narrow moments: 20 bytes a parameter in bfloat16; in int8 22.1 on TPU, at most 30 on GPU, of GPT-2 whole 32. No
  temporaries on TPU, at most a quarter of a byte a parameter on GPU. Split over chips one or two all-reduces of scales.
- Compensated weights move the bytes they store, in one pass: on TPU 16 bytes a parameter with 8-bit moments.
- ZeRO-1 on 16 TPUs: one all-gather of the update; 17.25 bytes a parameter of the model.
- Clipping and caution read 4 to 8 bytes a parameter more and copy nothing; a call that accumulates leaves the moments
  alone.
"""

import math
from typing import Any

import jax
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec

import optax_nadam
from benchmarks import options
from benchmarks.ahead_of_time import (
    GPT2,
    LARGE,
    OURS,
    SEVERAL,
    SPLIT,
    TARGETS,
    collectives,
    compiled_step,
    gathered,
    in_place,
    kernels,
    laid_out,
    mesh_of,
    traffic,
)
from benchmarks.tracing import whole_step
from optax_nadam import NadamConfig
from optax_nadam.diagnostics import scalars

WITHOUT_PRODUCT = ("nadam, constant", "nadam, simplified")  # their coefficients do not read the state's mu_product
SCALARS = 300_000  # bytes of them that XLA counts in a step, whatever the size of the leaves
A_LEAF = {"tpu": 0, "gpu": 2048}  # bytes of temporaries at most, whatever the size of the leaf
EVERY_SHAPES = {"a large leaf": LARGE, "several leaves": SEVERAL}
CHIPS = [(target, chips) for target, kind in TARGETS.items() for chips in kind.topologies]
MANY = [(target, chips) for target, chips in CHIPS if chips > 1]
EVERYWHERE = PartitionSpec()
ONE = [(target, chips) for target, chips in CHIPS if chips == 1]
every_mesh = pytest.mark.parametrize(("target", "chips"), CHIPS)
many_chips = pytest.mark.parametrize(("target", "chips"), MANY)


def size(shapes):
    return sum(map(math.prod, shapes.values()))


def specs(tree):
    return {sharding.spec for sharding in jax.tree.leaves(tree)}


def moments(state):
    return optax.tree.get(state, "m"), optax.tree.get(state, "v")


# The rules differ in scalars alone: each is compiled for one chip, and one of them for every mesh.
PASSES = [(name, "a large leaf", *one) for name in OURS for one in ONE]
PASSES += [("nadamw", shapes, *mesh) for shapes in EVERY_SHAPES for mesh in CHIPS]


@pytest.mark.parametrize(("name", "shapes", "target", "chips"), dict.fromkeys(PASSES))
def test_one_pass(name, shapes, target, chips):
    """Every array crosses the memory bus once, in one fusion a leaf, in place, and stays split."""
    shapes = EVERY_SHAPES[shapes]
    step = compiled_step(OURS[name], shapes, mesh_of(target, chips))
    assert traffic(step) == 28 * size(shapes) // chips
    assert kernels(step) == {"fusion": len(shapes)}
    assert not collectives(step)
    memory, (params, state) = step.memory_analysis(), step.output_shardings
    assert memory.temp_size_in_bytes <= len(shapes) * A_LEAF[target]
    assert memory.alias_size_in_bytes >= 12 * size(shapes) // chips
    assert in_place(step) == len(jax.tree.leaves((params, state))) - (name in WITHOUT_PRODUCT)
    assert chips == 1 or specs((params, *moments(state))) == {SPLIT}
    if target == "tpu" and shapes is LARGE:  # where XLA counts the same and some scalars
        assert 0 <= step.cost_analysis()["bytes accessed"] - 28 * size(LARGE) // chips < SCALARS


@many_chips
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jitted_init(dtype, target, chips):
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SEVERAL.items()}
    init: Any = jax.jit(OURS["nadamw"].init).lower(laid_out(params, mesh_of(target, chips), SPLIT)).compile()
    assert specs(moments(init.output_shardings)) == {SPLIT}
    assert init.memory_analysis().output_size_in_bytes < 8 * size(SEVERAL) / chips + 4096
    assert not collectives(init)


@every_mesh
def test_bfloat16_params(target, chips):
    step = compiled_step(OURS["nadamw"], LARGE, mesh_of(target, chips), jnp.bfloat16)
    assert traffic(step) == 22 * size(LARGE) // chips
    assert kernels(step) == {"fusion": 1}
    assert step.memory_analysis().temp_size_in_bytes <= A_LEAF[target]


NARROW: dict[str, Any] = {name: {"m_dtype": name, "v_dtype": name} for name in ("bfloat16", "int8")}
MATRICES = {"w": (4096, 8192), "u": (1024, 1024)}
# Of one chip, what the second moves test_compensated shows too.
LEAVES = [pytest.param(*mesh, LARGE, jnp.float32) for mesh in CHIPS]
LEAVES += [pytest.param(*mesh, MATRICES, jnp.bfloat16) for mesh in MANY]
LEAVES += [pytest.param(*mesh, MATRICES, jnp.bfloat16, marks=pytest.mark.long) for mesh in ONE]
wide_and_narrow = pytest.mark.parametrize(("target", "chips", "shapes", "dtype"), LEAVES)


@wide_and_narrow
def test_bfloat16_moments(target, chips, shapes, dtype):
    """One pass."""
    step = compiled_step(optax_nadam.nadamw(1e-3, **NARROW["bfloat16"]), shapes, mesh_of(target, chips), dtype)
    expected = 20 if dtype == jnp.float32 else 14
    assert 0.9 * expected <= traffic(step) / (size(shapes) / chips) <= expected + 0.01  # small shards stay on the chip
    assert set(kernels(step)) == {"fusion"}
    assert not collectives(step)
    assert step.memory_analysis().temp_size_in_bytes <= room(target, shapes, chips)


def room(target, shapes, chips):
    """Temporaries for what is smaller than a leaf."""
    return 0 if target == "tpu" else A_LEAF[target] * len(shapes) + 0.001 * size(shapes) / chips


# Bytes a parameter at most: of traffic with float32 and with bfloat16 params and gradients, and of temporaries.
EIGHT_BITS = {"tpu": (22.3, 17.1, 0.0), "gpu": (29.7, 19.5, 0.75)}


@wide_and_narrow
def test_8_bit_moments(target, chips, shapes, dtype):
    """One pass over gradients and codes for the scales, one for everything else; on GPU two for the scales."""
    step = compiled_step(optax_nadam.nadamw(1e-3, **NARROW["int8"]), shapes, mesh_of(target, chips), dtype)
    wide, narrow, temporaries = EIGHT_BITS[target]
    n = size(shapes) / chips
    if chips < 256:  # there the shards have 32 rows or fewer, and scales of columns count
        assert traffic(step) / n <= (wide if dtype == jnp.float32 else narrow)
        assert step.memory_analysis().temp_size_in_bytes <= temporaries * n
    sent = collectives(step)
    assert sent.get("all-reduce", 0) <= 2
    if (target, chips) == ("gpu", 256):  # of the second leaf each chip has 4 rows, fewer than a window of maxima
        sent.pop("collective-permute", None)
    assert set(sent) == ({"all-reduce"} if chips > 1 else set())


MOST = {"tpu": 22.3, "gpu": 32.7}


@pytest.mark.parametrize(
    ("target", "shape", "most"),
    [
        *(("tpu", shape, MOST["tpu"]) for shape in ((768, 768), (12, 768, 2304), (3, 3, 256, 256))),
        *(("gpu", shape, MOST["gpu"]) for shape in ((1024, 768), (12, 768, 2304))),
        *((target, (2**20,), 22.5) for target in TARGETS),
        *(pytest.param(target, (3072, 768), most, marks=pytest.mark.long) for target, most in MOST.items()),
    ],
)
def test_8_bit_shapes(target, shape, most):
    """Of matrices of a million elements and more on GPU, of all on TPU; on GPU smaller ones are written in float32."""
    step = compiled_step(optax_nadam.nadamw(1e-3, **NARROW["int8"]), {"w": shape}, mesh_of(target, 1))
    assert traffic(step) / math.prod(shape) <= most
    assert step.memory_analysis().temp_size_in_bytes <= (0.4 if target == "gpu" else 0) * math.prod(shape)


@pytest.mark.long
def test_8_bit_gpt2():
    """On a GPU, as a whole."""
    step = compiled_step(optax_nadam.nadamw(1e-3, **NARROW["int8"]), GPT2, mesh_of("gpu", 1))
    assert traffic(step) / size(GPT2) <= 32
    assert step.memory_analysis().temp_size_in_bytes <= 0.1 * size(GPT2)


@pytest.mark.parametrize("name", NARROW)
def test_split_vector(name):
    """The segments of a vector are whole on each chip: nothing is sent."""
    assert not collectives(compiled_step(optax_nadam.nadamw(1e-3, **NARROW[name]), {"b": (8192,)}, mesh_of("tpu", 16)))


REMAINDERS = {"int8": 2, "int16": 4, None: 0}  # bytes a parameter that are read and written
MOMENTS = ("int8", "bfloat16", None)
# Every pair on one chip; on many, each of either once: what is sent depends on the moments alone.
PAIRS = [(remainder, moments) for remainder in REMAINDERS for moments in MOMENTS]
COMPENSATED = [
    pytest.param(*pair, *one, marks=() if "int8" in pair else pytest.mark.long) for pair in PAIRS for one in ONE
]
COMPENSATED += [(*pair, *mesh) for pair in zip(REMAINDERS, MOMENTS, strict=True) for mesh in MANY]


@pytest.mark.lenient("optax.apply_updates adds float32 updates to bfloat16 params")
@pytest.mark.parametrize(("remainder", "moments", "target", "chips"), COMPENSATED)
def test_compensated(remainder, moments, target, chips):
    more = REMAINDERS[remainder]
    inner = optax_nadam.nadamw(1e-3, m_dtype=moments, v_dtype=moments)
    step = compiled_step(
        optax_nadam.compensated(inner, remainder_dtype=remainder), LARGE, mesh_of(target, chips), jnp.bfloat16
    )
    n, narrow = size(LARGE) / chips, moments == "int8"
    of_int8 = {"tpu": 14.1 + more, "gpu": max(20.7, 18.7 + more)}
    expected = of_int8[target] if narrow else more + {None: 22.01, "bfloat16": 14.01}[moments]
    if not narrow or chips < 256:
        assert traffic(step) / n <= expected
        rest = EIGHT_BITS[target][2] * n if narrow else 0
        assert step.memory_analysis().temp_size_in_bytes <= room(target, LARGE, chips) + rest
    assert set(collectives(step)) == ({"all-reduce"} if moments == "int8" and chips > 1 else set())


@every_mesh
def test_diagnostics(target, chips):
    tx, mesh = OURS["nadam, scheduled"], mesh_of(target, chips)

    def step(params, state, grads):
        params, state = whole_step(tx, apply=True)(params, state, grads)
        return params, state, scalars(state, NadamConfig())

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LARGE.items()}
    params, state = (laid_out(tree, mesh, SPLIT) for tree in (params, jax.eval_shape(tx.init, params)))
    logged = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    read = traffic(logged) / (size(LARGE) // chips)
    if target == "tpu":
        assert read == 28 + 12
        assert kernels(logged) == {"fusion": 2}
    else:  # on many, copies of arrays, or one more reading of the moments
        assert 28 < read < 28 + (24.1 if chips > 1 else 12.01)
    assert collectives(logged) == ({"all-reduce": 1} if chips > 1 else {})


# The norm reads the gradients once more, caution gradients and m, the clipping of the update gradients and v. A call
# that accumulates reads and writes mean and params; one that takes a step also params, mean, moments and the update.
@pytest.mark.parametrize(
    ("option", "most", "least"),
    [
        ("clip_global_norm", 28 + 4, 28 + 4),
        ("clip_norm, a leaf", 28 + 4, 28 + 4),
        ("cautious", 28 + 8, 28 + 8),
        ("clip_by_gradient_rms", 28 + 8, 28 + 8),
        ("accumulate_steps", 28 + 28, 28),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_options(target, option, most, least):
    step = compiled_step(options.OPTIONS[option], LARGE, mesh_of(target, 1))
    assert traffic(step) / size(LARGE) == pytest.approx(most, abs=0.01)
    assert traffic(step, branch=min) / size(LARGE) == pytest.approx(least, abs=0.01)
    assert step.memory_analysis().temp_size_in_bytes < 0.01 * size(LARGE)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_gpt2_small(target):
    step = compiled_step(OURS["nadamw"], GPT2, mesh_of(target, 1))
    assert traffic(step) == 28 * size(GPT2)
    assert kernels(step) == {"fusion": 148}
    assert step.memory_analysis().temp_size_in_bytes <= 148 * A_LEAF[target]


# ZeRO-1: whole params on every chip; gradients, as a reduce-scatter leaves them, and moments split.


def zero1(shapes):
    mesh = mesh_of("tpu", 16)
    return compiled_step(gathered(OURS["nadam, scheduled"], mesh), shapes, mesh, params_spec=EVERYWHERE)


def test_zero1_moves():
    """The shard is updated, the update gathered once, with one leaf of temporaries."""
    step, n = zero1(LARGE), size(LARGE)
    # The shard: g, m, v in and u, m, v out; then u gathered from all; then params and u in, params out. The shard of u
    # may stay on the chip between the first two.
    most = 24 * n // 16 + (4 * n // 16 + 4 * n) + 12 * n
    assert most - 2 * 4 * n // 16 <= traffic(step) <= most
    assert kernels(step) == {"fusion": 2, "all-gather": 1}
    memory = step.memory_analysis()
    assert memory.argument_size_in_bytes < 4 * n + 12 * n // 16 + 4096
    assert memory.temp_size_in_bytes < 4 * n + 2**16
    assert in_place(step) == len(jax.tree.leaves(step.output_shardings))


def test_zero1_sends():
    """Each leaf is gathered once, nothing else is sent; the moments stay split and the params whole."""
    step = zero1(SEVERAL)
    assert collectives(step) == {"all-gather": len(SEVERAL)}
    params, state = step.output_shardings
    assert specs(params) == {EVERYWHERE}
    assert specs(moments(state)) == {SPLIT}


def test_zero1_on_gpus():
    """Where the results are pinned: the shard is stepped, 28 bytes an element, and the new params are gathered."""
    mesh, n = mesh_of("gpu", 8), size(LARGE)
    step = compiled_step(OURS["nadam, scheduled"], LARGE, mesh, params_spec=EVERYWHERE, pin=True)
    assert collectives(step) == {"all-gather": 1}
    assert kernels(step)["fusion"] == 1
    # A fusion that reads a slice of the old params is counted as if it read them whole.
    assert traffic(step) == 28 * n // 8 + (4 * n - 4 * n // 8) + (4 * n // 8 + 4 * n)
    assert step.memory_analysis().temp_size_in_bytes < 4 * n // 8 + 2**16
