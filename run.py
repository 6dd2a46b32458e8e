"""Runs the tests, the example or the checks, or builds the site, in an environment that it makes itself.

    python run.py unit        what tests a module or a docstring, in the smallest environment: unit tests/test_rules.py
    python run.py tests
    python run.py project     what the pages, the notebook, the examples and the benchmarks say and do
    python run.py example
    python run.py lint        format and lint, in seconds
    python run.py checks      format, lint and types
    python run.py parity      beside Keras, TensorFlow, PyTorch, timm and Flax
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
PYTEST = ["-m", "pytest", "--fail-on-skip"]
SHARED = ["-n", "2", "--dist", "worksteal"]  # over two processes; "-n 0" passed on takes that back
ELSEWHERE = [*PYTEST, "-o", "addopts=--strict-markers --strict-config --import-mode=importlib -ra"]
UNIT = ["-m", "pytest", "-o", "testpaths=optax_nadam tests/test_*.py tests/compat"]
RUFF = [["-m", "ruff", "format", "--check"], ["-m", "ruff", "check"]]
QUICK = ["-m", "benchmarks", "--quick"]
# What the compilers for TPU and GPU change.
COMPILED = ["ahead_of_time", "flashoptim", "host_memory", "memory_formats", "options"]
# A task's group of dependencies, and what it runs.
TASKS: dict[str, tuple[str, list[list[str]]]] = {
    "unit": ("unit", [UNIT]),
    "tests": ("test", [[*PYTEST, *SHARED, "--ignore=tests/project"]]),
    "project": ("test", [[*PYTEST, *SHARED, "tests/project"]]),
    "example": ("examples", [["examples/train_digits.py"]]),
    "lint": ("lint", RUFF),
    "checks": ("dev", [*RUFF, ["-m", "mypy"]]),
    "parity": ("parity", [[*ELSEWHERE, *SHARED, "--dist", "loadfile", "tests/parity"]]),  # imports take half a minute
    "aot": ("aot", [[*QUICK, *COMPILED], [*ELSEWHERE, *SHARED, "tests/ahead_of_time"]]),
    "benchmarks": ("test", [QUICK]),
    "release": ("release", [[*ELSEWHERE, "tests/release"]]),
    "long": ("test", [[*PYTEST, "-m", "long or property", "--hypothesis-profile=long"]]),
    "docs": ("docs", [["-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-d", "build/doctrees", "docs", "site"]]),
}


def included(group: str, groups: dict[str, list[Any]]) -> Iterator[str]:
    """The group and, one after another, those that it includes."""
    yield group
    for entry in groups[group]:
        if isinstance(entry, dict):
            yield from included(entry["include-group"], groups)


def environment(folder: Path, group: str, constraints: Path) -> Path:
    """The Python of a virtual environment with a group and what it needs of the package, made where it is missing."""
    import tomllib  # not at the top: whoever runs this may have a Python without it

    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    text = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(text + constraints.read_bytes()).hexdigest()[:16]
    if not (folder / f"installed-{group}-{wanted}").exists():
        print(f"Setting up {folder} for {group} (once; a minute or two) ...", flush=True)
        if not any(folder.glob("installed-*")):
            venv.create(folder, with_pip=True, upgrade_deps=True)  # a pip of 2023 takes twice as long
        project = tomllib.loads(text.decode())
        groups = project["dependency-groups"]  # pip reads these from 25.1 on; Python may bring an older
        names = list(included(group, groups))
        needed = [entry for name in names for entry in groups[name] if isinstance(entry, str)]
        without = {"lint": [], "unit": project["project"]["dependencies"]}  # pytest finds the package where it is
        package = without.get(group, ["-e", str(ROOT)])
        install = [str(python), "-m", "pip", "install", "-q", "--no-compile", "-c", str(constraints)]
        subprocess.run([*install, *package, *needed], check=True)
        if alone := groups.get(f"{group}-alone"):
            subprocess.run([*install, "--no-deps", *alone], check=True)
        for name in names:
            (folder / f"installed-{name}-{wanted}").touch()
    return python


def main() -> int:
    """Sets up and runs one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is or shall be")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints/newest.txt", help="versions to install")
    parser.add_argument("task", choices=TASKS)
    arguments, passed_on = parser.parse_known_args()
    group, commands = TASKS[arguments.task]
    folder = arguments.venv.resolve()
    if group == "aot":  # compilers for what is not here stay out of the environment of everything else
        folder = folder.with_name(f"{folder.name}-aot")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # images of containers set it; each start would compile all of JAX
    python = environment(folder, group, arguments.constraints.resolve())
    *before, last = commands
    codes = [subprocess.run([python, *command], cwd=ROOT).returncode for command in before]
    return max(*codes, subprocess.run([python, *last, *passed_on], cwd=ROOT).returncode, 0)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever runs this may have an older one
        sys.exit("optax_nadam needs Python 3.11 or later.")
    sys.exit(main())
