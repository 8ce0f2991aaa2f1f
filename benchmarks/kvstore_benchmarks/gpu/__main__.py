"""`python -m kvstore_benchmarks.gpu [--quick]`: the tests that need a GPU, then the
measurements, on a machine with a GPU and without vLLM.

To be run where the sources are, with `.`, `connectors` and `benchmarks` on PYTHONPATH.
"""

from __future__ import annotations

import subprocess
import sys

from kvstore_benchmarks.gpu.main import run
from kvstore_benchmarks.gpu.measure import QUICK, Options


def main() -> int:
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/gpu"], check=False)
    measured = run(QUICK if "--quick" in sys.argv else Options(), as_object=False)
    return tests.returncode or measured


if __name__ == "__main__":
    sys.exit(main())
