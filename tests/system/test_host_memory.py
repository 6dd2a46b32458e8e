"""A state in host memory, on CPU devices.

- Steps with the state in host memory, in one piece or an entry of the params at a time, are those of a state on the
  device: bit for bit, in float32 and 8 bits, also where it is split over devices.
- A state stays in host memory when it is loaded, converted, given master weights or restored by Orbax.
"""

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
CONFIG = NadamConfig(learning_rate=0.1, rule="constant")
OPTIMIZERS = {
    "float32": nadamw(1e-2),
    "int8": nadamw(1e-2, **INT8),
    "compensated": compensated(nadamw(1e-2, **INT8)),
    "chain and mask": optax.chain(
        optax.masked(nadamw(1e-2, **INT8), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.5, 10)),
    ),
}
SPLIT = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
pytestmark = pytest.mark.lenient("Optax's wrappers and apply_updates mix dtypes")


def test_kinds_of_memory():
    assert (HOST != DEVICE) == ON_CPU


def random_params(rng, dtype=jnp.float32):
    shapes = {"kernel": (64, 128), "layer": {"bias": (128,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def shardings(tree, memory_kind=DEVICE):
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(memory_kind), tree)


def on_host(tree):
    return jax.device_put(tree, shardings(tree, HOST))


def assert_in(memory_kind, tree):
    assert {x.sharding.memory_kind for x in jax.tree.leaves(tree)} == {memory_kind}


def assert_same(got, expected):
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))


def by_entry(tx):
    """An optimizer with a state for each entry of the params."""

    def init(params):
        return {name: tx.init(p) for name, p in params.items()}

    def update(grads, state, params):
        both = {name: tx.update(grads[name], state[name], p) for name, p in params.items()}
        return tuple({name: x[i] for name, x in both.items()} for i in range(2))

    return optax.GradientTransformation(init, update)


WAYS: dict[str, Any] = {"whole": (lambda tx: tx, moved_whole), "by entry": (by_entry, moved_by_leaf)}


def start(name, rng, sharding=None, wrap=lambda tx: tx):
    """Params, state and gradients of five steps, on one device or split."""
    dtype = jnp.bfloat16 if name == "compensated" else jnp.float32
    params, *grads = (jax.device_put(random_params(rng, dtype), sharding) for _ in range(6))
    return params, jax.jit(wrap(OPTIMIZERS[name]).init)(params), grads


def plain_step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def host_step(moved, tx, params, state):
    out = shardings(params), shardings(state, HOST)
    return jax.jit(moved(tx, shardings(state)), donate_argnums=(0, 1), out_shardings=out)


@pytest.mark.parametrize(
    ("name", "way"),
    [("float32", "whole"), ("chain and mask", "whole"), ("compensated", "by entry")],
)
def test_steps(name, way, rng):
    """An entry at a time with 8-bit moments and compensated weights: an entry moves the same whatever is in it."""
    tx, (wrap, moved) = OPTIMIZERS[name], WAYS[way]
    params, state, grads = start(name, rng, wrap=wrap)
    step, from_host = jax.jit(functools.partial(plain_step, wrap(tx))), host_step(moved, tx, params, state)
    kept, moving = (params, state), (jax.tree.map(jnp.copy, params), on_host(state))
    for g in grads:
        kept, moving = step(*kept, g), from_host(*moving, g)
        assert_in(DEVICE, moving[0])
        assert_in(HOST, moving[1])
    assert all(x < 1 for _, x in optax.tree.get_all_with_path(jax.device_get(moving[1]), "mu_product"))
    assert_same(moving, kept)


def test_split_state(rng):
    """An entry at a time."""
    wrap, moved = WAYS["by entry"]
    params, state, (g, *_) = start("int8", rng, SPLIT, wrap)
    expected = jax.device_get(jax.jit(functools.partial(plain_step, wrap(OPTIMIZERS["int8"])))(params, state, g))
    wanted = shardings(state, HOST)
    got = host_step(moved, OPTIMIZERS["int8"], params, state)(params, on_host(state), g)
    assert shardings(got[1], HOST) == wanted
    assert_in(HOST, got[1])
    of_kernel = wanted["kernel"][0]
    assert {x.spec for x in jax.tree.leaves(of_kernel.m)} == {of_kernel.scales[0].spec} == {SPLIT.spec}
    assert_same(got, expected)


def test_clipped_before(rng):
    """Entry by entry, a transformation that needs all leaves is outside."""
    clip, tx = optax.clip_by_global_norm(1.0), OPTIMIZERS["float32"]
    params, state, (g, *_) = start("float32", rng, wrap=by_entry)
    whole = optax.chain(clip, tx)
    expected, _ = plain_step(whole, params, whole.init(params), g)
    clipped, _ = clip.update(g, clip.init(params))
    got, _ = host_step(moved_by_leaf, tx, params, state)(jax.tree.map(jnp.copy, params), on_host(state), clipped)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


# What is done to a state between steps, outside jit.


@pytest.mark.parametrize(("before", "after"), [(None, "int8"), ("int8", "bfloat16")])
def test_converted(before, after, rng):
    params, tx = random_params(rng), nadamw(m_dtype=before, v_dtype=before)
    state = jax.jit(lambda params: tx.update(params, tx.init(params), params)[1])(params)
    got = optax_nadam.convert_moments(on_host(state), m_dtype=after, v_dtype=after)
    assert_in(HOST, got)
    assert_same(got, optax_nadam.convert_moments(state, m_dtype=after, v_dtype=after))


def test_converted_and_split(rng):
    _, state, _ = start("float32", rng, SPLIT)
    got = optax_nadam.convert_moments(on_host(state), **INT8)
    assert got[0].m["kernel"].sharding == SPLIT.with_memory_kind(HOST)
    assert_in(HOST, got)


@pytest.mark.parametrize("remainder", ["int8", None])
def test_master_params(remainder, rng):
    weights, tx = random_params(rng), compensated(nadamw(), remainder_dtype=remainder)
    state = tx.init(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
    expected = optax_nadam.set_master_params(state, weights)
    params, loaded = optax_nadam.set_master_params(on_host(state), weights)
    assert_in(HOST, loaded)
    assert_in(DEVICE, params)
    assert_same((params, loaded), expected)
    master = optax_nadam.master_params(loaded, params)
    assert_in(DEVICE, master)
    assert_same(master, optax_nadam.master_params(expected[1], expected[0]))


@pytest.mark.parametrize("moments", [{}, INT8], ids=["float32", "int8"])
def test_dumped_and_loaded(moments, rng):
    params, tx = random_params(rng), nadamw(rule="constant", **moments)
    state = jax.jit(lambda params: tx.update(params, tx.init(params), params)[1])(params)
    dumped = compat.optax.dump_state(on_host(state), config=CONFIG)
    assert_same(dumped, compat.optax.dump_state(state, config=CONFIG))
    loaded = compat.optax.load_state(on_host(tx.init(params)), dumped, config=CONFIG)
    assert_in(HOST, loaded)
    np.testing.assert_array_equal(loaded[0].m["layer"]["bias"], state[0].m["layer"]["bias"])


@every_optimizer
def test_orbax(name, rng, tmp_path):
    _, state, _ = start(name, rng)
    stored = on_host(state)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), stored)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", stored)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_in(HOST, restored)
    assert_same(restored, state)
