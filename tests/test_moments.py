"""Moments in bfloat16 and in 8 bits: the steps they lead to, and the formats of the leaves.

- ``v`` decays, which it would not if rounded to the nearest: within 1% after 2200 steps; so it does for bfloat16 leaves
  with the float32 moments of the default, within 1e-4.
- Updates are unbiased; in 8 bits, with gradients that differ by 10^4 in a row and in a column, each ``v`` is, within
  2%, a tenth for any 32 of one size.
- No 8-bit step is longer than 1.5 times the longest with float32 moments, or twice with b2 = .999, with gradients that
  differ by up to 10^3 inside a row and a column.
- A spike of 10^5, an infinity or a NaN changes the steps of its own element only.
- A leaf of a mixed state takes the steps that it takes alone, bit for bit.
"""

from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import QuantizedNadamState, ScaleByNadamState, convert_moments, scale_by_nadam
from tests.helpers import NANS, run
from tests.reference import Nadam

NARROW: Any = {name: {"m_dtype": name, "v_dtype": name} for name in ("bfloat16", "int8")}
every_format = pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)


@jax.jit
def numbers(state):
    return convert_moments(state, m_dtype=None, v_dtype=None)


@pytest.mark.parametrize(("narrow", "rtol"), [({}, 1e-4), *((x, 0.01) for x in NARROW.values())], ids=str)
def test_v_decays(narrow, rtol):
    """Rounded to the nearest, v would stay at .196 in bfloat16."""
    grads = np.repeat(np.array([1, 0], jnp.bfloat16), [200, 2000])
    tx, leaf = scale_by_nadam(**narrow), np.zeros((64, 64), jnp.bfloat16)
    step = jax.jit(lambda state, grads: jax.lax.scan(lambda s, g: (tx.update(leaf + g, s)[1], None), state, grads)[0])
    state = numbers(step(tx.init(leaf), grads))
    np.testing.assert_allclose(np.mean(np.asarray(state.v, float)), (1 - 0.999**200) * 0.999**2000, rtol=rtol)
    assert np.max(np.abs(state.m)) < 1e-30


@every_format
def test_updates_unbiased(rng, narrow):
    """Over 4096 equal elements the rounding errors average out; in each they are a few hundredths."""
    g = rng.normal(size=300).astype(np.float32)
    _, updates = run(scale_by_nadam(**narrow), jnp.asarray(np.tile(g[:, None, None], (64, 64))))
    expected, *_ = Nadam().updates(g.astype(float)[:, None, None])
    errors = np.asarray(updates, float) - expected
    bytes_ = narrow is NARROW["int8"]
    for steps in (1, 300):
        error, length = errors[:steps], np.linalg.norm(expected[:steps])
        assert np.linalg.norm(error) < (0.08 if bytes_ else 0.02) * np.sqrt(4096) * length, steps
        assert np.linalg.norm(np.mean(error, axis=(1, 2))) < (2e-2 if bytes_ else 1e-3) * length, steps


def test_bits_of_their_own():
    """Equal moments are rounded by random bits of their own, in leaves of one shape too."""
    tx, g = scale_by_nadam(b1=0.3, b2=0.3, **NARROW["bfloat16"]), [np.ones((32, 64), np.float32)] * 2
    _, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
    moments = [np.ravel(x).astype(float) for x in jax.tree.leaves((state.m, state.v))]
    assert [len(np.unique(x)) for x in moments] == [2, 2, 2, 2]
    assert np.max(np.abs(np.corrcoef(moments) - np.eye(4))) < 5 / np.sqrt(32 * 64)


def test_uneven_unbiased(rng):
    """Of gradients from 1 to 1e-4 in each row, in any order, each element's v is unbiased, and each m."""
    sizes = np.geomspace(1, 1e-4, 256, dtype=np.float32)
    order = np.stack([rng.permutation(256) for _ in range(64)])
    grads = rng.normal(size=(1500, 64, 256)).astype(np.float32) * sizes[order]
    state = numbers(run(scale_by_nadam(rule="constant", **NARROW["int8"]), jnp.asarray(grads))[0])
    m, v = np.zeros((64, 256)), np.zeros((64, 256))
    for t, g in enumerate(grads.astype(float), start=1):
        m, v = Nadam("constant").moments(g, m, v, t)
    ratio = np.asarray(state.v, float) / v
    np.testing.assert_allclose(np.mean(ratio), 1, atol=0.02)
    by_size = np.take_along_axis(ratio, np.argsort(order), axis=1)
    np.testing.assert_allclose(by_size.reshape(64, 8, 32).mean(axis=(0, 2)), 1, atol=0.1)
    assert abs(np.mean((np.asarray(state.m, float) - m) / sizes[order])) < 0.02


def both_runs(grads, **h):
    """All updates with float32 and with 8-bit moments."""
    optimizers = scale_by_nadam(**h), scale_by_nadam(**h, **NARROW["int8"])
    return jax.jit(lambda g: [run(tx, g)[1] for tx in optimizers])(grads)


@pytest.mark.parametrize(("b2", "times"), [(0.95, 1.5), (0.999, 2.0)])
def test_longest_step(rng, b2, times):
    normal, falling = rng.normal(size=(300, 64, 64)), np.geomspace(1, 1e-3, 64)
    kinds = {
        "normal": normal,
        "heavy-tailed": rng.standard_t(2, size=normal.shape),
        "steady": normal[:1] + 0.1 * normal,
        "rare": normal * (rng.random(normal.shape) < 0.01),
        "by row and column": normal * falling * falling[:, None],
        "by element": normal * rng.permuted(np.tile(falling, (64, 1)), axis=1),
    }
    wide, narrow = jax.vmap(lambda g: both_runs(g, b2=b2))(jnp.asarray(np.stack([*kinds.values()]), jnp.float32))
    for kind, *longest in zip(kinds, *(np.max(np.abs(u), axis=(1, 2, 3)) for u in (wide, narrow)), strict=True):
        assert longest[1] < times * longest[0], kind


def test_least_v():
    """Where rounding left a ``v`` that no gradients give with this ``m``, the step is the longest that some give."""
    reference, tx = Nadam(), scale_by_nadam(**NARROW["int8"])
    falling = (reference.b1 / reference.b2) ** np.arange(2000.0)[::-1, None]  # by Cauchy and Schwarz
    _, m, v, _ = reference.updates(falling)
    zero, v_of_scales = np.zeros((2, 32, 64), np.float32)
    v_of_scales[0] = v_of_scales[:, 0] = 1
    state = ScaleByNadamState(np.int32(2000), np.float32(0), zero + 1, v_of_scales)
    updates, _ = jax.jit(lambda state: tx.update(zero, convert_moments(state, **NARROW["int8"])))(state)
    expected = reference.update(0, reference.b1, v / m**2 * reference.b1**2, 2001, 0.0)
    np.testing.assert_allclose(updates[1:, 1:], np.broadcast_to(expected, (31, 63)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 33, 64), (4096,)], ids=str)
def test_spike_alone(rng, shape):
    """In the others of its row and column, the steps differ from those of float32 as they do without it."""
    spikes, at, where = [1.0, np.inf, np.nan], 20, tuple(size // 2 for size in shape)
    if len(shape) > 1:  # a vector has one scale for a segment, with a spike in it too
        spikes.append(1e5)
    grads = np.stack([rng.normal(size=(at + 251, *shape)).astype(np.float32)] * len(spikes))
    grads[(slice(None), at, *where)] = spikes
    wide, narrow = (np.asarray(u, float) for u in jax.vmap(both_runs)(jnp.asarray(grads)))
    for axis in range(len(shape)):
        others = tuple(np.delete(np.arange(shape[axis]), i) if j == axis else i for j, i in enumerate(where))
        for step in (at + 5, at + 250):
            calm, *errors = (np.linalg.norm((n - w)[(step, *others)]) for n, w in zip(narrow, wide, strict=True))
            assert np.all(np.asarray(errors) < 1.5 * calm), (axis, step)


@every_format
def test_nan_shows(narrow):
    """In the update and the moments of its element."""
    grads = np.ones((32, 64), np.float32)
    grads[np.arange(len(NANS)), 5] = NANS
    tx = scale_by_nadam(**narrow)
    updates, state = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
    state = numbers(state)
    for x in (updates, state.m, state.v):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(grads))


@every_format
def test_one_moment_narrow(narrow):
    """The other one is as without, and so is what cannot be narrow."""
    params = {"z": jnp.ones((32, 64), jnp.complex64), "w": jnp.ones((32, 64)), "b": jnp.ones(3)}
    plain, both = scale_by_nadam().init(params), scale_by_nadam(**narrow).init(params)
    for name, other in (("m", "v"), ("v", "m")):
        state = scale_by_nadam(**{f"{name}_dtype": narrow[f"{name}_dtype"]}).init(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(getattr(state, name), getattr(both, name))
        chex.assert_trees_all_equal_shapes_and_dtypes(getattr(state, other), getattr(plain, other))
        assert getattr(state, name)["w"].dtype.itemsize < 4
    assert both.m["z"].dtype == jnp.complex64


def test_float32_draws_no_bits():
    """A leaf adds the same one equation to the trace, and float32 ones draw no random bits."""
    g = jnp.ones((32, 64))
    optimizers = scale_by_nadam(), *(scale_by_nadam(**narrow) for narrow in NARROW.values())
    traces = [str(jax.make_jaxpr(tx.update)(g, tx.init(g))) for tx in optimizers]
    assert ["iota" in trace for trace in traces] == [False, True, True]


def test_vmap_of_bytes(rng):
    """Each member of a population has scales of its own."""
    params, rates = jnp.asarray(rng.normal(size=(3, 32, 64)), jnp.float32), jnp.array([1e-3, 1e-2, 0.1])

    def steps(p, b1):
        state, u = run(scale_by_nadam(b1, **NARROW["int8"]), jnp.stack(3 * [p]))
        return u[-1], state

    together, alone = jax.vmap(steps)(params, rates), jax.lax.map(lambda args: steps(*args), (params, rates))
    chex.assert_trees_all_close(together[0], alone[0], rtol=1e-6)
    assert [x.shape for x in together[1].scales] == [(3, 32), (3, 64)] * 2


TREE: Any = {"embed": (64, 32), "blocks": [{"kernel": (32, 64), "bias": (64,)}, (1065,)], "none": None}
LAST = {"embed": None, "blocks": "int8", "none": "bfloat16"}
EVERY = {"embed": None, "blocks": [{"kernel": "int8", "bias": None}, jnp.int8], "none": None}


def gradients(rng, steps=5):
    """Of such a tree, with a leading axis of steps."""
    return jax.tree.map(
        lambda shape: rng.normal(size=(steps, *shape)).astype(np.float32),
        TREE,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_formats_by_leaf(rng):
    """By the first levels of the tree, by all, or by path; leaves that are None or masked have none.

    A leaf of a mixed state takes the steps that it takes alone.
    """
    grads, seen = gradients(rng), []

    def by_path(path):
        seen.append(path)
        return "int8" if path.startswith("blocks") else None

    state, updates = run(scale_by_nadam(m_dtype=LAST, v_dtype=LAST), grads)
    for formats in (EVERY, by_path):
        chex.assert_trees_all_equal(run(scale_by_nadam(m_dtype=formats, v_dtype=formats), grads), (state, updates))
    assert seen[:4] == ["blocks/0/bias", "blocks/0/kernel", "blocks/1", "embed"]
    assert [str(x.dtype) for x in jax.tree.leaves(state.m)] == ["float32", "int8", "int8", "float32"]
    assert [x.shape for x in state.scales] == [(32,), (64,), (9,)] * 2
    wide, expected = run(scale_by_nadam(), grads)
    for got, want in ((updates, expected), (state.m, wide.m), (state.v, wide.v)):
        chex.assert_trees_all_equal(got["embed"], want["embed"])
    assert np.any(np.asarray(updates["blocks"][1]) != np.asarray(expected["blocks"][1]))
    masked = optax.masked(scale_by_nadam(m_dtype=LAST, v_dtype=by_path), TREE | {"embed": False, "blocks": True})
    inner = jax.eval_shape(masked.init, jax.tree.map(lambda g: g[0], grads)).inner_state
    assert isinstance(inner.m["embed"], optax.MaskedNode)
    assert [x.shape for x in inner.scales] == [(32,), (64,), (9,)] * 2


def test_kind_of_state():
    """That with scales where a format may be int8, whatever the params, so that it does not depend on them."""
    for formats in ("int8", {"w": None, "b": jnp.int8}, lambda path: None):
        state = scale_by_nadam(v_dtype=formats).init({"w": jnp.ones(3), "b": jnp.ones(3)})
        assert isinstance(state, QuantizedNadamState)
        assert state.scales.shape == ()
    assert isinstance(
        scale_by_nadam(m_dtype={"w": None}, v_dtype="bfloat16").init({"w": jnp.ones(3)}), ScaleByNadamState
    )


@pytest.mark.parametrize(
    ("formats", "text"),
    [
        ({"embed": "int4", "blocks": None}, r"v_dtype\['embed'\] must be None, int8, .*got 'int4'"),
        (lambda path: "int4", r"v_dtype\['blocks'\]\[0\]\['bias'\] must be None, int8, .*got 'int4'"),
        (
            {"embed": "int8"},
            r"v_dtype must be one format, a tree of .*does not fit the params: no format for blocks",
        ),
        ({**LAST, "blocks": ["int8"]}, "does not fit the params: no format for blocks/1"),
        ({**LAST, "embed": {"w": None}}, "does not fit the params: no format for embed; no leaf for embed/w"),
    ],
)
def test_misfits(rng, formats, text):
    with pytest.raises(ValueError, match=text):
        scale_by_nadam(v_dtype=formats).init(gradients(rng))
