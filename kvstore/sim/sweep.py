"""Many replays of one trace: each policy at each size of one tier."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from kvstore.core.cost import REFERENCE, Prefill
from kvstore.core.policies import POLICIES
from kvstore.errors import BadRequest
from kvstore.nearest import nearest
from kvstore.sim.bounds import Clairvoyant
from kvstore.sim.processes import spread
from kvstore.sim.replay import Progress, Replay, Result
from kvstore.sim.trace import Trace

BOUNDS: dict[str, Callable[[Trace, int, Prefill], Clairvoyant]] = {
    "belady": lambda trace, capacity, prefill: Clairvoyant(
        trace, capacity, bypass=False, prefill=prefill
    ),
    "belady-bypass": lambda trace, capacity, prefill: Clairvoyant(trace, capacity, prefill=prefill),
    "cost-belady": lambda trace, capacity, prefill: Clairvoyant(
        trace, capacity, by_cost=True, prefill=prefill
    ),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One replay. `by_chain`: the order of references within a request (`sim.replay`);
    None for the policy's own. `hints`: the policy is told what the trace says of
    sessions."""

    policy: str
    capacity_blocks: int
    by_chain: bool | None = None
    hints: bool = True


def policy_called(name: str) -> str:
    """The policy or bound of this name, written with or without hyphens. Raises
    `BadRequest` with the nearest."""
    known: list[str] = [*POLICIES, *BOUNDS]
    for candidate in known:
        if _plain(candidate) == _plain(name):
            return candidate
    try:
        POLICIES[name]
    except KeyError:
        hint = nearest(name, known)
        raise BadRequest(f"no policy {name!r} ({', '.join(known)}){hint}") from None
    return name


def sweep(
    trace: Trace,
    points: Sequence[Point],
    processes: int,
    progress: Progress | None = None,
    prefill: Prefill = REFERENCE,
    enough: Callable[[list[dict[str, Any]]], bool] | None = None,
) -> list[dict[str, Any]]:
    """One object a point, in their order: what `kvstore simulate --json` prints. `enough`: of
    the first points (`spread`); the others are left out."""
    return spread(
        len(points),
        lambda number, tell: _replay(trace, points[number], prefill, tell),
        processes,
        progress,
        enough,
    )


def _replay(trace: Trace, point: Point, prefill: Prefill, progress: Progress) -> dict[str, Any]:
    name = policy_called(point.policy)
    started = perf_counter()
    by_chain = False
    if name in BOUNDS:
        result = BOUNDS[name](trace, point.capacity_blocks, prefill).run(progress)
    else:
        policy = POLICIES[name]()
        by_chain = policy.by_chain if point.by_chain is None else point.by_chain
        replay = Replay(policy, trace, point.capacity_blocks, prefill, hints=point.hints)
        result = replay.run(by_chain=by_chain, progress=progress)
    return _row(point, result, by_chain, perf_counter() - started)


def _row(point: Point, result: Result, by_chain: bool, seconds: float) -> dict[str, Any]:
    return {
        "policy": point.policy,
        "capacity_blocks": point.capacity_blocks,
        **ratios(result),
        "order": "chain" if by_chain else "published",
        "block_references": result.blocks,
        "evictions": result.evictions,
        "seconds": round(seconds, 3),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0))


def ratios(result: Result) -> dict[str, Any]:
    """What was found, as it is printed."""
    return {
        "block_hit_ratio": round(result.block_hit_ratio, 6),
        "token_hit_ratio": round(result.token_hit_ratio, 6),
        "compute_saved_ratio": round(result.compute_saved_ratio, 6),
        "compute_saved_ms": round(result.saved_ms),
        "token_hit_ratio_by_priority": {
            str(priority): round(hits / tokens, 6) if tokens else 0.0
            for priority, (tokens, hits) in sorted(result.by_priority.items())
        },
    }


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
