"""`python -m kvstore_benchmarks.gpu [--quick] [--gigabytes N] [--dir DIR]`: the tests that need a
GPU, then the measurements, on a machine with a GPU and without vLLM.

To be run where the sources are, with `.`, `connectors` and `benchmarks` on PYTHONPATH. What it
needs beside them is in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvstore_benchmarks.gpu.main import run
from kvstore_benchmarks.gpu.measure import QUICK, Options

# Not the project's own settings, which ask for plugins that such a machine need not have.
_PYTEST = [
    "-q", "-ra", "-c", os.devnull, "--rootdir=.", "--confcutdir=tests/gpu",
    "--import-mode=importlib", "-p", "no:cacheprovider", "tests/gpu",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: the tests', or else that of the measurements (`main.run`)."""
    parser = argparse.ArgumentParser(prog="kvstore_benchmarks.gpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=Options().moved / 1e9)
    parser.add_argument("--dir", type=Path)
    asked = parser.parse_args(arguments)
    tests = run_tests()
    options = QUICK if asked.quick else Options(moved=int(asked.gigabytes * 1e9))
    return run(options._replace(directory=asked.dir), as_object=False) or tests


def run_tests() -> int:
    """Exit code of `tests/gpu`; 69 where there is no pytest to run it with."""
    if importlib.util.find_spec("pytest") is None:
        print("kvstore: tests/gpu is not run: there is no pytest", file=sys.stderr)
        return os.EX_UNAVAILABLE
    return subprocess.run([sys.executable, "-m", "pytest", *_PYTEST], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
