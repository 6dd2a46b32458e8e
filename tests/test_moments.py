"""Moments in bfloat16 and in 8 bits: the steps they lead to.

- ``v`` decays, which it would not if rounded to the nearest: within 1% after 2200 steps; so it does for bfloat16 leaves
  with the float32 moments of the default, within 1e-4.
- Updates are unbiased; in 8 bits, with gradients that differ by 10^4 in one row, each ``v`` is, within 2%, a tenth for
  any 32 elements.
- A run is the same every time and on 1, 2 or 8 devices, in any sharding, bit for bit.
- A NaN stays NaN, whatever its bits, also 0x7fffffff, that of NVIDIA GPUs.
"""

from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_nadam import nadamw, scale_by_nadam
from optax_nadam._moments import decode
from optax_nadam._quantized import is_quantized
from tests.helpers import NANS, run
from tests.reference import Nadam

NARROW: Any = {name: {"m_dtype": name, "v_dtype": name} for name in ("bfloat16", "int8")}
every_format = pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)


def numbers(tree):
    return jax.tree.map(lambda x: decode(x, jnp.float32), tree, is_leaf=is_quantized)


@pytest.mark.parametrize(("narrow", "rtol"), [({}, 1e-4), *((x, 0.01) for x in NARROW.values())], ids=str)
@pytest.mark.parametrize("rule", ["scheduled", "dozat2016"])
def test_v_decays(rule, narrow, rtol):
    """Rounded to the nearest, v would stay at .196 in bfloat16."""
    grads = jnp.repeat(jnp.asarray([1, 0], jnp.bfloat16), np.array([200, 2000]))
    tx, leaf = scale_by_nadam(rule=rule, **narrow), jnp.zeros((64, 64), jnp.bfloat16)
    state, _ = jax.lax.scan(lambda s, g: (tx.update(leaf + g, s)[1], None), tx.init(leaf), grads)
    v = np.asarray(numbers(state.v), float)
    np.testing.assert_allclose(np.mean(v), (1 - 0.999**200) * 0.999**2000, rtol=rtol)
    assert np.max(np.abs(numbers(state.m))) < 1e-30


@every_format
@pytest.mark.parametrize("rule", ["scheduled", "dozat2016", "loss_scaled", "eps_hat"])
def test_updates_unbiased(rng, rule, narrow):
    """Over 4096 equal elements the rounding errors average out; in each they are a few hundredths."""
    g = rng.normal(size=300).astype(np.float32)
    _, updates = run(scale_by_nadam(rule=rule, **narrow), jnp.asarray(np.tile(g[:, None, None], (64, 64))))
    expected, *_ = Nadam(rule).updates(g.astype(float)[:, None, None])
    errors = np.asarray(updates, float) - expected
    bytes_ = narrow is NARROW["int8"]
    for steps in (1, 300):
        error, length = errors[:steps], np.linalg.norm(expected[:steps])
        assert np.linalg.norm(error) < (0.08 if bytes_ else 0.02) * np.sqrt(4096) * length, steps
        assert np.linalg.norm(np.mean(error, axis=(1, 2))) < (2e-2 if bytes_ else 1e-3) * length, steps


def test_bits_of_their_own():
    """Equal moments are rounded by random bits of their own."""
    tx, g = scale_by_nadam(b1=0.3, b2=0.3, **NARROW["bfloat16"]), jnp.ones((32, 64))
    _, state = tx.update(g, tx.init(g))
    m, v = (np.ravel(x).astype(float) for x in (state.m, state.v))
    assert len(np.unique(m)) == len(np.unique(v)) == 2
    assert abs(np.corrcoef(m, v)[0, 1]) < 5 / np.sqrt(32 * 64)


def test_uneven_rows_unbiased(rng):
    """Of gradients from 1 to 1e-4 in one row, each element's v is unbiased, and each m."""
    sizes = np.geomspace(1, 1e-4, 256, dtype=np.float32)
    grads = rng.normal(size=(1500, 64, 256)).astype(np.float32) * sizes
    state, _ = run(scale_by_nadam(rule="constant", **NARROW["int8"]), jnp.asarray(grads))
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
def test_same_on_any_devices(rng, narrow):
    """With rows split, with columns split, and whole on every device."""
    tx = nadamw(1e-2, **narrow)
    whole = PartitionSpec()
    specs = {"rows": PartitionSpec("data"), "columns": PartitionSpec(None, "data"), "whole": whole, "few": whole}
    params = {name: jnp.asarray(rng.normal(size=(16, 128)), jnp.bfloat16) for name in specs} | {"few": jnp.ones(16)}
    update = jax.jit(tx.update)

    def last_state(params):
        state, grads = jax.jit(tx.init)(params), jax.tree.map(lambda p: -p, params)
        for _ in range(5):
            _, state = update(grads, state, params)
        return jax.device_get(state)

    expected = last_state(params)
    chex.assert_trees_all_equal(last_state(params), expected)
    for count in (2, 8):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        chex.assert_trees_all_equal(last_state(jax.device_put(params, shardings)), expected)


@every_format
def test_nan_shows(narrow):
    """In updates and moments, in 8 bits in those of its whole row."""
    grads, where = np.ones((32, 64), np.float32), np.zeros((32, 64), bool)
    for row, nan in enumerate(NANS):
        grads[row, 5] = nan
        where[row, slice(None) if narrow is NARROW["int8"] else 5] = True
    tx = scale_by_nadam(**narrow)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    for tree in (updates, state.m, state.v):
        np.testing.assert_array_equal(np.isnan(numbers(tree)), where)


@every_format
def test_one_moment_narrow(narrow):
    """The other one is as without, and so is what cannot be narrow."""
    params = {"z": jnp.ones((32, 64), jnp.complex64), "w": jnp.ones((32, 64)), "b": jnp.ones(3)}
    plain, both = scale_by_nadam().init(params), scale_by_nadam(**narrow).init(params)
    for name, other in (("m", "v"), ("v", "m")):
        state = scale_by_nadam(**{f"{name}_dtype": narrow[f"{name}_dtype"]}).init(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(getattr(state, name), getattr(both, name))
        chex.assert_trees_all_equal_shapes_and_dtypes(getattr(state, other), getattr(plain, other))
        assert getattr(state, name)["w"].dtype == jnp.bfloat16  # of the scale, where there is one
        assert is_quantized(getattr(state, name)["w"]) == (narrow is NARROW["int8"])
    assert both.m["z"].dtype == jnp.complex64


def test_float32_draws_no_bits():
    """A leaf adds the same one equation to the trace, and float32 ones draw no random bits."""
    g = jnp.ones((32, 64))
    optimizers = scale_by_nadam(), *(scale_by_nadam(**narrow) for narrow in NARROW.values())
    traces = [str(jax.make_jaxpr(tx.update)(g, tx.init(g))) for tx in optimizers]
    assert ["iota" in trace for trace in traces] == [False, True, True]


def test_vmap_of_bytes(rng):
    """Each member of a population has rows of its own."""
    params, rates = jnp.asarray(rng.normal(size=(3, 32, 64)), jnp.float32), jnp.array([1e-3, 1e-2, 0.1])

    def steps(p, b1):
        state, u = run(scale_by_nadam(b1, **NARROW["int8"]), jnp.stack(3 * [p]))
        return u[-1], state

    together, alone = jax.vmap(steps)(params, rates), jax.lax.map(lambda args: steps(*args), (params, rates))
    chex.assert_trees_all_close(together[0], alone[0], rtol=1e-6)
    assert together[1].m.codes.shape == (3, 32, 64)


def test_misfits():
    tx = scale_by_nadam(**NARROW["int8"])
    state = tx.init({"w": jnp.ones((32, 64))})
    with pytest.raises(ValueError, match=r"gradients\['w'\] has shape \(64, 32\).*\(32, 64\)"):
        tx.update({"w": jnp.ones((64, 32))}, state)
    with pytest.raises(ValueError, match=r"missing \['w'\]; unexpected \['x'\]"):
        tx.update({"x": jnp.ones((32, 64))}, state)
