"""What the tests of the examples share."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the examples, as a program among them would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def start(example, monkeypatch):
    """Starts an example with these arguments; returns what its ``main`` does."""

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return example(name).main()

    return start
