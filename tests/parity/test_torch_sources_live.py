"""Each kind of checkpoint of docs/carry.md, continued here and there, and back."""

import warnings

import pytest

from tests.compat.test_torch_read import BOUND, WARNS
from tests.parity.torch_sources import KINDS, there_and_back


@pytest.mark.parametrize("name", KINDS)
def test_continued_and_returned(name):
    with warnings.catch_warnings():
        for text in WARNS.values():
            warnings.filterwarnings("ignore", f".*({text})")
        here, back = there_and_back(KINDS[name])
    assert here < BOUND
    assert back < BOUND
