"""Nadam's state: finding it, checking it, converting its moments.

- ``convert_moments`` takes any format to any other, at any depth and by leaf; what is in the format already is not
  changed, and rounding is unbiased, within 5 standard errors.
- A state whose moments and scales do not belong together is refused, by the name of the leaf.
"""

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import (
    QuantizedNadamState,
    ScaleByNadamState,
    convert_moments,
    get_state,
    nadam,
    nadamw,
    scale_by_nadam,
    set_state,
)
from optax_nadam._rounding import RandomBits
from optax_nadam._tree import map_nodes, nodes_of
from tests.helpers import inside_everything, run

FORMATS = [None, "bfloat16", "int8"]
LEAVES = {"w": (32, 64), "b": (7,), "z": (3,)}


def a_state(rng, dtype=None):
    """After five steps."""
    grads = {name: jnp.asarray(rng.normal(size=(5, *shape)), jnp.float32) for name, shape in LEAVES.items()}
    grads["z"] = grads["z"].astype(jnp.complex64)
    return run(scale_by_nadam(m_dtype=dtype, v_dtype=dtype), grads)[0]


@jax.jit
def numbers(state):
    return convert_moments(state, m_dtype=None, v_dtype=None)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_convert_moments(rng, of, to):
    """The state is one that the other optimizer makes and continues."""
    state, grads = a_state(rng, of), {name: np.ones(shape, np.float32) for name, shape in LEAVES.items()}
    grads["z"] = grads["z"].astype(np.complex64)
    converted, tx = convert_moments(state, m_dtype=to, v_dtype=to), scale_by_nadam(m_dtype=to, v_dtype=to)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, jax.eval_shape(tx.init, grads))
    chex.assert_trees_all_equal((converted.count, converted.mu_product), (state.count, state.mu_product))
    tolerance = {None: 0.0, "bfloat16": 2.0**-7, "int8": 4.1 / 127}[to]
    for before, after in zip(*map(jax.tree.leaves, jax.device_get([*map(numbers, (state, converted))])), strict=True):
        assert np.max(np.abs(after - before)) <= tolerance * np.max(np.abs(before))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.update, grads, converted)[0], grads)


def test_back_and_forth(rng):
    """Codes go back to the same codes."""
    state = a_state(rng, "int8")
    chex.assert_trees_all_equal(convert_moments(numbers(state), m_dtype="int8", v_dtype="int8"), state)


@pytest.mark.parametrize("bits", [0, 2**16 - 1])
@pytest.mark.parametrize("dtype", FORMATS)
def test_same_format(rng, dtype, bits, monkeypatch):
    """Nothing changes, whatever the random bits."""
    state = a_state(rng, dtype)
    monkeypatch.setattr(RandomBits, "draw", lambda self, shape: jnp.full(shape, bits, jnp.uint32))
    chex.assert_trees_all_equal(convert_moments(state, m_dtype=dtype, v_dtype=dtype), state)
    chex.assert_trees_all_equal(set_state(state, state), state)


def test_convert_by_leaf(rng):
    """Each leaf as by itself."""
    state, to = a_state(rng, "int8"), {"w": None, "b": "bfloat16", "z": None}
    converted = convert_moments(state, m_dtype=to, v_dtype=lambda path: "int8" if path == "w" else to[path])
    of_b, of_w = convert_moments(state, m_dtype="bfloat16", v_dtype="bfloat16"), numbers(state)
    chex.assert_trees_all_equal(converted.m, {"w": of_w.m["w"], "b": of_b.m["b"], "z": state.m["z"]})
    chex.assert_trees_all_equal(converted.v, {"w": state.v["w"], "b": of_b.v["b"], "z": state.v["z"]})
    chex.assert_trees_all_equal(converted.scales, state.scales[2:])


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
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tx.init(params))
    converted = jax.jit(lambda s: convert_moments(s, m_dtype="int8", v_dtype="int8"))(state)
    assert [len(x.scales) for x in nodes_of(converted, QuantizedNadamState)] == [4, 4]
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


INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
WHOLE = {"w": jnp.ones((32, 64)), "b": jnp.ones(7)}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


# What is changed in an 8-bit state of two leaves, and what the error says of it.
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda s: s._replace(v={"w": s.v["w"]}), "v of the state that {} got differ in structure|missing ['b']"),
    (lambda s: s._replace(v=s.v | {"b": jnp.ones(3)}), "v['b'] is float32, (3,) in place of an array of shape (7,)"),
    (lambda s: s._replace(m=s.v, v=s.m), "m['w'] is uint8, (32, 64) in place of |complex128, int8."),
    (lambda s: s._replace(v=s.m), "v['w'] is int8, (32, 64) in place of |float64, uint8."),
    (lambda s: s._replace(m=cast(s.m, jnp.float16)), "m['b'] is float16, (7,) in place of |float32, bfloat16, float64"),
    (lambda s: cast(s, jnp.int32), "{} got a state in which mu_product is int32 in place of float32|its own dtypes"),
    (lambda s: cast(s, jnp.bfloat16), "count is bfloat16 in place of an integer|convert_moments."),
    (lambda s: ScaleByNadamState(*s[:4]), "scales is 0 arrays in place of 4, two for each leaf of codes"),
    (lambda s: s._replace(scales=s.scales[1:]), "scales is 3 arrays in place of 4"),
    (lambda s: s._replace(scales=(s.scales[0],) * 4), "scales[1] is float32, (32,) in place of float32, (64,)"),
    (lambda s: s._replace(scales=cast(s.scales, jnp.bfloat16)), "scales[0] is bfloat16, (32,) in place of float32"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_state(change, text):
    """Refused by all that read one."""
    tx = scale_by_nadam(**INT8)
    state = change(tx.init(WHOLE))
    readers: dict[str, Callable[[], Any]] = {
        "scale_by_nadam": lambda: tx.update(WHOLE, state),
        "get_state": lambda: get_state((state,)),
        "convert_moments": lambda: convert_moments(state, m_dtype=None, v_dtype=None),
    }
    for name, read in readers.items():
        words = [name, *text.split("|")] if "{}" not in text else text.format(name).split("|")
        with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
            read()


def test_dict_for_state():
    """As it is restored from disk."""
    tx = optax.chain(scale_by_nadam(**INT8))
    (state,) = tx.init(WHOLE)
    with pytest.raises(ValueError, match=r"scale_by_nadam got a state in the form of a dict, .*set_state\(tx.init"):
        tx.update(WHOLE, (state._asdict(),))
