"""The examples, in short, as a user starts them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def start(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_train_digits(tmp_path):
    picture = tmp_path / "new folder" / "digits.png"
    done = start("train_digits.py", "--steps", "60", "--seeds", "2", "--seed", "7", "--out", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("optax_nadam.nadam", "optax.nadam", "optax.adam"):
        assert f"{name}: test accuracy" in done.stdout
    assert "loss=" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "many"], "argument --steps: must be a positive whole number, got 'many'"),
        (["--steps", "0"], "argument --steps: must be a positive whole number, got '0'"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0, got '-1'"),
        (["--out", "curve.jpg"], "argument --out: must end in .png, got 'curve.jpg'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_a_bad_argument_gets_one_line(arguments, line):
    done = start("train_digits.py", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"train_digits.py: {line} (see --help)\n"
