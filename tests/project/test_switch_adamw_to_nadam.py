"""The example that turns AdamW into Nadam in mid-run, in short: what continues goes on as AdamW would have."""

import jax
import numpy as np
import pytest

STEPS, EARLY = 20, 10


@pytest.mark.long
@pytest.mark.lenient("examples run with the promotion that users have")
def test_switch(example, start, monkeypatch, capsys, tmp_path):
    name, picture, states = "switch_adamw_to_nadam", tmp_path / "switch.png", {}
    example = example(name)
    monkeypatch.setattr(example, "RULES", ("scheduled",))  # each takes as long to compile
    bytes_ = dict.fromkeys(("m_dtype", "v_dtype"), lambda path: "int8" if path == "out" else None)
    monkeypatch.setattr(example, "FORMATS", {"float32": {}, "8-bit": bytes_})  # and so does loading each leaf
    monkeypatch.setattr(jax, "device_count", lambda: 2)  # eight would wait for each other on the cores of a test
    made = example.continuations
    monkeypatch.setattr(example, "continuations", lambda *arguments: states.update(made(*arguments)) or dict(states))
    after = start(name, "--steps", str(STEPS), "--seed", "1", "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"\n{of} " in printed for of in after)
    assert sorted(after) == sorted([example.ADAMW, *states])

    adamw = after[example.ADAMW]
    assert adamw.shape == (STEPS,)
    wide, narrow = (after[f"scheduled, {form}"] for form in example.FORMATS)
    np.testing.assert_allclose(wide[0], adamw[0], rtol=1e-6)  # the same weights, before the first step
    assert abs(wide[:EARLY].mean() / adamw[:EARLY].mean() - 1) < 0.02  # single batches depend on the text
    np.testing.assert_allclose(narrow, wide, rtol=5e-3)
    assert np.any(narrow != wide)
    for wrong in (example.ZERO, example.UNCOUNTED):
        assert np.abs(after[wrong] / after["scheduled, float32"] - 1).max() > 0.005

    _, state = states["scheduled, 8-bit"]
    assert state[0].count == STEPS
    assert state[0].m["out"].sharding.spec == jax.sharding.PartitionSpec("data")
