"""The update: its values, its dtypes, its state."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import ScaleByNadamState, _rules, nadam, nadamw, scale_by_nadam
from tests.reference import FURTHER_RULES, RULES, Nadam

ALL_RULES = pytest.mark.parametrize("rule", RULES + FURTHER_RULES)


def random_hyperparameters(rng, rule):
    return Nadam(
        rule,
        b1=rng.uniform(0.0, 0.98),
        b2=1 - 10 ** rng.uniform(-5, -0.3),
        eps=10 ** rng.uniform(-8, -3),
        eps_root=rng.choice([0.0, 1e-8]),
        momentum_decay=10 ** rng.uniform(-3, 0),
    )


def hyperparameters(reference):
    return {name: getattr(reference, name) for name in ("b1", "b2", "eps", "eps_root", "momentum_decay")}


def build(reference):
    return scale_by_nadam(**hyperparameters(reference), rule=reference.rule)


def relative_error(got, expected):
    got, expected = np.asarray(got, expected.dtype), np.asarray(expected)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# One scalar parameter that starts at 1, gradients .5, -.25, .1, learning rate .01: what the frameworks themselves
# give in float32; for Dozat, Optimisers.jl and the old torch what float64 gives from the formula.
PUBLISHED: dict[str, tuple[Any, dict[str, Any], tuple[float, ...]]] = {
    "tf.keras legacy": (nadam, {}, (0.98943549, 0.99354661, 0.99129963)),
    "Keras 3": (nadam, {"momentum_decay": 1.0}, (0.98937213, 0.99329805, 0.99111259)),
    "Keras 3, weight decay": (
        nadamw,
        {"momentum_decay": 1.0, "weight_decay": 0.1},
        (0.98837215, 0.99130970, 0.98813295),
    ),
    "torch": (nadam, {"eps": 1e-8}, (0.98943549, 0.99354661, 0.99129969)),
    "torch, decoupled weight decay": (
        nadamw,
        {"eps": 1e-8, "weight_decay": 0.1},
        (0.98843551, 0.99155819, 0.98831975),
    ),
    "torch, momentum_decay=0": (nadam, {"eps": 1e-8, "momentum_decay": 0}, (0.98943573, 0.99354756, 0.99130028)),
    "torch, momentum_decay=1": (nadam, {"eps": 1e-8, "momentum_decay": 1}, (0.98937213, 0.99329811, 0.99111265)),
    "timm": (nadam, {"eps": 1e-8, "rule": "simplified"}, (0.98100001, 0.98193216, 0.97796911)),
    "AlgoPerf": (nadam, {"eps": 1e-8, "rule": "simplified"}, (0.98100013, 0.98193228, 0.97796929)),
    "optax.nadam": (nadam, {"eps": 1e-8, "rule": "constant"}, (0.98526323, 0.98691183, 0.98355019)),
    "torch 1.10 to 1.13": (nadam, {"eps": 1e-8, "rule": "torch1"}, (0.98950469, 0.99362890, 0.99139116)),
    "AlgoPerf, debias=False": (nadam, {"eps": 1e-8, "rule": "undebiased"}, (0.93991679, 0.94387817, 0.92426008)),
    "tf.contrib": (nadam, {"eps": 1e-8, "rule": "eps_hat"}, (0.98100001, 0.98193222, 0.97796917)),
    "Optimisers.jl": (nadam, {"eps": 1.19e-7, "rule": "flux"}, (0.98525579, 0.98690525, 0.98354193)),
    "Dozat 2016": (nadam, {"eps": 1e-8, "rule": "dozat2016"}, (0.98688901, 0.99142467, 0.98887820)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_framework(name):
    make, keywords, expected = PUBLISHED[name]
    tx = make(0.01, **keywords)
    p, got = jnp.float32(1.0), []
    state = tx.init(p)
    for g in (0.5, -0.25, 0.1):
        updates, state = tx.update(jnp.float32(g), state, p)
        p = optax.apply_updates(p, updates)
        got.append(float(p))
    # The frameworks' own float32 is up to three units in the last place of 1 off the formula.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)


TREE = {"scalar": (), "vector": (7,), "nested": [(3, 5), (2, 1, 4)]}


def random_gradients(rng, shapes, steps):
    """A tree of float32 gradients with a leading axis of steps, leaf by leaf of another magnitude."""

    def leaf(shape):
        return (rng.normal(size=(steps, *shape)) * 10 ** rng.uniform(-3, 1)).astype(np.float32)

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(tx, grads):
    """The last state and all updates."""
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)


def together(f, references, inputs):
    """What a function makes of each optimizer and its input, in one program, which compiles faster than several."""
    return jax.jit(lambda inputs: [*map(f, map(build, references), inputs)])(inputs)


@ALL_RULES
def test_trees_follow_the_reference_for_1000_steps(rule):
    """With four draws of hyperparameters, one of them on a tree of several leaves."""
    rng = np.random.default_rng((RULES + FURTHER_RULES).index(rule))
    references = [random_hyperparameters(rng, rule) for _ in range(4)]
    grads = [random_gradients(rng, shapes, 1000) for shapes in (TREE, (3, 5), (3, 5), (3, 5))]
    for reference, tree, (state, updates) in zip(references, grads, together(run, references, grads), strict=True):
        for g, *got in zip(*map(jax.tree.leaves, (tree, updates, state.m, state.v)), strict=True):
            u, m, v, product = reference.history(g.astype(np.float64))
            # Float32 rounds a moment once a step, and a moment remembers 1/(1-b) steps: a random walk of 1e-7 each.
            errors = [relative_error(*pair) for pair in zip(got, (u, m[-1], v[-1]), strict=True)]
            assert max(errors) < 1e-6, reference
            np.testing.assert_allclose(state.mu_product, product[-1], rtol=1e-4, atol=1e-30)
        assert state.count == 1000


B2 = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
STEPS = (1, 2, 3, 5, 10, 100, 1_000, 10_000, 100_000, 10_000_000)


class SingleSteps(NamedTuple):
    """Steps apart from each other, with a leading axis: gradients and states before, and the updates expected."""

    inputs: tuple[jax.Array, ScaleByNadamState]
    expected: list[np.ndarray]


def single_steps(rng, reference, dtype=np.float32, steps=STEPS):
    """On leaves of 4096; the states are such as runs of t - 1 steps on such gradients could have left."""
    g, m, v = rng.normal(size=4096), 0.3 * rng.normal(size=4096), rng.random(4096)
    leaves, products, expected = [], [], []
    for t in steps:
        leaves.append([x.astype(dtype) for x in (g, m * (t > 1), v * (1 - reference.b2 ** (t - 1)))])
        products.append(reference.mu_product(t - 1))
        exact = [x.astype(np.longdouble if dtype == np.float64 else np.float64) for x in leaves[-1]]
        expected.append(reference.step(*exact, t, products[-1])[0])
    grads, *moments = (jnp.stack(x) for x in zip(*leaves, strict=True))
    state = ScaleByNadamState(jnp.asarray(steps, jnp.int32) - 1, jnp.asarray(np.stack(products), float), *moments)
    return SingleSteps((grads, state), expected)


def taken(tx, inputs):
    """Each of the steps, one after another as in a run: updates and states."""
    return jax.lax.map(lambda args: tx.update(*args), inputs)


def assert_right(updates, steps, bound, reference):
    _, state = steps.inputs
    errors = {
        f"step {count + 1}": float(relative_error(u, expected))
        for count, u, expected in zip(state.count.tolist(), updates, steps.expected, strict=True)
    }
    assert {step: error for step, error in errors.items() if not error <= bound} == {}, reference


@ALL_RULES
def test_one_update_is_right_to_3e_7(rng, rule):
    """The hyperparameters are numbers, constants of the program."""
    references = [Nadam(rule, b2=b2) for b2 in B2]
    steps = [single_steps(rng, reference) for reference in references]
    results = together(taken, references, [x.inputs for x in steps])
    for reference, of_b2, (updates, _) in zip(references, steps, results, strict=True):
        assert_right(updates, of_b2, 3e-7, reference)


@ALL_RULES
def test_one_update_is_right_to_3e_7_with_traced_hyperparameters(rng, rule):
    take = jax.jit(lambda h, inputs: taken(scale_by_nadam(**h, rule=rule), inputs))
    for b2 in B2:
        h = {name: jnp.float32(x) for name, x in hyperparameters(Nadam(b2=b2)).items()}
        reference = Nadam(rule, **{name: float(x) for name, x in h.items()})
        steps = single_steps(rng, reference)
        assert_right(take(h, steps.inputs)[0], steps, 3e-7, reference)


@ALL_RULES
def test_one_update_outside_jit_is_right_to_3e_7(rng, rule):
    reference = Nadam(rule)
    tx, steps = build(reference), single_steps(rng, reference, steps=(1, 100, 10_000_000))
    each = [jax.tree.map(lambda x, i=i: x[i], steps.inputs) for i in range(3)]
    assert_right([tx.update(*inputs)[0] for inputs in each], steps, 3e-7, reference)


@ALL_RULES
@pytest.mark.x64
def test_one_update_of_a_float64_leaf_is_right_to_1e_14(rng, rule):
    references = [Nadam(rule, b2=b2) for b2 in (0.5, 0.999, 0.99999)]
    steps = [single_steps(rng, reference, np.float64) for reference in references]
    results = together(taken, references, [x.inputs for x in steps])
    for reference, of_b2, (updates, state) in zip(references, steps, results, strict=True):
        chex.assert_type([updates, state.m, state.v, state.mu_product], jnp.float64)
        assert_right(updates, of_b2, 1e-14, reference)


@pytest.mark.x64
def test_float32_and_float64_leaves_stand_side_by_side(rng):
    params = {"single": jnp.ones(3, jnp.float32), "double": jnp.ones(3, jnp.float64)}
    grads = {"single": rng.normal(size=3).astype(np.float32), "double": rng.normal(size=3)}
    tx = scale_by_nadam()
    updates, state = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(params))
    for name, bound in (("single", 3e-7), ("double", 1e-14)):
        chex.assert_type([updates[name], state.m[name], state.v[name]], params[name].dtype)
        expected, *_ = Nadam().updates(grads[name][None].astype(np.longdouble))
        assert relative_error(updates[name], expected[0]) <= bound


def test_a_float32_product_stays_float32_where_x64_has_been_enabled_since():
    tx, g = scale_by_nadam(), jnp.ones(3)
    state = tx.init(g)
    jax.config.update("jax_enable_x64", True)
    _, state = tx.update(g, state)
    assert state.mu_product.dtype == jnp.float32


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_the_power_of_v_can_be_chosen(rng, power):
    rule = dataclasses.replace(_rules.RULES["simplified"], power=power)
    grads = rng.normal(size=(20, 16)).astype(np.float32)
    tx = scale_by_nadam(rule=rule, eps=1e-3)
    _, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.asarray(grads[0])), jnp.asarray(grads))
    expected, *_ = Nadam("simplified", eps=1e-3, power=power).updates(grads.astype(np.float64))
    assert relative_error(u, expected) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_leaves_have_float32_moments_and_their_own_dtype_in_updates(rng, dtype):
    g = jnp.asarray(rng.normal(size=100), dtype)
    tx = scale_by_nadam()
    u, state = tx.update(g, tx.init(g))
    chex.assert_type([state.m, state.v], jnp.float32)
    chex.assert_type(u, dtype)
    expected, *_ = Nadam().updates(np.asarray(g, np.float64)[None])
    np.testing.assert_allclose(np.asarray(u, np.float64), expected[0], rtol=float(jnp.finfo(dtype).eps))


@ALL_RULES
def test_zero_gradients_give_zero_updates(rule):
    zeros = {dtype: jnp.zeros(3, dtype) for dtype in ("float16", "bfloat16", "float32", "complex64")}
    tx = scale_by_nadam(rule=rule)
    state = tx.init(zeros)
    for _ in range(3):
        u, state = tx.update(zeros, state)
        chex.assert_trees_all_equal(u, zeros)


def test_v_of_bfloat16_leaves_decays():
    tx = scale_by_nadam()
    grads = jnp.concatenate([jnp.ones(200, jnp.bfloat16), jnp.zeros(2000, jnp.bfloat16)])
    state, _ = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)
    np.testing.assert_allclose(state.v, (1 - 0.999**200) * 0.999**2000, rtol=1e-4)


@ALL_RULES
def test_complex_leaves_have_a_real_v_and_follow_the_reference(rng, rule):
    g = rng.normal(size=(50, 8)) + 1j * rng.normal(size=(50, 8))
    g[:, 0] *= 1e-12
    tx = scale_by_nadam(rule=rule, eps=1e-20)
    grads = jnp.asarray(g, jnp.complex64)
    state, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)
    chex.assert_type([u, state.m, state.v], [jnp.complex64, jnp.complex64, jnp.float32])
    expected, *_ = Nadam(rule, eps=1e-20).updates(np.asarray(grads, np.complex128))
    assert relative_error(u, expected) < 1e-6
    assert relative_error(u[:, 0], expected[:, 0]) < 1e-6


@pytest.mark.parametrize(("m_dtype", "v_dtype"), [("float32", None), (None, jnp.float32), (jnp.float32, "float64")])
@pytest.mark.x64
def test_moment_dtypes_can_be_chosen(m_dtype, v_dtype):
    params = {"real": jnp.ones(3, jnp.float64), "complex": jnp.ones(3, jnp.complex128)}
    tx = scale_by_nadam(m_dtype=m_dtype, v_dtype=v_dtype)
    updates, state = tx.update(params, tx.init(params))
    complex_m = jnp.complex64 if m_dtype else jnp.complex128
    chex.assert_type([state.m["real"], state.m["complex"]], [m_dtype or jnp.float64, complex_m])
    chex.assert_type([state.v["real"], state.v["complex"]], v_dtype or jnp.float64)
    expected, *_ = Nadam().updates(np.ones((1, 3), np.longdouble))
    chex.assert_trees_all_close(updates["real"], np.asarray(expected[0], float), rtol=1e-14)


def test_state_is_the_documented_pytree():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "none": None}
    state = scale_by_nadam().init(params)
    assert state._fields == ("count", "mu_product", "m", "v")
    chex.assert_shape([state.count, state.mu_product, state.m["w"], state.v["w"]], [(), (), (2, 3), (2, 3)])
    chex.assert_type([state.count, state.mu_product, state.m["w"], state.v["w"]], [jnp.int32, *3 * [jnp.float32]])
    assert state.m["none"] is None
    assert state.count == 0
    assert state.mu_product == 1


def test_count_stops_at_the_largest_int32():
    tx, g = scale_by_nadam(), jnp.float32(1.0)
    state = tx.init(g)._replace(count=jnp.int32(2**31 - 2), mu_product=jnp.float32(0.0))
    for _ in range(3):
        u, state = tx.update(g, state)
        assert state.count == 2**31 - 1
        assert jnp.isfinite(u)


def test_b2_zero_and_b1_zero_give_the_sign_of_the_gradient(rng):
    g = jnp.asarray(rng.normal(size=(20, 50)) * 10.0 ** rng.integers(-6, 3, size=(20, 50)), jnp.float32)
    tx = scale_by_nadam(b1=0.0, b2=0.0, eps=0.0)
    _, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)
    chex.assert_trees_all_close(u, jnp.sign(g), rtol=3e-7)


@pytest.mark.parametrize("make", [nadam, nadamw])
def test_learning_rate_may_be_a_number_an_array_or_a_schedule(make):
    params = jnp.asarray([1.0, -2.0])
    results = []
    for rate in (0.5, jnp.float32(0.5), lambda count: jnp.where(count == 0, 0.5, jnp.nan)):
        tx = make(rate)
        results.append(tx.update(params, tx.init(params), params)[0])
    chex.assert_trees_all_equal(*results)


def test_schedules_count_from_zero():
    tx, p = nadam(lambda count: count.astype(float)), jnp.float32(1.0)
    updates, state = tx.update(p, tx.init(p))
    assert updates == 0
    assert tx.update(p, state)[0] < 0


def test_weight_decay_is_decoupled_and_masked():
    params = {"kernel": jnp.asarray([2.0, -3.0]), "bias": jnp.asarray([1.0])}
    grads = jax.tree.map(jnp.ones_like, params)
    plain, decayed = nadam(0.1), nadamw(0.1, weight_decay=0.25, mask=lambda p: {"kernel": True, "bias": False})
    u, _ = plain.update(grads, plain.init(params), params)
    u_decayed, state = decayed.update(grads, decayed.init(params), params)
    chex.assert_trees_all_close(u_decayed["kernel"], u["kernel"] - 0.1 * 0.25 * params["kernel"], rtol=1e-6)
    chex.assert_trees_all_equal(u_decayed["bias"], u["bias"])
    chex.assert_trees_all_equal(state[0].v, scale_by_nadam().update(grads, scale_by_nadam().init(params))[1].v)


def test_weight_decay_schedule():
    """It counts the steps taken, and a float32 params tree gets its factor times the learning rate."""
    tx, p, g = nadamw(0.1, weight_decay=lambda n: 0.25 / (1 + n.astype(float))), jnp.float32(2.0), jnp.float32(1.0)
    plain, state, other = nadam(0.1), tx.init(p), nadam(0.1).init(p)
    for count in range(3):
        u, state = tx.update(g, state, p)
        u_plain, other = plain.update(g, other)
        np.testing.assert_allclose(u, u_plain - 0.1 * 0.25 / (1 + count) * p, rtol=1e-6)


HYPERPARAMETERS = {"b1": 0.9, "b2": 0.999, "eps": 1e-7, "eps_root": 0.0}
KEYWORD_ONLY = {"momentum_decay": 4e-3, "rule": "scheduled", "m_dtype": None, "v_dtype": None}


@pytest.mark.parametrize(
    ("make", "positional", "keyword_only"),
    [
        (scale_by_nadam, HYPERPARAMETERS, KEYWORD_ONLY),
        (nadam, {"learning_rate": 1e-3} | HYPERPARAMETERS, KEYWORD_ONLY),
        (nadamw, {"learning_rate": 1e-3} | HYPERPARAMETERS, KEYWORD_ONLY | {"weight_decay": 1e-4, "mask": None}),
    ],
)
def test_signatures_are_the_published_ones(make, positional, keyword_only):
    parameters = inspect.signature(make).parameters.values()
    by_kind = {kind: {p.name: p.default for p in parameters if p.kind is kind} for kind in {p.kind for p in parameters}}
    assert by_kind == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: positional,
        inspect.Parameter.KEYWORD_ONLY: keyword_only,
    }
    assert list(by_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]) == list(positional)
