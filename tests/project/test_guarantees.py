"""Every test that the page of guarantees names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/.]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_the_page_names_is_there(file, test):
    assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M)


def test_every_promise_names_a_test():
    promises = [line for line in PAGE.splitlines() if re.match(r"\| [^-]", line) and "| test |" not in line]
    assert len(promises) > 30
    assert [line for line in promises if not re.search(r"`[\w/.]+\.py(::\w+)?`", line)] == []
