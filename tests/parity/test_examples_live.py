"""The examples that bring a run over, in short."""

import os
import re
import sys

import pytest

pytestmark = pytest.mark.lenient("examples run with the promotion that users have")


@pytest.mark.parametrize("name", ["from_torch", "from_keras"])
def test_both_continuations_are_one(name, program, tmp_path):
    picture = tmp_path / "curves.png"
    printed = program(name, "--steps", "40", "--seed", "3", "--out", str(picture))
    (difference,) = re.findall(r"largest relative difference: (.*)", printed)
    # Two frameworks multiply matrices in another order; a lost product of momenta would show at 2e-2.
    assert float(difference) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_backend_of_keras(program, monkeypatch):
    """It is set before Keras is imported, which it is here already."""
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match="keras"):
        program("from_keras")
    assert os.environ["KERAS_BACKEND"] == "jax"
