"""The benchmark at the size of GPT-2 small, on a model that trains in an instant."""

import importlib.metadata
import importlib.util
import json
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from benchmarks import _report, gpt2
from benchmarks._tasks import Sizes
from benchmarks.gpt2 import FLOAT32, FORMATS, FULL, Run, Setting

TINY = Setting(Sizes(64, 2, 2, 16), 300, 100_000, steps=80, batch=2, chunk=40)
COMPENSATED = FORMATS[1]

pytestmark = pytest.mark.lenient("the model adds positions to a batch, and apply_updates float32 to bfloat16")


@pytest.fixture(scope="module")
def text():
    return gpt2.read_text(TINY)


@pytest.fixture(scope="module")
def found(text):
    """Two formats that are trained."""
    return {form.name: gpt2.run(TINY, form, text) for form in (COMPENSATED, FLOAT32)}


def read(tokens, pieces):
    """The text that tokens stand for."""
    return b"".join(bytes([token]) if token < 256 else pieces[token - 256] for token in tokens)


def test_tokens_stand_for_the_text():
    text = [b" the cat the\n\n  \xc3\xa9nd 42", b" the cat?!"]
    first, second = gpt2.tokenized(text, 258)
    assert set(first[first > 255]) == {256, 257}  # of the longer pieces, the two most frequent ones
    assert read(first, [b" the", b" cat"]) == text[0]
    assert read(second, [b" the", b" cat"]) == text[1]
    assert len(first) < len(text[0])


def test_texts_are_found_once_and_up_to_a_size(tmp_path, monkeypatch):
    paths = dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    for name, content in {"a.py": "one", "b.md": "two", "c.rst": "one", "d.bin": "four", "e.txt": ""}.items():
        (tmp_path / name).write_text(content)
    assert sorted(gpt2.files(100)) == [b"one", b"two"]
    assert sum(map(len, gpt2.files(4))) == 4
    assert list(gpt2.files(100)) == list(gpt2.files(100))


def test_no_text_is_both_trained_on_and_held_out(text):
    assert text.vocabulary == TINY.vocabulary > max(text.seen.max(), text.held_out.max())
    assert 0.9 * TINY.bytes <= text.bytes <= TINY.bytes
    assert 0 < len(text.held_out) < len(text.seen)


def test_the_full_setting_is_the_size_of_gpt2_small():
    assert gpt2.number_of_weights(FULL) == pytest.approx(124e6, rel=2e-3)
    assert FULL.steps % FULL.chunk == 0
    sizes = [sum(gpt2.bytes_a_parameter(FULL, form)) for form in FORMATS]
    assert sizes == sorted(sizes)
    assert sizes == pytest.approx([4, 5, 6, 10, 12], abs=0.01)


def test_formats_have_the_same_weights_and_batches(found):
    wide, narrow = found[FLOAT32.name].curve, found[COMPENSATED.name].curve
    assert len(wide) == TINY.steps
    # The first learning rate is zero: two batches with the first weights, which the model rounds to bfloat16.
    np.testing.assert_allclose(narrow[:2], wide[:2], rtol=1e-6)
    assert wide[0] != wide[1]
    assert np.any(narrow != wide)
    assert wide[0] == pytest.approx(np.log(TINY.vocabulary), rel=0.2)


def test_a_token_is_predicted_from_those_before_it(rng):
    params = jax.tree.map(lambda x: 2 * x, gpt2.first_weights(TINY, jnp.float32))
    x = jnp.asarray(rng.integers(0, 300, (1, 16)), jnp.int32)

    @jax.jit
    def losses(x):
        """Of the first tokens, all with the same label."""
        label = jnp.zeros((1, 8), jnp.int32)
        cut = params | {"position": params["position"][:8]}
        return gpt2.loss(TINY, cut, (x[:, :8], label))

    assert losses(x) == losses(x.at[0, 8:].add(-1))
    assert losses(x) != losses(x.at[0, 7].set((x[0, 7] + 1) % 300))


@pytest.mark.parametrize("form", [COMPENSATED, FLOAT32], ids=lambda form: form.name)
def test_training_lowers_the_loss(found, form):
    one = found[form.name]
    assert one.curve[-8:].mean() < one.curve[:8].mean() - 0.3
    assert one.held_out < one.curve[:8].mean()


def ended(loss, peak=None):
    return Run(np.array(10 * [9.0] + 2 * [loss]), 2 * loss, 12_345.6, 3_000_000_000, peak)


def test_a_row_has_ratios_once_float32_was_run():
    found = {COMPENSATED.name: ended(3.0, 4_560_000_000)}
    (row,) = gpt2.rows(FULL, found)
    assert row == [COMPENSATED.name, "2.00 + 3.00", "3.0000", "", "6.0000", "", "12,346", "3.00", "4.56"]
    first, second = gpt2.rows(FULL, found | {FLOAT32.name: ended(2.0)})
    assert first[3::2][:2] == ["1.5000", "1.5000"]
    assert second[1:6] == ["4.00 + 8.00", "2.0000", "1.0000", "4.0000", "1.0000"]
    assert second[-1] == "not counted"
    assert len(first) == len(gpt2.COLUMNS)


def test_the_peak_is_what_the_device_tells(monkeypatch):
    class Card:
        stats = {"peak_bytes_in_use": 7}  # noqa: RUF012

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    assert gpt2.peak() == 7
    monkeypatch.setattr(Card, "stats", None)
    assert gpt2.peak() is None


@pytest.fixture
def folder(monkeypatch, tmp_path, found):
    """Where results are written, and runs that are over at once."""
    monkeypatch.setattr(gpt2, "FULL", TINY)
    monkeypatch.setattr(gpt2, "QUICK", TINY)
    monkeypatch.setattr(gpt2, "FORMATS", [FORMATS[0], COMPENSATED, FLOAT32])
    monkeypatch.setattr(gpt2, "run", lambda setting, form, text: found.get(form.name, found[FLOAT32.name]))
    monkeypatch.setattr(gpt2, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(_report, "__file__", str(tmp_path / "_report.py"))
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_the_result_is_a_table_and_a_picture_that_can_be_drawn_again(folder, capsys):
    gpt2.main([])
    result = json.loads((folder / "results" / "gpt2-cpu.json").read_text())
    assert [row[0] for row in result["rows"]] == [form.name for form in gpt2.FORMATS]
    assert f"{gpt2.number_of_weights(TINY):,} weights" in result["note"]
    assert "{" not in result["note"]
    assert result["question"] in capsys.readouterr().out
    drawn = (folder / "picture.png").read_bytes()
    (folder / "picture.png").unlink()
    gpt2.main(["--draw"])
    assert (folder / "picture.png").read_bytes() == drawn


def test_without_matplotlib_the_losses_are_there(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpt2.main([])
    assert "No picture: matplotlib is not installed" in capsys.readouterr().out
    assert set(np.load(folder / "results" / "gpt2-cpu.npz")) == {form.name for form in gpt2.FORMATS}


def test_a_quick_run_writes_nothing(folder, capsys):
    gpt2.main(["--quick"])
    assert list(folder.iterdir()) == []
    assert COMPENSATED.name in capsys.readouterr().out


def test_steps_must_be_whole_chunks(folder, capsys):
    with pytest.raises(SystemExit):
        gpt2.main(["--steps", "6"])
    assert "--steps must be a multiple of 40, got 6" in capsys.readouterr().err


def test_the_page_says_what_the_run_on_a_gpu_found():
    result = json.loads((_report.RESULTS / "gpt2-gpu.json").read_text())
    page = " ".join((Path(__file__).parents[2] / "docs" / "memory.md").read_text().split())
    least = min(float(row[3]) for row in result["rows"])
    assert all(float(row[3]) <= 1 for row in result["rows"])
    speeds = sorted(float(row[6].replace(",", "")) / 1000 for row in result["rows"])
    memory = sorted(float(row[7]) for row in result["rows"])
    for said in (
        f"up to {100 * (1 - least):.1f}% below",
        f"{speeds[0]:.0f} to {speeds[-1]:.0f} thousand tokens",
        f"{memory[0]:.1f} GB in place of {memory[-1]:.1f}",
    ):
        assert said in page
