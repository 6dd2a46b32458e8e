"""The notebook runs in a fresh kernel, and its stored outputs are those of a run.

``python -m tests.project.test_notebook`` runs it and stores what it prints and draws.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


STORED = load()


@pytest.mark.long
def test_runs():
    """It finds what is stored, so that no cell has failed."""
    executed = execute(load())
    assert re.sub(NUMBER, "#", printed(executed)) == re.sub(NUMBER, "#", printed(STORED))
    assert numbers(printed(executed)) == pytest.approx(numbers(printed(STORED)), rel=0.02)  # processors round apart
    assert pictures(executed) == pictures(STORED)


def test_resumed():
    """The notebook asserts that a resumed run is the same."""
    asserted = re.findall(r"^assert .*", "\n".join(cell.source for cell in STORED.cells), re.MULTILINE)
    assert len(asserted) == 2
    assert "bit for bit" in printed(STORED)


def test_stored():
    """After one run of all cells; outputs are few and small."""
    nbformat.validate(STORED)
    code = [cell for cell in STORED.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.metadata for cell in STORED.cells] == [{}] * len(STORED.cells)
    assert {output.output_type for output in outputs(STORED)} == {"stream", "display_data"}
    assert "stderr" not in {output.get("name") for output in outputs(STORED)}
    assert pictures(STORED) == ["rules-plot", "moments-plot"]
    assert len(printed(STORED)) < 1000
    assert NOTEBOOK.stat().st_size < 150_000


if __name__ == "__main__":
    nbformat.write(execute(load()), NOTEBOOK)
