"""All benchmarks, one after the other.

python -m benchmarks --quick              each in seconds; writes nothing
python -m benchmarks --quick options      only those named
"""

import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._report import parser

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the scripts, each with the same option; one that lacks what it needs says so."""
    options = parser(__doc__, "each in seconds")
    options.add_argument("scripts", nargs="*", default=[], metavar="script", help=", ".join(SCRIPTS))
    chosen = options.parse_args(arguments)
    unknown = sorted(set(chosen.scripts) - set(SCRIPTS))
    if unknown:
        options.error(f"no such script: {', '.join(unknown)}")
    for name in chosen.scripts or SCRIPTS:
        print(f"# {name}", flush=True)
        started = time.perf_counter()
        try:
            importlib.import_module(f"benchmarks.{name}").main(["--quick"] if chosen.quick else [])
        except SystemExit as ended:
            if not isinstance(ended.code, str):  # an error in the arguments, not a reason to be left out
                raise
            print(ended)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
