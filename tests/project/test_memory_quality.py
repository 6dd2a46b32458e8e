"""The benchmark of what narrow formats cost in quality, on a task that trains in an instant."""

import json
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from benchmarks import _report, _tasks, memory_quality
from benchmarks._tasks import Task
from benchmarks.memory_quality import FLOAT32, FORMATS, OFFERED, Format, Runs

pytestmark = pytest.mark.lenient("optax.nadam itself mixes dtypes")

FEW = [FLOAT32, *[form for form in FORMATS if form.order], *OFFERED[:2], FORMATS[-1]]
SIGNS = jnp.sign(jax.random.normal(jax.random.key(0), (32, 64)))
STRAIGHT = Task(
    name="straight",
    steps=40,
    peak=1e-3,
    init=lambda key: jax.random.normal(key, SIGNS.shape),
    loss=lambda params, batch: jnp.mean(params * batch[0]) + batch[1],  # the same gradient at all weights
    draw=lambda key: (SIGNS * jax.random.choice(key, jnp.array([1.0, -0.5])), jnp.array(2.0)),
    train=(SIGNS, jnp.array(2.0)),
    held_out=(-SIGNS, jnp.array(2.0)),
    floor=0.5,
)


def weights(rng, init):
    """Like those of a task, drawn by NumPy, which need not compile a program for each shape."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), shapes)


def test_a_byte_is_predicted_from_those_before_it_alone(rng):
    task = _tasks.language_model()
    params, (text, following) = weights(rng, task.init), jax.tree.map(lambda x: x[:2], task.train)
    np.testing.assert_array_equal(text[:, 1:], following[:, :-1])
    for place in (0, 20):
        logits, others = (
            _tasks.next_token(params, x, jax.nn.gelu, _tasks.SMALL.heads) for x in (text, text.at[:, place].add(1))
        )
        changed = np.any(logits != others, axis=-1)
        assert not changed[:, :place].any()
        assert changed[:, place:].all()


def test_the_network_for_digits_convolves(rng):
    layer = weights(rng, _tasks._convolutions)["second"]
    x = jnp.asarray(rng.standard_normal((3, 8, 8, 16)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    np.testing.assert_allclose(_tasks._convolved(x, layer), expected + layer["b"], atol=1e-5)


@pytest.mark.parametrize("make", memory_quality.TASKS)
def test_nearly_all_weights_are_in_leaves_that_are_stored_in_bytes(make):
    weights, state = memory_quality.bytes_a_parameter(make(), Format("bytes", memory_quality.BYTES))
    assert weights == 4
    assert 2 < state < 2.2


def test_a_seed_has_the_same_weights_and_batches_in_every_format():
    curves = {form.name: memory_quality.runs_of(STRAIGHT, form, seeds=2).curves for form in FEW}
    assert np.all(curves[FLOAT32.name][0] != curves[FLOAT32.name][1])
    for form in FEW:
        same = np.abs(curves[form.name] - curves[FLOAT32.name])[:, :5].max() < 0.01
        assert same == (form.order == 0), form.name


def test_compensated_weights_are_measured_with_all_their_bits():
    inner = memory_quality.nadam()
    exact = Format("exact", memory_quality.compensated(inner, jnp.int16), jnp.bfloat16)
    start = jax.random.normal(jax.random.key(0), SIGNS.shape).astype(jnp.bfloat16).astype(jnp.float32)
    task = STRAIGHT._replace(init=lambda key: start)
    wide, narrow = (memory_quality.runs_of(task, form, seeds=2) for form in (FLOAT32, exact))
    np.testing.assert_array_equal(narrow.train, wide.train)
    np.testing.assert_array_equal(narrow.held_out, wide.held_out)


def test_naive_bytes_are_evenly_spaced_and_small_leaves_whole():
    v = np.random.default_rng(0).random((32, 64)).astype(np.float32)
    v[3] = 0
    stored = memory_quality._even(jnp.asarray(v))
    largest = v.max(axis=1, keepdims=True)
    assert stored.codes.dtype == np.uint8
    assert np.abs(memory_quality._as_number(stored) - v).max() <= largest.max() / 510 + 1e-6
    np.testing.assert_array_equal(memory_quality._as_number(stored)[3], 0)
    assert memory_quality._even(jnp.ones((3, 5))).dtype == np.float32


def ended(train, curve):
    """Runs with these losses, one for each seed."""
    return Runs(np.array(curve), np.array(train), np.array(train))


@pytest.mark.parametrize(
    ("train", "third", "lost"),
    [(1.4, 1.4, False), (1.6, 1.4, True), (1.4, 3.1, True), (1.4, np.nan, True), (np.nan, 1.4, True)],
)
def test_a_run_is_unstable_where_it_ends_or_goes_half_as_high_again_or_is_lost(train, third, lost):
    float32 = ended([1.0, 1.0], np.tile([[1.0], [2.0]], 50))
    curves = np.ones((2, 50))
    curves[0, 30] = third
    curves[:, 2] = 99.0  # in the warm-up
    assert list(memory_quality.unstable(ended([train, 1.0], curves), float32)) == [lost, False]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 1.0002], "Met"),
        ([0.99, 1.01], "Met within the noise"),
        ([0.99, 1.014], "Missed within the noise"),
        ([1.01, 1.0102], "Missed"),
        ([1.0, np.nan], "Missed"),
    ],
)
def test_a_ratio_is_judged_by_its_mean_and_the_noise_of_that(values, words):
    assert memory_quality.verdict("a", np.array(values)).startswith(f"- {words}: a: ")


@pytest.fixture
def straight(monkeypatch, tmp_path):
    """One simple task, and a folder for its results."""
    monkeypatch.setattr(memory_quality, "TASKS", (lambda: STRAIGHT,))
    monkeypatch.setattr(memory_quality, "FORMATS", FEW[:-1])
    monkeypatch.setattr(memory_quality, "OFFERED", OFFERED[:2])
    monkeypatch.setattr(memory_quality, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(_report, "__file__", str(tmp_path / "_report.py"))
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_quality_is_written_as_a_table_and_drawn(straight, capsys):
    memory_quality.main([])
    result = json.loads((straight / "results" / "memory_quality-cpu.json").read_text())
    assert [row[1] for row in result["rows"]] == [form.name for form in FEW[:-1]]
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert not re.search(r"\b(nan|inf)\b", str(result["rows"]))
    assert result["note"].count("target at most 1.001") == 2
    assert (straight / "picture.png").stat().st_size < 200_000
    assert result["question"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--quick"], ["--seeds", "2"], ["--steps", "20"], ["--only", "8-bit"], ["--tune", "--seeds", "2"]]
)
def test_a_short_run_for_quality_writes_nothing(straight, capsys, monkeypatch, options):
    monkeypatch.setattr(memory_quality, "FORMATS", [FLOAT32])
    monkeypatch.setattr(memory_quality, "OFFERED", [])
    monkeypatch.setattr(memory_quality, "LEARNING_RATES", (1e-3, 2e-3))
    memory_quality.main(options)
    assert list(straight.iterdir()) == []
    assert "straight, " in capsys.readouterr().out
