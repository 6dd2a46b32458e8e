"""From one framework to another: configs and states that pass through ours, also through narrow moments."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, compat, convert_moments, scale_by_nadam


def test_torch_config_to_keras():
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "momentum_decay": 0.004}
    config = compat.torch.config_from({**group, "decoupled_weight_decay": False, "differentiable": False})
    theirs = compat.keras.config_to(config, dialect="legacy")
    assert theirs["schedule_decay"] == 0.004
    assert theirs["learning_rate"] == 0.01
    back = compat.keras.config_from(theirs)
    differing = [f.name for f in dataclasses.fields(back) if getattr(back, f.name) != getattr(config, f.name)]
    assert differing == ["coupled_weight_decay", "complex_as_real"]  # without effect here


def test_keras_to_torch():
    weights = [np.array(7), np.float32(0.00375), np.full((3, 2), 0.5, np.float32), np.full((3, 2), 0.25, np.float32)]
    params = {"kernel": np.zeros((3, 2), np.float32)}
    state = compat.keras.load_state(compat.torch.nadam().init(params), weights, lambda arrays: {"kernel": arrays[0]})
    dumped = compat.torch.dump_state(state, lambda tree: {"weight": tree["kernel"].T}, config=NadamConfig())
    entry = dumped["state"][0]
    assert (int(entry["step"]), float(entry["mu_product"])) == (7, float(np.float32(0.00375)))
    np.testing.assert_array_equal(entry["exp_avg"], np.full((2, 3), 0.5))
    np.testing.assert_array_equal(entry["exp_avg_sq"], np.full((2, 3), 0.25))


def as_list(params):
    return [np.asarray(params["kernel"]).T]


def as_tree(arrays):
    return {"kernel": arrays[0].T}


WAYS = {
    "torch": (
        lambda state: compat.torch.dump_state(state, as_list, config=NadamConfig()),
        lambda state, source: compat.torch.load_state(state, source, as_tree),
    ),
    "timm": (
        lambda state: compat.timm.dump_state(state, as_list, config=NadamConfig(rule="simplified")),
        lambda state, source: compat.timm.load_state(state, source, as_tree),
    ),
    "keras": (
        lambda state: compat.keras.dump_state(state, as_list, config=NadamConfig(momentum_decay=1.0)),
        lambda state, source: compat.keras.load_state(state, source, as_tree, config=NadamConfig()),
    ),
    "keras weights": (
        lambda state: compat.keras.get_weights(state, as_list),
        lambda state, source: compat.keras.set_weights(state, source, as_tree),
    ),
    "optax": (
        compat.optax.dump_state,
        lambda state, source: compat.optax.load_state(state, source, config=NadamConfig()),
    ),
    "algoperf": (
        compat.algoperf.dump_state,
        lambda state, source: compat.algoperf.load_state(state, source, config=NadamConfig()),
    ),
}


@pytest.mark.parametrize(("dump", "load"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", 2.0**-7), ("int8", 4.1 / 127)])
def test_narrow_moments(dump, load, dtype, precision, rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)}
    wide, narrow = scale_by_nadam(), scale_by_nadam(m_dtype=dtype, v_dtype=dtype)
    _, state = wide.update(params, wide.init(params))
    loaded = load(narrow.init(params), dump(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, narrow.init(params))
    numbers = convert_moments(loaded, m_dtype=None, v_dtype=None)
    for got, expected in zip(*map(jax.tree.leaves, ((numbers.m, numbers.v), (state.m, state.v))), strict=True):
        assert np.max(np.abs(got - expected)) <= precision * np.max(np.abs(expected))
    back = load(wide.init(params), dump(loaded))
    chex.assert_trees_all_equal((back.count, back.m, back.v), (numbers.count, numbers.m, numbers.v))


def test_empty_checkpoint():
    tx = scale_by_nadam(m_dtype="int8", v_dtype="int8")
    fresh = tx.init({"kernel": jnp.ones((32, 64))})
    _, state = tx.update({"kernel": jnp.ones((32, 64))}, fresh)
    group = compat.torch.config_to(NadamConfig()) | {"params": [0]}
    loaded = compat.torch.load_state(state, {"state": {}, "param_groups": [group]}, as_tree)
    numbers, zeros = (convert_moments(s, m_dtype=None, v_dtype=None) for s in (loaded, fresh))
    chex.assert_trees_all_equal(numbers, zeros)
