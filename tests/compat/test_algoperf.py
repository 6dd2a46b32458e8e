"""AlgoPerf's nadamw under its own names: its steps, its state, configs that make the round trip, refusals by name."""

import dataclasses
import re
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, compat, get_state
from optax_nadam._rules import RULES
from tests.compat.sources import follow_advice
from tests.parity.problem import FEW, problem, run

STATE = compat.algoperf.nadamw(0.1).init(jnp.ones(2))


# AlgoPerf's nadamw run on gradients .5, -.25, .1 from 1 at a learning rate of .01, in float32.
@pytest.mark.parametrize(
    ("debias", "expected"),
    [(True, (0.98100013, 0.98193228, 0.97796929)), (False, (0.93991679, 0.94387817, 0.92426008))],
)
def test_the_steps_are_those_of_algoperf(debias, expected):
    got, _ = run(
        compat.algoperf.nadamw(0.01, debias=debias), np.float32(1.0), [np.float32(g) for g in (0.5, -0.25, 0.1)]
    )
    np.testing.assert_allclose(got, expected, atol=2e-7)


def test_power_and_weight_decay():
    tx = compat.algoperf.nadamw(0.1, power=1.0, weight_decay=0.5, weight_decay_mask={"a": True, "b": False})
    params = {"a": jnp.float32(2.0), "b": jnp.float32(2.0)}
    updates, _ = tx.update({"a": jnp.float32(0.5), "b": jnp.float32(0.5)}, tx.init(params), params)
    step = -0.1 * (0.5 + 0.9 * 0.5) / 0.25  # v-hat is .25, m-hat and the gradient are .5
    np.testing.assert_allclose(updates["b"], step, rtol=1e-6)
    np.testing.assert_allclose(updates["a"], step - 0.1 * 0.5 * 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"power must be finite and positive, got -1\.0"):
        compat.algoperf.nadamw(0.1, power=-1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 0.1, "weight_decay": 0.5},
        {"learning_rate": 0.1, "debias": False, "power": 0.25},
        {"learning_rate": 0.1, "power": 1.0},
    ],
)
def test_configs_round_trip(arguments):
    config = compat.algoperf.config_from(arguments)
    translated = compat.algoperf.config_to(config)
    assert compat.algoperf.config_from(translated) == config
    params, grads = problem(1, shapes=FEW)
    expected, _ = run(compat.algoperf.nadamw(**arguments), params, grads)
    for tx in (config.build(), compat.algoperf.nadamw(**translated)):
        chex.assert_trees_all_equal(run(tx, params, grads)[0], expected)


class ScaleByAdamState(NamedTuple):
    """AlgoPerf's own class, which is not that of Optax."""

    count: Any
    mu: Any
    nu: Any


def test_a_state_goes_both_ways():
    params, grads = problem(2, shapes=FEW)
    config = NadamConfig(learning_rate=0.1, rule="simplified")
    tx = config.build()
    before, state = run(tx, params, grads[:25])
    theirs = compat.algoperf.dump_state(state)
    assert isinstance(theirs, optax.ScaleByAdamState)
    chain = (optax.EmptyState(), ScaleByAdamState(*theirs), optax.EmptyState())
    resumed = compat.algoperf.load_state(tx.init(params), chain, config=config)
    np.testing.assert_allclose(get_state(resumed).mu_product, get_state(state).mu_product, rtol=1e-5)
    at = jax.tree.map(lambda p: p[-1], before)
    chex.assert_trees_all_equal(run(tx, at, grads[25:], resumed)[0], run(tx, at, grads[25:], state)[0])


def test_other_records():
    with pytest.raises(ValueError, match=r"source must hold one ScaleByAdamState, .* but holds 0"):
        compat.algoperf.load_state(compat.algoperf.nadamw(0.1).init(jnp.ones(2)), optax.EmaState(jnp.int32(1), 0.0))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rule": "constant"}, "AlgoPerf's nadamw cannot express rule='constant'. It follows 'simplified', or"),
        ({"rule": dataclasses.replace(RULES["flux"], power=0.25)}, "AlgoPerf's nadamw cannot express rule=Rule("),
        ({"coupled_weight_decay": True}, "AlgoPerf's nadamw cannot express coupled_weight_decay=True"),
        ({"v_dtype": "int8"}, "AlgoPerf's nadamw cannot express v_dtype='int8'"),
    ],
)
def test_inexpressible(fields, text):
    config = NadamConfig(**{"rule": "simplified", **fields})
    for refuse in (compat.algoperf.config_to, lambda config: compat.algoperf.dump_state(STATE, config=config)):
        with pytest.raises(ValueError, match=re.escape(text)):
            refuse(config)
    assert follow_advice(compat.algoperf.config_to, config) == [("AlgoPerf's nadamw", *fields)]


def test_calls_that_cannot_be_read():
    with pytest.raises(ValueError, match="AlgoPerf's nadamw has unknown keys beta1; known are"):
        compat.algoperf.config_from({"learning_rate": 0.1, "beta1": 0.9})
    with pytest.raises(ValueError, match="AlgoPerf's nadamw lacks learning_rate"):
        compat.algoperf.config_from({"b1": 0.9})
    with pytest.raises(TypeError, match="debias must be True or False, got 0"):
        compat.algoperf.config_from({"learning_rate": 0.1, "debias": 0})
