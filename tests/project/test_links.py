"""The README is shown on package indexes as well: whatever it links to has a full address, and is there."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = re.findall(r"\]\(([^)]*)\)", (ROOT / "README.md").read_text())
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
BLOB, RAW = f"{SOURCE}/blob/main/", f"{SOURCE.replace('github.com', 'raw.githubusercontent.com')}/main/"


def heading_ids(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_are_absolute():
    assert len(LINKS) > 10
    assert [link for link in LINKS if not link.startswith("https://")] == []


def test_pictures_are_raw():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    assert pictures
    assert [picture for picture in pictures if not picture.startswith(RAW)] == []


@pytest.mark.parametrize("link", [link for link in LINKS if link.startswith((SOURCE, RAW))])
def test_links_lead_somewhere(link):
    assert link.startswith((BLOB, RAW))
    path, _, heading = link.removeprefix(BLOB).removeprefix(RAW).partition("#")
    assert (ROOT / path).is_file()
    assert not heading or heading in heading_ids(ROOT / path)
