"""The update: its values, its dtypes, its state.

- One update is within 3e-7 of float64 for every rule, steps 1 to 10^7, with hyperparameters that are numbers, or arrays
  with b2 from .5 to .99999, of three rules also outside jit; the worst is 1.7e-7 (``benchmarks/precision.py``). Of
  float64 leaves: 1e-14.
- A thousand updates and their moments are within 1e-6, on trees of any leaves.
- Every variant takes the steps that its framework takes, within 2e-7.
- An update has the dtype of its gradient; moments are float32, or float64 for leaves with 64-bit parts.
"""

import dataclasses
import functools
import inspect
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, Rule, ScaleByNadamState, nadam, nadamw, scale_by_nadam
from tests.helpers import descend, few_rules, relative_error, run
from tests.reference import FURTHER_RULES, RULES, Nadam

EVERY_RULE = tuple(RULES + FURTHER_RULES)
NUMBERS = {"b1": 0.9, "b2": 0.999, "eps": 1e-7, "eps_root": 0.0, "momentum_decay": 4e-3}


def numbers_of(reference):
    return {name: getattr(reference, name) for name in NUMBERS}


def build(reference):
    return scale_by_nadam(**numbers_of(reference), rule=reference.rule)


def together(f, references, inputs):
    """What a function makes of each optimizer and its input, in one program, which compiles faster than several."""
    return jax.jit(lambda inputs: [*map(f, map(build, references), inputs)])(inputs)


# One scalar parameter that starts at 1, gradients .5, -.25, .1, learning rate .01: what the frameworks themselves
# give in float32; for Dozat, Optimisers.jl and the old torch what float64 gives from the formula.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "tf.keras legacy": ({}, (0.98943549, 0.99354661, 0.99129963)),
    "Keras 3": ({"momentum_decay": 1.0}, (0.98937213, 0.99329805, 0.99111259)),
    "Keras 3, decay": ({"momentum_decay": 1.0, "weight_decay": 0.1}, (0.98837215, 0.99130970, 0.98813295)),
    "torch": ({"eps": 1e-8}, (0.98943549, 0.99354661, 0.99129969)),
    "torch, decay": ({"eps": 1e-8, "weight_decay": 0.1}, (0.98843551, 0.99155819, 0.98831975)),
    "torch, coupled": (
        {"eps": 1e-8, "weight_decay": 0.1, "coupled_weight_decay": True},
        (0.98943549, 0.99137628, 0.98747730),
    ),
    "torch, momentum_decay=0": ({"eps": 1e-8, "momentum_decay": 0}, (0.98943573, 0.99354756, 0.99130028)),
    "torch, momentum_decay=1": ({"eps": 1e-8, "momentum_decay": 1}, (0.98937213, 0.99329811, 0.99111265)),
    "timm": ({"eps": 1e-8, "rule": "simplified"}, (0.98100001, 0.98193216, 0.97796911)),
    "AlgoPerf": ({"eps": 1e-8, "rule": "simplified"}, (0.98100013, 0.98193228, 0.97796929)),
    "optax.nadam": ({"eps": 1e-8, "rule": "constant"}, (0.98526323, 0.98691183, 0.98355019)),
    "torch 1.10 to 1.13": ({"eps": 1e-8, "rule": "torch1"}, (0.98950469, 0.99362890, 0.99139116)),
    "AlgoPerf, debias=False": ({"eps": 1e-8, "rule": "undebiased"}, (0.93991679, 0.94387817, 0.92426008)),
    "tf.contrib": ({"eps": 1e-8, "rule": "eps_hat"}, (0.98100001, 0.98193222, 0.97796917)),
    "Optimisers.jl": ({"eps": 1.19e-7, "rule": "flux"}, (0.98525579, 0.98690525, 0.98354193)),
    "Dozat 2016": ({"eps": 1e-8, "rule": "dozat2016"}, (0.98688901, 0.99142467, 0.98887820)),
}


def test_published_steps():
    optimizers = [NadamConfig(learning_rate=0.01, **keywords).build() for keywords, _ in PUBLISHED.values()]
    paths = jax.jit(lambda p, g: [descend(tx, p, g)[1] for tx in optimizers])(1.0, jnp.array([0.5, -0.25, 0.1]))
    for (name, (_, expected)), got in zip(PUBLISHED.items(), paths, strict=True):
        # The frameworks' own float32 is up to three units in the last place of 1 off the formula.
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7, err_msg=name)


def test_1000_steps():
    """With a draw of hyperparameters for each rule, on leaves of different magnitudes."""
    references, grads = [], []
    for seed, rule in enumerate(EVERY_RULE):
        rng = np.random.default_rng(seed)
        b1, b2, momentum_decay = rng.uniform(0.0, 0.98), 1 - 10 ** rng.uniform(-5, -0.3), 10 ** rng.uniform(-3, 0)
        eps, eps_root = 10 ** rng.uniform(-8, -3), rng.choice([0.0, 1e-8])
        references.append(Nadam(rule, b1, b2, eps, eps_root, momentum_decay))
        grads.append([np.float32(rng.normal(size=(1000, *s)) * 10 ** rng.uniform(-3, 1)) for s in ((), (3, 5))])
    for reference, g, (state, updates) in zip(references, grads, together(run, references, grads), strict=True):
        for of_leaf, *got in zip(g, updates, state.m, state.v, strict=True):
            u, m, v, product = reference.history(of_leaf.astype(np.float64))
            # Float32 rounds a moment once a step, and a moment remembers 1/(1-b) steps: a random walk of 1e-7 each.
            assert max(map(relative_error, got, (u, m[-1], v[-1]))) < 1e-6, reference
            np.testing.assert_allclose(state.mu_product, product[-1], rtol=1e-4, atol=1e-30)
        assert state.count == 1000


STEPS = (1, 2, 3, 5, 10, 100, 1_000, 10_000, 100_000, 10_000_000)


@functools.cache
def products_before(reference):
    """Those of the momenta, before each of the steps."""
    return np.stack([reference.mu_product(t - 1) for t in STEPS])


def single_steps(rng, reference, dtype):
    """Steps apart from each other, on leaves of 4096, with states such as runs on such gradients could have left."""
    t, products = np.reshape(STEPS, (-1, 1)), products_before(dataclasses.replace(reference, b2=0.5))  # of any b2
    g, m, v = rng.normal(size=(len(STEPS), 4096)), rng.normal(size=(len(STEPS), 4096)), rng.random((len(STEPS), 4096))
    arrays = [x.astype(dtype) for x in (g, 0.3 * m * (t > 1), v * (1 - reference.b2 ** (t - 1)))]
    exact = [x.astype(np.longdouble if dtype == np.float64 else np.float64) for x in arrays]
    g, m, v = arrays
    state = ScaleByNadamState(np.asarray(STEPS, np.int32) - 1, np.asarray(products, dtype), m, v)
    return (g, state), reference.step(*exact, t, products[:, None])[0]


def taken(tx, inputs):
    """Each of the steps, one after another as in a run: updates and states."""
    return jax.lax.map(lambda args: tx.update(*args), inputs)


@functools.partial(jax.jit, static_argnums=0)
def taken_by_each(rules, numbers, inputs):
    return [taken(scale_by_nadam(**h, rule=rule), x) for rule, h, x in zip(rules, numbers, inputs, strict=True)]


def with_numbers(references, inputs):
    return together(taken, references, inputs)


def with_arrays(references, inputs):
    arrays = [jax.tree.map(jnp.float32, numbers_of(reference)) for reference in references]
    return taken_by_each(tuple(reference.rule for reference in references), arrays, inputs)


def not_compiled(references, inputs):
    each = [jax.tree.map(lambda x, i=i: x[i], inputs[0]) for i in range(len(STEPS))]
    results = [build(references[0]).update(*args) for args in each]
    return [jax.tree.map(lambda *x: np.stack(x), *results)]


MANY = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


@pytest.mark.parametrize(("take", "b2s"), [(with_numbers, (0.99999,)), (with_arrays, MANY)], ids=["numbers", "arrays"])
def test_one_update_to_3e_7(rng, take, b2s):
    assert_exact(rng, EVERY_RULE, take, b2s, np.float32, 3e-7)


@pytest.mark.x64
def test_one_update_to_1e_14(rng):
    assert_exact(rng, EVERY_RULE, with_numbers, (0.99999,), np.float64, 1e-14)


@few_rules
def test_one_update_not_compiled(rng, rule):
    assert_exact(rng, [rule], not_compiled, (0.999,), np.float32, 3e-7)


def assert_exact(rng, rules, take, b2s, dtype, bound):
    for b2 in b2s:
        references = [Nadam(rule, b2=b2) for rule in rules]
        if take is with_arrays:
            references = [Nadam(r.rule, *(float(np.float32(x)) for x in numbers_of(r).values())) for r in references]
        cases = [single_steps(rng, reference, dtype) for reference in references]
        results = take(references, [inputs for inputs, _ in cases])
        for reference, (_, expected), (updates, state) in zip(references, cases, results, strict=True):
            chex.assert_type([updates, state.m, state.v, state.mu_product], dtype)
            errors = relative_error(updates, expected, axis=1)
            assert np.all(errors <= bound), (reference, dict(zip(STEPS, errors, strict=True)))


@pytest.mark.x64
def test_dtypes_side_by_side(rng):
    """Side by side, each leaf is computed in its own; that of small complex ones follows the reference as well."""
    real, imaginary = rng.normal(size=(2, 50, 8))
    names = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
    grads = {name: jnp.asarray(real + 1j * imaginary if "complex" in name else real, name) for name in names}
    grads["tiny"] = 1e-12 * grads["complex64"]
    state, updates = run(scale_by_nadam(eps=1e-20), grads)
    for name, g in grads.items():
        wide = jnp.finfo(g.dtype).bits == 64
        chex.assert_type(updates[name], g.dtype)
        chex.assert_type(state.m[name], jnp.float32 if g.dtype.itemsize == 2 else g.dtype)
        chex.assert_type(state.v[name], jnp.float64 if wide else jnp.float32)
        expected, *_ = Nadam(eps=1e-20).updates(np.asarray(g).astype(np.clongdouble))
        rounding = float(jnp.finfo(g.dtype).eps)
        first, all_steps = (1e-14, 1e-13) if wide else (max(3e-7, rounding), max(1e-6, rounding))
        assert np.max(np.abs(np.asarray(updates[name][0]).astype(complex) / expected[0] - 1)) <= first, name
        assert np.max(relative_error(updates[name], expected, axis=0)) <= all_steps, name


@pytest.mark.parametrize("rule", ["scheduled", "dozat2016"])
def test_derivative(rng, rule):
    """Of two updates by the first gradient, against the differences of the reference."""
    g, h = rng.normal(size=(2, 64)).astype(np.float32), 1e-5
    tx = scale_by_nadam(rule=rule, eps=1e-3)
    slopes = jax.jit(jax.jacfwd(lambda s: run(tx, jnp.asarray(g) * jnp.stack([s, jnp.ones_like(s)])[:, None])[1]))(1.0)
    (above, *_), (below, *_) = (Nadam(rule, eps=1e-3).updates(g.astype(float) * [[1 + x], [1]]) for x in (h, -h))
    assert np.all(relative_error(slopes, (above - below) / (2 * h), axis=1) < 1e-5)


def test_x64_enabled_later():
    """A float32 product of momenta stays one."""
    tx, g = scale_by_nadam(), jnp.ones(3)
    state = tx.init(g)
    jax.config.update("jax_enable_x64", True)
    _, state = tx.update(g, state)
    assert state.mu_product.dtype == jnp.float32


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_power_of_v(rng, power):
    grads = rng.normal(size=(20, 16)).astype(np.float32)
    rule = Rule(momentum_schedule=False, m_correction="current", power=power)
    _, u = run(scale_by_nadam(rule=rule, eps=1e-3), jnp.asarray(grads))
    expected, *_ = Nadam("simplified", eps=1e-3, power=power).updates(grads.astype(np.float64))
    assert relative_error(u, expected) < 1e-6


@pytest.mark.parametrize(("m_dtype", "v_dtype"), [("float32", None), (None, jnp.float32), (jnp.float32, "float64")])
@pytest.mark.x64
def test_moment_dtypes(m_dtype, v_dtype):
    params = {"real": jnp.ones(3, jnp.float64), "complex": jnp.ones(3, jnp.complex128)}
    tx = scale_by_nadam(m_dtype=m_dtype, v_dtype=v_dtype)
    updates, state = tx.update(params, tx.init(params))
    complex_m = jnp.complex64 if m_dtype else jnp.complex128
    chex.assert_type([state.m["real"], state.m["complex"]], [m_dtype or jnp.float64, complex_m])
    chex.assert_type([state.v["real"], state.v["complex"]], v_dtype or jnp.float64)
    expected, *_ = Nadam().updates(np.ones((1, 3), np.longdouble))
    chex.assert_trees_all_close(updates["real"], np.asarray(expected[0], float), rtol=1e-14)


def test_decays_of_zero(rng):
    """The update is the sign of the gradient."""
    g = jnp.asarray(rng.normal(size=(20, 50)) * 10.0 ** rng.integers(-6, 3, size=(20, 50)), jnp.float32)
    for zero in (0.0, jnp.float32(0.0)):
        _, u = run(scale_by_nadam(b1=zero, b2=zero, eps=0.0), g)
        chex.assert_trees_all_close(u, jnp.sign(g), rtol=3e-7)


@pytest.mark.parametrize("make", [nadam, nadamw])
def test_learning_rate_kinds(make):
    """A number, an array or a schedule, which counts from zero."""
    params, grads = jnp.asarray([1.0, -2.0]), jnp.ones((2, 2))
    rates = (0.5, jnp.float32(0.5), lambda count: 0.5 * (1 - count.astype(float)))
    (number, _), (array, _), (schedule, stopped) = (descend(make(rate), params, grads)[1] for rate in rates)
    chex.assert_trees_all_equal(number, array, schedule, stopped)


def test_decay_by_schedule_and_mask(rng):
    """Decoupled, by a schedule, and masked; none of it is in the moments."""
    params, grads = {"kernel": jnp.asarray([2.0, -3.0]), "bias": jnp.ones(2)}, rng.normal(size=(3, 2))
    tx = nadamw(
        0.1, weight_decay=lambda n: 0.25 / (1 + n.astype(float)), mask=lambda p: {"kernel": True, "bias": False}
    )
    both = dict.fromkeys(params, jnp.asarray(grads, jnp.float32))
    (_, state), path = descend(tx, params, both)
    chex.assert_trees_all_equal(state[0], run(scale_by_nadam(), both)[0])
    for name, factor in (("kernel", 0.25), ("bias", 0.0)):
        p = np.asarray(params[name], float)
        for t, u in enumerate(Nadam().updates(grads)[0]):
            p = p - 0.1 * (u + factor / (1 + t) * p)
            np.testing.assert_allclose(path[name][t], p, rtol=1e-6)


KEYWORD_ONLY = {"momentum_decay": 4e-3, "rule": "scheduled", "m_dtype": None, "v_dtype": None}
POSITIONAL = {name: x for name, x in NUMBERS.items() if name != "momentum_decay"}


@pytest.mark.parametrize(
    ("make", "positional", "keyword_only"),
    [
        (scale_by_nadam, POSITIONAL, KEYWORD_ONLY),
        (nadam, {"learning_rate": 1e-3} | POSITIONAL, KEYWORD_ONLY),
        (nadamw, {"learning_rate": 1e-3} | POSITIONAL, KEYWORD_ONLY | {"weight_decay": 1e-4, "mask": None}),
    ],
)
def test_signature_published(make, positional, keyword_only):
    parameters = inspect.signature(make).parameters.values()
    by_kind = {kind: {p.name: p.default for p in parameters if p.kind is kind} for kind in {p.kind for p in parameters}}
    assert by_kind == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: positional,
        inspect.Parameter.KEYWORD_ONLY: keyword_only,
    }
    assert list(by_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]) == list(positional)
