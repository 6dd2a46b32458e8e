"""The chess example beside tf_keras and torch, and its positions beside chess."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.lenient("examples run with the promotion that users have")
def test_three_frameworks(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = program("carry_chess_network", "--parts", "a", "c", "--steps", "20", "--seed", "3")
    carried = [float(x) for x in re.findall(r"carried (.*?) lr", printed)]
    lost = [float(x) for x in re.findall(r"(?:without the product|fresh) (.*?) lr", printed)]
    # Weights are below 2; torch rounds them twice in a step. Gradients at weights that differ double it.
    bound = 8 * 3 * (2 * 2**-24 / 5e-4) * 2
    assert len(carried) == 2
    assert max(carried) < bound
    assert len(lost) == 3
    assert min(lost) > 1


def test_recorded_positions(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("_chess")
    with np.load(example.POSITIONS) as recorded:
        played = example.random_play()
        assert sorted(recorded) == sorted(played)
        np.testing.assert_array_equal(recorded["planes"], played["planes"])
        np.testing.assert_array_equal(recorded["policy"], played["policy"])
        np.testing.assert_allclose(recorded["value"], played["value"], rtol=1e-6)
