"""The notebook runs in a fresh kernel, and its stored outputs are those of a run.

``python -m tests.project.test_notebook`` runs it and stores what it prints and draws.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
NUMBER = r"\d[\d,]*\.?\d*"


def load():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook):
    """Runs all cells, from the folder of the notebook as Jupyter does; raises where a cell does."""
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources=folder,
        record_timing=False,  # times differ in every run
        coalesce_streams=True,
    )
    executed = client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    executed.metadata.language_info = {"name": "python"}  # without the version of Python
    return executed


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def pictures(notebook):
    return [cell.id for cell in notebook.cells for x in cell.get("outputs", ()) if "image/png" in x.get("data", {})]


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, text)]


@pytest.fixture(scope="module")
def stored():
    return load()


def test_the_notebook_runs_and_finds_what_is_stored(stored):
    executed = execute(load())
    assert re.sub(NUMBER, "#", printed(executed)) == re.sub(NUMBER, "#", printed(stored))
    assert numbers(printed(executed)) == pytest.approx(numbers(printed(stored)), rel=0.02)  # processors round apart
    assert pictures(executed) == pictures(stored)


def test_a_cell_that_fails_is_an_error():
    broken = load()
    (cell,) = (cell for cell in broken.cells if "restored = " in cell.source)
    imports = next(cell for cell in broken.cells if cell.cell_type == "code")
    broken.cells = [imports, cell]  # without what it needs
    with pytest.raises(CellExecutionError, match="NameError"):
        execute(broken)


def test_the_resumed_run_is_asserted_to_be_the_same(stored):
    asserted = re.findall(r"^assert .*", "\n".join(cell.source for cell in stored.cells), re.MULTILINE)
    assert len(asserted) == 2
    assert "bit for bit" in printed(stored)


def test_the_notebook_was_stored_after_one_run_of_all_cells(stored):
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.metadata for cell in stored.cells] == [{}] * len(stored.cells)


def test_stored_outputs_are_few_and_small(stored):
    assert {output.output_type for output in outputs(stored)} == {"stream", "display_data"}
    assert "stderr" not in {output.get("name") for output in outputs(stored)}
    assert pictures(stored) == ["rules-plot", "moments-plot"]
    assert len(printed(stored)) < 1000
    assert NOTEBOOK.stat().st_size < 150_000


if __name__ == "__main__":
    nbformat.write(execute(load()), NOTEBOOK)
