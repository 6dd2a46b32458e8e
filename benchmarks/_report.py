"""What the benchmarks share: arguments, interleaved timing, results as JSON and as Markdown."""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
Rows = list[list[Any]]
FIRST = (
    "step_time",
    "precision",
    "memory_formats",
    "eight_bits",
    "language_model",
    "options",
    "tracing",
    "convergence",
)
SHORT = 15  # rows of a table that is not folded
PACKAGES = ("optax_nadam", "jax", "jaxlib", "optax", "numpy")
HOW = """\
One script per question. Rivals run in the same process on the same arrays, interleaved, after a warm-up; times are
medians with quartiles."""
README = f"""\
# Benchmarks

{HOW} Run the commands from the root of the repository, with the package installed
(`pip install -e . --group test`); each writes its result into `results/` and this table. `--quick` takes seconds and
writes nothing. All tables, notes and pictures are on a [page of the site](../site/benchmarks.html), which
`python run.py docs` makes from the results.

"""
PAGE = f"""\
# Benchmarks

{HOW} The command under a table runs it again, from the root of the repository.

"""


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The arguments that every script takes; ``quick`` says what is done in seconds."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help=f"{quick}; writes nothing")
    return arguments


def is_quick(description: str | None, quick: str, arguments: Sequence[str] | None) -> bool:
    """Whether a script with no other arguments shall only show that it works."""
    return bool(parser(description, quick).parse_args(arguments).quick)


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, interleaved; a call must block until its result is ready.

    The order is shuffled in each round, so that what a call leaves in caches and in the allocator does not always
    affect the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rng = random.Random(0)
    for repeat in range(warmup + repeats):
        for name, call in rng.sample(list(calls.items()), len(calls)):
            started = time.perf_counter()
            call()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_and_spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return 1e3 * middle, 1e3 * low, 1e3 * high


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def milliseconds(seconds: list[float]) -> str:
    """Median and quartiles as text."""
    middle, low, high = median_and_spread(seconds)
    return f"{middle:.4g} ms ({low:.4g} to {high:.4g})"


class Answer(NamedTuple):
    """What a result says, for the table at the head of the page: one sentence, and a ratio to whatever it names."""

    sentence: str
    ratio: str = ""


def row_of(rows: Rows, *cells: Any) -> list[Any]:
    """The first row that begins with these cells."""
    return next(row for row in rows if row[: len(cells)] == list(cells))


def save(
    name: str,
    question: str,
    columns: list[str],
    rows: Rows,
    note: str = "",
    *,
    answer: Callable[[Rows], Answer],
    picture: Path | None = None,
    backend: str | None = None,
    hardware: str | None = None,
    packages: tuple[str, ...] = (),
    quick: bool = False,
) -> None:
    """Writes a result with its machine, versions and date, prints it, and rewrites README.md; quick, only prints it.

    A result that is not about this machine names its own backend, hardware and further packages. The answer is read
    from the rows; a picture is shown before the table, which then is folded.
    """
    if hardware is None and jax.default_backend() != "cpu":  # beside the answer for a processor
        question = f"On {machine()}: {question[0].lower()}{question[1:]}"
    result = {
        "question": question,
        "command": f"python -m benchmarks.{name}",
        "date": datetime.date.today().isoformat(),
        "machine": hardware or machine(),
        "versions": {package: version(package) for package in PACKAGES + packages},
        "columns": columns,
        "rows": rows,
        "note": note,
        "picture": picture and f"img/{picture.name}",
    }
    if quick:
        print(table(result), flush=True)
    else:
        result |= {"answer": answer(rows)._asdict()}
        print(section(result), flush=True)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{backend or jax.default_backend()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS.parent / "README.md").write_text(readme())


def version(package: str) -> str:
    """Of an installed package, or of one that is only on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(package).__version__)


def machine() -> str:
    """Processor or accelerator, as the system names it."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, {os.cpu_count()} cores"


def table(result: dict[str, Any]) -> str:
    """The rows of a result in Markdown."""
    return "\n".join(
        [
            "| " + " | ".join(result["columns"]) + " |",
            "|" + "---|" * len(result["columns"]),
            *("| " + " | ".join(map(str, row)) + " |" for row in result["rows"]),
        ]
    )


def section(result: dict[str, Any]) -> str:
    """A result in Markdown: the answer, a picture if there is one, and the table, folded where it is long."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    rows = table(result)
    if len(result["rows"]) > SHORT or result["picture"]:
        rows = f"<details><summary>Table</summary>\n\n{rows}\n\n</details>"
    picture = f"![{result['question']}]({result['picture']})" if result["picture"] else ""
    made = f"`{result['command']}`, {result['date']}, {result['machine']}; {versions}."
    parts = [f"## {result['question']}", result["answer"]["sentence"], picture, rows, result["note"], made]
    return "\n\n".join(part for part in parts if part) + "\n"


def anchor(heading: str) -> str:
    """The anchor of a heading, on the site as on GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def results() -> list[dict[str, Any]]:
    """All results, each with the name of its file; first what most readers ask."""

    def place(path: Path) -> tuple[int, str]:
        return next((k for k, name in enumerate(FIRST) if path.name.startswith(f"{name}-")), len(FIRST)), path.name

    return [{"file": path.name, **json.loads(path.read_text())} for path in sorted(RESULTS.glob("*.json"), key=place)]


def readme() -> str:
    """README.md of this folder: the questions and their answers."""
    rows = [[f"[{x['question']}](results/{x['file']})", *x["answer"].values(), f"`{x['command']}`"] for x in results()]
    return README + table({"columns": ["question", "answer", "ratio", "command"], "rows": rows}) + "\n"


def page() -> str:
    """The page of the site: the answers, and all tables with what is to be known of them."""
    found = results()
    rows = [[f"[{x['question']}](#{anchor(x['question'])})", *x["answer"].values()] for x in found]
    answers = table({"columns": ["question", "answer", "ratio"], "rows": rows})
    return "\n".join([f"{PAGE}{answers}\n", *map(section, found)])
