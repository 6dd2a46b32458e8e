"""The Nadams of Optax and of AlgoPerf: run beside Optax itself."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import optax_nadam
from optax_nadam import NadamConfig, compat
from tests.parity.problem import gap, problem, run

pytestmark = pytest.mark.lenient("Optax's own Nadam mixes dtypes")
RATE = 1e-2
# Optax forms 1 - b^t in float32, off by 2e-5 at b2=.999: half of that in each of 60 updates is 6e-4 of a rate.
BOUND = 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "keywords", [{}, {"b1": 0.8, "b2": 0.98, "eps": 1e-4, "eps_root": 1e-6}], ids=["defaults", "others"]
)
def test_nadam_takes_the_steps_of_optax(seed, keywords):
    params, grads = problem(seed)
    ours, _ = run(compat.optax.nadam(RATE, **keywords), params, grads)
    theirs, _ = run(optax.nadam(RATE, **keywords), params, grads)
    assert gap(ours, theirs, RATE) < BOUND


@pytest.mark.parametrize("seed", range(3))
def test_nadamw_takes_the_steps_of_optax(seed):
    params, grads = problem(seed)
    mask = {"kernel": True, "bias": False, "conv": True, "scale": False}
    ours, _ = run(compat.optax.nadamw(RATE, weight_decay=0.1, mask=mask), params, grads)
    theirs, _ = run(optax.nadamw(RATE, weight_decay=0.1, mask=mask), params, grads)
    assert gap(ours, theirs, RATE) < BOUND


def test_schedules_are_taken():
    params, grads = problem(0)
    schedule = optax.cosine_decay_schedule(RATE, 60)
    assert (
        gap(run(compat.optax.nadam(schedule), params, grads)[0], run(optax.nadam(schedule), params, grads)[0], RATE)
        < BOUND
    )


# AlgoPerf's nadamw run on gradients .5, -.25, .1 from 1 at a rate of .01, in float32.
@pytest.mark.parametrize(
    ("debias", "expected"),
    [(True, (0.98100013, 0.98193228, 0.97796929)), (False, (0.93991679, 0.94387817, 0.92426008))],
)
def test_algoperf(debias, expected):
    got, _ = run(
        compat.optax.algoperf_nadamw(0.01, debias=debias), np.float32(1.0), [np.float32(g) for g in (0.5, -0.25, 0.1)]
    )
    np.testing.assert_allclose(got, expected, atol=2e-7)


def test_algoperf_power_and_weight_decay():
    tx = compat.optax.algoperf_nadamw(0.1, power=1.0, weight_decay=0.5, weight_decay_mask={"a": True, "b": False})
    params = {"a": jnp.float32(2.0), "b": jnp.float32(2.0)}
    updates, _ = tx.update({"a": jnp.float32(0.5), "b": jnp.float32(0.5)}, tx.init(params), params)
    step = -0.1 * (0.5 + 0.9 * 0.5) / 0.25  # v-hat is .25, m-hat and the gradient are .5
    np.testing.assert_allclose(updates["b"], step, rtol=1e-6)
    np.testing.assert_allclose(updates["a"], step - 0.1 * 0.5 * 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"power must be finite and positive, got -1\.0"):
        compat.optax.algoperf_nadamw(0.1, power=-1.0)


@pytest.mark.parametrize("make", [optax.adam, optax.nadam, lambda rate: optax.nadamw(rate, weight_decay=0.0)])
@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx)], ids=["bare", "chained"]
)
def test_a_run_goes_on_here_as_it_would_there(make, wrap):
    params, grads = problem(1)
    before, running = run(wrap(make(RATE)), params, grads[:25])
    at = jax.tree.map(lambda p: p[-1], before)
    tx = optax.chain(optax.clip_by_global_norm(1e9), compat.optax.nadam(RATE))
    resumed = compat.optax.load_state(tx.init(at), running)
    ours, state = run(tx, at, grads[25:35], resumed)
    theirs, _ = run(
        optax.nadam(RATE), at, grads[25:35], (optax.tree.get(running, "ScaleByAdamState"), optax.EmptyState())
    )
    assert gap(ours, theirs, RATE) < BOUND
    assert optax.tree.get(state, "ScaleByNadamState").count == 35


def test_and_back():
    params, grads = problem(2)
    tx = compat.optax.nadam(RATE)
    before, state = run(tx, params, grads[:25])
    at = jax.tree.map(lambda p: p[-1], before)
    theirs, _ = run(optax.nadam(RATE), at, grads[25:35], (compat.optax.dump_state(state), optax.EmptyState()))
    assert gap(run(tx, at, grads[25:35], state)[0], theirs, RATE) < BOUND


def test_an_adam_run_turned_into_scheduled_nadam_gets_the_product_of_its_steps():
    params, grads = problem(3)
    _, running = run(optax.adam(RATE), params, grads[:7])
    config = NadamConfig(learning_rate=RATE, b1=0.8, momentum_decay=0.5)
    resumed = compat.optax.load_state(config.build().init(params), running, config=config)
    _, all_along = run(config.build(), params, grads[:7])
    np.testing.assert_allclose(resumed[0].mu_product, all_along[0].mu_product, rtol=1e-6)


def test_weights_of_another_shape_are_turned_by_the_users_own_function():
    params, grads = problem(4)
    _, running = run(optax.adam(RATE), params, grads[:3])

    def transposed(tree):
        return {**tree, "kernel": tree["kernel"].T}

    tx = compat.optax.nadam(RATE)
    state = compat.optax.load_state(tx.init(transposed(params)), running, transposed)
    chex.assert_trees_all_equal(state[0].m, transposed(running[0].mu))
    chex.assert_trees_all_equal(compat.optax.dump_state(state, transposed).mu, running[0].mu)
    with pytest.raises(ValueError, match=r"m\['kernel'\] has shape \(4, 3\).*made for shape \(3, 4\)"):
        compat.optax.load_state(tx.init(transposed(params)), running)


def test_memory_of_the_source_is_not_kept():
    buffer = np.zeros(1024 + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4  # memory so aligned, JAX may take over as it is
    moments = {"w": buffer[start : start + 1024]}
    tx = compat.optax.nadam(RATE)
    state = compat.optax.load_state(tx.init(moments), optax.ScaleByAdamState(np.int32(1), moments, moments))
    moments["w"] += 1
    chex.assert_trees_all_equal(state[0].m, {"w": jnp.zeros(1024)})


def test_counters_of_schedules_go_along_whatever_holds_them():
    params, grads = problem(5)
    _, running = run(optax.adam(RATE), params, grads[:9])
    inner = optax.inject_hyperparams(optax_nadam.nadamw)(optax.linear_schedule(RATE, 0.0, 100), weight_decay=0.1)
    tx = optax.chain(optax.masked(inner, True), optax.scale_by_schedule(lambda count: 1.0))
    state = compat.optax.load_state(tx.init(params), running)
    counts = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if path[-1] == jax.tree_util.GetAttrKey("count")
    ]
    assert [int(count) for count in counts] == [9] * 4


def test_states_that_are_none_or_many_are_rejected():
    params, _ = problem(0)
    tx = compat.optax.nadam(RATE)
    with pytest.raises(ValueError, match=r"source must hold one state of optax.adam.*holds 0"):
        compat.optax.load_state(tx.init(params), optax.sgd(RATE).init(params))
    twice = optax.chain(optax.adam(RATE), optax.adam(RATE)).init(params)
    with pytest.raises(ValueError, match="holds 2"):
        compat.optax.load_state(tx.init(params), twice)
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 0"):
        compat.optax.load_state(optax.adam(RATE).init(params), optax.adam(RATE).init(params))
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 0"):
        compat.optax.dump_state(optax.adam(RATE).init(params))
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 2"):
        compat.optax.dump_state(optax.chain(tx, tx).init(params))


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 0.1, "weight_decay": 0.5},
    ],
)
def test_configs_go_round(arguments):
    config = compat.optax.config_from(arguments)
    assert compat.optax.config_from(compat.optax.config_to(config)) == config
    make = optax.nadamw if "weight_decay" in arguments else optax.nadam
    params, grads = problem(6)
    theirs, _ = run(make(**compat.optax.config_to(config)), params, grads)
    assert gap(run(config.build(), params, grads)[0], theirs, 0.1) < BOUND


def test_what_optax_cannot_express_is_named():
    with pytest.raises(ValueError, match=r"no counterpart of momentum_decay=0\.5, rule='scheduled', caution=True"):
        compat.optax.config_to(NadamConfig(momentum_decay=0.5, caution=True))
    with pytest.raises(ValueError, match="unknown keys mask; known are"):
        compat.optax.config_from({"learning_rate": 0.1, "mask": None})
    with pytest.raises(ValueError, match="no default learning_rate"):
        compat.optax.config_from({"b1": 0.1})
