"""From one format of the moments to another, in the middle of a run."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import convert_moments, nadamw, scale_by_nadam
from optax_nadam._quantized import is_quantized

FORMATS = [None, "bfloat16", "int8"]


def a_state(rng, dtype=None, steps=5):
    params = {
        "w": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32),
        "b": jnp.ones(7),
        "z": jnp.ones(3, jnp.complex64),
    }
    tx = scale_by_nadam(m_dtype=dtype, v_dtype=dtype)
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(params, state)
    return params, state


def numbers(state):
    return convert_moments(state)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_a_converted_state_is_one_that_the_other_optimizer_makes_and_goes_on_with(rng, of, to):
    params, state = a_state(rng, of)
    converted = convert_moments(state, m_dtype=to, v_dtype=to)
    tx = scale_by_nadam(m_dtype=to, v_dtype=to)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, tx.init(params))
    chex.assert_trees_all_equal((converted.count, converted.mu_product), (state.count, state.mu_product))
    tolerance = {None: 0.0, "bfloat16": 2.0**-7, "int8": 4.1 / 127}[to]
    for before, after in zip(jax.tree.leaves(numbers(state)), jax.tree.leaves(numbers(converted)), strict=True):
        assert np.max(np.abs(after - before)) <= tolerance * np.max(np.abs(before))
    u, _ = tx.update(params, converted)
    chex.assert_trees_all_equal_shapes_and_dtypes(u, params)


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_has_the_format_stays_as_it_is(rng, dtype):
    _, state = a_state(rng, dtype)
    chex.assert_trees_all_equal(convert_moments(state, m_dtype=dtype, v_dtype=dtype), state)


def test_to_a_wider_format_and_back_is_the_same_within_the_codes(rng):
    """The largest of a row need not be its scale any more, so codes may move, by one."""
    _, state = a_state(rng, "int8")
    back = convert_moments(convert_moments(state), m_dtype="int8", v_dtype="int8")
    for a, b in zip(*(jax.tree.leaves((s.m["w"].codes, s.v["w"].codes)) for s in (state, back)), strict=True):
        assert np.max(np.abs(a.astype(jnp.int32) - b.astype(jnp.int32))) <= 1


def test_rounding_is_right_in_the_mean(rng):
    state = scale_by_nadam().init(jnp.ones((256, 256)))
    value = jnp.asarray(rng.uniform(0.3, 0.31, size=(256, 256)), jnp.float32)
    state = state._replace(count=jnp.int32(7), m=value, v=value)
    for dtype in ("bfloat16", "int8"):
        back = numbers(convert_moments(state, m_dtype=dtype, v_dtype=dtype))
        for moment in (back.m, back.v):
            assert abs(np.mean(moment - value)) < 5 * 0.01 / 256
        assert not np.array_equal(back.m - value, back.v - value)


@pytest.mark.lenient("Optax's schedule and clipping mix dtypes")
def test_states_are_found_at_any_depth_and_all_else_is_kept(rng):
    params = {"a": jnp.ones((32, 64)), "b": jnp.ones((64, 32))}
    parts = {name: nadamw(optax.linear_schedule(0.1, 0.0, 10)) for name in params}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, {name: name for name in params}))
    _, state = tx.update(params, tx.init(params), params)
    converted = jax.jit(lambda s: convert_moments(s, m_dtype="int8", v_dtype="int8"))(state)
    found = [node for node in jax.tree.leaves(converted, is_quantized) if is_quantized(node)]
    assert len(found) == 4
    counters = [[x for path, x in optax.tree.get_all_with_path(s, "count")] for s in (state, converted)]
    chex.assert_trees_all_equal(*counters)


@pytest.mark.x64
def test_float64_moments_stay_so_by_default():
    state = scale_by_nadam().init({"w": jnp.ones((32, 64), jnp.float64), "n": jnp.ones(3, jnp.float32)})
    chex.assert_trees_all_equal(convert_moments(state), state)


def test_bad_arguments():
    state = scale_by_nadam().init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"v_dtype must be None, int8, .*got 'int4'"):
        convert_moments(state, v_dtype="int4")
    with pytest.raises(ValueError, match="must hold a ScaleByNadamState, but holds none"):
        convert_moments(optax.adam(0.1).init(jnp.ones(3)))
