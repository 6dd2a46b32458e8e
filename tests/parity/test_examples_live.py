"""The examples that bring a run over, in short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize("name", ["from_torch", "from_keras"])
def test_both_continuations_are_one(name, tmp_path):
    picture = tmp_path / "curves.png"
    command: list[str | Path] = [
        sys.executable,
        EXAMPLES / f"{name}.py",
        "--steps",
        "40",
        "--seed",
        "3",
        "--out",
        str(picture),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (difference,) = re.findall(r"largest relative difference: (.*)", done.stdout)
    # Two frameworks multiply matrices in another order; a lost product of momenta would show at 2e-2.
    assert float(difference) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")
