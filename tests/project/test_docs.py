"""The code of the pages runs, the reference lists all that is public, curves and figures have a source.

- Curves and the lengths of steps are those of the formula, within 1e-5.
- The differences in ``evidence.md`` were measured by ``benchmarks/convergence.py``, those of losses in ``memory.md`` by
  ``benchmarks/language_model.py``.
"""

import doctest
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt

import optax_nadam
from docs import plots
from optax_nadam import compat
from tests import reference

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
LATER = "State in host memory" if jax.__version_info__ < (0, 10, 2) else None  # the section needs two kinds of memory
MODULES = [
    optax_nadam,
    optax_nadam.diagnostics,
    *(x for x in vars(compat).values() if inspect.ismodule(x) and "._" not in x.__name__),
]


def sections(page):
    """Those that need another framework, one by one, and all others together: a list of blocks each."""
    parts = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    parts = [part for part in parts if part.partition("\n")[0] != LATER]
    foreign = [bool(re.search(r"^import .*\b(keras|torch)\b", part, flags=re.MULTILINE)) for part in parts]
    ours = "".join(part for part, theirs in zip(parts, foreign, strict=True) if not theirs)
    return blocks(ours), [blocks(part) for part, theirs in zip(parts, foreign, strict=True) if theirs]


def blocks(text):
    return re.findall(r"^```(python|pycon)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(program):
    """Runs blocks as one program, and compares what it prints."""
    names: dict[str, object] = {}
    for kind, code in program:
        if kind == "python":
            exec(compile(code, "a block", "exec"), names)
        else:
            example = doctest.DocTestParser().get_doctest(code, names, "a block", None, None)
            assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
            names |= example.globs


@pytest.mark.lenient("Optax's schedules and wrappers mix dtypes")
@pytest.mark.parametrize("page", PAGES)
def test_code(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(sections(page)[0])


def test_pages_are_found():
    assert {page for page in PAGES if sections(page)[0]} >= {"index.md", "start.md", "which.md", "devices.md"}
    assert len(sections("carry.md")[1]) == 2


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_names(module):
    page = (DOCS / "api" / f"{module.__name__.rpartition('.')[2]}.rst").read_text()
    named = {name: getattr(module, name) for name in module.__all__}
    public = [name for name, x in named.items() if inspect.isfunction(x) or inspect.isclass(x)]
    listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(public)


def lengths_by_the_formula(variant, grads):
    updates, *_ = reference.Nadam(**variant).updates(np.asarray(grads, np.float64))
    return np.sqrt(np.mean(updates**2, axis=1))


@pytest.mark.parametrize("name", plots.VARIANTS)
def test_lengths_of_steps(name):
    variant = plots.VARIANTS[name]
    expected = lengths_by_the_formula(variant, np.ones((200, 1)))
    np.testing.assert_allclose(plots.step_lengths(False, **variant)[:200], expected, rtol=1e-5)


def test_lengths_in_noise():
    def noise(t):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (plots.ELEMENTS,))

    grads = jax.vmap(noise)(np.arange(20))
    np.testing.assert_allclose(plots.step_lengths(True)[:20], lengths_by_the_formula({}, grads), rtol=1e-5)


def named_on(page, phrases):
    text = " ".join((DOCS / page).read_text().split())
    return [phrase for phrase in phrases if phrase not in text]


def test_named_lengths():
    one = {rule: plots.step_lengths(False, rule=rule) for rule in ("constant", "simplified", "undebiased")}
    slow, fast = (plots.step_lengths(True, momentum_decay=psi)[100:300].mean() for psi in (0.004, 1.0))
    first = [lengths[0] for lengths in one.values()]
    phrases = [
        "{:.1f} and {:.1f} times the step".format(*first),
        f"length is {slow:.2f} with",
        f"and {fast:.2f} in Keras",
    ]
    assert named_on("which.md", phrases) == []
    assert 6 < first[-1] < one["undebiased"][3] < 6.5
    assert one["undebiased"][1000] > 1.1
    assert 5.5 < plots.step_lengths(False, rule="loss_scaled", momentum_decay=1.0)[-1] < 6


def test_named_error():
    log = np.log(0.999)
    exact = -np.expm1(log)
    subtracted = abs((1 - np.float32(0.999)) / exact - 1)
    assert named_on("maths.md", [f"relative error of {subtracted:.0e} when subtracted".replace("e-0", "e-")]) == []
    assert abs(-np.expm1(np.float32(log)) / exact - 1) < 2e-7


def curve(line):
    """Steps and values."""
    t, y = line.get_xydata().T
    return t.astype(int), y


def test_curves_of_momenta():
    plots.draw_momenta()
    left, right = plt.gcf().axes
    assert [text.get_text() for text in plt.gcf().legends[0].get_texts()] == list(plots.MOMENTA)
    for variant, *lines in zip(plots.MOMENTA.values(), left.lines, right.lines, strict=True):
        formula = reference.Nadam(**variant)
        (t, mu), (_, product) = map(curve, lines)
        np.testing.assert_allclose(mu, formula.mu(t), rtol=1e-12)
        products = np.array([formula.mu_product(i) for i in t[t < 100]], float)
        np.testing.assert_allclose(product[t < 100], products, rtol=1e-10)
    plt.close("all")


def test_curves_of_lengths(monkeypatch):
    two = dict([*plots.VARIANTS.items()][:2])
    monkeypatch.setattr(plots, "VARIANTS", two)  # each is a program
    plots.draw_step_lengths()
    for axes, noise in zip(plt.gcf().axes, (False, True), strict=True):
        for variant, line in zip(two.values(), axes.lines, strict=True):
            t, lengths = curve(line)
            assert (t[0], t[-1]) == (1, plots.STEPS)
            np.testing.assert_array_equal(lengths, plots.step_lengths(noise, **variant)[t - 1])
    plt.close("all")


NAIVE = "float32; bfloat16 weights, naive"
RESULTS = DOCS.parent / "benchmarks" / "results"
EVIDENCE = (DOCS / "evidence.md").read_text()
MEASURED = json.loads((RESULTS / "convergence-cpu.json").read_text())


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_evidence():
    (table,) = re.findall(r"^## Losses minus Adam's$.*?((?:^\|[^\n]*\n)+)", EVIDENCE, re.DOTALL | re.MULTILINE)
    _, _, *rows = map(cells, table.splitlines())
    measured = [dict(zip(MEASURED["columns"], row, strict=True)) for row in MEASURED["rows"]]
    for shown, row in zip(rows, [row for row in measured if row["rule"] != "adam"], strict=True):
        differences = [row[f"{name} minus Adam's"] for name in ("train loss", "held-out loss")]
        differences.insert(1, row["the same at b1 0.9"])
        bold = [f"**{x.split(',')[0]}**" if re.search("lower|higher", x) else x.split(",")[0] for x in differences]
        assert shown == [row["task"], row["rule"], row["b1"], *bold]
    assert "edge" not in json.dumps(MEASURED["rows"])  # no learning rate was at the edge of its grid


def test_table_of_quality():
    (table,) = re.findall(r"^\| moments; weights \|.*\n((?:\|.*\n)+)", (DOCS / "memory.md").read_text(), re.MULTILINE)
    rows = json.loads((RESULTS / "language_model-cpu.json").read_text())["rows"]
    models = list(dict.fromkeys(row[0] for row in rows))
    measured = {(model, name): excess for model, name, _, _, excess, *_ in rows if excess}
    _, *shown = map(cells, table.splitlines())
    assert {name for name, *_ in shown} == {name for _, name in measured}
    for name, *excesses in shown:
        assert excesses == [measured.get((model, name), "") for model in models], name


def test_named_excesses():
    rows = json.loads((RESULTS / "language_model-cpu.json").read_text())["rows"]
    found = {(model, name): excess.split(" ± ") for model, name, _, _, excess, *_ in rows if excess}
    (ours, error), (theirs, their_error) = (found["head apart", name] for name in ("int8", "rollfast, 8-bit"))
    readme = f"{1 + float(ours):.5f} ± {error.removeprefix('0')} times float32's"
    rival = f"{1 + float(theirs):.3f} ± {float(their_error):.3f}".replace("± 0", "± ")
    assert named_on("../README.md", [readme, rival]) == []
    nearest, naive = (float(found["long run", name][0]) for name in ("bfloat16, rounded to the nearest", NAIVE))
    phrases = [f"to the nearest end {100 * nearest:.1f}% higher", f"bfloat16 weights end {100 * naive:.1f}% higher"]
    assert named_on("memory.md", phrases) == []


def test_named_gains():
    rows = [dict(zip(MEASURED["columns"], row, strict=True)) for row in MEASURED["rows"]]
    adam = {row["task"]: float(row["train loss"].split()[0]) for row in rows if row["rule"] == "adam"}
    gains = [
        -100 * float(row["train loss minus Adam's"].split()[0]) / adam[row["task"]]
        for row in rows
        if row["rule"] == "constant" and "lower" in row["train loss minus Adam's"]
    ]
    assert len(gains) == len(adam) == 4
    assert named_on("evidence.md", [f"on all four, by {min(gains):.1f} to {max(gains):.1f}%"]) == []
    assert not any("higher" in row["the same at b1 0.9"] for row in rows if row["rule"] == "scheduled")
