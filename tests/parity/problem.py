"""The problem that every framework and ours are given: a tree of parameters, and gradients made in advance."""

import functools

import jax
import numpy as np
import optax
import pytest

SHAPES = {"kernel": (4, 3), "bias": (3,), "conv": (2, 2, 3), "scale": ()}
# A matrix and a scalar: each leaf takes a while to compile here and there, and no rule depends on how many there are.
FEW = {"kernel": (4, 3), "scale": ()}
STEPS = 60


def long_unless(is_short, cases):
    """Cases, or tuples, as parameters of a test; those are long that a function says no of."""
    found = [x if isinstance(x, tuple) else (x,) for x in cases]
    return [pytest.param(*x, marks=() if is_short(*x) else pytest.mark.long) for x in found]


def problem(seed=0, steps=STEPS, shapes=None, dtype=np.float32):
    """Parameters by name, and a list of gradients by name, of magnitudes that differ from leaf to leaf."""
    shapes = SHAPES if shapes is None else shapes
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    scales = {name: 10 ** rng.uniform(-2, 1) for name in shapes}
    grads = [
        {name: (scales[name] * (rng.normal(size=shape) + 0.3)).astype(dtype) for name, shape in shapes.items()}
        for _ in range(steps)
    ]
    return params, grads


@functools.cache
def program(tx):
    """All steps of an optimizer in one program, which is compiled once where an optimizer runs more than once."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def steps(params, state, grads):
        return jax.lax.scan(step, (params, tx.init(params) if state is None else state), grads)

    return steps


def run(tx, params, grads, state=None):
    """Our parameters after each step, by name with a leading axis of steps, and the last optimizer state."""
    stacked = jax.tree.map(lambda *g: np.stack(g), *grads)
    (_, state), trajectory = program(tx)(params, state, stacked)
    return jax.tree.map(np.asarray, trajectory), state


def continued(tx, state, params, loss, steps):
    """Our parameters some steps of a loss later."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def stack(trajectory):
    """A list of parameters by name as arrays by name with a leading axis of steps."""
    return {name: np.stack([np.asarray(params[name]) for params in trajectory]) for name in trajectory[0]}


def gap(ours, theirs, learning_rate):
    """The largest distance of a parameter at any step, in units of the learning rate."""
    return max(float(np.max(np.abs(ours[name] - theirs[name]))) for name in theirs) / learning_rate
