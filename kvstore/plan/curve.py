"""How much of a trace a cache of each size would have held, in as few steps as tell it.

A prompt of a hundred thousand tokens is thousands of blocks, and nearly all of what a replay does
is done for each of them. So long prompts are replayed in larger blocks. What these cannot tell,
where within one of them a prompt goes on as none did before, is counted in the trace's own
blocks (`Request.again_tokens`). A cache is as large a part of all larger blocks as it is to be
of the trace's own.

The largest size takes no replay: where nothing leaves, what was asked for before is there. Nor
do those above one that has nearly as many hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kvstore.core.cost import Prefill
from kvstore.sim.replay import Progress, Result
from kvstore.sim.sweep import Point, cores, ratios, sweep
from kvstore.sim.trace import Trace, coarsened

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
"""Sizes replayed, of all blocks of the trace."""
BLOCKS_A_PROMPT = 16
"""In a mean prompt, at least, unless the trace's own are fewer."""
UNSEEN = 0.001
"""Of all tokens, at most, those of repeated prompts that are shorter than one larger block."""
NEARLY_ALL = 0.0005
"""Below all hits, as a share of tokens and of prefill: no larger size is replayed."""


class Held(NamedTuple):
    """What a cache of `tokens` tokens of KV holds of what is asked for."""

    tokens: float
    token_hits: float
    """Share of prompt tokens."""
    saved: float
    """Share of prefill time."""


@dataclass(frozen=True, slots=True)
class Curve:
    """`points`: by size, from nothing on, to where nothing more is gained. `replays`: how many
    of them, and `block_tokens`: in blocks of how many tokens."""

    points: Sequence[Held]
    block_tokens: int
    replays: int


def curve_of(
    trace: Trace,
    prefill: Prefill,
    policy: str,
    *,
    block_tokens: int | None = None,
    progress: Progress | None = None,
) -> Curve:
    """`block_tokens`: to replay in; None: as the prompts' length allows. Raises `TraceError` for
    such as cannot be made of the trace's."""
    again = _again(trace)
    most = _all(trace, again, prefill)
    replayed = trace
    block_tokens = block_tokens or _larger(trace, again)
    if block_tokens != trace.block_tokens:
        replayed = coarsened(_knowing(trace, again), block_tokens)
    sizes = sorted({max(1, round(replayed.blocks * share)) for share in SHARES})
    # A trace of few blocks has fewer sizes.
    of_use = [Point(policy, size) for size in sizes if size < replayed.blocks]
    rows: list[dict[str, Any]] = []
    if of_use:
        rows = sweep(
            replayed, of_use, cores(), progress, prefill, lambda rows: _nearly(rows[-1], most)
        )
    points = [Held(0.0, 0.0, 0.0)]
    for row in rows:
        # An order may take turns for the worse; a planner must not.
        last = points[-1]
        hits = max(last.token_hits, row["token_hit_ratio"])
        saved = max(last.saved, row["compute_saved_ratio"])
        points.append(Held(most.tokens * row["capacity_blocks"] / replayed.blocks, hits, saved))
    points.append(most)
    while len(points) > 1 and points[-1][1:] == points[-2][1:]:
        points.pop()
    return Curve(points, replayed.block_tokens, len(rows))


def _nearly(row: dict[str, Any], most: Held) -> bool:
    hits, saved = row["token_hit_ratio"], row["compute_saved_ratio"]
    return bool(most.token_hits - hits <= NEARLY_ALL and most.saved - saved <= NEARLY_ALL)


def _again(trace: Trace) -> list[int]:
    """Tokens of each request up to the first block that nobody asked for before."""
    seen = bytearray(trace.blocks)
    found: list[int] = []
    for request in trace.requests:
        leading = 0
        for first, stop in request.pieces:
            new = seen.find(0, first, stop)
            leading += (stop if new < 0 else new) - first
            if new >= 0:
                break
        for first, stop in request.pieces:
            seen[first:stop] = b"\1" * (stop - first)
        found.append(min(leading * trace.block_tokens, request.tokens))
    return found


def _all(trace: Trace, again: Sequence[int], prefill: Prefill) -> Held:
    """Of a cache from which nothing ever leaves."""
    result, size = Result(), trace.block_tokens
    for request, tokens in zip(trace.requests, again, strict=True):
        result.count(request, 0, 0, -(-tokens // size), size, prefill)
    found = ratios(result)
    return Held(trace.blocks * float(size), found["token_hit_ratio"], found["compute_saved_ratio"])


def _knowing(trace: Trace, again: Sequence[int]) -> Trace:
    pairs = zip(trace.requests, again, strict=True)
    requests = [replace(request, again_tokens=tokens) for request, tokens in pairs]
    return replace(trace, requests=requests)


def _larger(trace: Trace, again: Sequence[int]) -> int:
    """Tokens of the largest blocks that tell enough of these prompts."""
    prompts = [request for request in trace.requests if request.pieces]
    mean = sum(request.blocks for request in prompts) / max(1, len(prompts))
    factor = max(1, int(mean / BLOCKS_A_PROMPT))
    unseen = UNSEEN * sum(request.tokens for request in prompts)
    while factor > 1 and _below(again, factor * trace.block_tokens) > unseen:
        factor //= 2
    return factor * trace.block_tokens


def _below(tokens: Sequence[int], limit: int) -> int:
    return sum(each for each in tokens if each < limit)
