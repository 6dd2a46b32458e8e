"""What a step costs on TPUs and GPUs, read from the programs compiled for them."""

import functools
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
    instructions,
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
ROWS = {"tpu": 0, "gpu": 64}  # and for each of its rows, where moments are bytes
SCALES = {"tpu": 0.01, "gpu": 0.02}  # traffic of the scales, bytes a parameter at most
OF_SCALES = {"tpu": {"fusion", "convert"}, "gpu": {"fusion", "copy"}}  # kernels beside those of the leaves
EVERY_SHAPES = {"a large leaf": LARGE, "several leaves": SEVERAL}
CHIPS = [(target, chips) for target, kind in TARGETS.items() for chips in kind.topologies]
MANY = [(target, chips) for target, chips in CHIPS if chips > 1]
EVERYWHERE = PartitionSpec()
CASES = [
    pytest.param(name, shapes, *on, id=f"{name}, {what}, {on[1]} on {on[0]}")
    for name in OURS
    for what, shapes in EVERY_SHAPES.items()
    for on in CHIPS
]
every_case = pytest.mark.parametrize(("name", "shapes", "target", "chips"), CASES)
every_mesh = pytest.mark.parametrize(("target", "chips"), CHIPS)
many_chips = pytest.mark.parametrize(("target", "chips"), MANY)


def size(shapes):
    return sum(map(math.prod, shapes.values()))


@functools.cache
def _compiled(name, leaves, target, chips):
    return compiled_step(OURS[name], dict(leaves), mesh_of(target, chips))


def compiled(name, shapes, target, chips):
    return _compiled(name, tuple(shapes.items()), target, chips)


@every_case
def test_every_array_crosses_the_memory_bus_once(name, shapes, target, chips):
    assert traffic(compiled(name, shapes, target, chips)) == 28 * size(shapes) // chips


@pytest.mark.parametrize("chips", TARGETS["tpu"].topologies)
@pytest.mark.parametrize("name", OURS)
def test_xla_counts_the_same_bytes_and_some_scalars(name, chips):
    accessed = compiled(name, LARGE, "tpu", chips).cost_analysis()["bytes accessed"]
    assert 0 <= accessed - 28 * size(LARGE) // chips < SCALARS


@every_case
def test_one_fusion_a_leaf_and_no_collective(name, shapes, target, chips):
    step = compiled(name, shapes, target, chips)
    assert kernels(step) == {"fusion": len(shapes)}
    assert not collectives(step)


@every_case
def test_no_temporary_of_an_array_and_every_array_updated_in_place(name, shapes, target, chips):
    step = compiled(name, shapes, target, chips)
    memory, results = step.memory_analysis(), len(jax.tree.leaves(step.output_shardings))
    assert memory.temp_size_in_bytes <= len(shapes) * A_LEAF[target]
    assert memory.alias_size_in_bytes >= 12 * size(shapes) // chips
    assert in_place(step) == results - (name in WITHOUT_PRODUCT)


def specs(tree):
    return {sharding.spec for sharding in jax.tree.leaves(tree)}


def moments(state):
    return optax.tree.get(state, "m"), optax.tree.get(state, "v")


@pytest.mark.parametrize("shapes", EVERY_SHAPES.values(), ids=EVERY_SHAPES)
@many_chips
@pytest.mark.parametrize("name", OURS)
def test_params_and_moments_stay_split(name, target, chips, shapes):
    params, state = compiled(name, shapes, target, chips).output_shardings
    assert specs((params, *moments(state))) == {SPLIT}


@many_chips
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_jitted_init_makes_the_moments_where_the_params_are(dtype, target, chips):
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SEVERAL.items()}
    init: Any = jax.jit(OURS["nadamw"].init).lower(laid_out(params, mesh_of(target, chips), SPLIT)).compile()
    assert specs(moments(init.output_shardings)) == {SPLIT}
    assert init.memory_analysis().output_size_in_bytes < 8 * size(SEVERAL) / chips + 4096
    assert not collectives(init)


@every_mesh
def test_bfloat16_params_and_gradients_with_float32_moments(target, chips):
    step = compiled_step(OURS["nadamw"], LARGE, mesh_of(target, chips), jnp.bfloat16)
    assert traffic(step) == 22 * size(LARGE) // chips
    assert kernels(step) == {"fusion": 1}
    assert step.memory_analysis().temp_size_in_bytes <= A_LEAF[target]


def room(shapes, target, chips):
    """For what is smaller than a leaf: the scales, one a row."""
    return sum(A_LEAF[target] + ROWS[target] * math.prod(shape[:-1]) // chips for shape in shapes.values())


NARROW: dict[str, Any] = {name: {"m_dtype": name, "v_dtype": name} for name in ("bfloat16", "int8")}
MATRICES = {"w": (8192, 8192), "u": (1024, 4096)}
EXPECTED = {"bfloat16": {jnp.float32: 20, jnp.bfloat16: 14}, "int8": {jnp.float32: 22, jnp.bfloat16: 14}}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_mesh
@pytest.mark.parametrize("shapes", [LARGE, MATRICES], ids=["a large leaf", "two leaves"])
def test_narrow_moments_need_no_kernel_of_their_own(target, chips, shapes, dtype, name):
    """bfloat16: one pass. int8: one over the gradients and codes for the scales, one for everything else."""
    step = compiled_step(optax_nadam.nadamw(1e-3, **NARROW[name]), shapes, mesh_of(target, chips), dtype)
    expected = EXPECTED[name][dtype]
    assert (
        0.9 * expected <= traffic(step) / (size(shapes) / chips) <= expected + SCALES[target]
    )  # small shards stay on the chip
    assert set(kernels(step)) <= OF_SCALES[target]
    assert not collectives(step)
    assert step.memory_analysis().temp_size_in_bytes <= room(shapes, target, chips)


def test_a_row_of_bytes_over_several_chips_agrees_on_its_scales_and_nothing_else():
    """A vector is one row: only the maxima of m and v are exchanged."""
    mesh = mesh_of("tpu", 16)
    step = compiled_step(optax_nadam.nadamw(1e-3, **NARROW["int8"]), {"b": (8192,)}, mesh)
    assert collectives(step) == {"all-reduce": 1}
    assert "all-reduce" not in {x.operation for x in instructions(step)}  # scalars, not arrays
    assert not collectives(compiled_step(optax_nadam.nadamw(1e-3, **NARROW["bfloat16"]), {"b": (8192,)}, mesh))


@pytest.mark.lenient("optax.apply_updates adds float32 updates to bfloat16 params")
@every_mesh
@pytest.mark.parametrize(("remainder", "more"), [("int8", 2), ("int16", 4), (None, 0)])
@pytest.mark.parametrize(("moments", "expected"), [(None, 22), ("bfloat16", 14), ("int8", 14)])
def test_compensated_weights_cost_the_bytes_they_store_and_no_more(remainder, more, moments, expected, target, chips):
    inner = optax_nadam.nadamw(1e-3, m_dtype=moments, v_dtype=moments)
    step = compiled_step(
        optax_nadam.compensated(inner, remainder_dtype=remainder), LARGE, mesh_of(target, chips), jnp.bfloat16
    )
    assert 0.9 * (expected + more) <= traffic(step) / (size(LARGE) / chips) <= expected + more + SCALES[target]
    assert step.memory_analysis().temp_size_in_bytes <= room(LARGE, target, chips)
    assert not collectives(step)


@every_mesh
def test_diagnostics_read_gradients_and_moments_once_more_and_send_sums(target, chips):
    tx, mesh = OURS["nadam, scheduled"], mesh_of(target, chips)

    def step(params, state, grads):
        params, state = whole_step(tx, apply=True)(params, state, grads)
        return params, state, scalars(state, NadamConfig(), grads)

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
def test_options_read_what_they_need_once_more_and_store_nothing(target, option, most, least):
    step = compiled_step(options.OPTIONS[option], LARGE, mesh_of(target, 1))
    assert traffic(step) / size(LARGE) == pytest.approx(most, abs=0.01)
    assert traffic(step, branch=min) / size(LARGE) == pytest.approx(least, abs=0.01)
    assert step.memory_analysis().temp_size_in_bytes < 0.01 * size(LARGE)


@pytest.mark.parametrize("target", TARGETS)
def test_the_leaves_of_gpt2_small_take_a_fusion_each(target):
    step = compiled_step(OURS["nadamw"], GPT2, mesh_of(target, 1))
    assert traffic(step) == 28 * size(GPT2)
    assert kernels(step) == {"fusion": 148}
    assert step.memory_analysis().temp_size_in_bytes <= 148 * A_LEAF[target]


# ZeRO-1: whole params on every chip; gradients, as a reduce-scatter leaves them, and moments split.


def zero1(shapes):
    mesh = mesh_of("tpu", 16)
    return compiled_step(gathered(OURS["nadam, scheduled"], mesh), shapes, mesh, params_spec=EVERYWHERE)


def test_zero1_updates_the_shard_and_gathers_once():
    step, n = zero1(LARGE), size(LARGE)
    # The shard: g, m, v in and u, m, v out; then u gathered from all; then params and u in, params out. The shard of u
    # may stay on the chip between the first two.
    most = 24 * n // 16 + (4 * n // 16 + 4 * n) + 12 * n
    assert most - 2 * 4 * n // 16 <= traffic(step) <= most
    assert kernels(step) == {"fusion": 2, "all-gather": 1}


def test_zero1_gathers_once_a_leaf_and_nothing_else_is_sent():
    assert collectives(zero1(SEVERAL)) == {"all-gather": len(SEVERAL)}


def test_zero1_keeps_the_moments_split_and_the_params_whole():
    params, state = zero1(SEVERAL).output_shardings
    assert specs(params) == {EVERYWHERE}
    assert specs(moments(state)) == {SPLIT}


def test_zero1_needs_one_leaf_of_temporaries():
    step, n = zero1(LARGE), size(LARGE)
    memory = step.memory_analysis()
    assert memory.argument_size_in_bytes < 4 * n + 12 * n // 16 + 4096
    assert memory.temp_size_in_bytes < 4 * n + 2**16
    assert in_place(step) == len(jax.tree.leaves(step.output_shardings))


def test_zero1_on_gpus_gathers_the_params_and_needs_no_update_of_a_whole_leaf():
    """Where the results are pinned: the shard is stepped, 28 bytes an element, and the new params are gathered."""
    mesh, n = mesh_of("gpu", 8), size(LARGE)
    step = compiled_step(OURS["nadam, scheduled"], LARGE, mesh, params_spec=EVERYWHERE, pin=True)
    assert collectives(step) == {"all-gather": 1}
    assert kernels(step)["fusion"] == 1
    # A fusion that reads a slice of the old params is counted as if it read them whole.
    assert traffic(step) == 28 * n // 8 + (4 * n - 4 * n // 8) + (4 * n // 8 + 4 * n)
    assert step.memory_analysis().temp_size_in_bytes < 4 * n // 8 + 2**16
