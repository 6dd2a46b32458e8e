"""A state in host memory: the same bits as on the device, and it stays there through loading, formats, checkpoints."""

import functools
from typing import Any

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_nadam
from benchmarks.host_memory import moved_by_leaf, moved_whole
from optax_nadam import NadamConfig, compat, compensated, nadamw

DEVICE = jax.devices("cpu")[0].default_memory().kind
ON_CPU = jax.__version_info__ >= (0, 10, 2)  # before, a program for processors had one kind of memory
HOST = "pinned_host" if ON_CPU else DEVICE
INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
CONFIG = NadamConfig(learning_rate=0.1)
OPTIMIZERS = {
    "float32": nadamw(1e-2),
    "int8": nadamw(1e-2, **INT8),
    "compensated": compensated(nadamw(1e-2, **INT8)),
    "chain and mask": optax.chain(
        optax.masked(nadamw(1e-2, **INT8), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.5, 10)),
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_way = pytest.mark.parametrize("moved", [moved_whole, moved_by_leaf])
pytestmark = pytest.mark.lenient("Optax's wrappers and apply_updates mix dtypes")


def test_host_memory_is_another_memory_where_a_processor_has_one():
    assert (HOST != DEVICE) == ON_CPU


def random_params(rng, dtype=jnp.float32):
    shapes = {"kernel": (64, 128), "table": (16, 64), "layer": {"bias": (128,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def shardings(tree, memory_kind=None):
    placed = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(lambda s: s.with_memory_kind(memory_kind), placed) if memory_kind else placed


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def on_host(tree):
    return jax.device_put(tree, shardings(tree, HOST))


def start(name, rng, mesh=None):
    """Params, state and gradients of five steps, on one device or split over the mesh."""
    dtype = jnp.bfloat16 if name == "compensated" else jnp.float32
    params, *grads = (random_params(rng, dtype) for _ in range(6))
    if mesh:
        params, *grads = jax.device_put([params, *grads], NamedSharding(mesh, PartitionSpec("data")))
    return params, jax.jit(OPTIMIZERS[name].init)(params), grads


def plain_step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def host_step(moved, tx, params, state):
    return jax.jit(
        moved(tx, shardings(state)),
        donate_argnums=(0, 1),
        out_shardings=(shardings(params), shardings(state, HOST)),
    )


@every_way
@every_optimizer
def test_steps_are_those_of_a_state_on_the_device(name, moved, rng):
    tx = OPTIMIZERS[name]
    params, state, grads = start(name, rng)
    step = jax.jit(functools.partial(plain_step, tx))
    from_host = host_step(moved, tx, params, state)
    kept, moving = (params, state), (jax.tree.map(jnp.copy, params), on_host(state))
    for g in grads:
        kept, moving = step(*kept, g), from_host(*moving, g)
        assert kinds(moving[1]) == {HOST}
        assert kinds(moving[0]) == {DEVICE}
    assert optax.tree.get(jax.device_get(moving[1]), "mu_product") < 1
    chex.assert_trees_all_equal(jax.device_get(moving), jax.device_get(kept))


@every_way
def test_a_split_state_stays_split(moved, rng):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params, state, (g, *_) = start("int8", rng, mesh)
    expected = jax.device_get(jax.jit(functools.partial(plain_step, OPTIMIZERS["int8"]))(params, state, g))
    wanted = shardings(state, HOST)
    got = host_step(moved, OPTIMIZERS["int8"], params, state)(params, on_host(state), g)
    assert shardings(got[1]) == wanted
    assert wanted[0].m["kernel"].codes.spec == PartitionSpec("data")
    chex.assert_trees_all_equal(jax.device_get(got), expected)


def test_gradients_clipped_by_their_global_norm_before_the_leaves_take_turns(rng):
    """Leaf by leaf, a transformation that needs all leaves is outside."""
    clip, tx = optax.clip_by_global_norm(1.0), OPTIMIZERS["float32"]
    params, state, (g, *_) = start("float32", rng)
    whole = optax.chain(clip, tx)
    expected, _ = plain_step(whole, params, whole.init(params), g)
    clipped, _ = clip.update(g, clip.init(params))
    got, _ = host_step(moved_by_leaf, tx, params, state)(jax.tree.map(jnp.copy, params), on_host(state), clipped)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


# What is done to a state between steps, outside jit.


@pytest.mark.parametrize("before", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("after", [None, "bfloat16", "int8"])
def test_converted_moments_stay_in_host_memory(before, after, rng):
    params = random_params(rng)
    tx = nadamw(m_dtype=before, v_dtype=before)
    _, state = tx.update(params, tx.init(params), params)
    expected = optax_nadam.convert_moments(state, m_dtype=after, v_dtype=after)
    got = optax_nadam.convert_moments(on_host(state), m_dtype=after, v_dtype=after)
    assert kinds(got) == {HOST}
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))


def test_split_moments_that_are_converted_stay_split(rng):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    _, state, _ = start("float32", rng, mesh)
    got = optax_nadam.convert_moments(on_host(state), **INT8)[0].m["kernel"]
    assert got.codes.sharding == NamedSharding(mesh, PartitionSpec("data"), memory_kind=HOST)
    assert kinds(got) == {HOST}


@pytest.mark.parametrize("remainder", ["int8", "int16", None])
def test_master_params_are_on_the_device_and_the_remainders_in_host_memory(remainder, rng):
    weights = random_params(rng)
    tx = compensated(nadamw(), remainder_dtype=remainder)
    state = tx.init(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
    expected = optax_nadam.set_master_params(state, weights)
    params, loaded = optax_nadam.set_master_params(on_host(state), weights)
    assert kinds(loaded) == {HOST}
    assert kinds(params) == {DEVICE}
    chex.assert_trees_all_equal(jax.device_get((params, loaded)), jax.device_get(expected))
    master = optax_nadam.master_params(loaded, params)
    assert kinds(master) == {DEVICE}
    chex.assert_trees_all_equal(master, optax_nadam.master_params(expected[1], expected[0]))


@pytest.mark.parametrize("moments", [{}, INT8], ids=["float32", "int8"])
def test_a_state_is_loaded_into_host_memory_and_dumped_from_there(moments, rng):
    params = random_params(rng)
    tx = nadamw(**moments)
    _, state = tx.update(params, tx.init(params), params)
    dumped = compat.optax.dump_state(on_host(state), config=CONFIG)
    chex.assert_trees_all_equal(jax.device_get(dumped), jax.device_get(compat.optax.dump_state(state, config=CONFIG)))
    loaded = compat.optax.load_state(on_host(tx.init(params)), dumped, config=CONFIG)
    assert kinds(loaded) == {HOST}
    np.testing.assert_array_equal(loaded[0].m["layer"]["bias"], state[0].m["layer"]["bias"])


@every_optimizer
def test_orbax_restores_into_host_memory(name, rng, tmp_path):
    _, state, _ = start(name, rng)
    stored = on_host(state)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), stored)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", stored)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    assert kinds(restored) == {HOST}
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
