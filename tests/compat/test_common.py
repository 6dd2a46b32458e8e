"""From one framework to another: configs and states that pass through ours."""

import dataclasses

import numpy as np

from optax_nadam import NadamConfig, compat


def test_a_torch_config_becomes_one_of_keras():
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "momentum_decay": 0.004}
    config = compat.torch.config_from({**group, "decoupled_weight_decay": False, "differentiable": False})
    theirs = compat.keras.config_to(config, "legacy")
    assert theirs["schedule_decay"] == 0.004
    assert theirs["learning_rate"] == 0.01
    back = compat.keras.config_from(theirs)
    differing = [f.name for f in dataclasses.fields(back) if getattr(back, f.name) != getattr(config, f.name)]
    assert differing == ["coupled_weight_decay", "complex_as_real"]  # without effect here


def test_a_keras_checkpoint_becomes_one_of_torch():
    weights = [np.array(7), np.float32(0.02), np.full((3, 2), 0.5, np.float32), np.full((3, 2), 0.25, np.float32)]
    params = {"kernel": np.zeros((3, 2), np.float32)}
    state = compat.keras.load_state(compat.torch.nadam().init(params), weights, lambda arrays: {"kernel": arrays[0]})
    dumped = compat.torch.dump_state(state, lambda tree: {"weight": tree["kernel"].T}, NadamConfig())
    entry = dumped["state"][0]
    assert (int(entry["step"]), float(entry["mu_product"])) == (7, float(np.float32(0.02)))
    np.testing.assert_array_equal(entry["exp_avg"], np.full((2, 3), 0.5))
    np.testing.assert_array_equal(entry["exp_avg_sq"], np.full((2, 3), 0.25))
