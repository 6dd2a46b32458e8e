"""Nadam's state: finding it, converting its moments, replacing its values."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import (
    NadamConfig,
    ScaleByNadamState,
    convert_moments,
    get_state,
    nadam,
    nadamw,
    scale_by_nadam,
    set_count,
)
from optax_nadam._quantized import is_quantized
from optax_nadam._tree import map_nodes, nodes_of

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
    return convert_moments(state, m_dtype=None, v_dtype=None)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_a_converted_state_is_one_that_the_other_optimizer_makes_and_continues(rng, of, to):
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
def test_moments_already_in_the_format_are_not_changed(rng, dtype):
    _, state = a_state(rng, dtype)
    chex.assert_trees_all_equal(convert_moments(state, m_dtype=dtype, v_dtype=dtype), state)


def test_to_a_wider_format_and_back_is_the_same_within_the_codes(rng):
    """The scale of a row may change with its largest element, so codes may change by one."""
    _, state = a_state(rng, "int8")
    back = convert_moments(convert_moments(state, m_dtype=None, v_dtype=None), m_dtype="int8", v_dtype="int8")
    for a, b in zip(*(jax.tree.leaves((s.m["w"].codes, s.v["w"].codes)) for s in (state, back)), strict=True):
        assert np.max(np.abs(a.astype(jnp.int32) - b.astype(jnp.int32))) <= 1


def test_rounding_is_unbiased(rng):
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
    chex.assert_trees_all_equal(convert_moments(state, m_dtype=None, v_dtype=None), state)


def test_bad_arguments():
    state = scale_by_nadam().init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"v_dtype must be None, int8, .*got 'int4'"):
        convert_moments(state, m_dtype=None, v_dtype="int4")
    with pytest.raises(ValueError, match=r"must hold a ScaleByNadamState, but holds none\. Pass what"):
        convert_moments(optax.adam(0.1).init(jnp.ones(3)), m_dtype=None, v_dtype=None)


@pytest.mark.parametrize("given", [{"m_dtype": "int8"}, {"v_dtype": None}])
def test_both_formats_are_required(given):
    state = scale_by_nadam().init(jnp.ones(3))
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument"):
        convert_moments(state, **given)


def inside_everything(tx):
    """An optimizer inside wrappers of every shape: tuples, dicts, records within records."""
    injected = optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(
        scale=optax.constant_schedule(1.0)
    )
    labels = {"a": "ours", "b": "theirs"}
    parts = optax.partition({"ours": injected, "theirs": optax.adam(optax.constant_schedule(0.1))}, labels)
    return optax.MultiSteps(optax.chain(optax.clip(1.0), parts), 2).gradient_transformation()


PARAMS = {"a": jnp.ones((32, 64)), "b": jnp.ones(3)}


def test_nodes_are_found_inside_one_another_and_in_order():
    state = inside_everything(nadam(optax.constant_schedule(0.1))).init(PARAMS)
    kinds = (optax.MultiStepsState, optax.InjectStatefulHyperparamsState, ScaleByNadamState, optax.ScaleByScheduleState)
    names = [type(node).__name__ for node in nodes_of(state, kinds)]
    assert names == [
        *("MultiStepsState", "InjectStatefulHyperparamsState", "ScaleByNadamState"),
        *("ScaleByScheduleState", "ScaleByScheduleState"),
    ]


def test_nodes_are_replaced_inside_one_another_and_all_else_is_the_same():
    state = inside_everything(nadam()).init(PARAMS)
    seen = []

    def note(node):
        seen.append(type(node).__name__)
        return node

    replaced = map_nodes(note, state, (ScaleByNadamState, optax.MultiStepsState))
    assert seen == ["ScaleByNadamState", "MultiStepsState"]
    chex.assert_trees_all_equal(replaced, state)


@pytest.mark.parametrize(("number", "tx"), [(0, optax.adam(0.1)), (2, optax.chain(nadam(), nadam()))])
def test_there_must_be_one_state(number, tx):
    with pytest.raises(ValueError, match=f"opt_state must hold one ScaleByNadamState, but holds {number}"):
        get_state(tx.init(PARAMS))


def after(tx, steps):
    """The state after so many steps with the params as gradients."""
    return jax.lax.fori_loop(0, steps, lambda _, state: tx.update(PARAMS, state, PARAMS)[1], tx.init(PARAMS))


@pytest.mark.lenient("Optax's schedules mix dtypes")
@pytest.mark.parametrize("rule", ["scheduled", "constant", "loss_scaled"])
def test_set_count_sets_what_so_many_steps_would_have_set(rule):
    config = NadamConfig(rule=rule, b1=0.8, momentum_decay=0.3)
    tx = inside_everything(config.build(optax.linear_schedule(0.1, 0.0, 100)))
    ran = after(tx, 2 * 9)
    moved = set_count(tx.init(PARAMS), jnp.int32(9), config)
    np.testing.assert_allclose(get_state(moved).mu_product, get_state(ran).mu_product, rtol=1e-6)
    counters = {path: x for path, x in jax.tree_util.tree_leaves_with_path(moved) if is_counter(path)}
    of_adam = [path for path in counters if ("theirs" in jax.tree_util.keystr(path)) and counters[path] == 0]
    assert len(of_adam) == 1  # its own count, not that of its schedule
    then = dict(jax.tree_util.tree_leaves_with_path(ran))
    assert {int(x) for path, x in counters.items() if path not in of_adam} == {9}
    assert all(then[path] == 9 for path in counters)


def is_counter(path):
    return jax.tree_util.keystr(path[-1:]) in (".count", ".gradient_step")


def test_set_count_leaves_narrow_moments_as_they_are(rng):
    _, state = a_state(rng, "int8")
    moved = set_count(state, 1000, NadamConfig())
    chex.assert_trees_all_equal((moved.m, moved.v), (state.m, state.v))


def test_a_count_beyond_int32_is_the_largest():
    state = set_count(nadam().init(PARAMS), 3_000_000_000, NadamConfig())
    assert get_state(state).count == 2**31 - 1
    assert get_state(state).mu_product == 0


@pytest.mark.parametrize(
    ("count", "kind", "text"),
    [(-1, ValueError, "count must not be negative, got -1"), (1.5, TypeError, "count must be a whole number, got 1.5")],
)
def test_counts_that_no_run_has(count, kind, text):
    with pytest.raises(kind, match=text):
        set_count(nadam().init(PARAMS), count, NadamConfig())
