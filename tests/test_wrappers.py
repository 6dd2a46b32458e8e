"""The links that some dialects need and Optax has not."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, _links, scale_by_nadam
from tests.reference import Nadam


def test_caution_is_that_of_timm():
    # timm's NAdamW with caution=True, lr=.01, no weight decay, in float32; off, its last row differs.
    for caution, expected in ((True, (0.981, 0.9596053, 0.9215352)), (False, (0.97350717, 0.9606539, 0.95404685))):
        config = NadamConfig(learning_rate=0.01, eps=1e-8, rule="simplified", caution=caution)
        tx, p = config.build(), jnp.ones(3)
        state = tx.init(p)
        for g in ((0.5, 0.5, 0.5), (-0.05, 0.5, 0.5), (-0.05, -0.05, 0.5)):
            updates, state = tx.update(jnp.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
        np.testing.assert_allclose(p, expected, atol=2e-7)


def test_caution_with_nothing_left_moves_nothing():
    tx = _links.cautious(scale_by_nadam(rule="simplified"))
    state = tx.init(jnp.ones(4))._replace(m=jnp.full(4, -1.0), v=jnp.ones(4), count=jnp.int32(5))
    updates, _ = tx.update(jnp.full(4, 1e-3), state)
    chex.assert_trees_all_equal(updates, jnp.zeros(4))


def test_caution_drops_what_has_no_gradient():
    tx = _links.cautious(scale_by_nadam(rule="simplified"))
    state = tx.init(jnp.ones(2))._replace(m=jnp.ones(2), v=jnp.ones(2), count=jnp.int32(5))
    updates, _ = tx.update(jnp.asarray([0.0, 1.0]), state)
    assert updates[0] == 0
    assert updates[1] > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_clipping_by_the_rms_of_the_gradient_over_the_root(rng, dtype):
    config = NadamConfig(learning_rate=1.0, rule="simplified", clip_update_rms=0.5)
    tx = config.build()
    grads = [jnp.asarray(scale * rng.normal(size=50), dtype) for scale in (1.0, 0.1, 3.0)]
    state = tx.init(grads[0])
    plain, *_ = Nadam("simplified").updates(np.stack([np.asarray(g, np.float64) for g in grads]))
    _, _, v = np.zeros(50), np.zeros(50), np.zeros(50)
    for t, g in enumerate(grads, start=1):
        updates, state = tx.update(g, state)
        chex.assert_type(updates, dtype)
        wide = np.asarray(g, np.float64)
        v = 0.999 * v + 0.001 * wide**2
        rms = np.sqrt(np.mean((wide / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)) ** 2))
        expected = -plain[t - 1] / max(1.0, rms / 0.5)
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=tolerance, atol=1e-6)
    assert rms > 1


def test_rows_without_gradient_stay_while_their_moments_decay():
    tx = _links.keep_rows_without_gradient(scale_by_nadam(), {"table": True, "dense": False})
    params = {"table": jnp.ones((3, 2)), "dense": jnp.ones((3, 2))}
    state = tx.init(params)
    first = {name: jnp.asarray([[1.0, 2.0], [0.5, 1.0], [0.0, 0.0]]) for name in params}
    second = {name: jnp.asarray([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]) for name in params}
    _, state = tx.update(first, state)
    updates, after = tx.update(second, state)
    plain, plain_after = scale_by_nadam().update(second, state)
    chex.assert_trees_all_equal(after, plain_after)
    chex.assert_trees_all_equal(updates["dense"], plain["dense"])
    chex.assert_trees_all_equal(updates["table"][1:], plain["table"][1:])
    chex.assert_trees_all_equal(updates["table"][0], jnp.zeros(2))
    assert jnp.all(plain["table"][0] != 0)


def test_rows_are_chosen_by_a_function_too():
    def mask(params):
        return jax.tree.map(lambda p: p.ndim == 2, params)

    params = {"table": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    chosen = _links.keep_rows_without_gradient(scale_by_nadam(), mask)
    fixed = _links.keep_rows_without_gradient(scale_by_nadam(), {"table": True, "bias": False})
    state = chosen.init(params)._replace(m=params, v=params)
    grads = {"table": jnp.asarray([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]), "bias": jnp.zeros(2)}
    updates, _ = chosen.update(grads, state)
    chex.assert_trees_all_equal(updates, fixed.update(grads, state)[0])
    assert jnp.all(updates["bias"] != 0)
