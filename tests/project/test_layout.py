"""The layout that CONTRIBUTING shows is the real one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = re.findall(r"^\| (`.*`) \| .+ \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
NAMED = {path for cell in TABLE for path in re.findall(r"`([\w/.]+)`", cell)}


def modules(folder):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}


def test_table():
    """Every module of the package, every folder of tests and no file that is not there."""
    shown = {path for path in NAMED if path.startswith("optax_nadam/") and path.endswith(".py")}
    assert shown == modules("optax_nadam") | modules("optax_nadam/compat")
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "tests").glob("*/*.py")}
    assert folders | {"benchmarks/", "docs/", "examples/"} <= NAMED
    assert [path for path in sorted(NAMED) if not (ROOT / path).exists()] == []


def test_names():
    """``_state.py`` is tested in ``test_state.py``; what tests more than one module has a folder of its own."""
    for folder in ("", "compat"):
        tested = {Path(path).stem.removeprefix("_") for path in modules(Path("optax_nadam") / folder)}
        tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*.py")}
        assert tests <= tested, folder
