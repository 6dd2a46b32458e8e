"""A few steps in each library that people train with, on scikit-learn's diabetes data."""

from typing import Any

import chex
import equinox as eqx
import flax
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
FLAX = tuple(map(int, flax.__version__.split(".")[:3]))


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


class Net(nnx.Module):
    """A layer of enough weights for 8-bit moments, and a complex one."""

    def __init__(self, dtype=jnp.float32):
        """Starts from fixed weights."""
        self.kernel = nnx.Param(jnp.linspace(-1.0, 1.0, 32 * 64).reshape(32, 64).astype(dtype))
        self.phase = nnx.Param(jnp.ones(3, jnp.complex64))

    def loss(self):
        """Of the weights alone."""
        phase = self.phase[...]
        return jnp.mean(self.kernel[...].astype(jnp.float32) ** 2) + jnp.sum(jnp.real(phase * jnp.conj(phase)))


BYTES: dict[str, Any] = {"m_dtype": "int8", "v_dtype": "int8"}


def parts(params):
    """A label for each leaf, whatever container the params are in."""
    return jax.tree.map_with_path(lambda path, _: "ours" if "kernel" in jax.tree_util.keystr(path) else "adam", params)


IN_NNX: dict[str, tuple[Any, Any]] = {
    "int8": (optax_nadam.nadamw(0.1, **BYTES), jnp.float32),
    "compensated": (optax_nadam.compensated(optax_nadam.nadamw(0.1, **BYTES)), jnp.bfloat16),
    "partition": (
        optax.partition({"ours": optax_nadam.nadamw(0.1, **BYTES), "adam": optax.adam(0.1)}, parts),
        jnp.float32,
    ),
    "complex as two real leaves": (optax_nadam.compat.torch.nadam(0.1, weight_decay=0.1), jnp.float32),
    "accumulation": (
        optax_nadam.NadamConfig(learning_rate=0.1, accumulate_steps=2, complex_as_real=True, **BYTES).build(),
        jnp.float32,
    ),
}


def by_name(tree):
    """Leaves by the names on the way to them, whether these are fields or keys."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in paths}


@pytest.mark.xfail(FLAX < (0, 12, 2), reason="fails on records in variables", raises=TypeError, strict=True)
@pytest.mark.parametrize("name", IN_NNX)
def test_states_in_flax_nnx_are_those_of_plain_optax(name):
    """Flax nnx makes mappings of the records in its variables, their fields sorted by name."""
    tx, dtype = IN_NNX[name]
    model = Net(dtype)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model.loss())(model))

    @jax.jit
    def plain_step(params, state):
        graph, _ = nnx.split(model)
        grads = jax.grad(lambda params: nnx.merge(graph, nnx.State(params)).loss())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(4):
        params, state = plain_step(params, state)
        step(model, optimizer)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, got, params)
    if name != "partition":
        inside = by_name(optax_nadam.get_state(nnx.as_pure(optimizer.opt_state)))
        expected = by_name(optax_nadam.get_state(state))
        assert inside.keys() == expected.keys()
        for path in expected:
            np.testing.assert_array_equal(inside[path], expected[path], err_msg=str(path))


@pytest.mark.parametrize("narrow", [{}, BYTES], ids=["float32", "int8"])
def test_states_go_through_jax_export(narrow):
    tx = optax_nadam.compensated(optax_nadam.scale_by_nadam(**narrow))
    params = {"w": jnp.ones((32, 64), jnp.bfloat16)}
    state = tx.init(params)
    exported = jax.export.export(jax.jit(tx.update))(params, state, params)
    again = jax.export.deserialize(exported.serialize())
    for got, expected in zip(again.call(params, state, params), tx.update(params, state, params), strict=True):
        chex.assert_trees_all_equal_structs(got, expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_equinox_apply_updates_is_named_where_it_has_widened_compensated_weights():
    tx = optax_nadam.compensated(optax_nadam.nadam(0.1))
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    updates, state = tx.update(params, tx.init(params), params)
    widened = eqx.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"params\['w'\] is float32 .*optax.apply_updates.*equinox.apply_updates does"):
        tx.update(params, state, widened)
