"""Narrow moments in use: the steps they lead to, and that these are the same on any devices and in any wrapper."""

import functools
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_nadam import NadamConfig, Quantized, nadamw, scale_by_nadam
from optax_nadam._moments import decode
from optax_nadam._quantized import is_quantized
from tests.reference import Nadam
from tests.test_rounding import every_nan

NARROW: Any = {name: {"m_dtype": name, "v_dtype": name} for name in ("bfloat16", "int8")}
every_format = pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)


def numbers(tree):
    return jax.tree.map(lambda x: decode(x, jnp.float32), tree, is_leaf=is_quantized)


def trained(tx, grads):
    """The last state and all updates."""
    return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)


@every_format
@pytest.mark.parametrize("rule", ["scheduled", "dozat2016"])
def test_v_decays_and_m_follows(rule, narrow):
    """Rounded to the nearest, v would stay at .196 in bfloat16."""
    grads = jnp.repeat(jnp.asarray([1, 0], jnp.bfloat16), np.array([200, 2000]))
    tx, leaf = scale_by_nadam(rule=rule, **narrow), jnp.zeros((64, 64), jnp.bfloat16)
    state, _ = jax.lax.scan(lambda s, g: (tx.update(leaf + g, s)[1], None), tx.init(leaf), grads)
    v = np.asarray(numbers(state.v), float)
    np.testing.assert_allclose(np.mean(v), (1 - 0.999**200) * 0.999**2000, rtol=0.01)
    assert np.max(np.abs(numbers(state.m))) < 1e-30


@every_format
@pytest.mark.parametrize("rule", ["scheduled", "dozat2016", "loss_scaled", "eps_hat"])
def test_updates_are_unbiased(rng, rule, narrow):
    """Over 4096 equal elements the rounding errors average out; in each they are a few hundredths."""
    g = rng.normal(size=300).astype(np.float32)
    grads = jnp.asarray(np.tile(g[:, None, None], (64, 64)))
    _, updates = trained(scale_by_nadam(rule=rule, **narrow), grads)
    expected, *_ = Nadam(rule).updates(g.astype(float)[:, None, None])
    errors = np.asarray(updates, float) - expected
    bytes_ = narrow is NARROW["int8"]
    for steps in (1, 300):
        error, length = errors[:steps], np.linalg.norm(expected[:steps])
        assert np.linalg.norm(error) < (0.08 if bytes_ else 0.02) * np.sqrt(4096) * length, steps
        assert np.linalg.norm(np.mean(error, axis=(1, 2))) < (2e-2 if bytes_ else 1e-3) * length, steps


def test_bytes_follow_gradients_of_very_different_sizes(rng):
    """In one row, from 1 to 1e-4: each element's v is unbiased, each update has the right length."""
    sizes = np.geomspace(1, 1e-4, 256, dtype=np.float32)
    grads = rng.normal(size=(1500, 64, 256)).astype(np.float32) * sizes
    tx = scale_by_nadam(rule="constant", **NARROW["int8"])
    state, _ = trained(tx, jnp.asarray(grads))
    m, v = np.zeros((64, 256)), np.zeros((64, 256))
    for t, g in enumerate(grads.astype(float), start=1):
        m, v = Nadam("constant").moments(g, m, v, t)
    ratio = np.asarray(numbers(state.v), float) / v
    np.testing.assert_allclose(np.mean(ratio), 1, atol=0.02)
    by_size = np.mean(ratio, axis=0).reshape(8, 32).mean(axis=1)
    np.testing.assert_allclose(by_size, 1, atol=0.1)
    error = np.asarray(numbers(state.m), float) - m
    assert abs(np.mean(error / sizes)) < 0.02


@every_format
def test_a_run_is_the_same_on_any_devices_every_time(rng, narrow):
    """With rows split, with columns split, and whole on every device."""
    tx = nadamw(1e-2, **narrow)
    whole = PartitionSpec()
    specs = {"rows": PartitionSpec("data"), "columns": PartitionSpec(None, "data"), "whole": whole, "few": whole}
    params = {name: jnp.asarray(rng.normal(size=(16, 128)), jnp.bfloat16) for name in specs} | {"few": jnp.ones(16)}

    def run(params):
        state, grads = jax.jit(tx.init)(params), jax.tree.map(lambda p: -p, params)
        for _ in range(5):
            _, state = update(grads, state, params)
        return jax.device_get(state)

    update = jax.jit(tx.update)
    expected = run(params)
    chex.assert_trees_all_equal(run(params), expected)
    for count in (2, 8):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        chex.assert_trees_all_equal(run(jax.device_put(params, shardings)), expected)


@every_nan
@every_format
def test_a_nan_gradient_shows_in_updates_and_moments(narrow, nan):
    """In 8 bits in those of its whole row."""
    tx, grads = scale_by_nadam(**narrow), jnp.ones((32, 64)).at[3, 5].set(nan)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    where = np.zeros((32, 64), bool)
    where[3, slice(None) if is_quantized(state.m) else 5] = True
    for tree in (updates, state.m, state.v):
        np.testing.assert_array_equal(np.isnan(numbers(tree)), where)


@every_format
def test_only_what_is_asked_for_is_narrow(narrow):
    params = {"z": jnp.ones((32, 64), jnp.complex64), "w": jnp.ones((32, 64)), "b": jnp.ones(3)}
    for which in narrow:
        state = scale_by_nadam(**{which: narrow[which]}).init(params)
        narrow_tree, wide_tree = (state.m, state.v) if which == "m_dtype" else (state.v, state.m)
        assert narrow_tree["w"].dtype == jnp.bfloat16  # of the scale, where there is one
        assert is_quantized(narrow_tree["w"]) == (narrow[which] == "int8")
        chex.assert_trees_all_equal_dtypes(
            wide_tree, scale_by_nadam().init(params).m if which == "v_dtype" else state.v
        )
    assert scale_by_nadam(**narrow).init(params).m["z"].dtype == jnp.complex64


@every_format
def test_float32_steps_carry_nothing_of_narrow_formats(narrow):
    """A leaf adds the same one equation to the trace, and float32 ones draw no random bits."""

    def primitives(tx):
        params = jnp.ones((32, 64))
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params)))

    assert "iota" not in primitives(scale_by_nadam())
    assert "iota" in primitives(scale_by_nadam(**narrow))


@pytest.mark.lenient("Optax's wrappers mix dtypes")
@every_format
def test_within_the_wrappers_of_optax(narrow, rng):
    """The state keeps its structure and dtypes, and the loss falls."""
    target = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    params = {"w": jnp.zeros((32, 64)), "frozen": jnp.ones(2)}
    tx = nadamw(0.05, **narrow)
    wrapped = {
        "MultiSteps": optax.MultiSteps(tx, 2),
        "masked": optax.masked(tx, {"w": True, "frozen": False}),
        "partition": optax.partition({"train": tx, "not": optax.set_to_zero()}, {"w": "train", "frozen": "not"}),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "inject": optax.inject_hyperparams(functools.partial(nadamw, **narrow))(learning_rate=0.05),
        "config": NadamConfig(learning_rate=0.05, clip_global_norm=100.0, **narrow).build(),
    }

    def loss(p):
        return jnp.mean((p["w"] - target) ** 2)

    def run(outer, params):
        def step(carry, _):
            params, state = carry
            updates, state = outer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, outer.init(params)), length=200)[0]

    ends = jax.jit(lambda params: {name: run(outer, params) for name, outer in wrapped.items()})(params)
    for name, (end, _) in ends.items():
        assert loss(end) < 0.05 * loss(params), name


def test_a_population_with_bytes(rng):
    """Under vmap each member's rows are its own."""
    params = jnp.asarray(rng.normal(size=(3, 32, 64)), jnp.float32)
    rates = jnp.array([1e-3, 1e-2, 0.1])

    def run(p, b1):
        tx = scale_by_nadam(b1, **NARROW["int8"])
        state = tx.init(p)
        for _ in range(3):
            u, state = tx.update(p, state)
        return u, state

    together = jax.vmap(run)(params, rates)
    for i in range(3):
        alone = jax.jit(run)(params[i], rates[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together[0]), alone[0], rtol=1e-6)
        assert jax.tree.leaves(together[1].m, is_quantized)[0].codes[i].shape == (32, 64)


def test_a_state_in_bytes_must_fit_the_gradients():
    tx = scale_by_nadam(**NARROW["int8"])
    state = tx.init({"w": jnp.ones((32, 64))})
    with pytest.raises(ValueError, match=r"gradients\['w'\] has shape \(64, 32\).*\(32, 64\)"):
        tx.update({"w": jnp.ones((64, 32))}, state)
    with pytest.raises(ValueError, match=r"missing \['w'\]; unexpected \['x'\]"):
        tx.update({"x": jnp.ones((32, 64))}, state)
    assert isinstance(state.v["w"], Quantized)
