"""Many runs of the whole stack on one trace, each policy with each description of tiers,
and how far each is from the bounds.

`belady-bypass` with as many blocks as all tiers have together: no store of that size has
more block hits, or more token hits. For compute the bound is the better of that and
`cost-belady`; that one is a good schedule, not a proven optimum. What every block that was
ever asked for would bring, were it held, bounds all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from kvstore.errors import BadRequest
from kvstore.sim.machine import Machine, Tiers, room_in
from kvstore.sim.processes import spread
from kvstore.sim.replay import Progress
from kvstore.sim.stack import Stack, first_tokens_without
from kvstore.sim.sweep import BOUNDS, policy_called, ratios
from kvstore.sim.trace import Trace
from kvstore.types import Tier

DAY_MS = 86_400_000.0
HITS = ("block_hit_ratio", "token_hit_ratio", "compute_saved_ratio")


class Run(NamedTuple):
    policy: str
    tiers: Tiers


Bound = tuple[str, int]
"""A name, and a number of blocks."""


def sweep_stacks(
    trace: Trace,
    runs: Sequence[Run],
    machine: Machine,
    processes: int,
    progress: Progress | None = None,
    *,
    hints: bool = True,
) -> list[dict[str, Any]]:
    """One object a run, in their order: what `kvstore simulate --tiers --json` prints.
    Raises `BadRequest` for a bound, which no server can run, and for tiers that cannot be."""
    policies = [policy_of_a_server(run.policy) for run in runs]
    everything = ("belady-bypass", trace.blocks)
    same_size = {
        tiers: [(name, _blocks(trace, tiers, machine)) for name in ("belady-bypass", "cost-belady")]
        for tiers in {run.tiers for run in runs}
    }
    bounds = sorted({everything, *chain(*same_size.values())})

    def do(number: int, tell: Progress) -> dict[str, Any]:
        if number < len(bounds):
            name, capacity = bounds[number]
            found = ratios(BOUNDS[name](trace, capacity, machine.prefill).run(tell))
            return {name: found[name] for name in HITS}
        number -= len(bounds)
        return _row(trace, runs[number], policies[number], machine, tell, hints)

    found = spread(len(bounds) + len(runs), do, processes, progress)
    known, rows = dict(zip(bounds, found, strict=False)), found[len(bounds) :]
    without = _times(first_tokens_without(trace, machine))
    for row, run in zip(rows, runs, strict=True):
        best = {hits: max(known[b][hits] for b in same_size[run.tiers]) for hits in HITS}
        row["first_token_ms_without"] = without
        row["bounds"] = {"same_size": best, "everything": known[everything]}
        row["below_bound"] = {hits: round(best[hits] - row[hits], 6) for hits in HITS}
    return rows


def policy_of_a_server(name: str) -> str:
    policy = policy_called(name)
    if policy in BOUNDS:
        raise BadRequest(f"{policy} knows the future, so no server runs it")
    return policy


def _blocks(trace: Trace, tiers: Tiers, machine: Machine) -> int:
    """What the tiers have room for together, of what there is."""
    room = room_in(tiers, machine, trace.block_tokens)
    return min(trace.blocks, room.dram_blocks + room.nvme_blocks)


def _row(
    trace: Trace, run: Run, policy: str, machine: Machine, progress: Progress, hints: bool
) -> dict[str, Any]:
    started = perf_counter()
    stack = Stack(trace, run.tiers, machine, policy, hints=hints)
    seen = stack.run(progress)
    residency = stack.planner.residency
    pools = {pool.tier.label: pool for pool in (residency.dram, residency.nvme) if pool}
    times = [time for each in seen.first_token_ms.values() for time in each]
    count = max(1, len(times))
    return {
        "policy": run.policy,
        "dram_bytes": run.tiers.dram_bytes,
        "nvme_bytes": run.tiers.nvme_bytes,
        "nvme_bytes_per_day": run.tiers.nvme_bytes_per_day,
        "block_bytes": stack.room.block_bytes,
        "dram_blocks": stack.room.dram_blocks,
        "nvme_blocks": stack.room.nvme_blocks,
        **ratios(seen.found),
        "block_hits_from": {tier.label: blocks for tier, blocks in seen.blocks_from.items()},
        "first_token_ms": _times(times),
        "first_token_ms_by_priority": {
            str(priority): _times(each) for priority, each in sorted(seen.first_token_ms.items())
        },
        "mean_wait_ms": round(seen.waited_ms / count, 3),
        "mean_load_ms": round(seen.loaded_ms / count, 3),
        "mean_compute_ms": round(seen.computed_ms / count, 3),
        "nvme_read_bytes": stack.shell.moved_bytes[Tier.DRAM],
        "nvme_written_bytes": stack.shell.moved_bytes[Tier.NVME],
        "nvme_drive_writes_a_day": _drive_writes(trace, run.tiers, stack),
        "evictions": {label: pool.evictions for label, pool in pools.items()},
        "refused": {
            why.label: chains for why, chains in stack.planner.counters.refused.items() if chains
        },
        "unstored_blocks": stack.serving.unstored_blocks,
        "block_references": seen.found.blocks,
        "seconds": round(perf_counter() - started, 3),
    }


def _drive_writes(trace: Trace, tiers: Tiers, stack: Stack) -> float | None:
    """How often a day the tier's bytes are written over; None where the trace takes no
    time, and without such a tier."""
    span_ms = trace.requests[-1].time_ms - trace.requests[0].time_ms
    if not tiers.nvme_bytes or span_ms <= 0:
        return None
    written = stack.shell.moved_bytes[Tier.NVME] / tiers.nvme_bytes
    return round(written * DAY_MS / span_ms, 4)


def _times(times: Sequence[float]) -> dict[str, float]:
    mean = float(np.mean(times))
    median, p99 = (float(part) for part in np.percentile(times, (50, 99)))
    return {
        "requests": len(times),
        "mean": round(mean, 3),
        "median": round(median, 3),
        "p99": round(p99, 3),
    }
