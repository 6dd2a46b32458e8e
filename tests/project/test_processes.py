"""Training over several devices and processes, by the example that shows users how.

- One device, or eight in two layouts, or two processes with all arrays split: the same run, within 3e-6 (6e-7 after
  300 steps, from the order of sums), and the bytes on a device are those of the layout.
- A checkpoint that every process has whole loads into a state that is split over them.
"""

import contextlib
import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, DEVICES, SECONDS = 8, 8, 240
# Bytes of params and of optimizer state on a device: the bias of ten does not divide over eight devices and lies on
# all of them; so do count and product.
LAYOUTS = {"zero1": (9640, 2492), "fsdp": (1240, 2492)}
PROGRAM = """
import sys, sharded_training
folder, *joined = sys.argv[1:]
sys.argv = ["", "--layout", "fsdp", "--steps", "{steps}", "--out", folder + "/fsdp.npz", *joined]
sharded_training.main()

{load}
"""
LOAD = """
import jax, numpy as np, optax
import optax_nadam
from _shared import initial_params
from optax_nadam import compat

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
weights = initial_params(0)
params = sharded_training.place(weights, sharded_training.shardings(weights, mesh, split=True))
config = optax_nadam.NadamConfig(learning_rate=0.1, rule="constant", m_dtype="int8", v_dtype="bfloat16")
tx = optax_nadam.compensated(config.build(optax.cosine_decay_schedule(0.1, 100)), remainder_dtype="int16")
narrow = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype("bfloat16"), tree))(params)
fresh = jax.jit(tx.init)(narrow)
source = optax.ScaleByAdamState(np.int32(7), weights, jax.tree.map(np.square, weights))
loaded = compat.optax.load_state(fresh, source, config=config)
for x, like in zip(jax.tree.leaves(loaded), jax.tree.leaves(fresh), strict=True):
    assert (x.sharding, x.dtype) == (like.sharding, like.dtype)
loaded = jax.jit(lambda state: jax.tree.map(lambda x: x + 0, state), donate_argnums=0)(loaded)
wide = jax.jit(lambda state: optax_nadam.convert_moments(optax_nadam.get_state(state), m_dtype=None, v_dtype=None))
sharded_training.save(folder + "/loaded" + str(jax.process_index()) + ".npz", sharded_training.gathered(wide(loaded)))
"""


@contextlib.contextmanager
def started(*arguments):
    """A process of its own on half of the devices, which does not outlive the test."""
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_NUM_CPU_DEVICES": str(DEVICES // 2), "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM.format(steps=STEPS, load=LOAD), *map(str, arguments)]
    with subprocess.Popen(command, text=True, env=environment, stdout=PIPE, stderr=PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def over_two_processes(folder):
    """What the first process reports; both train with all arrays split."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    joined = ["--coordinator", coordinator, "--processes", 2, "--process"]
    with started(folder, *joined, 0) as first, started(folder, *joined, 1) as second:
        (report, errors), (silent, others) = (process.communicate(timeout=SECONDS) for process in (first, second))
        assert first.returncode == second.returncode == 0, errors + others
    assert "loss" not in silent
    return report


@pytest.fixture
def train_here(monkeypatch, capsys, tmp_path):
    """Trains over virtual devices of this process; returns the arrays and the report."""

    def train(layout, devices):
        path = tmp_path / f"{layout} on {devices}.npz"
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", ["", "--layout", layout, "--steps", str(STEPS), "--out", str(path)])
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        importlib.import_module("sharded_training").main()
        return dict(np.load(path)), capsys.readouterr().out

    return train


def assert_same_run(got, expected, case):
    """The same but for the order in which gradients are summed, which changes their last bits."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(got[name] - array) <= 3e-6 * np.linalg.norm(array), f"{name}, {case}"
    assert got["['opt_state'][1][0].count"] == STEPS


@pytest.mark.lenient("examples run with the promotion that users have")
def test_same_run(tmp_path, train_here):
    def assert_reported(layout, processes, report):
        of_params, of_state = LAYOUTS[layout]
        assert re.search(
            rf"{layout} on 8 devices of {processes} processes\nloss: .*\n"
            rf"bytes on one device: {of_params} of params, {of_state} of optimizer state\n",
            report,
        )

    expected, report = train_here("replicated", devices=1)
    assert re.search("replicated on 1 devices of 1 processes\n.*\n.*: 9640 of params, 19292 of optimizer", report)
    for layout in LAYOUTS:
        got, report = train_here(layout, DEVICES)
        assert_reported(layout, 1, report)
        assert_same_run(got, expected, f"{layout} on eight devices")
    assert_reported("fsdp", 2, over_two_processes(tmp_path))  # and each of them loads a checkpoint
    assert_same_run(dict(np.load(tmp_path / "fsdp.npz")), expected, "over two processes")

    (tmp_path / "here").mkdir()
    exec(LOAD, {"sharded_training": importlib.import_module("sharded_training"), "folder": str(tmp_path / "here")})
    alone = dict(np.load(tmp_path / "here" / "loaded0.npz"))
    assert alone[".count"] == 7
    for process in (0, 1):
        there = dict(np.load(tmp_path / f"loaded{process}.npz"))
        assert there.keys() == alone.keys()
        assert all(np.array_equal(there[name], alone[name]) for name in alone)
