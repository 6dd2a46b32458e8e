"""Putting a count or a state into another one.

- ``set_count`` sets what as many steps would have set, and no other counter.
- ``set_state`` takes any state that holds a Nadam's, whatever its containers have become, into any format: exact where
  the format is wide or the same, else within one code, unbiased.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import (
    NadamConfig,
    convert_moments,
    get_state,
    nadam,
    nadamw,
    scale_by_nadam,
    set_count,
    set_state,
)
from tests.helpers import inside_everything

FORMATS = [None, "bfloat16", "int8"]


def stepped(tx, params, steps=5):
    """The state after as many steps."""

    @jax.jit
    def run(params):
        return jax.lax.fori_loop(0, steps, lambda _, state: tx.update(params, state, params)[1], tx.init(params))

    return run(params)


@pytest.fixture
def params(rng):
    return {
        "embed": rng.normal(size=(40, 64)).astype(np.float32),
        "blocks": [{"bias": np.ones(3, np.float32)}, None],
        "z": np.full(3, 1 + 2j, np.complex64),
    }


@jax.jit
def numbers(opt_state):
    return get_state(convert_moments(opt_state, m_dtype=None, v_dtype=None))


def as_restored(tree: Any, sequence: Callable[[list[Any]], Any]) -> Any:
    """What a file has kept of it: names, and of tuples and lists the order."""
    if hasattr(tree, "_fields"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        return {name: as_restored(x, sequence) for name, x in tree.items()} or None
    if isinstance(tree, tuple | list):
        return sequence([as_restored(x, sequence) for x in tree])
    return tree


# Orbax restores lists, Flax dicts by number.
SEQUENCES: dict[str, Any] = {"lists": list, "dicts": lambda children: {str(i): x for i, x in enumerate(children)}}


def test_set_state_copies(params):
    """What is donated afterwards is not the state that it was made of, and arrays of NumPy become JAX's."""
    tx = nadam(**EIGHT)
    state, fresh = stepped(tx, params), jax.jit(tx.init)(params)
    for source in (state, jax.device_get(state)):
        loaded = set_state(fresh, source)
        for x in jax.tree.leaves(loaded):
            assert isinstance(x, jax.Array)
            x.delete()
    chex.assert_trees_all_equal(state, jax.device_get(state))


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", [None, "int8"])
def test_set_state(params, of, to):
    """A record, an optimizer state and what was restored of it are one; the count sets all schedules."""
    old, new = nadam(m_dtype=of, v_dtype=of), nadamw(optax.linear_schedule(0.1, 0.0, 100), m_dtype=to, v_dtype=to)
    state, fresh = stepped(old, params), jax.jit(new.init)(params)
    loaded = set_state(fresh, get_state(state))
    for same in (state, *(as_restored(state, sequence) for sequence in SEQUENCES.values())):
        chex.assert_trees_all_equal(set_state(fresh, same), loaded)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, fresh)
    assert [x for _, x in optax.tree.get_all_with_path(loaded, "count")] == [5, 5]
    got, expected = numbers(loaded), numbers(state)
    chex.assert_trees_all_equal(got[:2], expected[:2])
    if to in (None, of):
        chex.assert_trees_all_equal((got, get_state(loaded)), (expected, get_state(loaded) if to is None else state[0]))
    tolerance = {None: 0.0, "bfloat16": 2.0**-7, "int8": 4.1 / 127}[to]
    for x, y in zip(*map(jax.tree.leaves, jax.device_get((got, expected))), strict=True):
        assert np.max(np.abs(x - y)) <= tolerance * np.max(np.abs(y))


def test_set_state_masked(params):
    mask = {"embed": True, "blocks": False, "z": False}
    tx, plain = optax.masked(nadam(m_dtype="int8"), mask), nadam(m_dtype="int8")
    state, fresh = stepped(tx, params), jax.jit(tx.init)(params)
    chex.assert_trees_all_equal(set_state(fresh, state), state)
    chex.assert_trees_all_equal(set_state(fresh, as_restored(state, list)), state)
    chex.assert_trees_all_equal(
        get_state(set_state(plain.init({"embed": params["embed"]}), as_restored(state, list))).scales,
        get_state(state).scales,
    )


def test_grown(params):
    """A vocabulary by rows, a layer by columns, and a leaf that is new; what was there is the same as before."""
    tx = scale_by_nadam(**EIGHT)
    state = stepped(tx, {"embed": params["embed"], "head": params["embed"].T})
    old = numbers(state)

    def grown(moments, mode):
        kwargs: Any = {"mode": mode}
        embed, head = np.pad(moments["embed"], ((0, 8), (0, 0)), **kwargs), np.pad(moments["head"], ((0, 0), (0, 8)))
        return {"embed": embed, "head": head, "new": np.zeros((32, 32), np.float32)}

    m, v = grown(old.m, "constant"), grown(old.v, "mean")
    larger = {"embed": (48, 64), "head": (64, 48), "new": (32, 32)}
    fresh = jax.jit(tx.init)({name: np.ones(shape, np.float32) for name, shape in larger.items()})
    loaded = jax.jit(lambda m, v: set_state(fresh, old._replace(m=m, v=v)))(m, v)
    after = get_state(loaded)
    assert (after.count, after.mu_product) == (old.count, old.mu_product)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, fresh)
    got = numbers(loaded)
    for name, rows, columns in (("embed", 40, 64), ("head", 64, 40)):
        for new, before in ((got.m, old.m), (got.v, old.v)):
            np.testing.assert_allclose(new[name][:rows, :columns], before[name], rtol=1e-6)


def test_average_of_states(params):
    """Unbiased: the mean over 256 equal rows is the mean of the states."""
    tx, m = scale_by_nadam(m_dtype="int8", v_dtype="int8"), np.tile(params["embed"][:1], (256, 1))
    states = [numbers(stepped(tx, {"w": scale * m})) for scale in (1.0, 0.4)]
    mean = jax.tree.map(lambda x, y: ((x + y) / 2).astype(x.dtype), *jax.device_get(states))
    set_moments = jax.jit(lambda m, v: set_state(tx.init({"w": v["w"]}), mean._replace(m=m, v=v)))
    got = numbers(set_moments(mean.m, mean.v))
    for x, y in ((got.m["w"], mean.m["w"]), (got.v["w"], mean.v["w"])):
        error = np.mean(np.asarray(x) - y, axis=0) / np.max(y, axis=0)
        assert np.max(np.abs(error)) < 5 * (2 / 127) / 16


EIGHT = {"m_dtype": "int8", "v_dtype": "int8"}
WEIGHTS = {"w": jnp.ones((32, 64))}
OF_0_2_0 = {
    "count": np.int32(3),
    "mu_product": np.float32(0.1),
    "m": {"w": {"codes": np.ones((32, 64), np.int8), "scale": np.ones(32, jnp.bfloat16)}},
    "v": {"w": {"codes": np.ones((32, 64), np.uint8), "scale": np.ones(32, jnp.bfloat16)}},
}
RECORD = scale_by_nadam().init(WEIGHTS)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (optax.adam(0.1).init(WEIGHTS), "opt_state must hold one ScaleByNadamState, but holds 0"),
        ({"params": WEIGHTS}, "opt_state must hold one ScaleByNadamState, but holds 0"),
        ((RECORD, RECORD), "opt_state must hold one ScaleByNadamState, but holds 2"),
        ([RECORD._asdict()] * 2, "opt_state must hold one ScaleByNadamState, but holds 0"),
        (RECORD._replace(m={"w": jnp.ones((32, 65))}), r"v\['w'\] is .*\(32, 64\) in place of .*\(32, 65\)"),
        (scale_by_nadam().init({"w": jnp.ones((32, 65))}), r"m\['w'\] has shape \(32, 65\), .*\(32, 64\)"),
        (scale_by_nadam().init({"x": jnp.ones((32, 64))}), r"m differ in structure .*missing \['w'\]; unexpected \['x"),
        ({**RECORD._asdict(), "scales": [np.ones(3)]}, "set_state got a state in which scales is 1 arrays"),
        ([OF_0_2_0], r"8-bit moments of optax_nadam 0.2.0.*In 0.2.0, load it, convert_moments\(.*set_state puts it"),
    ],
    ids=range(9),
)
def test_set_misuse(state, text):
    with pytest.raises(ValueError, match=text):
        set_state(scale_by_nadam(**EIGHT).init(WEIGHTS), state)


def test_set_into_none():
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 0"):
        set_state(optax.adam(0.1).init(WEIGHTS), RECORD)


PARAMS = {"a": jnp.ones((32, 64)), "b": jnp.ones(3)}


def counters(opt_state):
    """Those of steps, by their paths."""
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(opt_state)}
    return {path: int(x) for path, x in leaves.items() if path.endswith((".count", ".gradient_step"))}


@pytest.mark.lenient("Optax's schedules mix dtypes")
@pytest.mark.parametrize("rule", ["scheduled", "constant", "loss_scaled"])
def test_all_counters(rule):
    """Those of schedules too; but not that of another optimizer."""
    decay = {"weight_decay": 0.1, "weight_decay_peak_learning_rate": 0.1}  # by a schedule too
    config = NadamConfig(rule=rule, b1=0.8, momentum_decay=0.3, **decay)
    tx = inside_everything(config.build(optax.linear_schedule(0.1, 0.0, 100)))
    ran, fresh = stepped(tx, PARAMS, 18), tx.init(PARAMS)
    then = counters(ran)
    assert set(then.values()) == {9}
    for moved in (set_count(fresh, jnp.int32(9), config), set_state(fresh, ran)):
        np.testing.assert_allclose(get_state(moved).mu_product, get_state(ran).mu_product, rtol=1e-6)
        now = counters(moved)
        (of_adam,) = [path for path, count in now.items() if "theirs" in path and count == 0]  # not of its schedule
        assert now == then | {of_adam: 0}


def test_largest_count():
    """Narrow moments stay; a count beyond int32 is the largest."""
    state = get_state(stepped(nadam(**EIGHT), PARAMS))
    moved = set_count(state, 3_000_000_000, NadamConfig())
    chex.assert_trees_all_equal(moved, state._replace(count=jnp.int32(2**31 - 1), mu_product=jnp.float32(0)))


@pytest.mark.parametrize(
    ("count", "kind", "text"),
    [(-1, ValueError, "count must not be negative, got -1"), (1.5, TypeError, "count must be a whole number, got 1.5")],
)
def test_bad_counts(count, kind, text):
    with pytest.raises(kind, match=text):
        set_count(nadam().init(PARAMS), count, NadamConfig())
