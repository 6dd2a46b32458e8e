"""Long runs: rounding errors do not accumulate, and counters at their largest value are harmless."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import ScaleByNadamState, _rules, nadam, nadamw, scale_by_nadam
from tests.reference import Nadam

ALL_RULES = pytest.mark.parametrize("rule", _rules.RULES)
# Half a unit in the last place of a float32, relative to it, is at most this.
ROUNDING = 2.0**-24


KINDS = ("steady", "drifting", "heavy-tailed")


def gradients(steps):
    """Float32 gradients of three kinds, a leaf of 3 x 8 with a leading axis of steps."""
    rng = np.random.default_rng(20261122)
    steady, noise, walk = rng.normal(size=(3, steps, 8))
    drifting, heavy_tailed = noise + np.cumsum(walk, axis=0) / 30, rng.standard_t(2, size=(steps, 8))
    return np.stack([steady, drifting, heavy_tailed], axis=1).astype(np.float32)


def history(tx, grads):
    """The update, m, v and product of the momenta of every step, in one scan."""

    def step(state, g):
        u, state = tx.update(g, state)
        return state, (u, state.m, state.v, state.mu_product)

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


def relative_errors(got, expected):
    """The relative errors, by the norms over the last axis."""
    return np.linalg.norm(np.asarray(got, float) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def assert_below(bound, errors, h):
    """The root mean square over steps 1 to 9, 10 to 99, 100 to 999 and so on, of every kind of gradient."""
    ends = 10 ** np.arange(1, round(np.log10(len(errors))))
    for decade, part in enumerate(np.split(errors, ends - 1)):
        worst = dict(zip(KINDS, np.sqrt(np.mean(part**2, axis=0)), strict=True))
        assert {kind: error for kind, error in worst.items() if not error < bound} == {}, f"{h}, from 10^{decade}"


@ALL_RULES
def test_the_history_of_the_reference_is_that_of_its_steps(rng, rule):
    reference, grads = Nadam(rule, b2=0.9), rng.normal(size=(50, 3))
    u, m, v, product = reference.history(grads)
    u_expected, *last = reference.updates(grads)
    np.testing.assert_allclose(u, u_expected, rtol=1e-14)
    np.testing.assert_allclose([*m[-1], *v[-1], product[-1]], np.hstack(last), rtol=1e-14)


@ALL_RULES
@pytest.mark.parametrize(
    ("steps", "hyperparameters"),
    [
        pytest.param(10_000, [{}, {"b1": 0.0}, {"b2": 0.0}, {"momentum_decay": 0.0}], id="10^4"),
        pytest.param(1_000_000, [{}], id="10^6", marks=pytest.mark.long),
    ],
)
def test_errors_do_not_grow_with_the_steps(rule, steps, hyperparameters):
    grads = gradients(steps)
    runs = [functools.partial(history, scale_by_nadam(rule=rule, **h)) for h in hyperparameters]
    histories = jax.jit(lambda grads: [run(grads) for run in runs])(grads)
    for h, (updates, ms, vs, products) in zip(hyperparameters, histories, strict=True):
        u, m, v, product = Nadam(rule, **h).history(grads.astype(float))
        # The same in every decade of steps, so whatever the step.
        assert_below(4e-7, relative_errors(updates, u), h)
        assert_below(1e-7, relative_errors(ms, m), h)
        # A unit in the last place, at each of the 1/(1-b2) steps that v averages, up or down at random.
        assert_below(8e-7, relative_errors(np.asarray(vs, float) / v, np.ones_like(v)), h)
        np.testing.assert_allclose(products, product, rtol=0, atol=1.2e-7, err_msg=str(h))


@ALL_RULES
def test_a_constant_gradient_leads_to_the_limit_as_near_as_float32_comes(rule):
    g = np.asarray([1.0, 0.3, -7.7, -1e-3], np.float32)
    u, m, v, _ = history(scale_by_nadam(rule=rule), np.tile(g, (100_000, 1)))
    # A moment stops where its next change, 1-b of the remaining distance, is under half a unit in its last place.
    m_lacks, v_lacks = ROUNDING / (1 - 0.9), ROUNDING / (1 - 0.999)
    exact = g.astype(float)
    np.testing.assert_allclose(m[-1], exact, rtol=m_lacks + ROUNDING)
    np.testing.assert_allclose(v[-1], exact**2, rtol=v_lacks + ROUNDING)
    limit, *_ = Nadam(rule).step(exact, exact, exact**2, 100_000, 0.0)
    np.testing.assert_allclose(u[-1], limit, rtol=v_lacks / 2 + m_lacks)
    chex.assert_trees_all_equal(m[50_000:], jnp.broadcast_to(m[-1], (50_000, 4)))
    chex.assert_trees_all_equal(v[50_000:], jnp.broadcast_to(v[-1], (50_000, 4)))


@ALL_RULES
def test_updates_are_right_where_the_count_ends(rng, rule):
    # Decays slow enough to matter still after two billion steps.
    reference = Nadam(rule, b2=1 - 1e-9, momentum_decay=1e-9)
    tx = scale_by_nadam(b2=reference.b2, momentum_decay=reference.momentum_decay, rule=rule)
    g, m = rng.normal(size=(2, 4096)).astype(np.float32)
    v = rng.random(4096).astype(np.float32)
    last = 2**31 - 1
    for before, t in ((last - 2, last - 1), (last - 1, last), (last, last)):
        state = ScaleByNadamState(jnp.int32(before), jnp.float32(0.0), jnp.asarray(m), jnp.asarray(v))
        u, state = tx.update(jnp.asarray(g), state)
        expected, *_ = reference.step(g.astype(float), m.astype(float), v.astype(float), t, 0.0)
        assert relative_errors(u[None], expected[None]) <= 3e-7
        assert state.count == t


@pytest.mark.parametrize("rule", [name for name, rule in _rules.RULES.items() if rule.running_product])
@pytest.mark.parametrize("product", [1e-37, 1e-39, 1e-45, 0.0])
def test_a_vanishing_product_of_momenta_no_longer_matters(rng, rule, product):
    g = jnp.asarray(rng.normal(size=100), jnp.float32)
    tx = scale_by_nadam(rule=rule)
    state = tx.init(g)._replace(count=jnp.int32(900), v=jnp.square(g))
    u, after = tx.update(g, state._replace(mu_product=jnp.float32(product)))
    expected, _ = tx.update(g, state._replace(mu_product=jnp.float32(0.0)))
    chex.assert_trees_all_equal(u, expected)
    assert 0 <= after.mu_product < 1e-36


@pytest.mark.parametrize("make", [nadam, nadamw])
@ALL_RULES
def test_a_learning_rate_of_zero_moves_the_state_and_no_parameter(make, rule):
    params = {"w": jnp.asarray([1.0, -2.0, 3e-38, 1e38]), "b": jnp.float32(0.1)}

    def run(learning_rate):
        tx = make(learning_rate, rule=rule)

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: p * 0 + g, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        grads = jnp.asarray(np.random.default_rng(7).normal(size=1000), jnp.float32)
        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    (still, state), (moved, moved_state) = run(0.0), run(0.1)
    chex.assert_trees_all_equal(still, params)
    chex.assert_trees_all_equal(state, moved_state)
    assert still["b"] != moved["b"]
