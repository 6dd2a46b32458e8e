"""bfloat16 weights with what rounding drops stored beside them."""

import operator

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_nadam import CompensatedState, compensated, master_params, nadamw, set_master_params
from tests.test_rounding import every_nan

pytestmark = pytest.mark.lenient("optax.apply_updates adds float32 updates to bfloat16 params")
KINDS = ["int8", "int16"]
INNERS = {
    "nadamw": nadamw(1e-4),
    "nadamw in bytes": nadamw(1e-4, m_dtype="int8", v_dtype="int8"),
    "optax.adamw": optax.adamw(1e-4),
    "sgd of tiny steps": optax.sgd(1e-5, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), nadamw(optax.linear_schedule(1e-3, 0.0, 200))),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_params(rng, shape=(32, 64)):
    return {
        "w": jnp.asarray(rng.normal(size=shape), jnp.bfloat16),
        "norm": jnp.asarray(rng.normal(size=shape[1:]), jnp.float32),
    }


def random_grads(rng, params, steps):
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)) + 0.3, p.dtype), params)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def step_of(tx):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


def run(tx, params, grads):
    """The last params and state, by scan."""
    return jax.jit(lambda p, g: jax.lax.scan(step_of(tx), (p, tx.init(p)), g)[0])(params, grads)


def run_one_by_one(tx, params, grads):
    """The same by a loop, for MultiSteps outside, whose state changes dtype at the first step before Optax 0.2.8."""
    step, carry = jax.jit(step_of(tx)), (params, tx.init(params))
    for t in range(len(grads["w"])):
        carry, _ = step(carry, jax.tree.map(operator.itemgetter(t), grads))
    return carry


def nearest_bfloat16(x):
    """Ties away from zero."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64) + 0x8000
    return (bits >> 16 << 16).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_with_two_bytes_weights_follow_the_float32_run_bit_for_bit(rng, inner):
    """Outside jit, where the inner optimizer is the same program in both."""
    narrow = random_params(rng)
    expected = wide(narrow)
    tx = compensated(inner, remainder_dtype="int16")
    state, inner_state = tx.init(narrow), inner.init(expected)
    grads = random_grads(rng, narrow, 40)
    for k in range(40):
        g = jax.tree.map(lambda x, k=k: x[k], grads)
        updates, state = tx.update(g, state, narrow)
        narrow = optax.apply_updates(narrow, updates)
        updates, inner_state = inner.update(wide(g), inner_state, expected)
        expected = optax.apply_updates(expected, updates)
        chex.assert_trees_all_equal(master_params(state, narrow), expected)
        np.testing.assert_array_equal(np.asarray(narrow["w"], np.float32), nearest_bfloat16(expected["w"]))
    assert (narrow["w"].dtype, narrow["norm"].dtype) == (jnp.bfloat16, jnp.float32)


def test_with_one_byte_weights_have_24_bits_and_are_unbiased(rng):
    params = random_params(rng, (256, 256))
    grads = random_grads(rng, params, 100)
    inner = optax.sgd(1e-5)
    narrow, state = run(compensated(inner), params, grads)
    expected, _ = run(inner, wide(params), wide(grads))
    master = np.asarray(master_params(state, narrow)["w"])
    assert np.all(master.view(np.uint32) & 0xFF == 0)
    np.testing.assert_array_equal(np.asarray(narrow["w"], np.float32), nearest_bfloat16(master))
    error = (master - np.asarray(expected["w"])) / np.maximum(np.abs(expected["w"]), 0.1)
    assert np.max(np.abs(error)) < 5 * 2.0**-16 * np.sqrt(100)  # half a unit of the 16th bit a step, at most
    assert abs(np.mean(error)) < 5 * np.std(error) / 256
    assert np.mean(np.abs(wide(narrow)["w"] - np.asarray(wide(params)["w"]))) > 1e-5  # rounded, they would not change


def test_without_a_byte_weights_are_unbiased_and_nothing_is_stored(rng):
    """From 1 by 1e-3 a step, far under the last bit of bfloat16; and each step goes to one of two neighbours."""
    tx = compensated(optax.sgd(1e-3), remainder_dtype=None)
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "norm": jnp.ones(64)}
    state = tx.init(params)
    assert state.remainder == {"w": None, "norm": optax.MaskedNode()}
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 4
    once = optax.apply_updates(params, tx.update(jax.tree.map(jnp.ones_like, params), state, params)[0])
    assert set(np.unique(np.asarray(once["w"], np.float32))) == {1 - 2.0**-8, 1}
    grads = {"w": jnp.ones((500, 64, 64), jnp.bfloat16), "norm": jnp.ones((500, 64))}
    narrow, state = run(tx, params, grads)
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
def test_float32_weights_become_params_and_remainder(rng, kind, lost, wrap):
    weights = {"w": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32), "norm": jnp.ones(64)}
    tx = wrap(compensated(optax.sgd(1e-3), remainder_dtype=kind))
    fresh = tx.init({"w": weights["w"].astype(jnp.bfloat16), "norm": weights["norm"]})
    for setter in (set_master_params, jax.jit(set_master_params)):
        params, state = setter(fresh, weights)
        chex.assert_trees_all_equal_structs(state, fresh)
        assert (params["w"].dtype, params["norm"].dtype) == (jnp.bfloat16, jnp.float32)
        got = np.asarray(master_params(state, params)["w"])
        np.testing.assert_array_equal(np.asarray(params["w"], np.float32), nearest_bfloat16(got))
        error = np.abs(got - np.asarray(weights["w"])) / np.abs(weights["w"])
        assert np.max(error) <= lost
        assert np.max(error) >= lost / 4
    if kind == "int16":
        again, _ = set_master_params(state, master_params(state, params))
        chex.assert_trees_all_equal(again, params)


def test_weights_are_set_where_the_state_is():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    weights = {"w": np.full((64, 32), 0.1, np.float32)}
    tx = compensated(nadamw(1e-3), remainder_dtype="int16")
    fresh = jax.jit(tx.init)({"w": jax.device_put(jnp.ones((64, 32), jnp.bfloat16), split)})
    params, state = set_master_params(fresh, weights)
    assert params["w"].sharding == state.remainder["w"].sharding == fresh.remainder["w"].sharding
    np.testing.assert_array_equal(master_params(state, params)["w"], weights["w"])


def test_weights_that_do_not_fit_are_refused():
    state = compensated(optax.sgd(1e-3)).init({"w": jnp.ones((4, 3), jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"weights\['w'\] is float32 of shape \(3, 4\).*leaf of shape \(4, 3\)"):
        set_master_params(state, {"w": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"weights\['w'\] is int32 .*takes weights of float32"):
        set_master_params(state, {"w": jnp.ones((4, 3), jnp.int32)})
    with pytest.raises(ValueError, match=r"weights differ in structure"):
        set_master_params(state, [jnp.ones((4, 3))])
    with pytest.raises(ValueError, match=r"opt_state must hold one CompensatedState"):
        set_master_params(optax.sgd(1.0).init(jnp.ones(3)), jnp.ones(3))


@every_kind
def test_a_thousand_small_steps(kind):
    """From 1 by 1e-3 a step: bfloat16 weights alone never move, and float32 ones reach zero."""
    params = jnp.ones((64, 64), jnp.bfloat16)
    grads = jnp.ones((999, 64, 64), jnp.bfloat16)
    narrow, state = run(compensated(optax.sgd(1e-3), remainder_dtype=kind), params, grads)
    expected, _ = run(optax.sgd(1e-3), wide(params), wide(grads))
    np.testing.assert_allclose(np.mean(master_params(state, narrow)), np.mean(expected), rtol=0.01)
    naive, _ = run(optax.sgd(1e-3), params, grads)
    assert np.all(naive == 1)


@every_kind
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 2.0**-126, 3.3e38, np.nan])
def test_nothing_changes_where_the_step_is_zero(kind, value):
    params = jnp.full(8, value, jnp.bfloat16)
    narrow, state = run(compensated(optax.sgd(0.0), remainder_dtype=kind), params, jnp.zeros((3, 8), jnp.bfloat16))
    chex.assert_trees_all_equal(narrow, params)
    chex.assert_trees_all_equal(master_params(state, narrow), params.astype(jnp.float32))


@every_nan
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_a_nan_step_is_a_nan_weight_and_stays_one(kind, nan):
    tx, params = compensated(optax.sgd(1.0), remainder_dtype=kind), jnp.ones((32, 64), jnp.bfloat16)
    state = tx.init(params)
    grads = jnp.zeros((32, 64)).at[3, 5].set(nan)
    where = np.isnan(grads)
    for g in (grads, jnp.zeros((32, 64))):
        updates, state = jax.jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(np.isnan(params), where)
        np.testing.assert_array_equal(np.isnan(master_params(state, params)), where)


@every_kind
@pytest.mark.parametrize(
    ("start", "end"),
    [(1.0, 1e-9), (1.0, 1.005e-9), (1.0, 1.21e-5), (1e-9, 1.0), (1.0, -1e-9), (0.0, -2.7), (-1.0, 0.0), (5.0, 3.1e38)],
)
def test_a_step_may_lead_anywhere(kind, start, end):
    """Where adding in float32 misses the target, it misses by no more than a float32 rounding."""
    params = jnp.full(8, start, jnp.bfloat16)
    tx = compensated(optax.sgd(1.0), remainder_dtype=kind)
    state = tx.init(params)
    updates, state = tx.update(params.astype(jnp.float32) - jnp.float32(end), state, params)
    narrow = optax.apply_updates(params, updates)
    precision = 2.0 ** (-16 if kind == "int8" else -24)
    allowed = 2.0**-24 * abs(start) + precision * abs(end)
    assert np.max(np.abs(np.asarray(master_params(state, narrow), float) - end)) <= allowed
    assert np.max(np.abs(np.asarray(narrow, float) - end)) <= 2.0**-24 * abs(start) + 2.0**-8 * abs(end)


def test_random_steps_reach_their_targets(rng):
    """Also those that move a weight nearly to zero, or just across it."""
    n = 400_000
    p = jnp.asarray(rng.choice([-1, 1], n) * np.exp2(rng.uniform(-30, 30, n)), jnp.bfloat16)
    tx = compensated(optax.sgd(1.0), remainder_dtype="int16")
    state = tx.init(p)._replace(remainder=jnp.asarray(rng.integers(-(2**15), 2**15, n), jnp.int16))
    before = np.asarray(master_params(state, p))
    near = before * (1 + rng.normal(size=n) * np.exp2(rng.uniform(-26, 0, n)))
    beside = before + rng.integers(-3000, 3000, n) * np.abs(before) * 2.0**-24
    anywhere = rng.normal(size=n) * np.exp2(rng.uniform(-40, 40, n))
    grads = np.choose(rng.integers(0, 3, n), [near, beside, anywhere]).astype(np.float32)
    updates, state = tx.update(jnp.asarray(grads), state, p)
    narrow = optax.apply_updates(p, updates)
    target, got, size = before - grads, np.asarray(master_params(state, narrow)), np.abs(np.asarray(p, float))
    assert np.max(np.abs(got.astype(float) - target) / size) <= 2.0**-24
    through_zero = (np.sign(target) != np.sign(before)) & (np.abs(target) < 0.01 * size)
    np.testing.assert_array_equal(got[~through_zero], target[~through_zero])


def test_a_tie_rounds_away_from_zero_and_its_bits_are_stored():
    params = jnp.array([1.0, -1.0], jnp.bfloat16)
    tx = compensated(optax.sgd(1.0), remainder_dtype="int16")
    updates, state = tx.update(jnp.array([-(2.0**-8), 2.0**-8]), tx.init(params), params)
    narrow = optax.apply_updates(params, updates)
    assert narrow.tolist() == [1 + 2.0**-7, -1 - 2.0**-7]
    assert master_params(state, narrow).tolist() == [1 + 2.0**-8, -1 - 2.0**-8]


@every_kind
def test_with_multi_steps_inside_and_outside(rng, kind):
    params = random_params(rng)
    grads = random_grads(rng, params, 12)
    inner = nadamw(1e-3)
    tx = compensated(optax.MultiSteps(inner, 3), remainder_dtype=kind)
    narrow, state = run(tx, params, grads)
    expected, _ = run(optax.MultiSteps(inner, 3), wide(params), wide(grads))
    tolerance = {"rtol": 2.0**-12, "atol": 1e-6} if kind == "int8" else {"rtol": 0, "atol": 0}
    chex.assert_trees_all_close(master_params(state, narrow), expected, **tolerance)
    around, outer = run_one_by_one(optax.MultiSteps(compensated(inner, remainder_dtype=kind), 3), params, grads)
    # Outside, MultiSteps may average the gradients in their own dtype.
    chex.assert_trees_all_close(master_params(outer, around), expected, atol=2e-3)


@every_kind
def test_sharded_like_the_params_donated_and_the_same_on_eight_devices(rng, kind):
    params = random_params(rng, (64, 64))
    grads = jax.tree.map(lambda x: x[0], random_grads(rng, params, 1))
    tx = compensated(nadamw(1e-3, m_dtype="int8", v_dtype="int8"), remainder_dtype=kind)
    mesh = Mesh(np.array(jax.devices("cpu")), ("rows",))
    rows = NamedSharding(mesh, PartitionSpec("rows"))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def trained(params, grads):
        state = jax.jit(tx.init)(params)
        donating = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(3):
            compiled = donating.lower(params, state, grads).compile()
            params, state = compiled(params, state, grads)
        return params, state, compiled

    alone, state, _ = trained(jax.tree.map(jnp.copy, params), grads)
    together, spread, compiled = trained(*jax.device_put((params, grads), rows))
    chex.assert_trees_all_equal(jax.device_get((together, spread)), jax.device_get((alone, state)))
    assert spread.remainder["w"].sharding.is_equivalent_to(rows, 2)
    assert "all-reduce" not in compiled.as_text()
    aliased = compiled.as_text().split("\n")[0].count("-alias)")
    assert aliased == len(jax.tree.leaves((together, spread)))


def test_the_state_of_float32_leaves_is_the_inner_one_alone(rng):
    params = random_params(rng)
    state = compensated(nadamw()).init(params)
    assert isinstance(state, CompensatedState)
    assert state.remainder["w"].dtype == jnp.int8
    assert jax.tree.leaves(state.remainder["norm"]) == []
    chex.assert_trees_all_equal(state.inner_state, nadamw().init(wide(params)))
    assert sum(x.nbytes for x in jax.tree.leaves(state.remainder)) == params["w"].size


def test_masked_leaves_and_none_pass(rng):
    params = random_params(rng) | {"none": None, "masked": optax.MaskedNode()}
    tx = compensated(nadamw(1e-3))
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["none"] is None
    assert isinstance(updates["masked"], optax.MaskedNode)
    assert master_params(state, params)["none"] is None


def test_extra_arguments_reach_the_inner_optimizer():
    inner = optax.contrib.reduce_on_plateau()
    params = jnp.ones(3, jnp.bfloat16)
    tx = compensated(optax.chain(optax.sgd(0.1), inner))
    tx.update(params, tx.init(params), params, value=jnp.float32(1.0))


def test_errors(rng):
    params = random_params(rng)
    tx = compensated(nadamw())
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"remainder_dtype must be int8, int16 or None, got 'float32'"):
        compensated(nadamw(), remainder_dtype="float32")
    with pytest.raises(TypeError, match=r"params\['h'\] has dtype float16.*bfloat16"):
        tx.init({"h": jnp.ones(3, jnp.float16)})
    with pytest.raises(ValueError, match="compensated needs params"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"params\['w'\] is float32 of shape \(32, 64\).*bfloat16 of shape \(32, 64\)"):
        tx.update(params, state, wide(params))
    with pytest.raises(ValueError, match=r"params\['norm'\] is bfloat16 of shape \(64,\).*not bfloat16"):
        tx.update(params, state, params | {"norm": jnp.ones(64, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"params differ in structure"):
        tx.update(params, state, {"w": params["w"]})
    with pytest.raises(ValueError, match=r"gradients\['w'\] has shape \(64,\)"):
        tx.update(params | {"w": params["norm"]}, state, params)
    with pytest.raises(ValueError, match=r"gradients differ in structure.*missing \['norm'\]"):
        tx.update({"w": params["w"]}, state, params)
    with pytest.raises(ValueError, match=r"compensated got the state of another optimizer: tuple"):
        tx.update(params, nadamw().init(params), params)
    with pytest.raises(ValueError, match="must hold one CompensatedState, but holds 0"):
        master_params(nadamw().init(params), params)
