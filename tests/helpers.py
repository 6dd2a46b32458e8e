"""What several of the unit tests share."""

import operator

import jax
import numpy as np
import optax
import pytest

from tests.reference import FURTHER_RULES, RULES

every_rule = pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
# The default; where m decays by mu and v looks ahead; where epsilon is elsewhere. The others differ from these in
# scalars alone (adam's of the gradient is 0), which tests with every rule check; here they are for ``run.py long``.
DISTINCT = {"scheduled", "dozat2016", "eps_hat"}
FEW_RULES = [(rule, () if rule in DISTINCT else pytest.mark.long) for rule in RULES + FURTHER_RULES]
few_rules = pytest.mark.parametrize("rule", [pytest.param(rule, marks=marks) for rule, marks in FEW_RULES])

# The second is x86's own, the third an NVIDIA GPU's.
NANS = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F810000], np.uint32).view(np.float32)


def run(tx, grads):
    """The last state and all updates, of gradients with a leading axis of steps."""

    @jax.jit  # what is computed outside is compiled operation by operation, each of which takes as long as a small step
    def steps(grads):
        first = jax.tree.map(operator.itemgetter(0), grads)
        return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(first), grads)

    return steps(grads)


def descend(tx, params, grads):
    """The last params and state, and the params after each step."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads))(params, grads)


def relative_error(got, expected, axis=None):
    """The length of the error over that of what is expected."""
    got, expected = np.asarray(got).astype(expected.dtype), np.asarray(expected)
    return np.linalg.norm(got - expected, axis=axis) / np.linalg.norm(expected, axis=axis)


def inside_everything(tx):
    """An optimizer inside wrappers of every shape: tuples, dicts, records within records."""
    injected = optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(
        scale=optax.constant_schedule(1.0)
    )
    labels = {"a": "ours", "b": "theirs"}
    parts = optax.partition({"ours": injected, "theirs": optax.adam(optax.constant_schedule(0.1))}, labels)
    return optax.MultiSteps(optax.chain(optax.clip(1.0), parts), 2).gradient_transformation()
