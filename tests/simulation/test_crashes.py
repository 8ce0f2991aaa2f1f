"""Crashes, faults of the disk and restarts in any order, seed by seed.

A seed that fails is in the error. To run it again:

    python -m tests.simulation.crashes SEED SEED+1
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.crashes import OPERATIONS, run_seed

ROOT = Path(__file__).parents[2]
PROCESSES = 2


def lives(first: int, seeds: int, timeout_s: float) -> dict[str, int]:
    """What so many seeds did, in two processes: one core each."""
    bounds = [first + seeds * n // PROCESSES for n in range(PROCESSES + 1)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulation.crashes", str(start), str(end)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for start, end in itertools.pairwise(bounds)
    ]  # fmt: skip
    total: dict[str, int] = {}
    try:
        for process in running:
            said, error = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, error[-4000:]
            for name, count in json.loads(said).items():
                total[name] = total.get(name, 0) + count
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return total


def convince(total: dict[str, int], seeds: int) -> None:
    """It was not for lack of anything going wrong, or of anything being read."""
    assert total["seeds"] == seeds
    assert total["operations"] >= OPERATIONS * seeds
    assert total["hits"] > total["operations"] // 20
    assert total["restarts"] > 2 * seeds
    assert total["damage_found"] > seeds // 2
    assert total["memory_damage_found"] > seeds // 2
    assert total["gpu_hits"] > 5 * seeds


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_no_crash_or_fault_makes_the_store_lie() -> None:
    seeds = 500
    convince(lives(0, seeds, 950), seeds)


@pytest.mark.soak
def test_no_crash_or_fault_makes_the_store_lie_ever() -> None:
    seeds = 20_000
    convince(lives(1000, seeds, 7000), seeds)


def test_a_seed_runs_again_as_it_ran(tmp_path: Path) -> None:
    once = run_seed(3, tmp_path / "data", 500)
    again = run_seed(3, tmp_path / "data", 500)
    assert once.trace.digest() == again.trace.digest()
    assert (once.hits, once.restarts) == (again.hits, again.restarts)
