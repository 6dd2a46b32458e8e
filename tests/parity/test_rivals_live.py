"""The rivals of the benchmark beside their formulas: one that is fast must not compute something else."""

import os
import warnings

from benchmarks import _rivals

os.environ.update(_rivals.ENVIRONMENT)

with warnings.catch_warnings():  # what they say while they are imported is no business of ours
    warnings.simplefilter("ignore")
    import keras
    import tensorflow as tf
    import tf_keras  # noqa: F401
    import torch

import jax
import numpy as np
import pytest

from benchmarks import step_time
from benchmarks._rivals import Problem

RIVALS = {rival.name: rival for rival in step_time.rivals(small=True, loops=True)}
THEIRS = {name: rival for name, rival in RIVALS.items() if rival.packages}

pytestmark = [
    pytest.mark.lenient("Keras mixes dtypes under JAX"),
    # Keras asks NumPy and JAX for things that they will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow.*"),
]


def test_all_take_part_here():
    assert keras.backend.backend() == "jax"
    assert step_time.absences(RIVALS.values()) == []
    assert {rival.packages[0] for rival in THEIRS.values()} == {"torch", "keras", "tensorflow"}
    assert {"torch", "keras"} < set(step_time.distributions(RIVALS.values()))


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.updates])
def test_formulas(name):
    assert _rivals.error(RIVALS[name]) < 2e-5


@pytest.mark.parametrize(
    "name", [name for name, rival in THEIRS.items() if rival.updates and "Adam" not in name and "Keras 3" not in name]
)
def test_equal_nadams(name):
    assert "NAdam" in name or "Nadam" in name
    problem = Problem.of([(5, 3), (4,)])
    ours, theirs = (RIVALS[x].start(problem) for x in (step_time.OURS, name))
    for _ in range(5):
        for run in (ours, theirs):
            run.step()
            run.wait()
    for start, p, q in zip(problem.params, ours.params(), theirs.params(), strict=True):
        np.testing.assert_allclose(q - start, p - start, rtol=step_time.CLOSE)


def test_torch_copy_size():
    run = RIVALS["copy: copy_, torch"].start(Problem.of([(5,), (2, 2)]))
    run.step()
    run.wait()
    np.testing.assert_array_equal(run.params()[0], np.full(27, 0.5))


@pytest.mark.parametrize("kind", ["torch", "tensorflow"])
def test_rival_without_gpu(monkeypatch, kind):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    reasons = {rival.left_out() for rival in THEIRS.values() if rival.packages[0] == kind}
    assert reasons == {f"{kind} and jax would not be on the same device"}
    assert RIVALS["Keras 3 Nadam on jax, stateless_apply"].left_out() is None


def test_rival_with_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: None)
    assert len(step_time.absences(RIVALS.values())) == len(THEIRS) - 1
