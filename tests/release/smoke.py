"""Run by the Python of an environment that has the installed package and what it declares, no more."""

import sys
from importlib import metadata
from pathlib import Path

import jax
import optax
from jax import numpy as jnp

import optax_nadam
from optax_nadam._rules import RULES

assert Path(sys.prefix) in Path(optax_nadam.__file__).parents, optax_nadam.__file__
assert optax_nadam.__version__ == metadata.version("optax_nadam")

params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
grads = jax.tree.map(jnp.ones_like, params)
for rule in RULES.values():
    tx = optax_nadam.nadamw(1e-2, rule=rule, weight_decay=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert all(jnp.all(after < before) for before, after in zip(*map(jax.tree.leaves, (params, moved)), strict=True))
print(f"optax_nadam {optax_nadam.__version__}, jax {jax.__version__}, optax {optax.__version__}")
