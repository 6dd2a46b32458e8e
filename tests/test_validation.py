"""Bad input: each check, and what its text says."""

import re

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, accumulate, nadam, nadamw, scale_by_nadam

PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


def raises(kind, *words):
    """The error must name each of these, in this order."""
    return pytest.raises(kind, match=".*".join(map(re.escape, words)))


def replaced(**leaves):
    return {"dense": PARAMS["dense"] | leaves}


@pytest.mark.parametrize("make", [scale_by_nadam, nadam, nadamw, NadamConfig])
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("b1", 1.0, "must be in [0, 1)"),
        ("b1", -0.1, "must be in [0, 1)"),
        ("b1", float("nan"), "must be in [0, 1)"),
        ("b2", 1, "must be in [0, 1)"),
        ("b2", np.float32(1.5), "must be in [0, 1)"),
        ("eps", -1e-8, "must be finite and not negative"),
        ("eps", float("inf"), "must be finite and not negative"),
        ("eps_root", -1.0, "must be finite and not negative"),
        ("momentum_decay", -4e-3, "must be finite and not negative"),
        ("rule", "keras", "must be one of 'scheduled', 'constant', 'simplified', 'dozat2016'"),
        ("m_dtype", "float16", "must be None, int8, bfloat16, float32 or float64"),
        ("v_dtype", "uint8", "must be None, int8, bfloat16, float32 or float64"),
        ("v_dtype", "no dtype", "must be None, int8, bfloat16, float32 or float64"),
    ],
)
def test_hyperparameters_out_of_range(make, name, value, rule):
    with raises(ValueError, name, rule, f"got {value!r}"):
        make(**{name: value})


def test_moments_cannot_be_float16_and_why():
    with raises(ValueError, "v_dtype", "In float16 the squares of gradients under 2e-4 are zero"):
        nadam(v_dtype="float16")


@pytest.mark.parametrize("make", [scale_by_nadam, nadam, nadamw])
@pytest.mark.parametrize("name", ["b1", "b2", "eps", "eps_root", "momentum_decay"])
@pytest.mark.parametrize("value", ["0.9", None, [0.9]])
def test_hyperparameters_that_are_not_numbers(make, name, value):
    with raises(TypeError, name, "must be a number or a scalar array", f"got {value!r}"):
        make(**{name: value})


def test_a_schedule_for_another_hyperparameter_points_to_inject_hyperparams():
    with raises(TypeError, "b1 must be a number", "optax.inject_hyperparams"):
        nadam(b1=optax.constant_schedule(0.9))


def test_hyperparameters_that_are_not_scalars():
    with raises(ValueError, "b2 must be a number or a scalar array, got an array of shape (2,)"):
        nadam(b2=jnp.asarray([0.9, 0.99]))


@pytest.mark.parametrize("make", [nadam, nadamw])
def test_what_is_not_a_learning_rate(make):
    with raises(
        TypeError,
        "learning_rate must be a number, a scalar array, an optax.Schedule or an optax_nadam.ScheduleConfig",
        "got '1e-3'",
    ):
        make("1e-3")
    with raises(ValueError, "learning_rate must be finite, got nan"):
        make(float("nan"))


@pytest.mark.parametrize("make", [nadam, nadamw, NadamConfig().build])
def test_learning_rates_with_axes(make):
    with raises(ValueError, "learning_rate must be a number or a scalar array, got an array of shape (1,)"):
        make(jnp.ones(1))
    tx, p = make(lambda count: jnp.ones(1)), jnp.float32(1.0)
    with raises(ValueError, "what the learning rate schedule returns must be", "scalar array", "shape (1,)"):
        tx.update(p, tx.init(p), p)


def test_weight_decay_out_of_range():
    with raises(ValueError, "weight_decay must be finite and not negative, got -0.1"):
        nadamw(weight_decay=-0.1)
    with raises(TypeError, "weight_decay must be a number, a scalar array, an optax.Schedule or", "got '0.1'"):
        nadamw(weight_decay="0.1")
    tx, p = nadamw(weight_decay=lambda count: jnp.ones(1)), jnp.float32(1.0)
    with raises(ValueError, "what the weight decay schedule returns must be", "scalar array", "shape (1,)"):
        tx.update(p, tx.init(p), p)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.uint8])
def test_integer_and_boolean_params(dtype):
    with raises(TypeError, "params['dense']['bias'] has dtype", jnp.dtype(dtype).name, "optax.masked"):
        nadam().init(replaced(bias=jnp.ones(2, dtype)))


def test_integer_gradients():
    tx = nadam()
    state = tx.init(PARAMS)
    with raises(TypeError, "gradients['dense']['bias'] has dtype int32", "optax.masked"):
        tx.update(replaced(bias=jnp.ones(2, jnp.int32)), state)


def test_leaves_that_are_not_arrays():
    with raises(TypeError, "params['dense']['bias'] is 'relu'; a leaf must be an array, or None"):
        nadam().init(replaced(bias="relu"))


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("shape", [(3,), (1, 2), (2, 3), ()])
def test_gradients_of_another_shape_broadcastable_or_not(jit, shape):
    tx = nadam()
    state = tx.init(PARAMS)
    with raises(ValueError, "gradients['dense']['kernel'] has shape", str(shape), "made for shape (3, 2)"):
        jit(tx.update)(replaced(kernel=jnp.ones(shape)), state)


def test_params_of_another_shape_than_the_state():
    tx = nadam()
    state = tx.init(PARAMS)
    with raises(ValueError, "params['dense']['bias'] has shape (5,)", "made for shape (2,)", "init again"):
        tx.update(PARAMS, state, replaced(bias=jnp.ones(5)))


@pytest.mark.parametrize(
    ("tree", "difference"),
    [
        ({"dense": {"kernel": PARAMS["dense"]["kernel"]}}, "missing ['dense']['bias']"),
        (replaced(bias=None), "missing ['dense']['bias']"),
        (replaced(scale=jnp.ones(2)), "unexpected ['dense']['scale']"),
        (
            {"dense": {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(2)}},
            "missing ['dense']['bias']; unexpected ['dense']['scale']",
        ),
    ],
)
def test_trees_of_another_structure(tree, difference):
    tx = nadam()
    state = tx.init(PARAMS)
    with raises(ValueError, "gradients differ in structure", difference, "init"):
        tx.update(tree, state)
    with raises(ValueError, "params differ in structure", difference, "init"):
        tx.update(PARAMS, state, tree)


def test_containers_of_another_kind():
    tx = scale_by_nadam()
    state = tx.init([jnp.ones(2), jnp.ones(3)])
    with raises(ValueError, "gradients differ in structure", "PyTreeDef((*, *)) in place of PyTreeDef([*, *])"):
        tx.update((jnp.ones(2), jnp.ones(3)), state)


@pytest.mark.parametrize(("of_params", "of_grads"), [(jnp.float32, jnp.complex64), (jnp.complex64, jnp.float32)])
def test_real_and_complex_do_not_mix(of_params, of_grads):
    tx = scale_by_nadam()
    kind = "complex" if of_params == jnp.complex64 else "real"
    with raises(TypeError, "gradients['w'] has dtype", jnp.dtype(of_grads).name, f"made for a {kind} leaf"):
        tx.update({"w": jnp.ones(2, of_grads)}, tx.init({"w": jnp.ones(2, of_params)}))


def test_the_state_of_another_optimizer():
    of_adam = "scale_by_nadam got the state of another optimizer: ScaleByAdamState in place of ScaleByNadamState"
    with raises(ValueError, of_adam):
        scale_by_nadam().update(PARAMS, optax.scale_by_adam().init(PARAMS))
    with raises(ValueError, of_adam):
        nadam().update(PARAMS, optax.adam(1e-3).init(PARAMS))
    for make in (nadamw, NadamConfig(weight_decay=0.1).build):  # here Optax's own chain finds it
        with raises(ValueError, "The number of updates and states has to be the same in chain"):
            make().update(PARAMS, nadam().init(PARAMS), PARAMS)
    with raises(ValueError, "accumulate got the state of another optimizer: tuple in place of MultiStepsState"):
        accumulate(nadam(), 2).update(PARAMS, nadam().init(PARAMS))


def test_nadamw_needs_params():
    tx = nadamw()
    with raises(ValueError, "params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_nothing_has_changed_when_an_error_is_raised():
    tx = nadam()
    state = tx.init(PARAMS)
    before = jax.tree.map(np.array, state)
    with pytest.raises(ValueError, match="shape"):
        tx.update(replaced(kernel=jnp.ones(3)), state)
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_traced_hyperparameters_are_not_checked():
    update = jax.jit(lambda b2, g: nadam(b2=b2).update(g, nadam().init(g))[0])
    assert jnp.isfinite(update(0.5, jnp.float32(1.0)))
