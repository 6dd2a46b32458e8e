"""Training over several processes, as a user starts them."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "sharded_training.py")
STEPS, DEVICES, SECONDS = 100, 8, 240


@contextlib.contextmanager
def started(*arguments, devices):
    """The example in a process of its own, which does not outlive the test."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, EXAMPLE, "--steps", str(STEPS), *map(str, arguments)]
    with subprocess.Popen(command, text=True, env=environment, stdout=PIPE, stderr=PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def output_of(process):
    out, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return out


def train(layout, path, processes):
    """Trains over eight devices of one or more processes; returns the arrays saved and the report."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    joined = ["--coordinator", coordinator, "--processes", processes]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                started("--layout", layout, "--out", path, *joined, "--process", i, devices=DEVICES // processes)
            )
            for i in range(processes)
        ]
        reports = [output_of(process) for process in running]
    assert not any("loss" in report for report in reports[1:])
    return dict(np.load(path)), reports[0]


def assert_same_run(got, expected):
    """The same but for the order in which gradients are summed, which changes their last bits."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(got[name] - array) <= 3e-6 * np.linalg.norm(array), name


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "one.npz"
    with started("--layout", "replicated", "--out", path, devices=1) as process:
        report = output_of(process)
    assert "replicated on 1 devices of 1 processes" in report
    return dict(np.load(path))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("layout", "bytes_on_a_device"),
    # The bias of ten does not divide over eight devices and lies on all of them; so do count and product.
    [("replicated", (9640, 19292)), ("zero1", (9640, 2492)), ("fsdp", (1240, 2492))],
)
def test_processes_and_devices_do_not_change_the_run(tmp_path, on_one_device, layout, bytes_on_a_device, processes):
    got, report = train(layout, tmp_path / "run.npz", processes)
    assert f"{layout} on 8 devices of {processes} processes" in report
    assert "bytes on one device: {} of params, {} of optimizer state".format(*bytes_on_a_device) in report
    assert_same_run(got, on_one_device)
    assert got["['opt_state'][1][0].count"] == STEPS
