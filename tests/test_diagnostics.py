"""The scalars for loggers: their values, and the states and gradients they accept."""

from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, ScaleByNadamState, nadam, nadamw, scale_by_nadam
from optax_nadam.diagnostics import scalars
from tests.reference import FURTHER_RULES, RULES, Nadam
from tests.system.test_sharding import collectives, laid_out, mesh_of, random_tree

HYPERPARAMETERS: dict[str, Any] = {"b1": 0.8, "b2": 0.97, "eps": 1e-3, "eps_root": 1e-4, "momentum_decay": 0.3}
SHAPES = {"kernel": (3, 5), "bias": (5,), "scale": ()}
STEPS = 6


def random_gradients(rng, kind):
    """The gradients of each step, of another magnitude in each leaf."""

    def draw(shape, magnitude):
        real = magnitude * rng.standard_normal((STEPS, *shape))
        return (real + 1j * rng.standard_normal(real.shape) if np.dtype(kind).kind == "c" else real).astype(kind)

    return {name: draw(shape, 10.0**-i) for i, (name, shape) in enumerate(SHAPES.items())}


def at(gradients, step):
    return jax.tree.map(lambda g: jnp.asarray(g[step]), gradients)


def trained(tx, gradients, times=1):
    """The state after all gradients, each repeated a number of times, and the last gradient."""
    params = jax.tree.map(jnp.zeros_like, at(gradients, 0))
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        for _ in range(times):
            _, state = update(at(gradients, step), state, params)
    return state, at(gradients, -1)


def scalars_of(tx, config, gradients, times=1):
    state, last = trained(tx, gradients, times)
    return scalars(state, config, last)


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


def assert_follow_the_reference(rng, rule, kind, rtol, compile=jax.jit):
    config, gradients = NadamConfig(rule=rule, **HYPERPARAMETERS), random_gradients(rng, kind)
    state, last = trained(config.build(), gradients)
    got = compile(lambda state, g: scalars(state, config, g))(state, last)
    expected = expected_scalars(Nadam(rule, **HYPERPARAMETERS), gradients)
    assert set(got) == set(expected)
    for name, x in got.items():
        chex.assert_shape(x, ())
        chex.assert_type(x, jnp.result_type(float))
        np.testing.assert_allclose(x, expected[name], rtol=rtol, err_msg=name)
    without = compile(lambda state: scalars(state, config))(state)
    assert without == {name: got[name] for name in without}
    assert set(got) - set(without) == {"update_rms", "gradient_share"}


@pytest.mark.parametrize("rule", RULES + FURTHER_RULES)
def test_they_follow_the_reference(rng, rule):
    assert_follow_the_reference(rng, rule, np.float32, 3e-6)


def test_they_follow_the_reference_outside_jit(rng):
    assert_follow_the_reference(rng, "scheduled", np.float32, 3e-6, compile=lambda f: f)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.complex64])
@pytest.mark.x64
def test_they_follow_the_reference_in_double_precision(rng, kind):
    rtol = 1e-13 if kind == np.float64 else 1e-6
    assert_follow_the_reference(rng, "scheduled", kind, rtol)


def test_complex_leaves_count_by_their_magnitude(rng):
    assert_follow_the_reference(rng, "scheduled", np.complex64, 3e-6)


WRAPPED: dict[str, tuple[Any, int]] = {
    "the state itself": (scale_by_nadam(**HYPERPARAMETERS), 1),
    "a chain": (optax.chain(optax.clip_by_global_norm(1e9), nadamw(0.1, **HYPERPARAMETERS)), 1),
    "MultiSteps": (optax.MultiSteps(nadam(0.1, **HYPERPARAMETERS), 2), 2),
    "apply_if_finite": (optax.apply_if_finite(nadam(0.1, **HYPERPARAMETERS), 1), 1),
}


@pytest.mark.lenient("Optax's wrappers mix dtypes")
@pytest.mark.parametrize("how", WRAPPED)
def test_the_state_is_found_at_any_depth(rng, how):
    config, gradients = NadamConfig(**HYPERPARAMETERS), random_gradients(rng, np.float32)
    tx, times = WRAPPED[how]
    got, plain = scalars_of(tx, config, gradients, times), scalars_of(config.build(), config, gradients)
    chex.assert_trees_all_close(got, plain, rtol=1e-6)


@pytest.mark.lenient("optax.inject_hyperparams mixes dtypes")
@pytest.mark.parametrize("rule", RULES)
def test_injected_hyperparameters_go_before_those_of_the_config(rng, rule):
    gradients = random_gradients(rng, np.float32)
    injected = optax.inject_hyperparams(nadam)(0.1, **HYPERPARAMETERS, rule=rule)
    state, last = trained(optax.chain(optax.clip_by_global_norm(1e9), injected), gradients)
    chex.assert_trees_all_close(
        jax.jit(lambda s, g: scalars(s, NadamConfig(rule=rule), g))(state, last),
        expected_scalars(Nadam(rule, **HYPERPARAMETERS), gradients),
        rtol=1e-5,
    )


@pytest.mark.lenient("optax.inject_hyperparams mixes dtypes")
def test_what_is_injected_into_another_transformation_is_not_ours(rng):
    config, gradients = NadamConfig(**HYPERPARAMETERS), random_gradients(rng, np.float32)
    other = optax.inject_hyperparams(optax.scale_by_adam)(b1=0.1, b2=0.2, eps=0.3, eps_root=0.4)
    chained = optax.named_chain(("nadam", config.build()), ("adam", other))
    assert scalars_of(chained, config, gradients) == scalars_of(config.build(), config, gradients)


def test_masked_and_missing_leaves_do_not_count(rng):
    config, gradients = NadamConfig(**HYPERPARAMETERS), random_gradients(rng, np.float32)
    more = gradients | {"frozen": np.ones((STEPS, 7), np.float32)}
    masked = optax.masked(config.build(), {name: name != "frozen" for name in more})
    plain = scalars_of(config.build(), config, gradients)
    assert scalars_of(masked, config, more) == plain
    assert scalars_of(config.build(), config, gradients | {"none": None}) == plain


def test_narrow_gradients_and_numpy_arrays_are_taken(rng):
    config, gradients = NadamConfig(**HYPERPARAMETERS), random_gradients(rng, jnp.bfloat16)
    state, last = trained(config.build(), gradients)
    got = scalars(jax.device_get(state), config, jax.device_get(last))
    chex.assert_trees_all_close(got, expected_scalars(Nadam(**HYPERPARAMETERS), gradients), rtol=3e-6)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_a_product_of_momenta_of_zero_is_harmless(rng, b1):
    m, g, count = rng.standard_normal(4), rng.standard_normal(4), 100_000
    state = ScaleByNadamState(jnp.int32(count), jnp.float32(0.0), jnp.float32(m), jnp.float32(m**2))
    got = scalars(state, NadamConfig(b1=b1), jnp.float32(g))
    u = Nadam(b1=b1).update(g, m, m**2, count, 0.0)
    np.testing.assert_allclose(got["update_rms"], np.sqrt(np.mean(u**2)), rtol=1e-6)


def test_before_the_first_step_there_is_no_update():
    config = NadamConfig()
    got = scalars(config.build().init(jnp.ones(3)), config, jnp.ones(3))
    assert got["m_norm"] == got["root_v_norm"] == 0
    assert got["mu_product"] == 1
    assert all(np.isnan(got[name]) for name in ("momentum_rms", "update_rms", "gradient_share"))


def test_over_devices_nothing_but_sums_is_sent(rng):
    config = NadamConfig()
    tx, params, grads = config.build(), random_tree(rng), random_tree(rng)
    measure = jax.jit(lambda state, g: scalars(state, config, g))
    _, alone = tx.update(grads, tx.init(params))
    with mesh_of("automatic") as mesh:
        split = laid_out(grads, mesh)
        _, state = jax.jit(tx.update)(split, jax.jit(tx.init)(laid_out(params, mesh)))
        compiled = measure.lower(state, split).compile()
        assert set(collectives(compiled)) == {"all-reduce"}
        chex.assert_trees_all_close(jax.device_get(compiled(state, split)), measure(alone, grads), rtol=1e-5)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.partition({"a": nadam(), "b": nadam()}, {"x": "a", "y": "b"})])
def test_a_state_without_exactly_one_nadam_is_rejected(tx):
    state = tx.init({"x": jnp.ones(2), "y": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"opt_state must hold one ScaleByNadamState, but holds [02]\."):
        scalars(state, NadamConfig())


@pytest.mark.parametrize(
    ("gradients", "error", "text"),
    [
        ({"x": np.ones(3, np.float32)}, ValueError, r"gradients\['x'\] has shape \(3,\)"),
        ({"x": np.ones(2, np.int32)}, TypeError, r"gradients\['x'\] has dtype int32"),
        ({"y": np.ones(2, np.float32)}, ValueError, "'x'"),
    ],
)
def test_gradients_that_do_not_fit_are_rejected(gradients, error, text):
    with pytest.raises(error, match=text):
        scalars(nadam().init({"x": jnp.ones(2)}), NadamConfig(), gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_moments_are_read_as_numbers(rng, dtype):
    gradients = {"w": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)}
    config = NadamConfig(m_dtype=dtype, v_dtype=dtype)
    got, wide = (
        scalars(c.build().update(gradients, c.build().init(gradients))[1], config, gradients)
        for c in (config, NadamConfig())
    )
    assert got.keys() == wide.keys()
    assert all(abs(got[name] / wide[name] - 1) < 0.02 for name in got)
