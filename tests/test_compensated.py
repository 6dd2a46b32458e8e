"""bfloat16 weights with what rounding drops stored beside them.

- With int16, weights follow the float32 run bit for bit, every step; params are those rounded to the nearest.
- With int8, weights have 24 bits and are unbiased, with half a unit of the last bit a step. Without a remainder,
  bfloat16 weights are unbiased.
- A step reaches its target, or misses it by a float32 rounding of the old weight: where it leads through zero to under
  a hundredth of that.
- A NaN stays NaN, whatever its bits, also 0x7fffffff, that of NVIDIA GPUs.
- State and weights are sharded like the params, updated in place, and the same on eight devices, bit for bit.
"""

import functools
import operator
import re

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_nadam import compensated, master_params, nadamw, set_master_params
from tests.helpers import NANS, descend

pytestmark = pytest.mark.lenient("optax.apply_updates adds float32 updates to bfloat16 params")
ROWS = NamedSharding(Mesh(np.array(jax.devices("cpu")), ("rows",)), PartitionSpec("rows"))
every_kind = pytest.mark.parametrize("kind", ["int8", "int16", None])


def random_params(rng, shape=(32, 64)):
    return {
        "w": rng.normal(size=shape).astype(jnp.bfloat16),
        "norm": rng.normal(size=shape[1:]).astype(np.float32),
    }


def random_grads(rng, params, steps):
    return jax.tree.map(lambda p: (rng.normal(size=(steps, *p.shape)) + 0.3).astype(p.dtype), params)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def at(grads, step):
    return jax.tree.map(operator.itemgetter(step), grads)


def ends(tx, params, grads):
    """The last params and state."""
    return jax.jit(lambda p, g: descend(tx, p, g)[0])(params, grads)


def stepped(tx, params, state, grads):
    """Params and state after one step."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def nearest_bfloat16(x):
    """Ties away from zero."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64) + 0x8000
    return (bits >> 16 << 16).astype(np.uint32).view(np.float32)


INNERS = {
    "sgd of tiny steps": optax.sgd(1e-5, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), nadamw(optax.linear_schedule(1e-3, 0.0, 200))),
}


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_int16_is_float32(rng, inner):
    """Outside jit, where the inner optimizer is the same program in both."""
    narrow = random_params(rng)
    expected, tx, grads = wide(narrow), compensated(inner, remainder_dtype="int16"), random_grads(rng, narrow, 20)
    state, inner_state = tx.init(narrow), inner.init(expected)
    for step in range(20):
        narrow, state = stepped(tx, narrow, state, at(grads, step))
        expected, inner_state = stepped(inner, expected, inner_state, wide(at(grads, step)))
        chex.assert_trees_all_equal(master_params(state, narrow), expected)
        np.testing.assert_array_equal(np.asarray(narrow["w"], np.float32), nearest_bfloat16(expected["w"]))
    assert (narrow["w"].dtype, narrow["norm"].dtype) == (jnp.bfloat16, jnp.float32)


def test_int8_unbiased(rng):
    params = random_params(rng, (256, 256))
    grads, inner = random_grads(rng, params, 100), optax.sgd(1e-5)
    narrow, state = ends(compensated(inner), params, grads)
    expected, _ = ends(inner, wide(params), wide(grads))
    master = np.asarray(master_params(state, narrow)["w"])
    assert np.all(master.view(np.uint32) & 0xFF == 0)
    np.testing.assert_array_equal(np.asarray(narrow["w"], np.float32), nearest_bfloat16(master))
    error = (master - np.asarray(expected["w"])) / np.maximum(np.abs(expected["w"]), 0.1)
    assert np.max(np.abs(error)) < 5 * 2.0**-16 * np.sqrt(100)  # half a unit of the 16th bit a step, at most
    assert abs(np.mean(error)) < 5 * np.std(error) / 256
    assert np.mean(np.abs(wide(narrow)["w"] - np.asarray(wide(params)["w"]))) > 1e-5  # rounded, they would not change


def test_no_remainder_unbiased():
    """From 1 by 1e-3 a step, far under the last bit of bfloat16; and each step goes to one of two neighbours."""
    tx = compensated(optax.sgd(1e-3), remainder_dtype=None)
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "norm": jnp.ones(64)}
    state = tx.init(params)
    assert state.remainder == {"w": None, "norm": optax.MaskedNode()}
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 4
    once, _ = stepped(tx, params, state, params)
    assert set(np.unique(np.asarray(once["w"], np.float32))) == {1 - 2.0**-8, 1}
    narrow, state = ends(tx, params, jax.tree.map(lambda p: jnp.ones((500, *p.shape), p.dtype), params))
    assert narrow["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow["norm"], 0.5, rtol=1e-4)
    # A step has a variance of at most 1e-3 times the spacing under 1, 2^-8.
    deviation = np.sqrt(500 * 1e-3 * 2.0**-8)
    w = np.asarray(narrow["w"], np.float64)
    assert abs(np.mean(w) - 0.5) < 5 * deviation / 64
    assert 0.3 * deviation < np.std(w) < 1.2 * deviation
    np.testing.assert_array_equal(master_params(state, narrow)["w"], wide(narrow)["w"])


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.identity(), optax.MultiSteps(tx, 2))])
@pytest.mark.parametrize(("kind", "lost"), [("int16", 0), ("int8", 2.0**-16), (None, 2.0**-8)])
def test_set_master_params(rng, kind, lost, wrap):
    w = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32).at[0, 0].set(1 + 2.0**-8)  # a tie
    weights = {"w": w, "norm": jnp.ones(64)}
    tx = wrap(compensated(optax.sgd(1e-3), remainder_dtype=kind))
    fresh = tx.init({"w": weights["w"].astype(jnp.bfloat16), "norm": weights["norm"]})
    for setter in (set_master_params, jax.jit(set_master_params)):
        params, state = setter(fresh, weights)
        chex.assert_trees_all_equal_structs(state, fresh)
        assert (params["w"].dtype, params["norm"].dtype) == (jnp.bfloat16, jnp.float32)
        got = np.asarray(master_params(state, params)["w"])
        np.testing.assert_array_equal(np.asarray(params["w"], np.float32), nearest_bfloat16(got))
        assert lost / 4 <= np.max(np.abs(got / weights["w"] - 1)) <= lost


@every_kind
def test_zero_steps(kind):
    """Nothing changes, whatever the weight."""
    params = jnp.asarray([0.0, -0.0, 1.0, -3.0, 2.0**-126, 3.3e38, np.nan], jnp.bfloat16)
    narrow, state = ends(compensated(optax.sgd(0.0), remainder_dtype=kind), params, jnp.zeros((3, 7), jnp.bfloat16))
    chex.assert_trees_all_equal(narrow, params)
    chex.assert_trees_all_equal(master_params(state, narrow), params.astype(jnp.float32))


@every_kind
def test_nan_stays(kind):
    """A NaN step, whatever its bits, is a NaN weight, in later steps too."""
    tx, params = compensated(optax.sgd(1.0), remainder_dtype=kind), jnp.ones((32, 64), jnp.bfloat16)
    grads = np.zeros((32, 64), np.float32)
    grads[3, : len(NANS)] = NANS
    step, state = jax.jit(functools.partial(stepped, tx)), tx.init(params)
    for g in (grads, np.zeros_like(grads)):
        params, state = step(params, state, g)
        np.testing.assert_array_equal(np.isnan(params), np.isnan(grads))
        np.testing.assert_array_equal(np.isnan(master_params(state, params)), np.isnan(grads))


JUMPS = [(1, 1e-9), (1, 1.005e-9), (1, 1.21e-5), (1e-9, 1), (1, -1e-9), (0, -2.7), (-1, 0), (5, 3.1e38)]


@pytest.mark.parametrize(("kind", "precision"), [("int8", 2.0**-16), ("int16", 0.0)])
def test_steps_anywhere(rng, kind, precision):
    """Also those that move a weight nearly to zero, or just across it."""
    n, tx = 400_000, compensated(optax.sgd(1.0), remainder_dtype=kind)
    starts, jumps = np.array(JUMPS, float).T
    random = rng.choice([-1, 1], n) * np.exp2(rng.uniform(-30, 30, n))
    p, range_ = np.concatenate([starts, random]).astype(jnp.bfloat16), np.iinfo(kind)
    drawn = np.concatenate([0 * starts, rng.integers(range_.min, range_.max + 1, n)])
    state = tx.init(p)._replace(remainder=jnp.asarray(drawn, kind))
    before = np.asarray(master_params(state, p))
    near = before[-n:] * (1 + rng.normal(size=n) * np.exp2(rng.uniform(-26, 0, n)))
    beside = before[-n:] + rng.integers(-3000, 3000, n) * np.abs(before[-n:]) * 2.0**-24
    anywhere = rng.normal(size=n) * np.exp2(rng.uniform(-40, 40, n))
    grads = np.concatenate([before[:-n] - jumps, np.choose(rng.integers(0, 3, n), [near, beside, anywhere])])
    target = before - grads.astype(np.float32)
    narrow, state = jax.jit(functools.partial(stepped, tx))(p, state, grads.astype(np.float32))
    got, size = np.asarray(master_params(state, narrow)), np.abs(np.asarray(p, float))
    # Where adding in float32 misses the target, it misses by no more than a float32 rounding; int8 drops under a bit.
    dropped = np.where(np.arange(len(p)) < len(JUMPS), precision, 2 * precision)
    for reached, lost in ((got, dropped), (narrow, 2.0**-8)):
        assert np.all(np.abs(np.asarray(reached, float) - target) <= 2.0**-24 * size + lost * np.abs(target))
    if kind == "int16":
        through_zero = (np.sign(target) != np.sign(before)) & (np.abs(target) < 0.01 * size)
        np.testing.assert_array_equal(got[~through_zero], target[~through_zero])


def test_ties_away_from_zero():
    """They round away from zero, and their bits are stored."""
    params, tx = jnp.array([1.0, -1.0], jnp.bfloat16), compensated(optax.sgd(1.0), remainder_dtype="int16")
    narrow, state = stepped(tx, params, tx.init(params), jnp.array([-(2.0**-8), 2.0**-8]))
    assert narrow.tolist() == [1 + 2.0**-7, -1 - 2.0**-7]
    assert master_params(state, narrow).tolist() == [1 + 2.0**-8, -1 - 2.0**-8]


def test_multi_steps(rng):
    """Inside and outside; there by a loop, as its state changes dtype at the first step before Optax 0.2.8."""
    params, inner = random_params(rng), nadamw(1e-3)
    grads = random_grads(rng, params, 12)
    narrow, state = ends(compensated(optax.MultiSteps(inner, 3), remainder_dtype="int16"), params, grads)
    expected, _ = ends(optax.MultiSteps(inner, 3), wide(params), wide(grads))
    chex.assert_trees_all_equal(master_params(state, narrow), expected)
    outside = optax.MultiSteps(compensated(inner, remainder_dtype="int16"), 3)
    step, state = jax.jit(functools.partial(stepped, outside)), outside.init(params)
    for t in range(12):
        params, state = step(params, state, at(grads, t))
    # Outside, MultiSteps may average the gradients in their own dtype.
    chex.assert_trees_all_close(master_params(state, params), expected, atol=2e-3)


def test_eight_devices(rng):
    """With int8, those of ``tests/system/test_sharding.py``."""
    params = random_params(rng, (64, 64))
    grads = at(random_grads(rng, params, 1), 0)
    tx = compensated(nadamw(1e-3, m_dtype="int8", v_dtype="int8"), remainder_dtype="int16")

    def trained(params, grads):
        state = jax.jit(tx.init)(params)
        step = jax.jit(functools.partial(stepped, tx), donate_argnums=(0, 1)).lower(params, state, grads).compile()
        for _ in range(3):
            params, state = step(params, state, grads)
        return params, state, step.as_text()

    *alone, _ = trained(jax.tree.map(jnp.copy, params), grads)
    *together, program = trained(*jax.device_put((params, grads), ROWS))
    chex.assert_trees_all_equal(jax.device_get(together), jax.device_get(alone))
    assert together[1].remainder["w"].sharding.is_equivalent_to(ROWS, 2)
    assert set(re.findall(r"= (\S+) all-(?:reduce|gather|to-all)", program)) == {"f32[64]{0}"}  # of the columns' maxima
    weights = jax.tree.map(lambda p: np.full(p.shape, 0.1, np.float32), params)
    placed, state = set_master_params(together[1], weights)
    assert placed["w"].sharding == state.remainder["w"].sharding == together[1].remainder["w"].sharding
    assert program.split("\n")[0].count("-alias)") == len(jax.tree.leaves(together))


def test_other_leaves(rng):
    """Those that are not bfloat16 have the inner state alone, what is no leaf passes, extra arguments go inside."""
    params = random_params(rng) | {"none": None, "masked": optax.MaskedNode()}
    inner = optax.chain(nadamw(1e-3), optax.contrib.reduce_on_plateau())
    tx = compensated(inner)
    state = tx.init(params)
    chex.assert_trees_all_equal(state.inner_state, inner.init(wide(params)))
    assert [(x.dtype, x.shape) for x in jax.tree.leaves(state.remainder)] == [(jnp.int8, (32, 64))]
    updates, state = tx.update(params, state, params, value=jnp.float32(1.0))
    assert updates["none"] is None
    assert isinstance(updates["masked"], optax.MaskedNode)
    assert master_params(state, params)["none"] is None


PARAMS = {"w": jnp.ones((4, 3), jnp.bfloat16), "norm": jnp.ones(3)}
W, NORM = PARAMS["w"], PARAMS["norm"]
TX = compensated(optax.sgd(1e-3))  # which checks nothing itself


@pytest.mark.parametrize(
    ("grads", "params", "text"),
    [
        (PARAMS, None, r"compensated needs params"),
        (PARAMS, wide(PARAMS), r"params\['w'\] is float32 of shape \(4, 3\).*bfloat16 of shape \(4, 3\)"),
        (PARAMS, {"w": W, "norm": W[0]}, r"params\['norm'\] is bfloat16 of shape \(3,\).*not bfloat16"),
        (PARAMS, {"w": W}, r"params differ in structure"),
        ({"w": NORM, "norm": NORM}, PARAMS, r"gradients\['w'\] has shape \(3,\)"),
        ({"w": W}, PARAMS, r"gradients differ in structure.*missing \['norm'\]"),
    ],
)
def test_misfits(grads, params, text):
    with pytest.raises(ValueError, match=text):
        TX.update(grads, TX.init(PARAMS), params)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: compensated(nadamw(), remainder_dtype="float32"), "remainder_dtype must be int8, .* got 'float32'"),
        (lambda: TX.init({"h": jnp.ones(3, jnp.float16)}), r"params\['h'\] has dtype float16.*bfloat16"),
        (lambda: TX.update(W, nadamw().init(W), W), "compensated got the state of another optimizer: tuple"),
        (lambda: master_params(nadamw().init(W), W), "opt_state must hold one CompensatedState, but holds 0"),
        (lambda: set_master_params(nadamw().init(W), W), "opt_state must hold one CompensatedState, but holds 0"),
        (lambda: set_master_params(TX.init(W), wide(W.T)), r"weights is float32 of shape \(3, 4\).*of shape \(4, 3\)"),
        (lambda: set_master_params(TX.init(W), W.astype(int)), r"weights is int32 .*takes weights of float32"),
        (lambda: set_master_params(TX.init(W), [W]), "weights differ in structure"),
    ],
)
def test_misuse(call, text):
    with pytest.raises(TypeError if "float16" in text else ValueError, match=text):
        call()
