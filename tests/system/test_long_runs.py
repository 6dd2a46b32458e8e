"""Long runs, of one rule for each shape of step; ``python run.py long``: of every rule.

- Rounding errors do not accumulate, with three kinds of gradients: bounds of 4e-7 (rms) in the update, 1e-7 in m, 8e-7
  in v, 1.2e-7 in the product, the same in every decade of 10^4 steps, 10^6 in ``python run.py long`` (measured 3.2e-7,
  8e-8, 6.5e-7 and 1e-7, constant from step 10^3 on).
- With a constant gradient, moments and updates converge: after 10^5 steps ``m`` is within 5 units in the last place,
  ``v`` within 6e-5, the update within 3e-5.
- The count stops at 2^31 - 1, and updates there are within 3e-7.
- A product of momenta that underflows changes nothing: the same bits as with 0.
- A learning rate of 0 updates the state like any other, and no parameter: bit for bit.
"""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import ScaleByNadamState, _rules, nadam, nadamw, scale_by_nadam
from tests.helpers import every_rule, few_rules, relative_error
from tests.reference import Nadam

ROUNDING = 2.0**-24  # half a unit in the last place of a float32, relative to it, is at most this
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


def assert_below(bound, errors, h):
    """The root mean square over steps 1 to 9, 10 to 99, 100 to 999 and so on, of every kind of gradient."""
    ends = 10 ** np.arange(1, round(np.log10(len(errors))))
    for decade, part in enumerate(np.split(errors, ends - 1)):
        worst = dict(zip(KINDS, np.sqrt(np.mean(part**2, axis=0)), strict=True))
        assert {kind: error for kind, error in worst.items() if not error < bound} == {}, f"{h}, from 10^{decade}"


@every_rule
def test_history_of_the_reference(rng, rule):
    reference, grads = Nadam(rule, b2=0.9), rng.normal(size=(50, 3))
    u, m, v, product = reference.history(grads)
    u_expected, *last = reference.updates(grads)
    np.testing.assert_allclose(u, u_expected, rtol=1e-14)
    np.testing.assert_allclose([*m[-1], *v[-1], product[-1]], np.hstack(last), rtol=1e-14)


@few_rules
@pytest.mark.parametrize(
    ("steps", "hyperparameters"),
    [
        pytest.param(10_000, [{}, {"b1": 0.0, "momentum_decay": 0.0}, {"b2": 0.0}], id="10^4"),
        pytest.param(1_000_000, [{}], id="10^6", marks=pytest.mark.long),
    ],
)
def test_errors_stay_small(rule, steps, hyperparameters):
    grads = gradients(steps)
    runs = [functools.partial(history, scale_by_nadam(rule=rule, **h)) for h in hyperparameters]
    histories = jax.jit(lambda grads: [run(grads) for run in runs])(grads)
    for h, (updates, ms, vs, products) in zip(hyperparameters, histories, strict=True):
        u, m, v, product = Nadam(rule, **h).history(grads.astype(float))
        # The same in every decade of steps, so whatever the step.
        assert_below(4e-7, relative_error(updates, u, axis=-1), h)
        assert_below(1e-7, relative_error(ms, m, axis=-1), h)
        # A unit in the last place, at each of the 1/(1-b2) steps that v averages, up or down at random.
        assert_below(8e-7, relative_error(np.asarray(vs, float) / v, np.ones_like(v), axis=-1), h)
        np.testing.assert_allclose(products, product, rtol=0, atol=1.2e-7, err_msg=str(h))


@few_rules
def test_constant_gradient(rule):
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


@few_rules
def test_last_count(rng, rule):
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
        assert relative_error(u, expected) <= 3e-7
        assert state.count == t


@pytest.mark.parametrize("rule", [name for name, rule in _rules.RULES.items() if rule.running_product])
def test_vanishing_product(rng, rule):
    g = jnp.asarray(rng.normal(size=100), jnp.float32)
    tx = scale_by_nadam(rule=rule)
    state = tx.init(g)._replace(count=jnp.int32(900), v=jnp.square(g))
    expected, _ = tx.update(g, state._replace(mu_product=jnp.float32(0.0)))
    for product in (1e-37, 1e-39, 1e-45, 0.0):
        u, after = tx.update(g, state._replace(mu_product=jnp.float32(product)))
        chex.assert_trees_all_equal(u, expected)
        assert 0 <= after.mu_product < 1e-36


@pytest.mark.parametrize("make", [nadam, *(functools.partial(nadamw, rule=rule) for rule in _rules.RULES)])
def test_learning_rate_of_zero(make):
    params = {"w": jnp.asarray([1.0, -2.0, 3e-38, 1e38]), "b": jnp.float32(0.1)}
    grads = jnp.asarray(np.random.default_rng(7).normal(size=100), jnp.float32)

    @jax.jit
    def run(learning_rate):
        tx = make(learning_rate)

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: p * 0 + g, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    (still, state), (moved, moved_state) = run(0.0), run(0.1)
    chex.assert_trees_all_equal(still, params)
    chex.assert_trees_all_equal(state, moved_state)
    assert still["b"] != moved["b"]
