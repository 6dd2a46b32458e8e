"""Every Python block of the README runs, in order, as one program."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.lenient("Optax's schedules mix dtypes")
def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_code_comes_before_line_20_and_it_is_short():
    lines = README.splitlines()
    assert "```python" in lines[:20]
    assert len(lines) < 150
