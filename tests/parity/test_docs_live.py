"""The code of the pages that needs another framework."""

import os

import pytest

os.environ["KERAS_BACKEND"] = "jax"

from tests.project.test_docs import PAGES, run, sections

PROGRAMS = [(page, program) for page in PAGES for program in sections(page)[1]]

pytestmark = [
    pytest.mark.lenient("Keras mixes dtypes under JAX"),
    # Keras asks NumPy and JAX for things that they will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras.*"),
]


@pytest.mark.parametrize(("page", "program"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_code_of_a_page_runs(page, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(program)
