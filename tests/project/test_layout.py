"""The layout that CONTRIBUTING shows is the real one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = re.findall(r"^\| (`.*`) \| .+ \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
NAMED = {path for cell in TABLE for path in re.findall(r"`([\w/.]+)`", cell)}


def modules(folder):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}


def test_every_module_of_the_package_is_shown_and_no_other():
    shown = {path for path in NAMED if path.startswith("optax_nadam/") and path.endswith(".py")}
    assert shown == modules("optax_nadam") | modules("optax_nadam/compat")


def test_every_folder_is_shown():
    folders = {path.parent for path in (ROOT / "tests").glob("*/*.py")}
    wanted = {f"{path.relative_to(ROOT)}/" for path in folders} | {"benchmarks/", "docs/", "examples/"}
    assert wanted <= NAMED


def test_whatever_is_shown_is_there():
    assert [path for path in sorted(NAMED) if not (ROOT / path).exists()] == []


def test_the_tests_of_a_module_have_its_name():
    """``_state.py`` is tested in ``test_state.py``; what tests more than one module has a folder of its own."""
    for folder in ("", "compat"):
        tested = {Path(path).stem.removeprefix("_") for path in modules(Path("optax_nadam") / folder)}
        tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*.py")}
        assert tests <= tested, folder
