"""Optimistix: Nadam as the minimiser of a fit, on scikit-learn's diabetes data, compared with the exact solution."""

from typing import Any

import jax
import optax
import optimistix as optx
from _shared import arguments
from jax import numpy as jnp
from sklearn.datasets import load_diabetes

import optax_nadam


def mean_squared_error(weights: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean squared error of a linear model."""
    x, y = data
    return jnp.mean((x @ weights - y) ** 2)


def main() -> tuple[float, float, float]:
    """Fits ten weights; returns the error at zero, at the end, and of least squares."""
    steps = arguments(__doc__, steps=1000).steps
    x, y = load_diabetes(return_X_y=True)
    data = jnp.asarray(x / x.std(axis=0)), jnp.asarray((y - y.mean()) / y.std())
    solver: Any = optx.OptaxMinimiser(optax_nadam.nadam(optax.cosine_decay_schedule(0.1, steps)), rtol=1e-6, atol=1e-6)
    solution: Any = optx.minimise(mean_squared_error, solver, jnp.zeros(10), args=data, max_steps=steps, throw=False)

    exact, *_ = jnp.linalg.lstsq(*data)
    at_first, at_last, least = (float(mean_squared_error(w, data)) for w in (jnp.zeros(10), solution.value, exact))
    print(f"mean squared error: {at_first:.6f} at zero, {at_last:.6f} after {solution.stats['num_steps']} steps")
    print(f"of least squares: {least:.6f}")
    return at_first, at_last, least


if __name__ == "__main__":
    main()
