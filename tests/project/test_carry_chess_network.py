"""The chess example in short, without TensorFlow, torch and chess; ``tests/parity`` has the parts that need them.

- A run of Optax that continues here is the same in float32, up to rounding, and in 8 bits within 0.01 in the loss.
"""

import importlib.util

import numpy as np
import pytest

pytestmark = pytest.mark.lenient("examples run with the promotion that users have")


def test_optax_run_continues(start, capsys, tmp_path):
    picture = tmp_path / "new folder" / "chess.png"
    found = start("carry_chess_network", "--parts", "b", "--steps", "20", "--out", str(picture))["b"]
    # Weights are below 2 and are rounded once in a step, here and there; gradients at weights that differ double it.
    bound = 8 * 2 * (2 * 2**-24 / 5e-4) * 2
    assert found["float32"] < bound
    # 8 bits leave a weight whose moments are small in their row off by up to about a learning rate in each step.
    assert bound < found["int8"] < 8 < found["fresh"]
    assert found["loss of float32"] < 1e-5  # a schedule that drops one step later shows at 1e-3
    assert found["loss of int8"] < 0.01 < 0.1 < found["loss of fresh"]
    assert found["rate"] == pytest.approx(1e-4, rel=1e-5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"float32 {found['float32']:.1e} lr" in printed
    assert "step set by hand from 20 to 45: learning rate 5.0e-04, then 1.0e-04\n" in printed


def test_left_out(start, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert start("carry_chess_network", "--parts", "a", "c") == {}
    left_out = "a: left out, for it needs tensorflow and tf_keras\nc: left out, for it needs torch\n"
    assert capsys.readouterr().out == left_out


def test_positions(example):
    ((planes, targets),) = example("_chess").make_batches(1, seed=0)
    assert planes.shape == (128, 768)
    pieces = planes.reshape(128, 2, 6, 64).sum(axis=3)
    np.testing.assert_array_equal(pieces[:, :, 5], 1)  # a king on each side
    assert pieces.sum(axis=2).max() <= 16
    left = planes.reshape(128, 2, 6, 64)[np.arange(128), 0, :, targets[:, 0].astype(int)]
    np.testing.assert_array_equal(left.sum(axis=1), 1)  # the side to move moves a piece of its own
    balance = (pieces[:, 0] - pieces[:, 1]) @ [1, 3, 3, 5, 9, 0]
    np.testing.assert_allclose(targets[:, 1], np.tanh(balance / 10), atol=1e-6)
