"""Rivals are what they are called, figures are computed right, and pages say what the results say.

That every script runs is shown by ``python run.py benchmarks``.
"""

import dataclasses
import functools
import importlib
import json
import math
import re
import sys
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import optax_nadam
from benchmarks import (
    _report,
    _rivals,
    convergence,
    eight_bits,
    flashoptim,
    gpt2,
    language_model,
    memory_formats,
    precision,
    step_time,
    tracing,
)
from benchmarks._rivals import Problem, Run
from benchmarks.step_time import FOREACH, FUSED, GPT2, LOOPED, OPTAX, OURS, RESNET, SMALL, Outcome
from optax_nadam import ScaleByNadamState, scale_by_nadam

ROOT = _report.RESULTS.parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in _report.RESULTS.glob("*.json")}
ANSWERS = {
    "flashoptim-for-gpu": flashoptim.traffic_answer,
    "flashoptim-places": flashoptim.places_answer,
}
RIVALS = step_time.rivals(small=True, loops=True)
IN_JAX = {rival.name: rival for rival in RIVALS if not rival.packages}

pytestmark = pytest.mark.lenient("optax.nadam and the models of the benchmarks mix dtypes")


@pytest.mark.parametrize("name", [name for name, rival in IN_JAX.items() if rival.updates])
def test_rival_follows_formula(name):
    assert _rivals.error(IN_JAX[name]) < step_time.CLOSE


@pytest.mark.parametrize(("tx", "off"), [(optax.adam(1e-3), "1.7e-01"), (optax.set_to_zero(), "1.0e+00")])
def test_wrong_formula_is_refused(tx, off):
    wrong = _rivals.jax_rival("wrong", tx, _rivals.nadam())
    with pytest.raises(ValueError, match=rf"wrong must be within 1e-04 of its formula, is off by {re.escape(off)}"):
        step_time.check([IN_JAX[OURS], wrong])


def test_loop_takes_all_steps():
    looped, single = (IN_JAX[name].start(Problem.of([(4,)])) for name in (OURS + LOOPED, OURS))
    looped.step()
    for _ in range(looped.steps):
        single.step()
    np.testing.assert_allclose(looped.params()[0], single.params()[0], rtol=1e-6)


@pytest.mark.parametrize(("looped", "times"), [(0, 2), (3, 6)])
def test_copy_writes_every_array(looped, times):
    run = _rivals.jax_copy(looped).start(Problem.of([(5,), (2, 2)]))
    for _ in range(2):
        run.step()
    np.testing.assert_array_equal(run.params()[0], np.full(27, 0.5 + times))


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("ours", ["cpu", "gpu"])
def test_rivals_share_a_device(monkeypatch, ours, theirs):
    monkeypatch.setattr(jax, "default_backend", lambda: ours)
    rival = dataclasses.replace(RIVALS[0], packages=("optax",), has_gpu=lambda: theirs)
    assert (rival.left_out() is None) == (theirs == (ours == "gpu"))
    assert dataclasses.replace(RIVALS[0], packages=("no_such",)).left_out() == "no_such not installed"


def test_torch_is_awaited_on_gpu(monkeypatch):
    torch = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _rivals._torch_wait()
    torch.get_device_module.assert_called_once_with("cuda")
    torch.get_device_module().synchronize.assert_called_once_with()


@pytest.mark.parametrize(
    ("shapes", "leaves", "parameters"), [(GPT2, 148, 124_439_808), (RESNET, 161, 25_557_032), (SMALL, 1000, 64_000)]
)
def test_shapes_of_models(shapes, leaves, parameters):
    assert len(step_time.SETS[shapes]) == leaves
    assert sum(map(math.prod, step_time.SETS[shapes])) == parameters


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (0.5, 1), (0.15, 4), (0.001, 500)])
def test_seconds_of_one_step(monkeypatch, seconds, calls, steps):
    """A call only starts its steps: the time passes while they are waited for."""
    now = begun = 0.0

    def begin():
        nonlocal begun
        begun += 1

    def wait():
        nonlocal now, begun
        now, begun = now + seconds * begun, 0

    for module in (step_time, _report):
        monkeypatch.setattr(module, "time", mock.Mock(perf_counter=lambda: now))
    monkeypatch.setattr(step_time, "FILLED", 0.5)
    run = Run(begin, wait, list, steps)
    assert step_time.calls_that_fill(run, 0.5) == calls
    rival = dataclasses.replace(RIVALS[0], name="one", start=lambda _: run)
    assert step_time.measured([rival], [(2,)], 3) == {"one": pytest.approx([seconds / steps] * 3)}


def test_interleaved_in_random_order():
    order: list[str] = []
    seconds = _report.interleaved({name: functools.partial(order.append, name) for name in "abc"}, 8, warmup=1)
    rounds = ["".join(order[k : k + 3]) for k in range(0, 27, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert {name: len(x) for name, x in seconds.items()} == {"a": 8, "b": 8, "c": 8}


def test_ratios_within_a_round():
    groups = [{OURS: [1.0, 2.0], "a": [3.0, 4.0], "c": [6.0, 2.0]}, {OURS: [10.0, 10.0], "b": [20.0, 40.0]}]
    outcome = Outcome([], 10, groups)
    assert outcome.ratios("a") == [3, 2]
    assert outcome.ratios("c", "a") == [2, 0.5]
    assert outcome.ratios("b", "a") == [2 / 2.5, 4 / 2.5]  # never in one group


def test_time_and_bandwidth():
    copy, known = _rivals.jax_copy().name, {rival.name: rival for rival in RIVALS}
    times = {OURS: 0.028, FOREACH: 0.056, copy: 0.012}
    outcome = Outcome([known[name] for name in times], 10**6, [{name: [x, x] for name, x in times.items()}])
    assert list(step_time.rows("some", outcome)) == [
        ["some", OURS, "28 ms (28 to 28)", "1 (1 to 1)", 28, "1", "50%"],
        ["some", FOREACH, "56 ms (56 to 56)", "2 (2 to 2)", 28, "0.5", "25%"],
        ["some", copy, "12 ms (12 to 12)", "0.429 (0.429 to 0.429)", 24, "2", "100%"],
    ]


@pytest.mark.parametrize(("number", "ends"), [(2, (1, 2)), (25, (8, 18)), (100, (41, 60))])
def test_interval_of_a_median(number, ends):
    low, high = step_time.interval([float(x) for x in range(number, 0, -1)])
    assert (low, high) == ends
    if number > 5:  # the coverage, by the binomial distribution
        assert 0.94 < sum(math.comb(number, k) for k in range(int(low), int(high))) / 2**number < 0.97


def text_run(loss, slope=0.0):
    curve = loss * (1 + slope * np.arange(language_model.PARTS))
    return language_model.Run([loss, loss, 2 * loss, 3 * loss], curve.tolist(), 1, 2.0)


def test_verdicts():
    for target, word in (({"at_most": 1.3}, "Met"), ({"at_least": 1.01}, "Met within the noise")):
        said = step_time.verdict("a", [0.9, 1.0, 1.1, 1.2], **target)
        assert said.startswith(f"- {word}: a: 1.050 (0.900 to 1.200), target at ")
    assert step_time.verdict("a", [0.9, 1.0, 1.1, 1.2], at_least=1.3).startswith("- Missed: ")
    model = language_model.MODELS[0]
    for loss, word in ((2.0008, "Met"), (2.002, "Missed"), (np.nan, "Missed")):
        runs = {"float32": [text_run(2.0)] * 2, "int8": [text_run(loss)] * 2}
        assert language_model.verdict(model, runs).startswith(f"- {word}: ")


def test_means_and_quantiles():
    assert _report.milliseconds([0.001, 0.002, 0.003]) == "2 ms (1 to 3)"
    assert _report.mean_and_error(np.array([1.0, 2.0, 3.0])) == pytest.approx((2, 3**-0.5))
    assert convergence.median_and_quartiles(np.arange(5.0)) == "2.0000 (1.0000 to 3.0000)"
    assert tracing.growth({10: 1.0, 148: 2.0, 592: 16.0}) == pytest.approx(1.5)
    assert gpt2.last(gpt2.Run(np.array([9.0] * 18 + [1.0, 2.0]), 1.0, 1.0, 1, None)) == 1.5


@pytest.mark.parametrize(("shift", "word"), [(1.7, "unclear"), (1.8, "higher"), (-1.8, "lower")])
def test_difference_of_losses(shift, word):
    others, noise = np.arange(4.0), np.array([-1.0, 1.0, -1.0, 1.0])  # of standard error 3 ** -0.5
    assert convergence.difference(others + noise + shift, others) == f"{shift:+.4f} ± 0.5774, {word}"


def test_best_rate_and_b1_are_chosen():
    study, best = convergence.Study(convergence.diabetes(), 1.0), len(convergence.B1) - 2

    def run(rates, b1, seeds):
        place = np.searchsorted(convergence.B1, b1)
        tuning = seeds >= convergence.FIRST_TUNING_SEED
        assert tuning.all() or sorted(set(seeds)) == list(range(convergence.SEEDS))
        if not tuning.all():
            assert (np.log2(rates) == place).all()  # at each b1 the rate that was best there
        away = abs(np.log2(rates) - place)
        return np.where(away == 3, np.nan, away + abs(place - best) + seeds % 2), -away

    losses = convergence.Losses(*(np.stack([x]) for x in convergence.of_rule(study, run)))
    assert losses.learning_rates.tolist() == [list(range(len(convergence.B1)))]
    twice = convergence.Losses(*(np.concatenate([x, x]) for x in losses))
    twice.train[0, 1] = -1
    assert twice.b1.tolist() == [1, best]  # of the first, Adam, the seeds of the result decide
    assert (twice.adam[0] == -1).all()
    assert (twice.adam[1] == losses.held_out[0, 1]).all()
    assert losses.train.shape == losses.held_out.shape == (1, len(convergence.B1), convergence.SEEDS)
    assert convergence.marked(study.grid, best) == "32"
    assert convergence.marked(study.grid, 0) == "1 (edge of the grid)"


def test_joint_runs_equal_single():
    task = convergence.diabetes()._replace(steps=4)
    make = convergence.RULES["scheduled"]
    train, held_out = convergence.program(task, make)(np.array([0.01, 0.2]), np.array([0.9, 0.5]), np.array([3, 5]))

    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 1, task.steps)

    @jax.jit
    def step(params, state, key, rate, b1):
        tx = make(lambda count: rate * schedule(count), b1)
        grads = jax.grad(task.loss)(params, task.draw(key))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i, rate, b1, seed in ((0, 0.01, 0.9, 3), (1, 0.2, 0.5, 5)):
        weights, order = jax.random.split(jax.random.key(seed))
        params = jax.jit(task.init)(weights)
        state = jax.jit(make(schedule, b1).init)(params)
        for index in range(task.steps):
            params, state = step(params, state, jax.random.fold_in(order, index), rate, b1)
        np.testing.assert_allclose(train[i], jax.jit(task.loss)(params, task.train), rtol=1e-5)
        np.testing.assert_allclose(held_out[i], jax.jit(task.loss)(params, task.held_out), rtol=1e-5)


def test_losses_of_a_format_beside_float32():
    found = {"float32": [text_run(2.0), text_run(4.0)], "int8": [text_run(2.02, 1e-3), text_run(4.0, 3e-3)]}
    found["int8"][0].curve[0] = 9.0  # neither at a quarter nor in the second half
    model = language_model.MODELS[0]._replace(steps=1000)  # a part is 50 steps
    _, name, seeds, loss, *excess, over, slope, long_steps = language_model.row(model, "int8", found)
    assert (name, seeds, loss, long_steps) == ("int8", 2, "3.0100", "1 1")
    assert excess == ["+0.00500 ± 0.00500"] * 4
    assert over == "+0.01302, +0.02304, +0.04309"
    assert slope == "+0.04010 ± 0.01990"
    assert language_model.row(model, "float32", found)[4:-1] == [""] * 6
    assert language_model.by_rank(np.array([7, 3, 7, 9, 9, 7])).tolist() == [0, 2, 0, 1, 1, 0]


def test_nearest_rounding_is_undone_afterwards():
    values = jnp.full(1000, 1 + 2.0**-9)  # a quarter of the way to the next bfloat16
    state = optax_nadam.ScaleByNadamState(jnp.int32(5), jnp.float32(0.1), m=values.astype("bfloat16"), v=values)
    tx = scale_by_nadam(b1=0.5, m_dtype="bfloat16")
    for name, kinds in ((language_model.NEAREST_16, 1), ("bfloat16", 2)):
        with language_model.rounding(language_model.KINDS[name]):
            _, new = jax.jit(tx.update)(values * 1.0039, state)
            assert len(set(new.m.tolist())) == kinds, name


def test_runs_that_were_made_are_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(language_model, "RUNS", tmp_path)
    monkeypatch.setattr(language_model, "library_text", lambda: None)
    model = language_model.MODELS[0]._replace(kinds=("float32", "int8"), seeds=2)
    made: list[tuple[language_model.Kind, int]] = []

    def trainer(model, kind, text):
        def train(seed):
            if len(made) == 3:
                raise RuntimeError("stopped")
            made.append((kind, seed))
            return text_run(float(seed))

        return train

    monkeypatch.setattr(language_model, "trainer", trainer)
    with pytest.raises(RuntimeError, match="stopped"):
        language_model.train(model)
    made.pop(0)
    language_model.train(model)
    kinds = [language_model.KINDS[name] for name in model.kinds]
    assert made == [(kinds[1], 0), (kinds[0], 1), (kinds[1], 1)]
    assert language_model.loaded(model) == {name: [text_run(0.0), text_run(1.0)] for name in model.kinds}


def test_precision_is_measured():
    make = functools.partial(scale_by_nadam, rule="scheduled")
    for rule, low, high in (("scheduled", 1e-9, 3e-7), ("constant", 0.05, 1)):
        assert low < precision.of_a_run(make(b2=0.99), rule, 0.99, steps=20) < high
        assert low < precision.of_one_update(lambda b2: make(b2=b2), ScaleByNadamState, rule, 0.99, 5) < high


def test_bytes_of_states():
    (float32, _, _), (_, compensated, _) = memory_formats.GROUPS[0], memory_formats.GROUPS[2]
    rows = memory_formats.measured([float32, compensated], [(64, 1024)], repeats=2)
    assert [float(row[2]) for row in rows] == pytest.approx([8, 3.133], abs=2e-3)
    sizes = [sum(gpt2.bytes_a_parameter(gpt2.FULL, form)) for form in gpt2.FORMATS]
    assert sizes == pytest.approx([4, 5, 6, 10, 12], abs=0.02)
    assert gpt2.number_of_weights(gpt2.FULL) == pytest.approx(124e6, rel=2e-3)
    state = flashoptim.bytes_a_parameter(flashoptim.ours(), {"w": (1024, 1024)})
    assert state == pytest.approx(3.016, abs=1e-3)


def test_error_beside_flashoptim():
    """Without 8-bit moments ours is as near to AdamW as weights of 24 bits can be."""
    makers = (flashoptim.ours(moments=None), jnp.bfloat16), (flashoptim.float32(), jnp.float32)
    case, key = flashoptim.CASES["sparse rows"], jax.random.key(0)
    assert 1e-6 < precision.error(*(flashoptim.runner(make, case, 20, dtype)(key) for make, dtype in makers)) < 1e-3
    first = flashoptim.as_it_is(flashoptim.ours(moments=None), jnp.float32)
    assert float(first.removeprefix("runs, error ")) < 1e-4


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("alike", 0, 0), ("columns over 1e4", 0, 4), ("rows x columns", 4, 4), (eight_bits.TABLE, 4, 0)],
)
def test_sizes_of_gradients(name, rows, columns):
    drawn = np.abs(eight_bits.gradients(eight_bits.STREAMS[name], jax.random.key(0), jnp.int32(0)))
    spreads = [np.ptp(np.log10(np.median(drawn, axis=axis))) for axis in (1, 0)]
    assert spreads == pytest.approx([rows, columns], abs=1)


def test_run_of_constant_gradients():
    (run,) = eight_bits.runs_of(eight_bits.ours("int8", 0.95, False), eight_bits.STREAMS["constant"], 20, 1)
    step = 0.9 + 0.1 / (1 - 0.9 ** np.arange(1.0, 21.0))  # along the sign of the gradient
    assert run.largest == pytest.approx(step[0], rel=1e-4)
    np.testing.assert_allclose(np.abs(run.weights).mean(), step.sum(), rtol=1e-3)
    np.testing.assert_allclose(run.sizes.mean(), 20 * 3e-3 * (2 / np.pi) ** 0.5, rtol=0.02)


def test_verdicts_on_8_bits():
    sizes, weights = np.arange(32.0).reshape(16, 2), np.ones((16, 2))
    wide, narrow = ([eight_bits.Run(x, y, sizes)] for x, y in ((weights, 2.0), (weights + (sizes < 4) / 2, 3.0)))
    assert eight_bits.compared(narrow, wide, eight_bits.smallest_eighth) == "0.5; 1.5"
    assert eight_bits.compared(narrow, wide, eight_bits.whole) == "0.177; 1.5"
    rows = [["alike", 0.95, "1", "0.004; 1.6", "0; 1", "0.003; 9", "not installed"]]
    rows += [[eight_bits.EXCEPTED, 0.95, "1", "0.004; 9", "0; 1", "0.003; 9", "not installed"]]
    assert [x.split(": ")[1] for x in eight_bits.verdicts(rows)] == [
        "Missed by alike (1.6, not 1.5)",
        "Met",
        "Missed by alike (0.004, not 0.003)",
    ]


@pytest.mark.parametrize("name", RESULTS)
def test_answer_follows_from_rows(name):
    answer = ANSWERS.get(name) or importlib.import_module(f"benchmarks.{name.partition('-')[0]}").answer
    assert answer(RESULTS[name]["rows"])._asdict() == RESULTS[name]["answer"]


def test_readme_has_all_answers():
    assert (ROOT / "benchmarks" / "README.md").read_text() == _report.readme()
    anchors = {_report.anchor(x["question"]) for x in RESULTS.values()}
    assert len(anchors) == len(RESULTS)
    assert set(re.findall(r"\(#([\w-]+)\)", _report.page())) == anchors


@pytest.mark.parametrize("quick", [True, False])
def test_quick_writes_nothing(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    _report.save("a", "Why?", ["column"], [["x"]], answer=lambda rows: _report.Answer("So."), quick=quick)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ([] if quick else ["README.md", "a-cpu.json"])


def test_readme_has_the_figures():
    times = {row[1]: float(row[2].split()[0]) for row in RESULTS["step_time-gpu"]["rows"] if row[0] == GPT2}
    torch, theirs, fused = (times[name] / times[OURS + LOOPED] for name in (FOREACH, OPTAX + LOOPED, FUSED))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"NAdam takes {torch:.1f} times our time, `optax.nadam` {theirs:.2f}, torch's fused AdamW {fused:.2f}" in readme
    )
