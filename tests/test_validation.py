"""Bad input: each check, and what its text says.

- Python numbers out of range and values of another kind are refused when an optimizer is built, by name.
- Trees that do not fit are refused while ``init`` or ``update`` is traced, by the path of the leaf; nothing changes.
"""

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


def with_axes(count):
    return jnp.ones(1)


FORMAT = "must be None, int8, bfloat16, float32 or float64"
NOT_NEGATIVE = "must be finite and not negative"
SCHEDULE = "must be a number, a scalar array, an optax.Schedule or an optax_nadam.ScheduleConfig"
VECTOR = "must be a number or a scalar array, got an array of shape (2,)"


@pytest.mark.parametrize("make", [scale_by_nadam, nadam, nadamw, NadamConfig])
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *(("b1", value, "must be in [0, 1)") for value in (1.0, -0.1, float("nan"))),
        *(("b2", value, "must be in [0, 1)") for value in (1, np.float32(1.5))),
        *(("eps", value, NOT_NEGATIVE) for value in (-1e-8, float("inf"))),
        *((name, -4e-3, NOT_NEGATIVE) for name in ("eps_root", "momentum_decay")),
        ("rule", "keras", "must be one of 'scheduled', 'constant', 'simplified', 'dozat2016'"),
        *(("v_dtype", value, FORMAT) for value in ("uint8", "no dtype")),
        ("m_dtype", "float16", FORMAT),
    ],
)
def test_out_of_range(make, name, value, rule):
    with raises(ValueError, name, rule, f"got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("make", [scale_by_nadam, nadam, nadamw])
@pytest.mark.parametrize("name", ["b1", "b2", "eps", "eps_root", "momentum_decay"])
@pytest.mark.parametrize("value", ["0.9", None, [0.9]])
def test_not_numbers(make, name, value):
    with raises(TypeError, name, "must be a number or a scalar array", f"got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("makes", "name", "value", "kind", "words"),
    [
        ([nadam], "v_dtype", "float16", ValueError, ["In float16 the squares of gradients under 2e-4 are zero"]),
        ([nadam], "b1", optax.constant_schedule(0.9), TypeError, ["must be a number", "optax.inject_hyperparams"]),
        ([nadam], "b2", np.ones(2), ValueError, [VECTOR]),
        ([nadamw], "weight_decay", -0.1, ValueError, [NOT_NEGATIVE, "got -0.1"]),
        ([nadamw], "weight_decay", "0.1", TypeError, [SCHEDULE, "got '0.1'"]),
        ([nadam, nadamw], "learning_rate", "1e-3", TypeError, [SCHEDULE, "got '1e-3'"]),
        ([nadam, nadamw], "learning_rate", float("nan"), ValueError, ["must be finite, got nan"]),
        ([nadam, nadamw, NadamConfig().build], "learning_rate", np.ones(2), ValueError, [VECTOR]),
    ],
)
def test_bad_arguments(makes, name, value, kind, words):
    for make in makes:
        with raises(kind, name, *words):
            make(**{name: value})


def test_schedule_with_axes():
    """What they return must be scalars."""
    optimizers = [nadam(with_axes), nadamw(with_axes), NadamConfig().build(with_axes), nadamw(weight_decay=with_axes)]
    for tx, what in zip(optimizers, [*3 * ["learning rate"], "weight decay"], strict=True):
        with raises(ValueError, f"what the {what} schedule returns must be", "scalar array", "shape (1,)"):
            tx.update(jnp.ones(()), tx.init(jnp.ones(())), jnp.ones(()))


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_bad_params(dtype):
    with raises(TypeError, "params['dense']['bias'] has dtype", dtype, "optax.masked"):
        nadam().init(replaced(bias=jnp.ones(2, dtype)))
    with raises(TypeError, "params['dense']['bias'] is 'relu'; a leaf must be an array, or None"):
        nadam().init(replaced(bias="relu"))


KERNEL = PARAMS["dense"]["kernel"]
MISSING, UNEXPECTED = "missing ['dense']['bias']", "unexpected ['dense']['scale']"
STRUCTURES = [
    ({"dense": {"kernel": KERNEL}}, MISSING),
    (replaced(bias=None), MISSING),
    (replaced(scale=jnp.ones(2)), UNEXPECTED),
    ({"dense": {"kernel": KERNEL, "scale": jnp.ones(2)}}, f"{MISSING}; {UNEXPECTED}"),
]


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("grads", "params", "kind", "words"),
    [
        (replaced(bias=jnp.ones(2, int)), None, TypeError, ["gradients['dense']['bias'] has dtype int32", "masked"]),
        (PARAMS, replaced(bias=jnp.ones(5)), ValueError, ["params['dense']['bias'] has shape (5,)", "(2,)", "again"]),
        *(
            (replaced(kernel=jnp.ones(shape)), None, ValueError, ["gradients['dense']['kernel'] has shape", text])
            for shape in ((3,), (1, 2), (2, 3), ())  # that broadcast, or not
            for text in [f"{shape}, but this optimizer state was made for shape (3, 2)"]
        ),
        *((tree, None, ValueError, ["gradients differ in structure", text, "init"]) for tree, text in STRUCTURES),
        *((PARAMS, tree, ValueError, ["params differ in structure", text, "init"]) for tree, text in STRUCTURES),
    ],
)
def test_misfits(jit, grads, params, kind, words):
    """Nothing has changed when the error is raised."""
    tx = nadam()
    state = tx.init(PARAMS)
    before = jax.tree.map(np.array, state)
    with raises(kind, *words):
        jit(tx.update)(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_other_containers():
    tx = scale_by_nadam()
    state = tx.init([jnp.ones(2), jnp.ones(3)])
    with raises(ValueError, "gradients differ in structure", "PyTreeDef((*, *)) in place of PyTreeDef([*, *])"):
        tx.update((jnp.ones(2), jnp.ones(3)), state)


def test_real_and_complex():
    tx, trees = scale_by_nadam(), {"real": {"w": jnp.ones(2)}, "complex": {"w": jnp.ones(2, jnp.complex64)}}
    for kind, other in (("real", "complex"), ("complex", "real")):
        with raises(TypeError, "gradients['w'] has dtype", trees[other]["w"].dtype.name, f"made for a {kind} leaf"):
            tx.update(trees[other], tx.init(trees[kind]))


OF_ADAM = "scale_by_nadam got the state of another optimizer: ScaleByAdamState in place of ScaleByNadamState"
OF_A_CHAIN = "The number of updates and states has to be the same in chain"  # here Optax's own chain finds it


@pytest.mark.parametrize(
    ("tx", "other", "text"),
    [
        (scale_by_nadam(), optax.scale_by_adam(), OF_ADAM),
        (nadam(), optax.adam(1e-3), OF_ADAM),
        (nadamw(), nadam(), OF_A_CHAIN),
        (NadamConfig(weight_decay=0.1).build(), nadam(), OF_A_CHAIN),
        (
            accumulate(nadam(), 2),
            nadam(),
            "accumulate got the state of another optimizer: tuple in place of MultiSteps",
        ),
        (nadamw(), nadamw(), "params"),  # which are missing
    ],
)
def test_other_states(tx, other, text):
    with raises(ValueError, text):
        tx.update(PARAMS, other.init(PARAMS), None if text == "params" else PARAMS)


def test_traced_not_checked():
    """They are not checked."""
    update = jax.jit(lambda b2, g: nadam(b2=b2).update(g, nadam().init(g))[0])
    assert jnp.isfinite(update(0.5, jnp.float32(1.0)))
