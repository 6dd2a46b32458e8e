"""The properties of one array: the dtypes it is computed in, zeros laid out like it, the memory it is in."""

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import _leaves, nadamw


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float32, np.float64, np.complex64, np.complex128])
def test_float32_without_x64(dtype):
    """All is computed in it without x64."""
    leaf = np.ones(3, dtype)
    assert _leaves.compute_dtype(leaf) == jnp.float32
    assert _leaves.is_complex(leaf) == (leaf.dtype.kind == "c")
    assert _leaves.complex_like(jnp.float32, leaf) == (jnp.complex64 if leaf.dtype.kind == "c" else jnp.float32)


@pytest.mark.x64
def test_float64_with_x64():
    """One 64-bit leaf is enough."""
    single, double = jnp.ones(3, jnp.float32), jnp.ones(3, jnp.complex128)
    assert _leaves.compute_dtype(single) == jnp.float32
    assert _leaves.compute_dtype(single, double) == jnp.float64
    assert _leaves.complex_like(jnp.float64, double) == jnp.complex128


def test_dtype_of_no_number():
    """What is none has the dtype it says."""
    assert _leaves.dtype_of(jax.ShapeDtypeStruct((2,), jnp.int8)) == jnp.int8
    assert _leaves.dtype_of(jax.random.key(0)) == jax.random.key(0).dtype
    with pytest.raises(TypeError):
        _leaves.dtype_of("relu")


def test_numpy_no_warning():
    """Warnings are errors here: ``jnp.zeros_like(p, dtype=p.dtype)`` would give one for each float64 leaf of NumPy."""
    params = {"w": np.ones((3, 2)), "z": np.ones(3, np.complex128)}
    tx = nadamw(0.1)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state[0].v)} == {jnp.dtype(jnp.float32)}
    tx.update(jax.tree.map(jnp.asarray, params), state, params)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float32])
def test_zeros_of_nan(dtype):
    x = jnp.asarray([1.0, jnp.nan, jnp.inf])
    for zeros in (_leaves.zeros_like(x, dtype), jax.jit(lambda x: _leaves.zeros_like(x, dtype))(x)):
        chex.assert_trees_all_equal(zeros, jnp.zeros(3, dtype))


def test_abs_squared_real():
    chex.assert_trees_all_equal(
        _leaves.abs_squared(jnp.asarray([3 + 4j], jnp.complex64)), jnp.asarray([25.0], jnp.float32)
    )


def test_memory_moves():
    """An array moves only where it is in another."""
    x = jnp.arange(3.0)
    *_, kind = (memory.kind for memory in jax.devices()[0].addressable_memories())  # the only one before JAX 0.7.2
    there = jax.device_put(x, x.sharding.with_memory_kind(kind))
    assert _leaves.in_device_memory(x) is x
    assert not _leaves.in_device_memory(x).committed  # free to move to another device, as before
    assert _leaves.in_device_memory(there).sharding.memory_kind == x.sharding.memory_kind
    assert _leaves.in_memory_of(there, x).sharding.memory_kind == kind
    assert _leaves.in_memory_of(x, x) is x
    assert _leaves.in_memory_of(np.zeros(3), x) is x
