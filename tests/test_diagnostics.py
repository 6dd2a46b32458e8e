"""The scalars for loggers: their values, and the states and gradients they accept.

- They follow the reference for every rule, within 3e-6, in double precision within 1e-13, compiled or not.
- The state is found at any depth; masked leaves do not count; injected hyperparameters go before the config's.
- Over devices nothing but sums is sent.
"""

import operator
import re
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_nadam import NadamConfig, ScaleByNadamState, nadam, nadamw, scale_by_nadam
from optax_nadam.diagnostics import scalars
from tests.helpers import descend
from tests.reference import FURTHER_RULES, RULES, Nadam

HYPERPARAMETERS: dict[str, Any] = {"b1": 0.8, "b2": 0.97, "eps": 1e-3, "eps_root": 1e-4, "momentum_decay": 0.3}
SHAPES = {"kernel": (3, 5), "bias": (5,), "scale": ()}
STEPS = 6


def random_gradients(rng, kind):
    """The gradients of each step, of another magnitude in each leaf."""

    def draw(shape, magnitude):
        real = magnitude * rng.standard_normal((STEPS, *shape))
        return (real + 1j * rng.standard_normal(real.shape) if np.dtype(kind).kind == "c" else real).astype(kind)

    return {name: draw(shape, 10.0**-i) for i, (name, shape) in enumerate(SHAPES.items())}


def trained(tx, gradients):
    """The state after all gradients, and the last gradient."""
    gradients = jax.tree.map(jnp.asarray, gradients)
    last = jax.tree.map(operator.itemgetter(-1), gradients)
    return descend(tx, jax.tree.map(jnp.zeros_like, last), gradients)[0][1], last


def expected_scalars(reference, gradients):
    """From the formulas alone, in double precision."""
    columns = []
    for leaf in gradients.values():
        g = leaf.astype(np.result_type(leaf, np.float64))
        *_, m, v, product = reference.updates(g)
        of_m, u = (reference.update(x, m, v, STEPS, product) for x in (0 * g[-1], g[-1]))
        columns.append([np.ravel(x) for x in (m, v, of_m, u)])
    m, v, of_m, u = (np.concatenate(column) for column in zip(*columns, strict=True))
    return {
        "mu": reference.mu(STEPS),
        "mu_product": product,
        "m_norm": np.linalg.norm(m),
        "root_v_norm": np.linalg.norm(np.sqrt(v)),
        "momentum_rms": np.sqrt(np.mean(np.abs(of_m) ** 2)),
        "update_rms": np.sqrt(np.mean(np.abs(u) ** 2)),
        "gradient_share": np.vdot(u - of_m, u).real / np.vdot(u, u).real,
    }


def outside_jit(f):
    return f


def on_numpy(f):
    return lambda *args: f(*jax.device_get(args))


@pytest.mark.parametrize(
    ("rule", "kind", "rtol", "compiled"),
    [
        *((rule, np.float32, 3e-6, jax.jit) for rule in RULES + FURTHER_RULES),
        ("scheduled", np.float32, 3e-6, outside_jit),
        ("scheduled", jnp.bfloat16, 3e-6, on_numpy),
        ("scheduled", np.complex64, 3e-6, jax.jit),
        pytest.param("scheduled", np.float32, 1e-6, jax.jit, marks=pytest.mark.x64),
        pytest.param("scheduled", np.float64, 1e-13, jax.jit, marks=pytest.mark.x64),
        pytest.param("scheduled", np.complex64, 1e-6, jax.jit, marks=pytest.mark.x64),
    ],
)
def test_follows_reference(rng, rule, kind, rtol, compiled):
    config, gradients = NadamConfig(rule=rule, **HYPERPARAMETERS), random_gradients(rng, kind)
    state, last = trained(config.build(), gradients)
    got, without = compiled(lambda state, g: (scalars(state, config, g), scalars(state, config)))(state, last)
    expected = expected_scalars(Nadam(rule, **HYPERPARAMETERS), gradients)
    assert set(got) == set(expected)
    for name, x in got.items():
        chex.assert_shape(x, ())
        chex.assert_type(x, jnp.result_type(float))
        np.testing.assert_allclose(x, expected[name], rtol=rtol, err_msg=name)
    assert without == {name: got[name] for name in without}
    assert set(got) - set(without) == {"update_rms", "gradient_share"}


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
    gradients = random_gradients(rng, np.float32)
    more: dict[str, Any] = {"frozen": np.ones((STEPS, 7), np.float32)} if how == "masked" else {"none": None}
    given = jax.tree.map(lambda g: np.repeat(g, 2 if how == "MultiSteps" else 1, axis=0), gradients | more)
    state, last = trained(WRAPPED[how], given)
    expected = expected_scalars(Nadam(**HYPERPARAMETERS), gradients)
    chex.assert_trees_all_close(scalars(state, NadamConfig(**HYPERPARAMETERS), last), expected, rtol=3e-6)


@pytest.mark.lenient("optax.inject_hyperparams mixes dtypes")
@pytest.mark.parametrize("rule", RULES)
def test_injected_go_first(rng, rule):
    """Those go before the hyperparameters of the config."""
    gradients = random_gradients(rng, np.float32)
    injected = optax.inject_hyperparams(nadam)(0.1, **HYPERPARAMETERS, rule=rule)
    state, last = trained(optax.chain(optax.clip_by_global_norm(1e9), injected), gradients)
    got = jax.jit(lambda s, g: scalars(s, NadamConfig(rule=rule), g))(state, last)
    chex.assert_trees_all_close(got, expected_scalars(Nadam(rule, **HYPERPARAMETERS), gradients), rtol=1e-5)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_product_of_zero(rng, b1):
    m, g, count = rng.standard_normal(4), rng.standard_normal(4), 100_000
    state = ScaleByNadamState(jnp.int32(count), jnp.float32(0.0), jnp.float32(m), jnp.float32(m**2))
    got = scalars(state, NadamConfig(b1=b1), jnp.float32(g))
    u = Nadam(b1=b1).update(g, m, m**2, count, 0.0)
    np.testing.assert_allclose(got["update_rms"], np.sqrt(np.mean(u**2)), rtol=1e-6)


def test_before_first_step():
    config = NadamConfig()
    got = scalars(config.build().init(jnp.ones(3)), config, jnp.ones(3))
    assert got["m_norm"] == got["root_v_norm"] == 0
    assert got["mu_product"] == 1
    assert all(np.isnan(got[name]) for name in ("momentum_rms", "update_rms", "gradient_share"))


def test_eight_devices(rng):
    """Nothing but sums is sent."""
    config, mesh = NadamConfig(), Mesh(np.array(jax.devices("cpu")), ("rows",))
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("w", (16, 4)), ("b", (8,)))}
    _, state = config.build().update(grads, config.build().init(grads))
    split = [
        jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*["rows"][: x.ndim]))), tree)
        for tree in (state, grads)
    ]
    measure = jax.jit(lambda state, g: scalars(state, config, g))
    compiled = measure.lower(*split).compile()
    sent = r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
    assert set(re.findall(sent, compiled.as_text())) == {"all-reduce"}
    chex.assert_trees_all_close(jax.device_get(compiled(*split)), measure(state, grads), rtol=1e-5)


@pytest.mark.parametrize(
    ("gradients", "error", "text"),
    [
        ({"x": np.ones(3, np.float32)}, ValueError, r"gradients\['x'\] has shape \(3,\)"),
        ({"x": np.ones(2, np.int32)}, TypeError, r"gradients\['x'\] has dtype int32"),
        ({"y": np.ones(2, np.float32)}, ValueError, "'x'"),
    ],
)
def test_misfits(gradients, error, text):
    with pytest.raises(error, match=text):
        scalars(nadam().init({"x": jnp.ones(2)}), NadamConfig(), gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_moments(rng, dtype):
    gradients = {"w": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)}
    config = NadamConfig(m_dtype=dtype, v_dtype=dtype)
    got, wide = (
        scalars(c.build().update(gradients, c.build().init(gradients))[1], config, gradients)
        for c in (config, NadamConfig())
    )
    assert got.keys() == wide.keys()
    assert all(abs(got[name] / wide[name] - 1) < 0.02 for name in got)
