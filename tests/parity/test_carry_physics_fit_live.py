"""The recording of the physics fit, beside the real Keras 3."""

import importlib
import json
import os
import warnings
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

with warnings.catch_warnings():  # what it says while it is imported is no business of ours
    warnings.simplefilter("ignore")
    import keras

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.lenient("Keras mixes dtypes under JAX"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras.*"),
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("carry_physics_fit")


def test_keras_repeats_its_recording(example):
    recording = np.load(example.RECORDING)
    start = recording["start"]
    config, weights = example.train_in_keras(start, 10)
    assert keras.optimizers.Nadam.from_config(config).clipnorm == example.CLIPNORM
    assert config | {"name": "nadam"} == json.loads(str(recording["config"])) | {"name": "nadam"}
    assert list(weights) == [1, 2, 3, 5, 7, 10]
    # Other releases and processors sum in another order. As for ours in tests/project/test_carry_physics_fit.py: one
    # unit in the last place of each weight and step, and as much again for the gradients. Here the same, to the bit.
    for step, recorded in zip(weights, recording["weights"], strict=False):
        assert np.linalg.norm(weights[step] - recorded) < 2 * step * np.linalg.norm(np.spacing(start))
