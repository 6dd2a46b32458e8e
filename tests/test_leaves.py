"""The properties of one array: the dtypes it is computed in, zeros laid out like it."""

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import nadamw
from optax_nadam._leaves import (
    abs_squared,
    complex_like,
    compute_dtype,
    dtype_of,
    in_device_memory,
    in_memory_of,
    is_complex,
    zeros_like,
)


@pytest.mark.parametrize(
    ("dtype", "computed", "like_float32"),
    [
        (jnp.float16, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.complex64, jnp.float32, jnp.complex64),
        (np.float64, jnp.float32, jnp.float32),
        (np.complex128, jnp.float32, jnp.complex64),
    ],
)
def test_without_x64_all_is_computed_in_float32(dtype, computed, like_float32):
    leaf = np.ones(3, dtype)
    assert compute_dtype(leaf) == computed
    assert complex_like(jnp.float32, leaf) == like_float32
    assert is_complex(leaf) == (like_float32 == jnp.complex64)


@pytest.mark.x64
def test_with_x64_one_64_bit_leaf_is_enough():
    single, double = jnp.ones(3, jnp.float32), jnp.ones(3, jnp.complex128)
    assert compute_dtype(single) == jnp.float32
    assert compute_dtype(single, double) == jnp.float64
    assert complex_like(jnp.float64, double) == jnp.complex128


def test_what_is_no_number_has_the_dtype_it_says():
    assert dtype_of(jax.ShapeDtypeStruct((2,), jnp.int8)) == jnp.int8
    assert dtype_of(jax.random.key(0)) == jax.random.key(0).dtype
    with pytest.raises(TypeError):
        dtype_of("relu")


def test_numpy_float64_params_give_no_warning_without_x64():
    """Warnings are errors here: ``jnp.zeros_like(p, dtype=p.dtype)`` would give one for each leaf."""
    params = {"w": np.ones((3, 2)), "z": np.ones(3, np.complex128)}
    tx = nadamw(0.1)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state[0].v)} == {jnp.dtype(jnp.float32)}
    tx.update(jax.tree.map(jnp.asarray, params), state, params)


@pytest.mark.parametrize("compiled", [False, True])
def test_zeros_are_zeros_of_nan_and_infinity_too(compiled):
    x = jnp.asarray([1.0, jnp.nan, jnp.inf])
    zeros = (jax.jit if compiled else lambda f: f)(lambda x: zeros_like(x, jnp.int8))(x)
    chex.assert_trees_all_equal(zeros, jnp.zeros(3, jnp.int8))


def test_squares_of_complex_numbers_are_real():
    chex.assert_trees_all_equal(abs_squared(jnp.asarray([3 + 4j], jnp.complex64)), jnp.asarray([25.0], jnp.float32))


def test_an_array_moves_between_memories_only_where_it_is_in_another():
    x = jnp.arange(3.0)
    *_, kind = (memory.kind for memory in jax.devices()[0].addressable_memories())  # the only one before JAX 0.7.2
    there = jax.device_put(x, x.sharding.with_memory_kind(kind))
    assert in_device_memory(x) is x
    assert not in_device_memory(x).committed  # free to move to another device, as before
    assert in_device_memory(there).sharding.memory_kind == x.sharding.memory_kind
    assert in_memory_of(there, x).sharding.memory_kind == kind
    assert in_memory_of(x, x) is x
    assert in_memory_of(np.zeros(3), x) is x
