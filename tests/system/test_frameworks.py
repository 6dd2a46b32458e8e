"""A few steps in each library that people train with, on scikit-learn's diabetes data."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import optax
import optimistix as optx
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax import numpy as jnp
from sklearn.datasets import load_diabetes

import optax_nadam

pytestmark = pytest.mark.lenient("these libraries mix dtypes")
STEPS = 60


@pytest.fixture(scope="module")
def data():
    x, y = load_diabetes(return_X_y=True)
    return jnp.asarray(20 * x, jnp.float32), jnp.asarray((y - y.mean()) / y.std(), jnp.float32)


def mean_squared_error(predict, data):
    x, y = data
    return jnp.mean((predict(x)[:, 0] - y) ** 2)


def assert_learned(losses, count):
    """The variance of y is 1; a linear model explains half of it."""
    assert losses[0] > 0.9
    assert losses[-1] < 0.6
    assert np.all(np.isfinite(losses))
    assert count == STEPS


def test_flax_linen_train_state(data):
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), data[0])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax_nadam.nadamw(0.03))

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: mean_squared_error(lambda x: state.apply_fn(p, x), data))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state)
        losses.append(loss)
    assert_learned(losses, state.opt_state[0].count)


def test_flax_nnx_optimizer(data):
    model = nnx.Linear(10, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax_nadam.nadamw(0.03), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: mean_squared_error(model, data))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(STEPS)]
    assert_learned(losses, optimizer.opt_state[0].count[...])


def test_equinox_module(data):
    model = eqx.nn.MLP(10, 1, 0, 0, activation=jax.nn.relu, key=jax.random.key(0))
    tx = optax_nadam.nadamw(0.03)
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state):
        loss, grads = eqx.filter_value_and_grad(lambda m: mean_squared_error(jax.vmap(m), data))(model)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    for _ in range(STEPS):
        model, opt_state, loss = step(model, opt_state)
        losses.append(loss)
    assert_learned(losses, opt_state[0].count)


def test_haiku(data):
    network: Any = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)))
    params = network.init(jax.random.key(0), data[0])
    tx = optax_nadam.nadamw(0.03)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(lambda p: mean_squared_error(lambda x: network.apply(p, x), data))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(STEPS):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    assert_learned(losses, opt_state[0].count)


def test_optimistix_minimiser(data):
    def loss(params, data):
        return mean_squared_error(lambda x: x @ params["w"] + params["b"], data)

    start = {"w": jnp.zeros((10, 1)), "b": jnp.zeros(1)}
    solver: Any = optx.OptaxMinimiser(optax_nadam.nadam(0.03), rtol=0.0, atol=0.0)
    solution: Any = optx.minimise(loss, solver, start, args=data, max_steps=STEPS, throw=False)
    assert_learned([loss(start, data), loss(solution.value, data)], solution.state.opt_state[0].count)
