"""All benchmarks, one after the other.

python -m benchmarks --quick              each in seconds; writes nothing
python -m benchmarks --quick options      only those named
python -m benchmarks --gpu                what a GPU shows, gpt2 for at most 8 minutes, then the tests of the update
"""

import importlib
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks._report import parser

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


UPDATE = [f"tests/test_{part}.py" for part in ("rounding", "quantized", "nadam", "compensated")]
ON_GPU = {"precision": [], "memory_formats": [], "flashoptim": [], "gpt2": ["--seeds", "3", "--minutes", "8"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the scripts, each with the same option; one that lacks what it needs says so."""
    options = parser(__doc__, "each in seconds")
    options.add_argument("--gpu", action="store_true", help=f"{', '.join(ON_GPU)}, then the tests of the update")
    options.add_argument("scripts", nargs="*", default=[], metavar="script", help=", ".join(SCRIPTS))
    chosen = options.parse_args(arguments)
    unknown = sorted(set(chosen.scripts) - set(SCRIPTS))
    if unknown:
        options.error(f"no such script: {', '.join(unknown)}")
    for name in chosen.scripts or (ON_GPU if chosen.gpu else SCRIPTS):
        print(f"# {name}", flush=True)
        started = time.perf_counter()
        further = ON_GPU.get(name, []) if chosen.gpu else []
        try:
            importlib.import_module(f"benchmarks.{name}").main([*further, "--quick"] if chosen.quick else further)
        except SystemExit as ended:
            if not isinstance(ended.code, str):  # an error in the arguments, not a reason to be left out
                raise
            print(ended)
        except Exception:
            if not chosen.gpu:
                raise
            traceback.print_exc()  # the others are still worth the time
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if chosen.gpu:
        subprocess.run([sys.executable, "-m", "pytest", "-v", "-n0", *UPDATE], check=False)


if __name__ == "__main__":
    main()
