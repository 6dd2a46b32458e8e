"""The examples run in short, with the arguments a user gives, and what each is about comes out of it.

``.ci/run`` starts ``train_digits.py`` as a program; ``test_switch_adamw_to_nadam.py`` has the longest one,
``tests/parity`` those that need another framework.
"""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
as_users_do = pytest.mark.lenient("examples run with the promotion that users have")


@pytest.fixture
def run(start, capsys):
    """What ``main`` of an example returns and prints."""
    return lambda name, *arguments: (start(name, *arguments), capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "many"], "argument --steps: must be a positive whole number, got 'many'"),
        (["--steps", "0"], "argument --steps: must be a positive whole number, got '0'"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0, got '-1'"),
        (["--out", "curve.jpg"], "argument --out: must end in .png, got 'curve.jpg'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_bad_arguments(start, capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        start("train_digits", *arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"train_digits.py: {line} (see --help)\n")


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?", text)]


def assert_printed_and_fell(losses, printed, steps, to):
    assert len(losses) == steps
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < to * losses[0]
    assert f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} after {steps} steps\n" in printed


@as_users_do
@pytest.mark.parametrize(
    ("name", "steps", "to"), [("flax_linen", 80, 0.5), ("flax_nnx", 80, 0.5), ("equinox_text", 40, 0.8)]
)
def test_libraries(run, name, steps, to):
    losses, printed = run(name, "--steps", str(steps))
    assert_printed_and_fell(losses, printed, steps, to)


@as_users_do
def test_optimistix_fit(run):
    (at_first, at_last, least), printed = run("optimistix_fit", "--steps", "300")
    assert at_first == pytest.approx(1.0)
    assert least < at_last < least + 1e-3
    assert numbers(printed)[:2] == pytest.approx([at_first, at_last], abs=1e-6)


@as_users_do
def test_low_rank_adapters(run):
    (before, after, losses), printed = run("low_rank_adapters", "--steps", "80")
    assert_printed_and_fell(losses, printed, 80, 0.5)
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), before, after)
    assert all(jax.tree.leaves(same["base"]))
    assert not any(jax.tree.leaves(same["adapters"]))
    assert "base: moved by 0.0000\n" in printed
    assert "552 of 2962 weights have moments\n" in printed  # 4 (64 + 32) + 4 (32 + 10)


@as_users_do
def test_layer_learning_rates(run):
    (moves, losses), printed = run("layer_learning_rates", "--steps", "80")
    assert_printed_and_fell(losses, printed, 80, 0.9)
    assert moves["last"] / moves["hidden"] == pytest.approx(10, rel=1e-3)
    assert f"the first step moves a weight by up to {moves['last']:.6f}" in printed


@as_users_do
def test_change_learning_rate(run):
    (rates, losses), printed = run("change_learning_rate", "--steps", "81")
    assert_printed_and_fell(losses, printed, 81, 0.5)
    assert rates == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    assert [numbers(line)[1] for line in printed.splitlines()[:4]] == pytest.approx(rates, abs=1e-5)


@as_users_do
def test_population(run):
    (best, rates), printed = run("population", "--steps", "60")
    assert best == sorted(best, reverse=True)
    assert best[-1] < 0.3 * best[0]
    assert len(rates) == 8
    assert rates.min() > 1e-3  # two began below 2e-4; a quarter more in each of five rounds is not enough
    assert [numbers(line)[0] for line in printed.splitlines()] == pytest.approx(best, abs=1e-4)


@as_users_do
def test_logging_moments(run, tmp_path):
    picture = tmp_path / "moments.png"
    log, printed = run("logging_moments", "--steps", "60", "--out", str(picture))
    assert_printed_and_fell(log["loss"], printed, 60, 0.5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(np.isfinite(values).all() and len(values) == 60 for values in log.values())
    assert (np.diff(log["mu"]) > 0).all()
    np.testing.assert_allclose(np.cumprod(log["mu"]), log["mu_product"], rtol=1e-5)
    layers = np.hypot(log["m_norm/hidden"], log["m_norm/last"])
    np.testing.assert_allclose(layers, log["m_norm"], rtol=1e-5)
    assert (log["momentum_rms"] < log["update_rms"]).all()


def test_list_of_examples():
    listed = re.findall(r"\]\((\w+)\.(?:py|ipynb)\)", (EXAMPLES / "README.md").read_text())
    programs = [path for kind in ("py", "ipynb") for path in EXAMPLES.glob(f"[!_]*.{kind}")]
    assert sorted(listed) == sorted(path.stem for path in programs)
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name in listed if not re.search(rf'"{name}(\.py|\.ipynb)?"', tests)] == []
