"""The version is defined in one place; changelog and citation agree with it. Ruff's is the same in both places."""

import re
from pathlib import Path

import optax_nadam

ROOT = Path(__file__).parents[2]
RELEASES = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_changelog():
    assert RELEASES[0][0] == optax_nadam.__version__
    assert sorted(RELEASES, key=lambda entry: [*map(int, entry[0].split("."))], reverse=True) == RELEASES


def test_citation():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r'^(?:version|date-released): "?([^"\n]*)', citation, re.M) == list(RELEASES[0])


def test_recorded_states():
    recorded = {path.stem.removeprefix("state-") for path in (ROOT / "tests" / "recordings").glob("state-*.npz")}
    assert recorded == {version for version, _ in RELEASES}


def test_pre_commit_ruff():
    hook = re.search(r"/ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    newest = re.search(r"^ruff==(\S+)$", (ROOT / "constraints" / "newest.txt").read_text(), re.M)
    assert hook
    assert newest
    assert hook[1] == newest[1]
