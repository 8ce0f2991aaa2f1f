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

OFTEN = {
    # Blocks that were read there, and nowhere else; in the time that a copy takes.
    "gpu_hits": 1000, "mirror_hits": 500, "copied_on_gpu": 100, "gone_while_read": 2,
    # Memory that went back while somebody used it.
    "extents_given_back": 100, "taken_under_lease": 5, "taken_under_landing": 10,
    "taken_under_straight_read": 2,
    "gpus_lost": 2, "gpus_stuck": 2,
    "died_with_gpu_lease": 10, "died_while_waiting": 50,
    # Hand-overs whose ends died.
    "landings_granted": 1000, "landed_hits": 300, "died_while_landing": 20,
    "decoder_died_before": 50, "decoder_died_while": 10, "decoder_died_after": 50,
    "too_late_to_commit": 5,
    "straight_blocks": 200, "bounced_blocks": 20, "failed_in_fill": 5, "arrived_damaged": 5,
    "hung_in_fill": 3,
    "slots_taken": 400, "slots_given_back": 200,
    "flushed_under_straight_read": 5, "flushed_under_gpu_lease": 20, "flushed_under_landing": 20,
    "cleared_under_straight_read": 2, "cleared_under_gpu_lease": 5, "cleared_under_landing": 2,
    "ends": 50, "empty_ends": 20,
}  # fmt: skip
"""Times in a hundred seeds, at least."""


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
    seldom = {
        name: total.get(name, 0)
        for name, times in OFTEN.items()
        if 100 * total.get(name, 0) < times * seeds
    }
    assert not seldom


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_crash_or_fault_makes_the_store_lie() -> None:
    seeds = 400
    convince(lives(0, seeds, 2900), seeds)


@pytest.mark.soak
def test_no_crash_or_fault_makes_the_store_lie_ever() -> None:
    seeds = 20_000
    convince(lives(1000, seeds, 7000), seeds)


def test_a_seed_runs_again_as_it_ran(tmp_path: Path) -> None:
    once = run_seed(8, tmp_path / "data", 1000)
    again = run_seed(8, tmp_path / "data", 1000)
    assert once.trace.digest() == again.trace.digest()
    assert once.seen == again.seen
    assert once.seen["gpu_hits"]
