"""What an Optax optimizer must do to work everywhere.

- Eager, jit and scan take the same steps; extra arguments are ignored; ``init`` takes abstract params.
- Dtypes and weak types stay from step to step, of leaves of all dtypes, so that nothing is compiled twice.
- Chains, masks, partitions, wrappers, injected hyperparameters, vmap and grad.
- Gradients up to 1e18 give finite updates and states: 20 examples, 2000 in ``python run.py long``.
"""

import functools
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import numpy as jnp

from optax_nadam import NadamConfig, nadam, nadamw, scale_by_nadam
from tests.helpers import run
from tests.reference import RULES

MAKERS: dict[str, Any] = {
    "scale_by_nadam": scale_by_nadam,
    "nadam": nadam,
    "nadamw": nadamw,
    "scheduled rate": lambda: nadam(lambda count: 0.1 / (1 + count.astype(float))),
    "config": lambda: NadamConfig(clip_norm=1.0, weight_decay=0.01, coupled_weight_decay=True).build(),
    "clipping config": lambda: NadamConfig(clip_norm=1.0, clip_global_norm=1.0).build(),
} | {f"rule {rule}": functools.partial(nadamw, rule=rule) for rule in RULES[1:]}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_rule = pytest.mark.parametrize("rule", RULES)
of_optax = pytest.mark.lenient("Optax's wrapper or schedule mixes dtypes")
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def some_params(dtype: Any = jnp.float32):
    return {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]], dtype), "b": jnp.asarray([0.25], dtype), "none": None}


def gradients_at(params):
    return jax.tree.map(lambda p: 2 * p, params)


def step(tx, carry, _=None, **extra_args):
    """A step on the sum of squares, as the body of a scan."""
    params, state = carry
    updates, state = tx.update(gradients_at(params), state, params, **extra_args)
    return (optax.apply_updates(params, updates), state), None


def descend(tx, params, steps=10, **extra_args):
    """Params and state after such steps."""
    carry = params, tx.init(params)
    for _ in range(steps):
        carry, _ = step(tx, carry, **extra_args)
    return carry


@every_maker
def test_extra_arguments(make):
    tx, extra = make(), {"value": 1.0, "grad": some_params(), "value_fn": jnp.sum}
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    chex.assert_trees_all_equal(descend(tx, some_params(), 2, **extra), descend(tx, some_params(), 2))


@every_maker
@pytest.mark.x64
def test_dtypes_stay(make):
    tx = make()
    trees = {dtype: some_params(dtype) for dtype in DTYPES}
    # The global norm of Optax is of one dtype.
    for params in trees.values() if make is MAKERS["clipping config"] else [trees]:
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        before, after = (jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), x) for x in (state, after))
        assert before == after


@every_maker
def test_eager_jit_and_scan(make):
    tx, params = make(), some_params()
    scanned, _ = jax.lax.scan(functools.partial(step, tx), (params, tx.init(params)), length=10)
    # Compiled alone or in a loop, XLA contracts other multiplications and additions.
    chex.assert_trees_all_close(scanned, descend(tx, params), rtol=1e-5, atol=1e-7)


@every_maker
def test_abstract_params(make):
    tx, abstract = make(), jax.eval_shape(some_params)
    chex.assert_trees_all_equal(tx.init(abstract), tx.init(some_params()))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, abstract), tx.init(some_params()))


@every_maker
@pytest.mark.parametrize("params", [{}, [], {"w": np.zeros((0, 3), np.float32)}], ids=["dict", "list", "leaf"])
def test_empty_trees(make, params):
    tx = make()
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)


def test_python_numbers():
    tx = scale_by_nadam()
    updates, state = tx.update({"w": 0.5}, tx.init({"w": 1.0}))
    np.testing.assert_allclose(updates["w"], 1.0564511, rtol=1e-6)
    chex.assert_type([updates["w"], state.m["w"]], jnp.float32)


@of_optax
def test_clipping_and_schedule():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)
    chained = optax.chain(optax.clip_by_global_norm(0.5), nadam(schedule))
    params = some_params()
    state, chain_state = scale_by_nadam().init(params), chained.init(params)
    for t in range(5):
        g = gradients_at(params)
        u, state = scale_by_nadam().update(optax.tree.scale(jnp.minimum(1.0, 0.5 / optax.tree.norm(g)), g), state)
        updates, chain_state = chained.update(g, chain_state, params)
        chex.assert_trees_all_close(updates, optax.tree.scale(-schedule(t), u), rtol=1e-5, atol=1e-8)
        params = optax.apply_updates(params, updates)


@of_optax
def test_multi_steps():
    """The step of the mean gradient."""
    params, tx = some_params(), optax.MultiSteps(nadam(0.1), every_k_schedule=2)
    state = tx.init(params)
    for factor in (0.5, 1.5):
        updates, state = tx.update(optax.tree.scale(factor, gradients_at(params)), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, descend(nadam(0.1), some_params(), 1)[0], rtol=1e-6)


def test_masked_and_partition():
    params = {"ours": jnp.ones(2), "frozen": jnp.arange(3)}
    masked = optax.masked(nadam(0.1), {"ours": True, "frozen": False})
    updates, state = masked.update(params, masked.init(params), params)
    chex.assert_trees_all_equal(updates["frozen"], params["frozen"])
    assert isinstance(optax.tree.get(state, "m")["frozen"], optax.MaskedNode)
    alone, _ = nadam(0.1).update(jnp.ones(2), nadam(0.1).init(jnp.ones(2)))
    chex.assert_trees_all_equal(updates["ours"], alone)

    slow_and_fast = {"slow": jnp.ones(2), "fast": jnp.ones(2)}
    parts = optax.partition({"slow": nadam(0.01), "fast": nadam(0.1)}, {"slow": "slow", "fast": "fast"})
    updates, _ = parts.update(slow_and_fast, parts.init(slow_and_fast), slow_and_fast)
    chex.assert_trees_all_close(updates, {"slow": 0.1 * alone, "fast": alone}, rtol=1e-6)


INJECTED: dict[str, Any] = {
    "learning_rate": 0.05,
    "b1": 0.8,
    "b2": 0.99,
    "eps": 1e-4,
    "eps_root": 1e-4,
    "momentum_decay": 0.1,
    "weight_decay": 0.1,
}


@of_optax
@every_rule
def test_injection(rule):
    injected, state = descend(optax.inject_hyperparams(nadamw)(**INJECTED, rule=rule), some_params())
    assert set(state.hyperparams) == set(INJECTED)
    chex.assert_trees_all_close(injected, descend(nadamw(**INJECTED, rule=rule), some_params())[0], rtol=1e-5)


@of_optax
def test_injected_schedules():
    """Injected hyperparameters may be schedules, and change during a run, which compiles once."""
    params = some_params()
    tx = optax.inject_hyperparams(nadamw)(optax.linear_schedule(0.1, 0.0, 10), b2=lambda count: 0.9 + 0.001 * count)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for t in range(3):
        state.hyperparams["b1"] = jnp.float32(0.5 + 0.1 * t)
        updates, state = update(params, state, params)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.08, rtol=1e-6)
    np.testing.assert_allclose(state.hyperparams["b2"], 0.902, rtol=1e-6)
    chex.assert_tree_all_finite(updates)


SAME_RUNS: dict[str, tuple[Any, Any, Any]] = {
    "injected, complex": (optax.inject_hyperparams(nadam)(0.1), nadam(0.1), [1 + 2j, -1j]),
    "flatten": (optax.flatten(nadamw(0.1)), nadamw(0.1), [1.0, -2.0]),
}


@of_optax
@pytest.mark.parametrize(("wrapped", "plain", "start"), SAME_RUNS.values(), ids=SAME_RUNS)
def test_same_run(wrapped, plain, start):
    params = {"w": jnp.asarray(start), "b": jnp.asarray(start[:1])}
    chex.assert_trees_all_close(descend(wrapped, params, 5)[0], descend(plain, params, 5)[0], rtol=1e-6)


@of_optax
def test_lookahead():
    params = optax.LookaheadParams.init_synced({"w": jnp.asarray([1.0, -2.0])})
    tx = optax.lookahead(nadam(0.1), sync_period=5, slow_step_size=0.5)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients_at(params.fast), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    assert jnp.sum(params.slow["w"] ** 2) < 0.05


def test_map_params():
    """It reaches the moments and nothing else."""
    tx, params = nadamw(0.1), {"w": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    names = {"w": "of w", "b": "of b"}
    mapped = optax.tree.map_params(tx, lambda x, name: (2 * x, name), state, names, transform_non_params=lambda x: -x)
    for before, after in ((state[0].m, mapped[0].m), (state[0].v, mapped[0].v)):
        chex.assert_trees_all_equal(after, {name: (2 * x, names[name]) for name, x in before.items()})
    assert (mapped[0].count, mapped[0].mu_product) == (-state[0].count, -state[0].mu_product)


def test_get_and_set():
    tx = optax.chain(optax.clip_by_global_norm(1.0), nadamw(0.1))
    state = optax.tree.set(tx.init(some_params()), mu_product=jnp.float32(0.25), count=jnp.int32(3))
    assert optax.tree.get(state, "mu_product") == 0.25
    assert optax.tree.get(state, "ScaleByNadamState").count == 3


@pytest.mark.parametrize("rule", ["scheduled", "dozat2016"])
def test_vmap(rule):
    """Over each hyperparameter, three values of it."""
    base = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-7, "momentum_decay": 4e-3, "weight_decay": 1e-4}
    rows = [base | {name: x} for name in base for x in (0.1, 0.5, 0.9)]
    h = {name: jnp.asarray([row[name] for row in rows]) for name in base}

    def trained(h):
        tx, params = nadamw(**h, rule=rule), {"w": jnp.asarray([1.0, -2.0])}
        return jax.lax.scan(functools.partial(step, tx), (params, tx.init(params)), length=10)[0]

    chex.assert_trees_all_close(jax.jit(jax.vmap(trained))(h), jax.lax.map(trained, h), rtol=2e-5, atol=1e-6)


@pytest.mark.x64
def test_gradient_of_a_run():
    """With respect to each hyperparameter, by finite differences."""
    at = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "momentum_decay": 0.1}

    @jax.jit
    def loss(h):
        tx, start = nadam(eps_root=1e-6, **h), {"w": jnp.asarray([1.0, -2.0, 0.0])}
        (params, _), _ = jax.lax.scan(functools.partial(step, tx), (start, tx.init(start)), length=5)
        return jnp.sum(params["w"] ** 3)

    gradient = jax.jit(jax.grad(loss))(at)
    for name, value in at.items():
        h = 1e-6 * value
        difference = (loss(at | {name: value + h}) - loss(at | {name: value - h})) / (2 * h)
        assert gradient[name] != 0, name
        np.testing.assert_allclose(gradient[name], difference, rtol=1e-5, err_msg=name)


@every_rule
def test_gradient_at_zero(rule):
    """With ``eps_root`` the update is differentiable there."""
    tx = scale_by_nadam(eps_root=1e-8, rule=rule)
    slope = jax.grad(lambda g: tx.update(g, tx.init(g))[0])(jnp.float32(0.0))
    assert jnp.isfinite(slope)
    assert slope > 0


def test_name_in_a_profile():
    tx, g = nadam(0.1), jnp.ones(3)
    assert "/nadam/" in str(jax.jit(tx.update).lower(g, tx.init(g)).compile().as_text())


# The square of 1e18 is a float32 with room to spare; v stays below it, and so does v debiased.
MAGNITUDES = st.floats(0.0, np.float32(1e18).item(), width=32, allow_subnormal=False)
SAFE_GRADIENTS = st.one_of(MAGNITUDES, MAGNITUDES.map(lambda x: -x))


@functools.partial(jax.jit, static_argnums=2)
def run_with(h, grads, rule):
    return run(scale_by_nadam(**h, rule=rule), grads)


@pytest.mark.property
@given(
    grads=st.lists(st.tuples(*3 * [SAFE_GRADIENTS]), min_size=1, max_size=12),
    b1=st.floats(0.0, 0.999),
    b2=st.floats(0.5, 0.99999),
    momentum_decay=st.floats(0.0, 10.0),
    eps=st.sampled_from([1e-8, 1e-7, 1e-3]),
    rule=st.sampled_from(RULES),
)
def test_finite(grads, rule, **h):
    padded = np.float32(grads + [(0.0, 0.0, 0.0)] * (12 - len(grads)))
    state, u = run_with({k: jnp.float32(x) for k, x in h.items()}, padded, rule)
    chex.assert_tree_all_finite((u[: len(grads)], state))
