"""What an Optax optimizer must do to work everywhere: in chains, wrappers and transformations of JAX."""

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

from optax_nadam import NadamConfig, ScaleByNadamState, nadam, nadamw, scale_by_nadam
from tests.reference import RULES

MAKERS: dict[str, Any] = {
    "scale_by_nadam": scale_by_nadam,
    "nadam": nadam,
    "nadamw": nadamw,
    "scheduled rate": lambda: nadam(lambda count: 0.1 / (1 + count.astype(float))),
    "config": lambda: NadamConfig(clip_norm=1.0, weight_decay=0.01, coupled_weight_decay=True).build(),
} | {f"rule {rule}": functools.partial(nadamw, rule=rule) for rule in RULES[1:]}
CLIPPED: dict[str, Any] = {"clipping config": lambda: NadamConfig(clip_norm=1.0, clip_global_norm=1.0).build()}
EVERY_MAKER = pytest.mark.parametrize("make", (MAKERS | CLIPPED).values(), ids=MAKERS | CLIPPED)
WITHOUT_CLIPS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128]
of_optax = pytest.mark.lenient("Optax's wrapper or schedule mixes dtypes")


def some_params(dtype=jnp.float32):
    return {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]], dtype), "b": jnp.asarray([0.25], dtype), "none": None}


def gradients_at(params):
    return jax.tree.map(lambda p: 2 * p, params)


def descend(tx, params, steps=10, **extra_args):
    """Parameters and state after steps on the sum of squares."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradients_at(params), state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def step(tx, carry, _=None):
    """The body of a scan over such steps."""
    params, state = carry
    updates, state = tx.update(gradients_at(params), state, params)
    return (optax.apply_updates(params, updates), state), None


@EVERY_MAKER
def test_extra_arguments_are_accepted_and_ignored(make):
    tx = make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    extra = {"value": 1.0, "grad": some_params(), "value_fn": jnp.sum}
    chex.assert_trees_all_equal(descend(tx, some_params(), **extra), descend(tx, some_params()))


def assert_dtypes_and_weak_types_stay(tx, params):
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state)
    _, stepped = jax.lax.cond(
        True, lambda: tx.update(params, state, params), lambda: (jax.tree.map(jnp.zeros_like, params), state)
    )
    chex.assert_trees_all_equal_structs(stepped, state)


@WITHOUT_CLIPS
@pytest.mark.x64
def test_dtypes_and_weak_types_do_not_change_from_step_to_step(make):
    assert_dtypes_and_weak_types_stay(make(), {jnp.dtype(dtype).name: some_params(dtype) for dtype in DTYPES})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.x64
def test_dtypes_do_not_change_behind_clipping(dtype):
    """Optax's global norm is of one dtype."""
    assert_dtypes_and_weak_types_stay(CLIPPED["clipping config"](), some_params(dtype))


def _kind(x):
    return x.shape, x.dtype, x.weak_type


@EVERY_MAKER
def test_a_loop_of_jitted_steps_compiles_once(make):
    tx, params = make(), some_params()
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(gradients_at(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)


@EVERY_MAKER
def test_eager_jit_and_scan_agree(make):
    tx, params = make(), some_params()
    scanned, _ = jax.lax.scan(functools.partial(step, tx), (params, tx.init(params)), length=10)
    # Compiled alone or in a loop, XLA contracts other multiplications and additions.
    chex.assert_trees_all_close(scanned, descend(tx, params), rtol=1e-5, atol=1e-7)


@EVERY_MAKER
def test_init_on_abstract_params(make):
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), some_params())
    chex.assert_trees_all_equal(make().init(abstract), make().init(some_params()))
    shapes = jax.eval_shape(make().init, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, make().init(some_params()))


@EVERY_MAKER
def test_empty_trees_and_empty_leaves(make):
    trees: list[Any] = [{}, [], {"w": jnp.zeros((0, 3))}]
    for params in trees:
        tx = make()
        updates, _ = tx.update(params, tx.init(params), params)
        chex.assert_trees_all_equal(updates, params)


def test_python_numbers_are_leaves_like_any_other():
    tx = scale_by_nadam()
    updates, state = tx.update({"w": 0.5}, tx.init({"w": 1.0}))
    np.testing.assert_allclose(updates["w"], 1.0564511, rtol=1e-6)
    chex.assert_type([updates["w"], state.m["w"]], jnp.float32)


@WITHOUT_CLIPS
def test_donated_buffers_are_reused_without_temporaries(make):
    tx, params = make(), {"w": jnp.ones((512, 512)), "u": jnp.ones((512, 256))}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled: Any = step.lower(params, tx.init(params), params).compile()
    memory = compiled.memory_analysis()
    moments = 2 * sum(p.nbytes for p in params.values())
    assert memory.alias_size_in_bytes >= moments + sum(p.nbytes for p in params.values())
    assert memory.temp_size_in_bytes < 4096  # scalars, each aligned


@of_optax
def test_a_chain_with_clipping_and_a_schedule():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)
    chained = optax.chain(optax.clip_by_global_norm(0.5), nadam(schedule))
    params = some_params()
    state, chain_state = scale_by_nadam().init(params), chained.init(params)
    for t in range(10):
        g = gradients_at(params)
        g = optax.tree.scale(jnp.minimum(1.0, 0.5 / optax.tree.norm(g)), g)
        u, state = scale_by_nadam().update(g, state)
        expected = optax.tree.scale(-schedule(t), u)
        updates, chain_state = chained.update(gradients_at(params), chain_state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-8)
        params = optax.apply_updates(params, updates)


@of_optax
def test_multi_steps_takes_the_step_of_the_mean_gradient():
    params = some_params()
    tx = optax.MultiSteps(nadam(0.1), every_k_schedule=2)
    state = tx.init(params)
    for factor in (0.5, 1.5):
        updates, state = tx.update(optax.tree.scale(factor, gradients_at(params)), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, descend(nadam(0.1), some_params(), 1)[0], rtol=1e-6)


def test_masked_leaves_pass_through():
    params = {"w": jnp.ones(2), "frozen": jnp.arange(3)}
    tx = optax.masked(nadam(0.1), {"w": True, "frozen": False})
    updates, state = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates["frozen"], params["frozen"])
    chex.assert_trees_all_equal(updates["w"], nadam(0.1).update(jnp.ones(2), nadam(0.1).init(jnp.ones(2)))[0])
    assert isinstance(optax.tree.get(state, "m")["frozen"], optax.MaskedNode)


def test_partition_gives_each_leaf_its_own_optimizer():
    params = {"slow": jnp.ones(2), "fast": jnp.ones(2)}
    tx = optax.partition({"slow": nadam(0.01), "fast": nadam(0.1)}, {"slow": "slow", "fast": "fast"})
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_close(updates["fast"], 10 * updates["slow"], rtol=1e-6)


@of_optax
def test_apply_if_finite_keeps_bad_gradients_out_of_the_state():
    params = some_params()
    tx = optax.apply_if_finite(nadam(0.1), max_consecutive_errors=3)
    state = tx.init(params)
    _, poisoned = tx.update(jax.tree.map(lambda p: p * jnp.nan, params), state, params)
    chex.assert_trees_all_equal(poisoned.inner_state, state.inner_state)
    updates, _ = tx.update(params, poisoned, params)
    chex.assert_trees_all_close(updates, nadam(0.1).update(params, nadam(0.1).init(params))[0], rtol=1e-6)


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
@pytest.mark.parametrize("rule", RULES)
def test_injected_hyperparameters_give_the_same_run(rule):
    injected, state = descend(optax.inject_hyperparams(nadamw)(**INJECTED, rule=rule), some_params())
    assert set(state.hyperparams) == set(INJECTED)
    chex.assert_trees_all_close(injected, descend(nadamw(**INJECTED, rule=rule), some_params())[0], rtol=1e-5)


@of_optax
def test_injected_hyperparameters_may_be_schedules_and_change_during_a_run():
    params = some_params()
    tx = optax.inject_hyperparams(nadamw)(optax.linear_schedule(0.1, 0.0, 10), b2=lambda count: 0.9 + 0.001 * count)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for t in range(3):
        state.hyperparams["b1"] = jnp.float32(0.5 + 0.1 * t)
        updates, state = update(params, state, params)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.08, rtol=1e-6)
    np.testing.assert_allclose(state.hyperparams["b2"], 0.902, rtol=1e-6)
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


@of_optax
def test_injection_into_complex_params_uses_real_hyperparameters():
    params = {"w": jnp.asarray([1.0 + 2.0j, -1.0j], jnp.complex64)}
    injected, _ = descend(optax.inject_hyperparams(nadam)(0.1), params)
    chex.assert_trees_all_close(injected, descend(nadam(0.1), params)[0], rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_flatten_gives_the_same_run(steps):
    params = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.asarray([0.25])}
    flat, _ = descend(optax.flatten(nadamw(0.1)), params, steps)
    chex.assert_trees_all_close(flat, descend(nadamw(0.1), params, steps)[0], rtol=1e-6)


@of_optax
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.1),
        lambda tx: optax.contrib.mechanize(tx),
        lambda tx: optax.with_extra_args_support(optax.contrib.split_real_and_imaginary(tx)),
        lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    ],
    ids=["schedule_free", "mechanize", "split_real_and_imaginary", "reduce_on_plateau"],
)
def test_wrappers_of_optax_converge(wrap):
    params = {"w": jnp.asarray([1.0, -2.0])}
    tx = wrap(nadam(0.1))
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.sum(p["w"] ** 2)))
    for _ in range(300):
        updates, state = step(gradients_at(params), state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.sum(params["w"] ** 2) < 0.05


@of_optax
def test_lookahead():
    params = optax.LookaheadParams.init_synced({"w": jnp.asarray([1.0, -2.0])})
    tx = optax.lookahead(nadam(0.1), sync_period=5, slow_step_size=0.5)
    state = tx.init(params)
    for _ in range(200):
        updates, state = tx.update(gradients_at(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.sum(params.slow["w"] ** 2) < 0.05


def test_map_params_reaches_the_moments_and_nothing_else():
    tx, params = nadamw(0.1), {"w": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    for name in ("m", "v"):
        expected = jax.tree.map(lambda x: 2 * x, optax.tree.get(state, name))
        chex.assert_trees_all_equal(optax.tree.get(doubled, name), expected)
    assert doubled[0].count == state[0].count
    assert doubled[0].mu_product == state[0].mu_product


def test_get_and_set_find_the_state_in_a_chain():
    tx = optax.chain(optax.clip_by_global_norm(1.0), nadamw(0.1))
    state = tx.init(some_params())
    state = optax.tree.set(state, mu_product=jnp.float32(0.25), count=jnp.int32(3))
    assert optax.tree.get(state, "mu_product") == 0.25
    assert optax.tree.get(state, "ScaleByNadamState").count == 3


@pytest.mark.parametrize("rule", RULES)
def test_vmap_over_a_hyperparameter(rule):
    names = ("learning_rate", "b1", "b2", "eps", "momentum_decay", "weight_decay")
    values = jnp.asarray([0.1, 0.5, 0.9])

    def run(name, value):
        tx = nadamw(**({"learning_rate": 0.1, "rule": rule} | {name: value}))
        params = {"w": jnp.asarray([1.0, -2.0])}
        return jax.lax.scan(functools.partial(step, tx), (params, tx.init(params)), length=10)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def sweep(over):
        return {name: over(functools.partial(run, name), values) for name in names}

    swept, one_by_one = sweep(lambda f, x: jax.vmap(f)(x)), sweep(jax.lax.map)
    chex.assert_trees_all_close(swept, one_by_one, rtol=2e-5, atol=1e-6)


@pytest.mark.x64
def test_the_gradient_through_a_run_is_that_of_finite_differences():
    at = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "momentum_decay": 0.1}

    @jax.jit
    def loss(h):
        params, _ = descend(nadam(eps_root=1e-6, **h), {"w": jnp.asarray([1.0, -2.0, 0.0])}, 5)
        return jnp.sum(params["w"] ** 3)

    gradient = jax.jit(jax.grad(loss))(at)
    for name, value in at.items():
        h = 1e-6 * value
        difference = (loss(at | {name: value + h}) - loss(at | {name: value - h})) / (2 * h)
        assert gradient[name] != 0, name
        np.testing.assert_allclose(gradient[name], difference, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_the_update_is_differentiable_at_zero_gradients_with_eps_root(rule):
    tx = scale_by_nadam(eps_root=1e-8, rule=rule)
    slope = jax.grad(lambda g: tx.update(g, tx.init(g))[0])(jnp.float32(0.0))
    assert jnp.isfinite(slope)
    assert slope > 0


def test_the_update_can_be_found_in_a_profile():
    tx, g = nadam(0.1), jnp.ones(3)
    assert "/nadam/" in str(jax.jit(tx.update).lower(g, tx.init(g)).compile().as_text())


# The square of 1e18 is a float32 with room to spare; v stays below it, and so does v debiased.
_MAGNITUDES = st.floats(0.0, np.float32(1e18).item(), width=32, allow_subnormal=False)
SAFE_GRADIENTS = st.one_of(_MAGNITUDES, _MAGNITUDES.map(lambda x: -x))


@pytest.mark.property
@given(
    grads=st.lists(st.tuples(*3 * [SAFE_GRADIENTS]), min_size=1, max_size=12),
    b1=st.floats(0.0, 0.999),
    b2=st.floats(0.5, 0.99999),
    momentum_decay=st.floats(0.0, 10.0),
    eps=st.sampled_from([1e-8, 1e-7, 1e-3]),
    rule=st.sampled_from(RULES),
)
def test_finite_gradients_give_finite_updates_and_a_state_that_round_trips(grads, b1, b2, momentum_decay, eps, rule):
    h = {"b1": b1, "b2": b2, "momentum_decay": momentum_decay, "eps": eps}
    u, state = _run(jnp.asarray(np.float32(_padded(grads))), {k: jnp.float32(x) for k, x in h.items()}, rule)
    chex.assert_tree_all_finite((u[: len(grads)], state))

    tx = scale_by_nadam(**h, rule=rule)
    leaves, treedef = jax.tree.flatten(state)
    restored = jax.tree.unflatten(treedef, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    assert isinstance(restored, ScaleByNadamState)
    g = jnp.ones(3)
    chex.assert_trees_all_equal(tx.update(g, restored), tx.update(g, state))


def _padded(grads):
    return grads + [(0.0, 0.0, 0.0)] * (12 - len(grads))


@functools.partial(jax.jit, static_argnums=2)
def _run(grads, h, rule):
    tx = scale_by_nadam(**h, rule=rule)
    state, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)
    return u, state
