"""The comparison with FlashOptim, with contenders of our own in the place of the rival's."""

import importlib.util

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from benchmarks import _tasks, flashoptim
from benchmarks.flashoptim import Case, Run
from benchmarks.step_time import LOOP

pytestmark = pytest.mark.lenient("the rival needs it")


def test_without_the_rival_nothing_is_done(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flashoptim_jax" else found(name))
    with pytest.raises(SystemExit, match="needs flashoptim-jax, pip install flashoptim-jax"):
        flashoptim.main(["--quick"])
    assert capsys.readouterr().out == ""


def test_ours_and_the_reference_are_the_same_formula():
    """Without narrow moments, ours differs from the reference by the 24 bits of the weights alone."""
    case = Case(flashoptim.noise)
    runs = [
        flashoptim.runner(contender, case, 20, dtype)(jax.random.key(0))
        for contender, dtype in (
            (flashoptim.ours(m_dtype=None, v_dtype=None), jnp.bfloat16),
            (flashoptim.float32(), jnp.float32),
            (flashoptim.other_roundings(), jnp.float32),
        )
    ]
    ours, reference, other = runs
    change, m, v, _ = flashoptim.errors_of(ours, reference)
    assert change < 1e-3
    assert max(m, v, *flashoptim.errors_of(other, reference)) < 1e-5


def test_errors_are_relative_to_the_reference():
    expected = Run(np.array([3.0, 4.0]), np.ones(2), np.array([2.0, 4.0]))
    got = Run(np.array([3.0, 4.5]), np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert flashoptim.errors_of(got, expected) == pytest.approx([0.1, 0.5**0.5, 1 / 20**0.5, 0.25])


def test_rows_have_both_contenders(monkeypatch):
    """With ours in the place of theirs, both cells of a row are the same."""
    monkeypatch.setattr(flashoptim, "theirs", flashoptim.ours)
    rows = list(flashoptim.error_rows({"some": Case(flashoptim.heavy_tailed)}, steps=30, seeds=2))
    assert [row[:2] for row in rows] == [[what, "some"] for what in flashoptim.WHATS]
    for _, _, theirs, ours in rows:
        assert theirs == ours
        assert 1e-4 < float(ours) < 0.3


def test_the_largest_change_of_a_weight_is_found():
    """Adam's first step has the length of the learning rate."""
    task = _tasks.digits()._replace(steps=3)
    losses, changes = flashoptim.trained(task, flashoptim.float32(task.peak), jnp.float32, 1)
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(changes, 1, rtol=0.3)


def test_losses_that_are_not_finite_are_counted_and_left_out():
    values = np.array([1.0, np.nan, 2.0])
    assert flashoptim.ratios(values) == "1.5000 ± 0.5000, at most 2.0000; 1 not finite"
    assert flashoptim.ratios(values[::2]) == "1.5000 ± 0.5000, at most 2.0000"


def test_an_error_is_a_cell():
    def fails(contender):
        raise TypeError("first\nsecond")

    def silent(contender):
        raise AssertionError

    makers = {"one": flashoptim.ours}
    assert flashoptim.attempt(flashoptim.Place(fails, makers), "one") == "TypeError: first"
    assert flashoptim.attempt(flashoptim.Place(silent, makers), "one") == "AssertionError, without a message"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_the_error_of_a_first_step(dtype):
    exact = flashoptim.ours(m_dtype=None, v_dtype=None)
    said = flashoptim.on_this_processor(exact, dtype)
    assert float(said.removeprefix("runs, error ")) < (5e-2 if dtype == jnp.bfloat16 else 1e-4)


def test_ours_runs_split_chained_and_under_vmap():
    ours = flashoptim.ours()
    assert flashoptim.split_here(ours) == "same bits, 0 collectives"
    assert flashoptim.chained(ours) == "runs"
    assert flashoptim.vmapped_here(ours) == "runs, same bits as alone"


def test_bytes_of_a_state():
    assert flashoptim.bytes_a_parameter(flashoptim.ours(), {"w": (1024, 1024)}) == pytest.approx(3.004, abs=1e-3)
    assert flashoptim.bytes_a_parameter(flashoptim.float32(), {"w": (64, 64)}) == pytest.approx(4, abs=1e-2)


def test_a_step_is_timed_as_one_of_a_loop_that_continues(monkeypatch):
    """Theirs runs on a GPU only: ours stands for both."""
    monkeypatch.setitem(flashoptim.MAKERS, flashoptim.KERNEL, flashoptim.ours)
    seen = []

    def once(calls, repeats):
        for call in calls.values():
            seen.append([int(call()[1].inner_state[0].count) for _ in range(2)])
        return {name: [LOOP * 1e-3] * repeats for name in calls}

    monkeypatch.setattr(flashoptim, "interleaved", once)
    rows = list(flashoptim.time_rows({"some": {"w": (8, 8)}}, 2))
    assert rows == [["a step", f"some, {x} gradients", *2 * ["1 ms (1 to 1)"]] for x in ("bfloat16", "float32")]
    assert seen == 4 * [[LOOP, 2 * LOOP]]
