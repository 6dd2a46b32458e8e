"""The code of the benchmarks, on small leaves and against the reference; no test looks at how long anything took."""

import dataclasses
import functools
import importlib
import importlib.machinery
import json
import math
import re
import sys
import types
from pydoc_data.topics import topics

import chex
import jax
import numpy as np
import optax
import pytest

import optax_nadam
from benchmarks import __main__ as benchmarks_main
from benchmarks import (
    _report,
    _rivals,
    ahead_of_time,
    byte_kernel,
    convergence,
    memory_formats,
    precision,
    step_time,
    tracing,
)
from benchmarks._rivals import Problem, Rival, Run
from benchmarks.convergence import ADAM, DEFAULT, SGD, Runs, Study
from benchmarks.step_time import FLAT, FOREACH, FUSED, GPT2, LOOPED, OPTAX, OURS, RESNET, SMALL, Outcome
from optax_nadam import ScaleByNadamState, scale_by_nadam
from tests.reference import RULES

RIVALS = step_time.rivals(small=True, loops=True)
IN_JAX = {rival.name: rival for rival in RIVALS if not rival.packages}
TINY = {name: [(2,), (3,)] for name in (GPT2, RESNET, SMALL)}

pytestmark = pytest.mark.lenient("optax.nadam itself mixes dtypes")


@dataclasses.dataclass
class Device:
    """One that takes a step in a known time, which passes when somebody waits; the clock shows it."""

    seconds: float
    begun: int = 0
    waits: int = 0
    clock: float = 0.0

    def perf_counter(self):
        """The time, as the module of that name tells it."""
        return self.clock

    def run(self, steps=1):
        """An optimizer at work there."""
        return Run(self._step, self._wait, list, steps)

    def _step(self):
        self.begun += 1

    def _wait(self):
        self.clock += self.seconds * self.begun
        self.begun = 0
        self.waits += 1


@pytest.mark.parametrize(
    ("shapes", "leaves", "parameters"), [(GPT2, 148, 124_439_808), (RESNET, 161, 25_557_032), (SMALL, 1000, 64_000)]
)
def test_shapes(shapes, leaves, parameters):
    assert len(step_time.SETS[shapes]) == leaves
    assert sum(map(math.prod, step_time.SETS[shapes])) == parameters


@pytest.mark.parametrize("name", [name for name, rival in IN_JAX.items() if rival.updates])
def test_an_optimizer_takes_the_step_of_its_formula(name):
    assert _rivals.error(IN_JAX[name]) < step_time.CLOSE


def test_every_rule_and_both_forms_of_ours_take_part():
    assert {f"optax_nadam.nadam, {rule}" for rule in RULES} | {OURS + FLAT, OURS + LOOPED} <= set(IN_JAX)
    assert [rival.name for rival in RIVALS[:2]] == [OURS, OPTAX]


def test_a_loop_takes_all_its_steps():
    run = IN_JAX[OURS + LOOPED].start(Problem.of([(4,)]))
    single = IN_JAX[OURS].start(Problem.of([(4,)]))
    run.step()
    for _ in range(run.steps):
        single.step()
    assert run.steps == step_time.LOOP
    np.testing.assert_allclose(run.params()[0], single.params()[0], rtol=1e-6)


@pytest.mark.parametrize(("looped", "times"), [(0, 2), (3, 6)])
def test_a_copy_adds_one_to_an_array_of_the_size_of_params_and_moments(looped, times):
    run = _rivals.jax_copy(looped).start(Problem.of([(5,), (2, 2)]))
    run.step()
    run.step()
    run.wait()
    np.testing.assert_array_equal(run.params()[0], np.full(27, 0.5 + times))


def test_one_that_takes_another_step_is_refused():
    adam = _rivals.jax_rival("a fast one", optax.adam(1e-3), _rivals.nadam())
    with pytest.raises(ValueError, match=r"a fast one must be within 1e-04 of its formula, is off by 1\.7e-01"):
        step_time.check([IN_JAX[OURS], adam])


def test_one_that_stands_still_is_refused():
    still = _rivals.jax_rival("still", optax.set_to_zero(), _rivals.nadam())
    with pytest.raises(ValueError, match=r"is off by 1\.0e\+00"):
        step_time.check([still])


def test_optimizers_share_the_gradients_and_nothing_else():
    problem = Problem.of([(4,), (2, 3)])
    again = Problem.of([(4,), (2, 3)])
    assert problem.size == 10
    assert problem.grads_as(np.copy)[0] is problem.grads_as(np.copy)[0]
    jax.tree.map(np.testing.assert_array_equal, problem.params + problem.grads, again.params + again.grads)
    first, second = (IN_JAX[OURS].start(problem) for _ in range(2))
    first.step()
    assert np.all(first.params()[0] != second.params()[0])
    np.testing.assert_array_equal(second.params()[0], problem.params[0])


def test_missing_packages_are_named():
    rival = dataclasses.replace(RIVALS[0], name="theirs", packages=("no_such_a", "jax", "no_such_b"))
    assert rival.left_out() == "no_such_a and no_such_b not installed"
    assert step_time.absences([RIVALS[0], rival]) == ["- Left out: theirs: no_such_a and no_such_b not installed."]


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("ours", ["cpu", "gpu"])
def test_no_comparison_across_kinds_of_device(monkeypatch, ours, theirs):
    monkeypatch.setattr(jax, "default_backend", lambda: ours)
    rival = dataclasses.replace(RIVALS[0], packages=("optax",), has_gpu=lambda: theirs)
    same = theirs == (ours == "gpu")
    assert rival.left_out() == (None if same else "optax and jax would not be on the same device")


class Torch(types.ModuleType):
    """As much of torch as takes part, on a device that only writes down what it is asked."""

    def __init__(self):
        """There is a GPU for it."""
        super().__init__("torch")
        self.__spec__ = importlib.machinery.ModuleSpec("torch", None)
        self.asked: list[tuple[str, ...]] = []
        self.cuda = types.SimpleNamespace(is_available=lambda: True)
        self.nn = types.SimpleNamespace(Parameter=lambda tensor: tensor)
        self.optim = types.SimpleNamespace(NAdam=self.optimizer, AdamW=self.optimizer)

    def tensor(self, x, device):
        """An array on a device."""
        self.asked.append(("tensor", device))
        return types.SimpleNamespace(x=x, copy_=lambda other: self.asked.append(("copy",)))

    def optimizer(self, params, **options):
        """One of any kind."""
        assert all(p.grad is not None for p in params)
        return types.SimpleNamespace(step=lambda: self.asked.append(("step", *sorted(options))))

    def get_device_module(self, device):
        """What is waited for."""
        return types.SimpleNamespace(synchronize=lambda: self.asked.append(("wait", device)))


@pytest.mark.parametrize("name", [FOREACH, FUSED, step_time.SINGLE, "copy: copy_, torch"])
def test_beside_a_gpu_torch_is_on_it_and_is_waited_for(monkeypatch, name):
    """No GPU needed: which device is asked for what."""
    torch = Torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (rival,) = (one for one in RIVALS if one.name == name)
    assert rival.left_out() is None
    step_time.take(rival.start(Problem.of([(4,), (2, 3)])), 3)
    tensors = [call for call in torch.asked if call[0] == "tensor"]
    assert tensors == [("tensor", "cuda")] * (2 if rival.updates is None else 4)
    assert [call[0] for call in torch.asked[len(tensors) :]] == [torch.asked[-2][0]] * 3 + ["wait"]
    assert torch.asked[-1] == ("wait", "cuda")


def test_groups_fit_and_share_the_first_two():
    def names(number, room):
        rivals = [dataclasses.replace(RIVALS[0], name=name) for name in "abcdefg"[:number]]
        return ["".join(x.name for x in group) for group in step_time.grouped(rivals, size=10, room=room)]

    assert names(7, room=5 * 120) == ["abcde", "abfg"]
    assert names(4, room=0) == ["abc", "abd"]


def test_room_is_half_of_a_device_that_tells_its_memory(monkeypatch):
    assert step_time.room() == step_time.ROOM

    class Card:
        def memory_stats(self):
            return {"bytes_limit": 100}

    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    assert step_time.room() == 50


def test_a_measurement_begins_all_its_steps_and_waits_once(monkeypatch):
    device = Device(0.25)
    monkeypatch.setattr(step_time, "time", device)
    assert step_time.take(device.run(), 3) == 0.75
    assert (device.begun, device.waits) == (0, 1)


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (0.5, 1), (0.125, 4), (0.15, 4)])
def test_short_steps_are_measured_several_at_a_time(monkeypatch, seconds, calls):
    device = Device(seconds)
    monkeypatch.setattr(step_time, "time", device)
    assert step_time.calls_that_fill(device.run(), 0.5) == calls


@pytest.mark.parametrize("steps", [1, 4])
def test_seconds_are_those_of_one_step(monkeypatch, steps):
    device = Device(0.001)
    monkeypatch.setattr(step_time, "time", device)
    monkeypatch.setattr(_report, "time", device)
    seconds = step_time.measured([Rival("one", lambda _: device.run(steps), None)], [(2,)], repeats=3)
    assert seconds == {"one": pytest.approx([0.001 / steps] * 3)}


def test_ratios_are_within_a_round_of_a_group():
    groups = [{OURS: [1.0, 2.0], "a": [3.0, 4.0], "c": [6.0, 2.0]}, {OURS: [10.0, 10.0], "b": [20.0, 40.0]}]
    outcome = Outcome([], 10, groups)
    assert outcome.seconds("b") == [20, 40]
    assert outcome.ratios("a") == [3, 2]
    assert outcome.ratios("c", "a") == [2, 0.5]
    assert outcome.ratios("b") == [2, 4]
    assert outcome.ratios(OURS) == [1] * 4
    assert outcome.ratios("b", "a") == [2 / 2.5, 4 / 2.5]  # never in one group
    assert outcome.ratio("b", "a") == pytest.approx(1.2)


@pytest.mark.parametrize(("number", "ends"), [(2, (1, 2)), (25, (8, 18)), (100, (41, 60))])
def test_interval_of_a_median_is_the_one_of_the_binomial_distribution(number, ends):
    low, high = step_time.interval([float(x) for x in range(number, 0, -1)])
    assert (low, high) == ends
    if number > 5:  # the median is outside where fewer than low, or more than high - 1, of all values are below it
        inside = sum(math.comb(number, k) for k in range(int(low), int(high))) / 2**number
        assert 0.94 < inside < 0.97


def test_a_verdict_says_when_noise_could_turn_it():
    values = [0.9, 1.0, 1.1, 1.2]
    assert step_time.verdict("a", values, at_most=1.3) == "- Met: a: 1.050 (0.900 to 1.200), target at most 1.3."
    assert step_time.verdict("a", values, at_least=1.3).startswith("- Missed: a: ")
    assert step_time.verdict("a", values, at_least=1.01).startswith("- Met within the noise: a: ")
    assert step_time.verdict("a", values, at_most=1.01).startswith("- Missed within the noise: a: ")


def outcome_of(times):
    """As if each optimizer took one time in each of two rounds, on a million parameters."""
    known = {rival.name: rival for rival in RIVALS}
    return Outcome([known[name] for name in times], 1_000_000, [{name: [x, x] for name, x in times.items()}])


COPY, LOOPED_COPY = (_rivals.jax_copy(looped).name for looped in (0, 1))


def test_rows_tell_time_ratio_and_bandwidth():
    outcome = outcome_of({OURS: 0.028, FOREACH: 0.056, COPY: 0.012, "copy: copy_, torch": 0.024})
    assert list(step_time.rows("some", outcome)) == [
        ["some", OURS, "28 ms (28 to 28)", "1 (1 to 1)", 28, "1", "50%"],
        ["some", FOREACH, "56 ms (56 to 56)", "2 (2 to 2)", 28, "0.5", "25%"],
        ["some", COPY, "12 ms (12 to 12)", "0.429 (0.429 to 0.429)", 24, "2", "100%"],
        ["some", "copy: copy_, torch", "24 ms (24 to 24)", "0.857 (0.857 to 0.857)", 24, "1", "50%"],
    ]


def said(word, what, value, bound):
    """A verdict on times that are the same in every round."""
    return f"- {word}: some: {what}: {value} ({value} to {value}), target {bound}."


def test_verdicts_on_a_processor():
    outcome = outcome_of({OURS: 1.0, OPTAX: 0.9, FOREACH: 3.0, step_time.LEGACY: 2.0, FUSED: 0.5, COPY: 1.0})
    assert list(step_time.verdicts("some", outcome)) == [
        said("Missed", f"{OURS} over {OPTAX}", "1.111", "at most 1.02"),
        said("Met", f"{step_time.LEGACY}, the fastest of the other Nadams, over {OURS}", "2.000", "at least 1"),
    ]


def test_verdicts_on_small_leaves_are_with_and_without_flatten():
    outcome = outcome_of({OURS: 9.0, OPTAX: 9.0, OURS + FLAT: 1.0, OPTAX + FLAT: 1.0, FOREACH: 0.9, COPY: 0.1})
    assert list(step_time.verdicts("some", outcome)) == [
        said("Met", f"{OURS} over {OPTAX}", "1.000", "at most 1.02"),
        said("Missed", f"{FOREACH}, the fastest of the other Nadams, over {OURS}", "0.100", "at least 1"),
        said("Met", f"{OURS + FLAT} over {OPTAX + FLAT}", "1.000", "at most 1.02"),
        said("Missed", f"{FOREACH}, the fastest of the other Nadams, over {OURS + FLAT}", "0.900", "at least 1"),
    ]


def test_verdicts_on_a_gpu():
    times = {OURS: 0.040, OPTAX: 0.040, FOREACH: 0.090, FUSED: 0.029, COPY: 0.036, LOOPED_COPY: 0.024}
    outcome = outcome_of(times | {OURS + LOOPED: 0.030})
    assert list(step_time.verdicts("some", outcome))[2:] == [
        said("Missed", f"{OURS}, bandwidth over that of the copy", "0.700", "at least 0.9"),
        said("Missed", f"{FOREACH} over {OURS}", "2.250", "at least 3"),
        said("Missed", f"{OURS} over {FUSED}", "1.379", "at most 1.05"),
        said("Met", f"{OURS + LOOPED}, bandwidth over that of the copy", "0.933", "at least 0.9"),
        said("Met", f"{FOREACH} over {OURS + LOOPED}", "3.000", "at least 3"),
        said("Met", f"{OURS + LOOPED} over {FUSED}", "1.034", "at most 1.05"),
    ]
    assert step_time.launches("some", outcome, 200) == (  # of 30 ms, the traffic takes 28
        "- some: in a loop, 10.0 microseconds a leaf beside the traffic at the copy's bandwidth."
    )
    without_torch = outcome_of({name: x for name, x in times.items() if "torch" not in name} | {OURS + LOOPED: 0.030})
    assert len(list(step_time.verdicts("some", without_torch))) == 3


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A folder for results, and hardly any work."""
    for name, value in _rivals.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(step_time, "SETS", TINY)
    monkeypatch.setattr(step_time, "QUICK", TINY)
    monkeypatch.setattr(step_time, "REPEATS", 2)
    monkeypatch.setattr(step_time, "FEW", 2)
    monkeypatch.setattr(step_time, "FILLED", 1e-6)
    monkeypatch.setattr(step_time, "rivals", compiled_rivals)
    monkeypatch.setattr(_report, "__file__", str(tmp_path / "_report.py"))
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    return tmp_path


def compiled_rivals(small, loops, known=step_time.rivals):
    """Those in jax, as they are compiled already; the others not installed, even where they are."""
    return [IN_JAX.get(x.name) or dataclasses.replace(x, packages=("no_such",)) for x in known(small, loops)]


def test_the_result_and_the_page_have_all_who_took_part_and_all_who_did_not(short, capsys):
    step_time.main([])
    result = json.loads((short / "results" / "step_time-cpu.json").read_text())
    page = (short / "README.md").read_text()
    for rival in RIVALS:
        rows = [row for row in result["rows"] if row[1] == rival.name]
        if rival.packages:
            assert rows == []
            assert result["note"].count(f"- Left out: {rival.name}: no_such not installed.") == 1
        elif LOOPED in rival.name:
            assert rows == []
        else:
            assert [row[0] for row in rows] == ([SMALL] if FLAT in rival.name else list(TINY))
            assert f"| {rows[0][0]} | {rival.name} | {rows[0][2]} |" in page
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert result["note"].count("target at most 1.02") == 4
    assert result["question"] in page
    assert " | ".join(map(str, result["rows"][0])) in capsys.readouterr().out


def test_on_a_gpu_loops_take_part(short, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    step_time.main([])
    names = [row[:2] for row in json.loads((short / "results" / "step_time-gpu.json").read_text())["rows"]]
    for name in (OURS + LOOPED, OPTAX + LOOPED, LOOPED_COPY):
        assert [leaves for leaves, found in names if found == name] == [GPT2, RESNET]
    assert "bandwidth over that of the copy" in capsys.readouterr().out


def test_a_quick_run_writes_nothing(short, capsys):
    step_time.main(["--quick"])
    assert list(short.iterdir()) == []
    assert f"- Left out: {FOREACH}: no_such not installed." in capsys.readouterr().out


def test_turns_are_taken_and_the_warm_up_is_not_counted():
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    seconds = _report.interleaved(calls, repeats=8, warmup=1)
    rounds = ["".join(order[k : k + 3]) for k in range(0, 27, 3)]
    assert {"".join(sorted(turns)) for turns in rounds} == {"abc"}
    assert len(set(rounds)) > 3  # nobody always comes after the same one
    assert {name: len(x) for name, x in seconds.items()} == {"a": 8, "b": 8, "c": 8}


@pytest.mark.parametrize("name", benchmarks_main.SCRIPTS)
def test_every_script_has_a_quick_form_that_writes_nothing(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert stopped.value.code == 0
    assert re.search(r"--quick\s+\S.*writes\s+nothing", capsys.readouterr().out, re.DOTALL)


def test_all_scripts_are_run_and_what_one_lacks_is_said(monkeypatch, capsys):
    asked = []

    class Script:
        def __init__(self, name):
            self.name = name

        def main(self, arguments):
            asked.append((self.name, arguments))
            if self.name == "benchmarks.options":
                raise SystemExit("Left out: a reason")

    monkeypatch.setattr(importlib, "import_module", Script)
    benchmarks_main.main(["--quick"])
    assert asked == [(f"benchmarks.{name}", ["--quick"]) for name in benchmarks_main.SCRIPTS]
    assert "# options\nLeft out: a reason\n" in capsys.readouterr().out
    monkeypatch.setattr(Script, "main", lambda self, arguments: sys.exit(2))
    with pytest.raises(SystemExit):
        benchmarks_main.main(["precision", "--quick"])
    monkeypatch.setattr(Script, "main", lambda self, arguments: asked.append((self.name, arguments)))
    benchmarks_main.main(["precision"])
    assert asked[-1] == ("benchmarks.precision", [])
    with pytest.raises(SystemExit):
        benchmarks_main.main(["no_such"])
    assert "no such script: no_such" in capsys.readouterr().err


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Saves a result of some rows in a folder of its own, and returns that folder."""
    monkeypatch.setattr(_report, "__file__", str(tmp_path / "_report.py"))
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")

    def save(name="a_name", question="Is it a question?", rows=1, **options):
        def answer(rows):
            return _report.Answer(f"{len(rows)} rows.", rows[0][0])

        _report.save(name, question, ["column"], [[f"cell {k}"] for k in range(rows)], answer=answer, **options)
        return tmp_path

    return save


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_result_is_printed_and_not_written(quick, saved, capsys):
    folder = saved(quick=quick)
    assert "| cell 0 |" in capsys.readouterr().out
    assert (folder / "results" / "a_name-cpu.json").exists() == (not quick)
    assert (folder / "README.md").exists() == (not quick)


def test_the_page_begins_with_the_answers_each_with_a_link_to_its_section(saved):
    saved()
    page = (saved("b_name", "And on TPU, for 2?", rows=40) / "README.md").read_text()
    head, *sections = page.split("\n## ")
    assert "| [Is it a question?](#is-it-a-question) | 1 rows. | cell 0 |\n" in head
    assert "| [And on TPU, for 2?](#and-on-tpu-for-2) | 40 rows. | cell 0 |\n" in head
    assert ["<details>" in section for section in sections] == [False, True]  # a long table is folded
    assert all("rows.\n\n" in section for section in sections)


def test_a_picture_stands_before_its_table_which_is_folded(saved, tmp_path, monkeypatch):
    page = (saved(picture=tmp_path.parent / "docs" / "p.png") / "README.md").read_text()
    assert "![Is it a question?](../docs/p.png)\n\n<details>" in page


def test_a_package_that_is_only_on_the_path_has_a_version_too(saved, monkeypatch):
    def not_installed(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    result = json.loads((saved() / "results" / "a_name-cpu.json").read_text())
    assert result["versions"]["optax_nadam"] == optax_nadam.__version__


def test_the_readme_has_the_times_of_the_result_on_a_gpu():
    result = json.loads((_report.RESULTS / "step_time-gpu.json").read_text())
    times = {row[1]: float(row[2].split()[0]) for row in result["rows"] if row[0] == step_time.GPT2}
    torch, theirs, fused = (times[name] / times[OURS + LOOPED] for name in (FOREACH, OPTAX + LOOPED, FUSED))
    said = (
        f"torch's NAdam takes {torch:.1f} times our time, `optax.nadam` {theirs:.2f}, torch's fused AdamW {fused:.2f}"
    )
    assert said in " ".join((_report.RESULTS.parents[1] / "README.md").read_text().split())


def test_the_page_is_that_of_the_results():
    assert (_report.RESULTS.parent / "README.md").read_text() == _report.page()


def test_every_result_has_an_answer():
    for path in _report.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["answer"]["sentence"].endswith("."), path.name


def test_the_stages_of_a_first_call_add_up():
    found = tracing.starting(2, repeats=2)
    assert set(found) == {"lower", "compile", "first call"}
    for whose in tracing.WHOSE:
        lower, compiled, first = (np.array(found[stage][whose]) for stage in ("lower", "compile", "first call"))
        assert len(first) == 2
        assert np.all((lower > 0) & (compiled > 0) & (lower + compiled < first))


def test_median_and_quartiles_in_milliseconds():
    assert _report.milliseconds([0.001, 0.002, 0.003]) == "2 ms (1 to 3)"


@pytest.mark.parametrize("rule", RULES)
def test_precision_of_a_run_and_of_one_update(rule):
    make = functools.partial(scale_by_nadam, rule=rule)
    assert precision.of_a_run(make(b2=0.99), rule, 0.99, steps=20) < 1e-6
    assert precision.of_one_update(lambda b2: make(b2=b2), ScaleByNadamState, rule, 0.99, 5) < 3e-7


def test_the_kernel_for_moments_in_bytes_makes_the_bits_of_the_library(rng):
    """Interpreted, on two blocks of rows; compiled, it is one of tests/ahead_of_time."""
    params = {"w": np.asarray(rng.normal(size=(256, 192)), np.float32)}
    ours, by_kernel = (jax.jit(tx.update) for tx in (byte_kernel.OURS, byte_kernel.scale_by_kernel(interpret=True)))
    results = {}
    for update in (ours, by_kernel):
        state = byte_kernel.OURS.init(params)
        for _ in range(3):
            u, state = update(params, state)
        results[update] = u, state
    chex.assert_trees_all_equal(results[ours], results[by_kernel])


def test_memory_formats_keep_what_they_say():
    shapes = [(64, 64), (2048,)]
    rows = [row for some in memory_formats.GROUPS for row in memory_formats.measured(some, shapes, repeats=2)]
    kept = {(name, weights): float(state) for name, weights, state, *_ in rows}
    assert len(kept) == len(memory_formats.FORMATS)
    assert kept["float32", "float32"] == pytest.approx(8, abs=0.01)
    assert kept["int8", "float32"] < 2.07
    assert kept["int8, compensated", "bfloat16"] < 3.07
    assert kept["int8, compensated by int16", "bfloat16"] < 4.07


def test_beside_a_gpu_formats_are_timed_in_a_loop_and_bytes_may_be_missing(short, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ahead_of_time, "installed", lambda: False)
    monkeypatch.setattr(memory_formats, "GROUPS", (memory_formats.FORMATS[:3:2],))  # float32 and int8
    monkeypatch.setattr(memory_formats, "gpt2_small", lambda: [(64, 64)])
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: None)
    timed = []

    def once(calls, repeats):
        for call in calls.values():
            call()
        timed.append(len(calls))
        return {name: [0.02] * repeats for name in calls}

    monkeypatch.setattr(memory_formats, "interleaved", once)
    memory_formats.main([])
    rows = json.loads((short / "results" / "memory_formats-gpu.json").read_text())["rows"]
    question = json.loads((short / "results" / "memory_formats-gpu.json").read_text())["question"]
    assert question == f"On {_report.machine()}: how much do the formats of moments and weights take?"
    assert [row[-3:] for row in rows] == 2 * [["not counted", "1 ms (1 to 1)", "1.00"]]
    assert f"{step_time.LOOP} steps as one program" in capsys.readouterr().out
    assert timed[0] == 3


FEW = {name: convergence.OPTIMIZERS[name] for name in (DEFAULT, "constant", ADAM, SGD)}


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """A folder for results, one task, few optimizers, and losses that are drawn, not trained for."""
    rng = np.random.default_rng(0)

    def program(task, optimizers):
        def run(rates, seeds):
            assert rates.shape == (len(optimizers), len(seeds)) == (len(FEW), convergence.SEEDS)
            return Runs(rng.random((*rates.shape, task.steps)), rng.random(rates.shape), rng.random(rates.shape))

        return run

    monkeypatch.setattr(convergence, "program", program)
    monkeypatch.setattr(convergence, "studies", lambda: [Study(convergence.diabetes(), 1e-2, 1e-3)])
    monkeypatch.setattr(convergence, "OPTIMIZERS", FEW)
    monkeypatch.setattr(convergence, "PICTURE", tmp_path / "img" / "convergence.png")
    monkeypatch.setattr(_report, "__file__", str(tmp_path / "_report.py"))
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    return tmp_path


def trained_alone(task, make, rate, seed):
    """The loss of each batch, and of all when it is done."""
    tx = make(optax.warmup_cosine_decay_schedule(0.0, rate, 1, task.steps))
    weights, order = jax.random.split(jax.random.key(seed))
    params, losses = task.init(weights), []
    state = tx.init(params)

    @jax.jit
    def step(params, state, index):
        loss, grads = jax.value_and_grad(task.loss)(params, task.draw(jax.random.fold_in(order, index)))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for index in range(task.steps):
        params, state, loss = step(params, state, index)
        losses.append(loss)
    return losses, task.loss(params, task.train), task.loss(params, task.held_out)


def test_optimizers_that_step_together_go_the_way_each_goes_alone():
    task = convergence.diabetes()._replace(steps=4)
    rates, seeds = np.array([[0.01, 0.1], [0.02, 0.2]]), np.array([3, 5])
    makers = [convergence.OPTIMIZERS[name] for name in (ADAM, convergence.NADAMW)]
    together = convergence.program(task, makers)(rates, seeds)
    for i, j in ((0, 0), (1, 1)):
        alone = trained_alone(task, makers[i], rates[i, j], seeds[j])
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(found[i, j], expected, rtol=1e-5)


def test_the_same_seeds_give_the_same_runs():
    task = convergence.diabetes()._replace(steps=4)
    runs = (convergence.program(task, [FEW[DEFAULT]]) for _ in range(2))
    first, second = (run(np.full((1, 2), 0.1), np.arange(2)) for run in runs)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert np.all(first.train[:, 0] != first.train[:, 1])


def test_the_rate_with_the_lowest_mean_loss_of_seeds_of_its_own_is_chosen():
    study, asked = Study(convergence.diabetes(), 1.0, 0.5), []
    best = dict(zip(convergence.OPTIMIZERS, range(10), strict=True))

    def run(rates, seeds):
        asked.extend(seeds)
        places = np.round(np.log2(rates / rates[:, :1]))
        losses = np.abs(places - np.array([min(5, i) for i in best.values()])[:, None])
        return Runs(np.array([]), np.where(places == 0, np.nan, losses), np.array([]))

    assert convergence.tuned(study, run).tolist() == [1, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert not set(asked) & set(range(convergence.SEEDS))
    assert study.grid(SGD).tolist() == [0.5, 1, 2, 4, 8, 16]
    assert [convergence.learning_rate_in_words(study.grid(ADAM), i) for i in (0, 1, 4, 5)] == [
        "1 (edge of the grid)",
        "2",
        "16",
        "32 (edge of the grid)",
    ]


def test_finer_rates_are_half_a_step_away_and_the_best_of_them_counts():
    study, few = Study(convergence.diabetes(), 1.0, 0.5), convergence.FEWER
    chosen = np.arange(len(convergence.OPTIMIZERS)) % 6

    def run(rates, seeds):
        assert seeds.tolist() == [*range(few), *range(few)]
        return Runs(np.array([]), rates, np.array([]))

    beside = convergence.between(study, run, chosen).train
    rates = convergence.learning_rates_of(study, chosen)
    assert rates[:3, 0].tolist() == [1, 2, 4]
    np.testing.assert_allclose(beside[:, :few] ** 2, rates**2 / 2 + np.zeros(few))
    np.testing.assert_allclose(beside[:, few:] ** 2, 2 * rates**2 + np.zeros(few))

    train = np.repeat([[2.0], [2.0], [2.0]], convergence.SEEDS, axis=1)
    beside = np.repeat([[1.0, 3.0], [3.0, np.nan], [3.0, 1.5]], few, axis=1)
    assert convergence.refined(train, beside).tolist() == [[1.0] * few, [2.0] * few, [1.5] * few]


def test_a_difference_counts_from_three_standard_errors_on():
    others, noise = np.arange(4.0), np.array([-1.0, 1.0, -1.0, 1.0])  # of standard error 3 ** -0.5
    assert convergence.difference(others, others) == ""
    assert convergence.difference(others + noise + 1.7, others) == "+1.7000 ± 0.5774, unclear"
    assert convergence.difference(others + noise + 1.8, others) == "+1.8000 ± 0.5774, higher"
    assert convergence.difference(others + noise - 1.8, others) == "-1.8000 ± 0.5774, lower"


def test_those_with_weight_decay_are_compared_with_each_other():
    assert convergence.compared_with("constant") == (ADAM, DEFAULT)
    assert convergence.compared_with(convergence.NADAMW) == (convergence.ADAMW, convergence.NADAMW)


def test_the_loss_at_a_share_of_a_run_is_the_mean_over_the_tenth_before():
    assert convergence.loss_of_batches(np.arange(200.0), 0.25) == np.mean(range(30, 50))
    assert convergence.median_and_quartiles(np.arange(5.0)) == "2.0000 (1.0000 to 3.0000)"


def test_the_tasks_are_those_that_the_page_describes():
    shapes, sizes, steps, floors = {}, {}, {}, {}
    for task, *_ in convergence.studies():
        x, y = jax.eval_shape(task.draw, jax.random.key(0))
        assert len(x) == len(y)
        shapes[task.name] = x.shape, task.train[0].shape, task.held_out[0].shape
        sizes[task.name] = sum(w.size for w in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
        steps[task.name], floors[task.name] = task.steps, round(task.floor, 1)
    assert shapes == {
        "language model": ((8, 32), (256, 32), (256, 32)),
        "digits": ((32, 8, 8, 1), (1347, 8, 8, 1), (450, 8, 8, 1)),
        "diabetes": ((32, 10), (331, 10), (111, 10)),
    }
    letters = len(set("".join(topics.values()).encode()))  # 107 in those of Python 3.11; 64 weights at each end
    assert sizes == {"language model": 114_368 + 128 * (letters - 107), "digits": 9_930, "diabetes": 193}
    assert steps == {"language model": 200, "digits": 200, "diabetes": 600}
    assert floors == {"language model": 0, "digits": 0.5, "diabetes": 0}


def test_convergence_is_written_down_and_drawn(brief):
    convergence.main([])
    result = json.loads((brief / "results" / "convergence-cpu.json").read_text())
    assert [row[:2] for row in result["rows"]] == [["diabetes", name] for name in FEW]
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert "scikit-learn" in result["versions"]
    assert (brief / "img" / "convergence.png").stat().st_size > 10_000


def test_a_quick_run_of_convergence_writes_nothing(brief, capsys):
    convergence.main(["--quick"])
    assert list(brief.iterdir()) == []
    assert "diabetes" in capsys.readouterr().out
