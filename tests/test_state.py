"""Nadam's state: finding it, converting its moments, setting its count.

- ``convert_moments`` takes any format to any other, at any depth; what is in the format already is not changed, and
  rounding is unbiased, within 5 standard errors.
- ``set_count`` sets what as many steps would have set, and no other counter.
"""

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
from tests.helpers import run

FORMATS = [None, "bfloat16", "int8"]
LEAVES = {"w": (32, 64), "b": (7,), "z": (3,)}


def a_state(rng, dtype=None):
    """After five steps."""
    grads = {name: jnp.asarray(rng.normal(size=(5, *shape)), jnp.float32) for name, shape in LEAVES.items()}
    grads["z"] = grads["z"].astype(jnp.complex64)
    return run(scale_by_nadam(m_dtype=dtype, v_dtype=dtype), grads)[0]


def numbers(state):
    return convert_moments(state, m_dtype=None, v_dtype=None)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_convert_moments(rng, of, to):
    """The state is one that the other optimizer makes and continues."""
    state, grads = a_state(rng, of), {name: jnp.ones(shape) for name, shape in LEAVES.items()}
    grads["z"] = grads["z"].astype(jnp.complex64)
    converted, tx = convert_moments(state, m_dtype=to, v_dtype=to), scale_by_nadam(m_dtype=to, v_dtype=to)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, tx.init(grads))
    chex.assert_trees_all_equal((converted.count, converted.mu_product), (state.count, state.mu_product))
    if of == to:
        chex.assert_trees_all_equal(converted, state)
    tolerance = {None: 0.0, "bfloat16": 2.0**-7, "int8": 4.1 / 127}[to]
    for before, after in zip(jax.tree.leaves(numbers(state)), jax.tree.leaves(numbers(converted)), strict=True):
        assert np.max(np.abs(after - before)) <= tolerance * np.max(np.abs(before))
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.update(grads, converted)[0], grads)


def test_back_and_forth(rng):
    """The scale of a row may change with its largest element, so codes may change by one."""
    state = a_state(rng, "int8")
    back = convert_moments(numbers(state), m_dtype="int8", v_dtype="int8")
    for a, b in zip(*(jax.tree.leaves((s.m["w"].codes, s.v["w"].codes)) for s in (state, back)), strict=True):
        assert np.max(np.abs(a.astype(jnp.int32) - b.astype(jnp.int32))) <= 1


def test_convert_unbiased(rng):
    state = scale_by_nadam().init(jnp.ones((256, 256)))
    value = jnp.asarray(rng.uniform(0.3, 0.31, size=(256, 256)), jnp.float32)
    state = state._replace(count=jnp.int32(7), m=value, v=value)
    for dtype in ("bfloat16", "int8"):
        back = jax.jit(lambda s, to=dtype: numbers(convert_moments(s, m_dtype=to, v_dtype=to)))(state)
        for moment in (back.m, back.v):
            assert abs(np.mean(moment - value)) < 5 * 0.01 / 256
        assert not np.array_equal(back.m - value, back.v - value)


@pytest.mark.lenient("Optax's schedule and clipping mix dtypes")
def test_convert_at_any_depth():
    """States are found there, and all else is kept."""
    params = {"a": jnp.ones((32, 64)), "b": jnp.ones((64, 32))}
    parts = {name: nadamw(optax.linear_schedule(0.1, 0.0, 10)) for name in params}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, {name: name for name in params}))
    _, state = tx.update(params, tx.init(params), params)
    converted = jax.jit(lambda s: convert_moments(s, m_dtype="int8", v_dtype="int8"))(state)
    assert sum(map(is_quantized, jax.tree.leaves(converted, is_quantized))) == 4
    counters = [[x for _, x in optax.tree.get_all_with_path(s, "count")] for s in (state, converted)]
    chex.assert_trees_all_equal(*counters)


@pytest.mark.x64
def test_float64_stays():
    """Its moments stay so by default."""
    state = scale_by_nadam().init({"w": jnp.ones((32, 64), jnp.float64), "n": jnp.ones(3, jnp.float32)})
    chex.assert_trees_all_equal(numbers(state), state)
    chex.assert_trees_all_equal_dtypes(numbers(state), state)


@pytest.mark.parametrize(
    ("tx", "formats", "kind", "text"),
    [
        (nadam(), {"m_dtype": None, "v_dtype": "int4"}, ValueError, r"v_dtype must be None, int8, .*got 'int4'"),
        (optax.adam(0.1), {"m_dtype": None, "v_dtype": None}, ValueError, r"hold a ScaleByNadamState, .*none\. Pass"),
        (nadam(), {"m_dtype": "int8"}, TypeError, "missing 1 required keyword-only argument"),
        (nadam(), {"v_dtype": None}, TypeError, "missing 1 required keyword-only argument"),
    ],
)
def test_convert_misuse(tx, formats, kind, text):
    with pytest.raises(kind, match=text):
        convert_moments(tx.init(jnp.ones(3)), **formats)


def inside_everything(tx):
    """An optimizer inside wrappers of every shape: tuples, dicts, records within records."""
    injected = optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(
        scale=optax.constant_schedule(1.0)
    )
    labels = {"a": "ours", "b": "theirs"}
    parts = optax.partition({"ours": injected, "theirs": optax.adam(optax.constant_schedule(0.1))}, labels)
    return optax.MultiSteps(optax.chain(optax.clip(1.0), parts), 2).gradient_transformation()


PARAMS = {"a": jnp.ones((32, 64)), "b": jnp.ones(3)}


def test_nodes_in_nodes():
    """They are found inside one another and in order, and replaced, inner ones first; all else is the same."""
    state = inside_everything(nadam(optax.constant_schedule(0.1))).init(PARAMS)
    multi, injected, schedule = optax.MultiStepsState, optax.InjectStatefulHyperparamsState, optax.ScaleByScheduleState
    found = nodes_of(state, (multi, injected, ScaleByNadamState, schedule))
    assert [type(node) for node in found] == [multi, injected, ScaleByNadamState, schedule, schedule]

    seen = []

    def note(node):
        seen.append(type(node))
        return node

    replaced = map_nodes(note, state, (ScaleByNadamState, multi))
    assert seen == [ScaleByNadamState, multi]
    chex.assert_trees_all_equal(replaced, state)


@pytest.mark.parametrize(("number", "tx"), [(0, optax.adam(0.1)), (2, optax.chain(nadam(), nadam()))])
def test_not_one_state(number, tx):
    with pytest.raises(ValueError, match=f"opt_state must hold one ScaleByNadamState, but holds {number}"):
        get_state(tx.init(PARAMS))


def is_counter(path):
    return jax.tree_util.keystr(path[-1:]) in (".count", ".gradient_step")


@pytest.mark.lenient("Optax's schedules mix dtypes")
@pytest.mark.parametrize("rule", ["scheduled", "constant", "loss_scaled"])
def test_set_count(rule):
    decay = {"weight_decay": 0.1, "weight_decay_peak_learning_rate": 0.1}  # by a schedule too
    config = NadamConfig(rule=rule, b1=0.8, momentum_decay=0.3, **decay)
    tx = inside_everything(config.build(optax.linear_schedule(0.1, 0.0, 100)))
    ran = jax.lax.fori_loop(0, 18, lambda _, state: tx.update(PARAMS, state, PARAMS)[1], tx.init(PARAMS))
    moved = set_count(tx.init(PARAMS), jnp.int32(9), config)
    np.testing.assert_allclose(get_state(moved).mu_product, get_state(ran).mu_product, rtol=1e-6)
    counters, then = (
        {jax.tree_util.keystr(path): int(x) for path, x in jax.tree_util.tree_leaves_with_path(s) if is_counter(path)}
        for s in (moved, ran)
    )
    assert set(then.values()) == {9}
    (of_adam,) = [
        path for path, count in counters.items() if "theirs" in path and count == 0
    ]  # not that of its schedule
    assert counters == then | {of_adam: 0}


def test_largest_count(rng):
    """Narrow moments stay; a count beyond int32 is the largest."""
    state = a_state(rng, "int8")
    moved = set_count(state, 3_000_000_000, NadamConfig())
    chex.assert_trees_all_equal((moved.m, moved.v), (state.m, state.v))
    assert (moved.count, moved.mu_product) == (2**31 - 1, 0)


@pytest.mark.parametrize(
    ("count", "kind", "text"),
    [(-1, ValueError, "count must not be negative, got -1"), (1.5, TypeError, "count must be a whole number, got 1.5")],
)
def test_bad_counts(count, kind, text):
    with pytest.raises(kind, match=text):
        set_count(nadam().init(PARAMS), count, NadamConfig())
