"""The scalars for loggers: their values, and the states and configs they accept.

- They follow the reference within 3e-6, in double precision within 1e-13, compiled or not; ``python run.py long``: for
  every rule.
- The state is found at any depth; masked leaves do not count; injected hyperparameters go before the config's.
- What a snapshot recorded is the length of the step that was taken, under clipping and accumulation too.
- Over devices nothing but sums is sent.
"""

import re
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_nadam import (
    NadamConfig,
    ScaleByNadamState,
    accumulate,
    get_state,
    nadam,
    nadamw,
    scale_by_nadam,
    set_state,
)
from optax_nadam.diagnostics import rms, scalars
from tests.helpers import FEW_RULES
from tests.reference import RULES, Nadam

HYPERPARAMETERS: dict[str, Any] = {"b1": 0.8, "b2": 0.97, "eps": 1e-3, "eps_root": 1e-4, "momentum_decay": 0.3}
SHAPES = {"kernel": (3, 5), "bias": (5,), "scale": ()}
STEPS = 6


def random_gradients(rng, kind):
    """The gradients of each step, of another magnitude in each leaf."""

    def draw(shape, magnitude):
        real = magnitude * rng.standard_normal((STEPS, *shape))
        return (real + 1j * rng.standard_normal(real.shape) if np.dtype(kind).kind == "c" else real).astype(kind)

    return {name: draw(shape, 10.0**-i) for i, (name, shape) in enumerate(SHAPES.items())}


def by_the_formulas(reference, gradients):
    """Moments of each leaf, in double precision, and the product."""
    updates = {name: reference.updates(g.astype(np.result_type(g, np.float64))) for name, g in gradients.items()}
    m, v = ({name: of_leaf[i] for name, of_leaf in updates.items()} for i in (-3, -2))
    return m, v, updates["scale"][-1]


def after_all(tx, reference, gradients, **others):
    """The state after all gradients: that of no step with the numbers of the formulas."""
    more = {name: None if x is None else np.ones(7, np.float32) for name, x in others.items()}
    fresh = tx.init(jax.tree.map(lambda g: g[0], gradients) | more)
    m, v, product = by_the_formulas(reference, gradients)
    numbers = ScaleByNadamState(STEPS, product, m | others, v | others)
    return set_state(fresh, jax.tree.map(lambda like, x: jnp.asarray(x, like.dtype), get_state(fresh), numbers))


def compiled_scalars(state, config):
    return jax.jit(lambda state: scalars(state, config))(state)


def expected_scalars(reference, gradients):
    """From the formulas alone, in double precision."""
    *moments, product = by_the_formulas(reference, gradients)
    m, v = (np.concatenate([np.ravel(x) for x in of_leaves.values()]) for of_leaves in moments)
    of_m = reference.update(0 * m, m, v, STEPS, product)
    return {
        "mu": reference.mu(STEPS),
        "mu_product": product,
        "m_norm": np.linalg.norm(m),
        "root_v_norm": np.linalg.norm(np.sqrt(v)),
        "momentum_rms": np.sqrt(np.mean(np.abs(of_m) ** 2)),
    }


def outside_jit(f):
    return f


def on_numpy(f):
    return lambda *args: f(*jax.device_get(args))


@pytest.mark.parametrize(
    ("rule", "kind", "rtol", "compiled"),
    [
        *(pytest.param(rule, np.float32, 3e-6, jax.jit, marks=marks) for rule, marks in FEW_RULES),
        ("scheduled", np.float32, 3e-6, outside_jit),
        ("scheduled", jnp.bfloat16, 3e-6, on_numpy),
        ("scheduled", np.complex64, 3e-6, jax.jit),
        pytest.param("scheduled", np.float32, 1e-6, jax.jit, marks=pytest.mark.x64),
        pytest.param("scheduled", np.float64, 1e-13, jax.jit, marks=pytest.mark.x64),
        pytest.param("scheduled", np.complex64, 1e-6, jax.jit, marks=pytest.mark.x64),
    ],
)
def test_follows_reference(rng, rule, kind, rtol, compiled):
    config, reference = NadamConfig(rule=rule, **HYPERPARAMETERS), Nadam(rule, **HYPERPARAMETERS)
    gradients = random_gradients(rng, kind)
    got = compiled(lambda state: scalars(state, config))(after_all(config.build(), reference, gradients))
    expected = expected_scalars(reference, gradients)
    assert set(got) == set(expected)
    for name, x in got.items():
        chex.assert_shape(x, ())
        chex.assert_type(x, jnp.result_type(float))
        np.testing.assert_allclose(x, expected[name], rtol=rtol, err_msg=name)


OTHER = optax.inject_hyperparams(optax.scale_by_adam)(b1=0.1, b2=0.2, eps=0.3, eps_root=0.4)
MASK = {"frozen": False, "kernel": True, "bias": True, "scale": True}
WRAPPED: dict[str, Any] = {
    "the state itself": scale_by_nadam(**HYPERPARAMETERS),
    "a chain": optax.chain(optax.clip_by_global_norm(1e9), nadamw(0.1, **HYPERPARAMETERS)),
    "MultiSteps": optax.MultiSteps(nadam(0.1, **HYPERPARAMETERS), 2),
    "apply_if_finite": optax.apply_if_finite(nadam(0.1, **HYPERPARAMETERS), 1),
    "masked": optax.masked(nadam(0.1, **HYPERPARAMETERS), MASK),
    "beside another": optax.named_chain(("nadam", nadam(0.1, **HYPERPARAMETERS)), ("adam", OTHER)),
}


@pytest.mark.lenient("Optax's wrappers mix dtypes")
@pytest.mark.parametrize("how", WRAPPED)
def test_found_at_any_depth(rng, how):
    """Masked and missing leaves do not count, and what is injected into another transformation is not ours."""
    gradients, reference = random_gradients(rng, np.float32), Nadam(**HYPERPARAMETERS)
    more: dict[str, Any] = {"frozen": optax.MaskedNode()} if how == "masked" else {"none": None}
    state = after_all(WRAPPED[how], reference, gradients, **more)
    expected = expected_scalars(reference, gradients)
    chex.assert_trees_all_close(compiled_scalars(state, NadamConfig(**HYPERPARAMETERS)), expected, rtol=3e-6)


@pytest.mark.lenient("optax.inject_hyperparams mixes dtypes")
@pytest.mark.parametrize("rule", RULES)
def test_injected_go_first(rng, rule):
    """Those go before the hyperparameters of the config."""
    gradients, reference = random_gradients(rng, np.float32), Nadam(rule, **HYPERPARAMETERS)
    injected = optax.inject_hyperparams(nadam)(0.1, **HYPERPARAMETERS, rule=rule)
    state = after_all(optax.chain(optax.clip_by_global_norm(1e9), injected), reference, gradients)
    got = compiled_scalars(state, NadamConfig(rule=rule))
    chex.assert_trees_all_close(got, expected_scalars(reference, gradients), rtol=1e-5)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_product_of_zero(rng, b1):
    m, count = rng.standard_normal(4), 100_000
    state = ScaleByNadamState(jnp.int32(count), jnp.float32(0.0), jnp.float32(m), jnp.float32(m**2))
    u = Nadam(b1=b1).update(0 * m, m, m**2, count, 0.0)
    np.testing.assert_allclose(scalars(state, NadamConfig(b1=b1))["momentum_rms"], np.sqrt(np.mean(u**2)), rtol=1e-6)


def test_before_first_step():
    config = NadamConfig()
    got = scalars(config.build().init(jnp.ones(3)), config)
    assert got["m_norm"] == got["root_v_norm"] == 0
    assert got["mu_product"] == 1
    assert np.isnan(got["momentum_rms"])


@pytest.mark.lenient("Optax's wrappers mix dtypes")
def test_step_is_that_taken(rng):
    """What a snapshot recorded, under clipping and accumulation: no gradient has to be passed."""
    gradients = rng.standard_normal((6, 5)).astype(np.float32)
    config = NadamConfig(learning_rate=0.1, clip_global_norm=0.5)
    tx = optax.chain(config.build(), optax.snapshot("step_rms", rms))
    accumulated = accumulate(tx, 2)
    params, state = jnp.zeros(5), accumulated.init(jnp.zeros(5))
    update = jax.jit(accumulated.update)
    for g in gradients:
        updates, state = update(g, state, params)
    means = gradients.reshape(3, 2, 5).mean(axis=1).astype(float)
    clipped = means * np.minimum(1, 0.5 / np.linalg.norm(means, axis=1, keepdims=True))
    u, *_ = Nadam().updates(clipped)
    got = scalars(state, config)["step_rms"]
    np.testing.assert_allclose(got, 0.1 * np.sqrt(np.mean(u[-1] ** 2)), rtol=1e-5)
    np.testing.assert_allclose(got, rms(updates), rtol=1e-6)


def test_another_config(rng):
    """Noticed by the product of the momenta, outside of jit; a changed b1 that is injected is no fault."""
    state = after_all(nadam(b1=0.9), Nadam(), random_gradients(rng, np.float32))
    with pytest.raises(ValueError, match=r"config is not that of this run: after 6 steps the product of its momenta"):
        scalars(state, NadamConfig(b1=0.5))
    with pytest.raises(TypeError, match="config must be the NadamConfig of the run, got GradientTransf"):
        scalars(state, nadam(b1=0.9))


def test_eight_devices(rng):
    """Nothing but sums is sent."""
    config, mesh = NadamConfig(), Mesh(np.array(jax.devices("cpu")), ("rows",))
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("w", (16, 4)), ("b", (8,)))}
    _, state = config.build().update(grads, config.build().init(grads))
    rows = lambda x: NamedSharding(mesh, PartitionSpec(*["rows"][: x.ndim]))  # noqa: E731
    split = jax.tree.map(lambda x: jax.device_put(x, rows(x)), state)
    measure = jax.jit(lambda state: scalars(state, config))
    compiled = measure.lower(split).compile()
    sent = r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
    assert set(re.findall(sent, compiled.as_text())) == {"all-reduce"}
    chex.assert_trees_all_close(jax.device_get(compiled(split)), measure(state), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_moments(rng, dtype):
    gradient = rng.normal(size=(32, 64)).astype(np.float32)
    config = NadamConfig(m_dtype=dtype, v_dtype=dtype)

    def of_one_step(optimizer):
        return scalars(optimizer.update(gradient, optimizer.init(gradient))[1], config)

    got, wide = jax.jit(lambda: [of_one_step(c.build()) for c in (config, NadamConfig())])()
    assert got.keys() == wide.keys()
    assert all(abs(got[name] / wide[name] - 1) < 0.02 for name in got)
