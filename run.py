"""Runs the tests, the example or the checks, or builds the site, in an environment that it makes itself.

    python run.py tests
    python run.py example
    python run.py parity      beside Keras, TensorFlow, PyTorch and timm
    python run.py aot         compiled ahead of time for TPU and GPU; needs neither
    python run.py benchmarks  each in seconds, nothing written
    python run.py docs        the site, into site/
    python run.py release     builds wheel and sdist, installs them elsewhere and tries what they install
    python run.py long        what takes minutes: a million steps, thousands of random trees, the largest leaves

Needs Python 3.11 or later and a package index, nothing else. What follows the task is passed on to it.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYTEST = ["-m", "pytest", "--fail-on-skip"]
SHARED = ["-n", "2", "--dist", "worksteal"]  # over two processes; "-n 0" passed on takes that back
TIMM = ["-m", "pip", "install", "-q", "--no-deps", "timm==1.0.31"]  # it asks for torchvision; its optimizers do not
ELSEWHERE = [*PYTEST, "-o", "addopts=--strict-markers --strict-config --import-mode=importlib -ra"]
QUICK = ["-m", "benchmarks", "--quick"]
# What the compilers for TPU and GPU change.
COMPILED = ["ahead_of_time", "flashoptim", "host_memory", "memory_formats", "options"]
TASKS: dict[str, tuple[str, list[list[str]]]] = {
    "tests": ("test", [[*PYTEST, *SHARED]]),
    "example": ("examples", [["examples/train_digits.py"]]),
    "parity": ("parity", [TIMM, [*ELSEWHERE, *SHARED, "tests/parity"]]),
    "aot": ("aot", [[*QUICK, *COMPILED], [*ELSEWHERE, *SHARED, "tests/ahead_of_time"]]),
    "benchmarks": ("test", [QUICK]),
    "release": ("release", [[*ELSEWHERE, "tests/release"]]),
    "long": ("test", [[*PYTEST, "-m", "long or property", "--hypothesis-profile=long"]]),
    "docs": ("docs", [["-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-d", "build/doctrees", "docs", "site"]]),
    "checks": ("dev", [["-m", "ruff", "format", "--check"], ["-m", "ruff", "check"], ["-m", "mypy"]]),
}


def environment(folder: Path, extra: str, constraints: Path) -> Path:
    """The Python of a virtual environment with the package and an extra in it, made where it is missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = (ROOT / "pyproject.toml").read_bytes() + constraints.read_bytes()
    stamp = folder / f"installed-{extra}-{hashlib.sha256(wanted).hexdigest()[:16]}"
    if not stamp.exists():
        print(f"Setting up {folder} (once; a minute or two) ...", flush=True)
        venv.create(folder, with_pip=True)
        install = ["-m", "pip", "install", "-q", "--no-compile", "-c", str(constraints), "-e", f"{ROOT}[{extra}]"]
        subprocess.run([python, *install], check=True)
        stamp.touch()
    return python


def main() -> int:
    """Sets up and runs one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is or shall be")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints/newest.txt", help="versions to install")
    parser.add_argument("task", choices=TASKS)
    arguments, passed_on = parser.parse_known_args()
    extra, commands = TASKS[arguments.task]
    folder = arguments.venv.resolve()
    if extra == "aot":  # compilers for what is not here stay out of the environment of everything else
        folder = folder.with_name(f"{folder.name}-aot")
    python = environment(folder, extra, arguments.constraints.resolve())
    *before, last = commands
    codes = [subprocess.run([python, *command], cwd=ROOT).returncode for command in before]
    return max(*codes, subprocess.run([python, *last, *passed_on], cwd=ROOT).returncode, 0)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever runs this may have an older one
        sys.exit("optax_nadam needs Python 3.11 or later.")
    sys.exit(main())
