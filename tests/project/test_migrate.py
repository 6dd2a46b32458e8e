"""Every line of the migration table runs, and does what its left-hand side did."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "api" / "keras_methods.md").read_text()
METHODS = (
    *("apply_gradients", "minimize", "get_gradients", "get_config", "from_config", "get_weights", "set_weights"),
    *("get_slot", "get_slot_names", "add_slot", "variables", "iterations", "clipvalue", "clipnorm", "global_clipnorm"),
    *("decay", "replicas"),
)
ROWS = re.findall(r"^\| (.*?) \| `(.*)` \|$", PAGE, flags=re.MULTILINE)  # left-hand sides with their lines of code


def test_every_method():
    assert len(ROWS) == PAGE.count("\n| ") - 1
    assert [method for method in METHODS if not any(method in there for there, _ in ROWS)] == []


@pytest.mark.lenient("Optax's wrappers mix dtypes")
def test_lines():
    names: dict[str, Any] = {}
    (setup,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    exec(setup, names)
    start = names["loss_fn"](names["params"])
    for there, here in ROWS:
        exec(here, names)
        if "minimize" in there:
            assert names["loss"] < start
            assert names["loss_fn"](names["params"]) < names["loss"]
        if "iterations`" in there:
            assert names["iterations"] == 2
        if "set_weights" in there:
            again = names["compat"].keras.get_weights(names["state"], names["from_params"])
            assert len(again) == 2 + 2 * 2
            assert all(np.array_equal(a, b) for a, b in zip(again, names["weights"], strict=True))
        if "from_config" in there:
            assert names["compat"].keras.config_from(names["stored"]) == names["config"]
        if "replicas" in there:
            assert np.array_equal(names["grads"], np.full((2, 3), 2.0))
    assert names["names"] == ("m", "v")
    assert names["slot"].shape == (3, 2)
    assert len(names["variables"]) == 2 + 2 * 2
