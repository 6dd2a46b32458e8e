"""Every Python block of the README runs, in order, as one program."""

import re
from pathlib import Path

import numpy as np
import pytest

from optax_nadam import NadamConfig, compat

README = (Path(__file__).parents[2] / "README.md").read_text()


def to_params(weights):
    return {"kernel": weights["weight"].T}


def a_checkpoint():
    """What torch.load gives after 3 steps of a linear layer."""
    config = NadamConfig(eps=1e-8)
    state = compat.torch.nadam().init({"kernel": np.ones((2, 3), np.float32)})
    optimizer = compat.torch.dump_state(state, lambda params: {"weight": params["kernel"].T}, config=config)
    optimizer["param_groups"][0]["initial_lr"] = 1e-3
    scheduler = {"T_max": 10, "eta_min": 0.0, "base_lrs": [1e-3], "last_epoch": 0, "_last_lr": [1e-3]}
    return {"model": {"weight": np.ones((3, 2), np.float32)}, "optimizer": optimizer, "scheduler": scheduler}


@pytest.mark.lenient("Optax's schedules mix dtypes")
def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {"to_params": to_params, "checkpoint": a_checkpoint()}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_code_comes_early():
    lines = README.splitlines()
    assert "```python" in lines[:20]
    assert len(lines) <= 100
