"""A training that is killed again and again ends as one that never was killed.

- Killed with SIGKILL 20 times and resumed, it ends with the same bits; at least a quarter of the kills come while a
  checkpoint is written (``python run.py long``).
- Every field of the state is needed to resume.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from optax_nadam import ScaleByNadamState
from tests.system import resumable
from tests.system.resumable import SAVE_EVERY, STEPS

# Imports take seconds; a fork of a process that has made them takes none. They do not start JAX's backend.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "jax", "optax", "orbax.checkpoint", "optax_nadam"])
KILLS = 20  # after which the training has not reached its last step
PATIENCE = 120  # seconds without a word: the training hangs


class Life(NamedTuple):
    """What was seen of a training from its start to its death."""

    newest: int  # the last complete checkpoint at the start, 0 for none
    resumed: int
    reached: int
    cut_short: list[int]  # files in each checkpoint that the death left half written


@contextlib.contextmanager
def running(folder: Path, pause_at: int, last: int) -> Iterator[tuple[BaseProcess, Connection]]:
    """A training in a process of its own, and what it tells; it is killed at the end, whatever happens."""
    reports, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=resumable.run, args=(folder, theirs, pause_at, last), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, reports
    finally:
        process.kill()
        process.join(PATIENCE)
        reports.close()


def hear(reports: Connection) -> tuple[str, Any]:
    if not reports.poll(PATIENCE):
        raise TimeoutError("The training has gone silent.")
    return reports.recv()


def newest_checkpoint(folder: Path) -> int:
    """The last complete one, 0 for none: Orbax writes under another name and renames at the end."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def half_written(folder: Path) -> dict[tuple[str, int], int]:
    """The number of files in each checkpoint not complete, by name and time: written again, it is another one."""
    found = {}
    for path in folder.glob("*.orbax-checkpoint-tmp"):
        with contextlib.suppress(FileNotFoundError):  # complete by now
            found[path.name, path.stat().st_ctime_ns] = sum(len(files) for _, _, files in os.walk(path))
    return found


def killed(folder: Path, last_step: int, rng: np.random.Generator) -> Life:
    """A training that is killed some steps after it resumed: anywhere, in a write or between writes."""
    newest, left_over = newest_checkpoint(folder), half_written(folder)
    last = newest + int(rng.integers(1, 6 * SAVE_EVERY))
    next_save = -(-last // SAVE_EVERY) * SAVE_EVERY
    moment, files = rng.choice(["anywhere", "in a write", "between writes"]), int(rng.integers(0, 11))

    def cut_short() -> list[int]:
        return [count for checkpoint, count in half_written(folder).items() if checkpoint not in left_over]

    def is_time() -> bool:
        if moment == "in a write":
            return max(cut_short(), default=-1) >= files or newest_checkpoint(folder) == next_save
        return moment == "anywhere" or not cut_short()

    with running(folder, next_save, last_step) as (process, reports):
        word, resumed = hear(reports)
        assert word == "resumed"
        reached = resumed
        while reached < last:
            _, reached = hear(reports)
        deadline = time.monotonic() + PATIENCE
        while not is_time():
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        with contextlib.suppress(EOFError):  # what it had told before it died
            while True:
                _, reached = reports.recv()
    return Life(newest, resumed, reached, cut_short())


def trained(steps: range, training: Any = None) -> Any:
    """The training after some steps, in this process."""
    training = resumable.initial() if training is None else jax.tree.map(jnp.asarray, training)
    for step in steps:
        training = resumable.take_step(training, *resumable.batch(step))
    return jax.device_get(training)


def finished(folder: Path, last_step: int) -> dict[str, bytes]:
    """The final training, no longer killed, as bytes."""
    with running(folder, last_step, last_step) as (process, reports):
        word, told = hear(reports)
        while word != "finished":
            word, told = hear(reports)
        process.join(PATIENCE)
        assert process.exitcode == 0
    return told


@pytest.mark.lenient("Optax's schedule mixes dtypes")
@pytest.mark.long
def test_kills_leave_no_trace(tmp_path):
    rng = np.random.default_rng(20261122)
    lives = [killed(tmp_path / "killed", STEPS, rng) for _ in range(KILLS)]
    assert [life.resumed for life in lives] == [life.newest for life in lives]
    lost = [before.reached - after.resumed for before, after in itertools.pairwise(lives)]
    assert all(0 <= steps <= 2 * SAVE_EVERY for steps in lost)  # the last checkpoint but one is always complete
    assert sum(lost) > 0
    assert KILLS // 4 <= sum(bool(life.cut_short) for life in lives) < KILLS

    survivor, whole = finished(tmp_path / "killed", STEPS), resumable.as_bytes(trained(range(1, STEPS + 1)))
    assert np.frombuffer(whole[".opt_state[1][0].count"], np.int32) == STEPS
    assert np.frombuffer(whole[".opt_state[1][0].mu_product"], np.float32) > 0
    assert [name for name in whole if survivor[name] != whole[name]] == []


def distance(a: Any, b: Any) -> float:
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in leaves)))


@pytest.mark.lenient("Optax's schedule mixes dtypes")
def test_every_field_is_needed():
    fresh, saved = jax.device_get(resumable.initial()), trained(range(1, 61))
    expected = trained(range(61, 101), saved).params
    clip, (nadam, *others) = saved.opt_state
    for field in ScaleByNadamState._fields:
        without = nadam._replace(**{field: getattr(fresh.opt_state[1][0], field)})
        elsewhere = trained(range(61, 101), saved._replace(opt_state=(clip, (without, *others)))).params
        way, apart = (distance(params, expected) for params in (saved.params, elsewhere))
        assert apart > 0.1 * way, field
