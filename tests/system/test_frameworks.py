"""Optimizers and their states in other libraries; ``tests/project/test_examples.py`` trains in more of them.

- Flax nnx takes the steps of plain Optax, with 8-bit, compensated, partitioned, accumulated and complex states: bit for
  bit.
- Our states are registered for ``jax.export``: bit for bit.
- Haiku learns. Compensated weights that ``equinox.apply_updates`` has widened are refused by name.
"""

from typing import Any

import chex
import equinox as eqx
import flax
import haiku as hk
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from sklearn.datasets import load_diabetes

import optax_nadam

pytestmark = pytest.mark.lenient("these libraries mix dtypes")
FLAX = tuple(map(int, flax.__version__.split(".")[:3]))


def test_haiku():
    x, y = load_diabetes(return_X_y=True)
    x, y = jnp.asarray(20 * x, jnp.float32), jnp.asarray((y - y.mean()) / y.std(), jnp.float32)
    network: Any = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)))
    params, tx = network.init(jax.random.key(0), x), optax_nadam.nadamw(0.03)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((network.apply(p, x)[:, 0] - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=60)
    assert losses[0] > 0.9  # the variance of y is 1; a linear model explains half of it
    assert losses[-1] < 0.6
    assert np.all(np.isfinite(losses))
    assert state[0].count == 60


class Net(nnx.Module):
    """A layer of enough weights for 8-bit moments, and a complex one."""

    def __init__(self, dtype):
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


IN_NNX: dict[str, Any] = {
    "int8": optax_nadam.nadamw(0.1, **BYTES),
    "compensated": optax_nadam.compensated(optax_nadam.nadamw(0.1, **BYTES)),
    "partition": optax.partition({"ours": optax_nadam.nadamw(0.1, **BYTES), "adam": optax.adam(0.1)}, parts),
    "complex as two real leaves": optax_nadam.compat.torch.nadam(0.1, weight_decay=0.1),
    "accumulation": optax_nadam.NadamConfig(
        learning_rate=0.1, accumulate_steps=2, complex_as_real=True, **BYTES
    ).build(),
}


def by_name(tree):
    """Leaves by the names on the way to them, whether these are fields or keys."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in paths}


@pytest.mark.xfail(FLAX < (0, 12, 2), reason="fails on records in variables", raises=TypeError, strict=True)
@pytest.mark.parametrize("name", IN_NNX)
def test_flax_nnx(name):
    """Flax nnx makes mappings of the records in its variables, their fields sorted by name."""
    tx, model = IN_NNX[name], Net(jnp.bfloat16 if name == "compensated" else jnp.float32)
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
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    if name != "partition":
        inside, expected = map(optax_nadam.get_state, (nnx.as_pure(optimizer.opt_state), state))
        chex.assert_trees_all_equal(by_name(inside), by_name(expected))


@pytest.mark.parametrize("narrow", [{}, BYTES], ids=["float32", "int8"])
def test_jax_export(narrow):
    tx = optax_nadam.compensated(optax_nadam.scale_by_nadam(**narrow))
    params = {"w": jnp.ones((32, 64), jnp.bfloat16)}
    state = tx.init(params)
    exported = jax.export.export(jax.jit(tx.update))(params, state, params)
    again = jax.export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(again.call(params, state, params), tx.update(params, state, params))


def test_equinox_widens():
    tx = optax_nadam.compensated(optax_nadam.nadam(0.1))
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    updates, state = tx.update(params, tx.init(params), params)
    widened = eqx.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"params\['w'\] is float32 .*optax.apply_updates.*equinox.apply_updates does"):
        tx.update(params, state, widened)
