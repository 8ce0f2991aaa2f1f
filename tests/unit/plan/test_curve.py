"""The curve of a trace: what larger blocks and sizes left out may cost, and what not."""

from __future__ import annotations

import random

import pytest

from kvstore.core.cost import REFERENCE
from kvstore.core.policies.lru import LRU
from kvstore.plan.curve import NEARLY_ALL, Held, curve_of
from kvstore.sim.replay import Replay
from kvstore.sim.trace import Piece, Request, Trace, TraceError


def talks() -> Trace:
    """Sessions whose long prompts grow by a few blocks each time, whoever's turn it is."""
    draw = random.Random(1)
    pieces: list[list[Piece]] = [[] for _ in range(12)]
    tokens = [0] * len(pieces)
    requests: list[Request] = []
    blocks = 0
    for _ in range(120):
        session = draw.choice([*range(len(pieces)), *range(4)])
        new = draw.randrange(3, 30) if pieces[session] else 320
        pieces[session].append((blocks, blocks + new))
        blocks += new
        tokens[session] += 16 * new
        asked = tuple(pieces[session])
        requests.append(Request(1e3 * len(requests), tokens[session], 0, asked, session))
    return Trace(16, blocks, requests)


def prompts(*lengths: int) -> Trace:
    """Of so many blocks, each asked for twice."""
    requests: list[Request] = []
    first = 0
    for length in lengths:
        for _ in range(2):
            pieces = ((first, first + length),)
            requests.append(Request(1e3 * len(requests), 16 * length, 0, pieces))
        first += length
    return Trace(16, first, requests)


def at(points: list[Held], tokens: float) -> Held:
    return min(points, key=lambda point: abs(point.tokens - tokens))


def test_long_prompts_in_larger_blocks_have_about_the_hits_of_the_trace_s_own() -> None:
    trace = talks()
    larger = curve_of(trace, REFERENCE, "lru")
    own = curve_of(trace, REFERENCE, "lru", block_tokens=16)
    assert larger.block_tokens > 300 and own.block_tokens == 16
    for point in larger.points[1:]:
        beside = at(list(own.points), point.tokens)
        assert point.token_hits == pytest.approx(beside.token_hits, abs=0.02)
        assert point.saved == pytest.approx(beside.saved, abs=0.02)
    assert larger.points[-1] == own.points[-1], "what all tokens have is exact"


def test_what_ends_within_a_larger_block_is_counted_where_what_is_before_it_is_there() -> None:
    first = Request(0, 96, 0, ((0, 3),), again_tokens=0)
    second = Request(1e3, 128, 0, ((0, 2), (3, 5)), again_tokens=80)
    trace = Trace(32, 5, [first, second])

    def hits(capacity: int) -> int:
        return Replay(LRU(), trace, capacity).run(by_chain=True).token_hits

    assert hits(5) == 80
    assert hits(1) == 32, "its second block is gone, so what is in the third is of no use"
    assert curve_of(talks(), REFERENCE, "lru").points[-1].token_hits == pytest.approx(
        1 - 16 * talks().blocks / sum(request.tokens for request in talks().requests), abs=1e-6
    ), "where everything fits, what is not found is what is asked for first"


def test_a_tier_too_small_for_a_block_finds_nothing_for_what_all_have_seen() -> None:
    trace = Trace(16, 40, [Request(1e3 * n, 640, 0, ((0, 40),)) for n in range(4)])
    points = curve_of(trace, REFERENCE, "lru", block_tokens=640).points
    assert points[-1].token_hits == pytest.approx(3 / 4)
    assert [point.tokens for point in points] == [0.0, 640.0]


def test_prompts_that_larger_blocks_cannot_see_keep_them_small() -> None:
    assert curve_of(prompts(2000, 2000), REFERENCE, "lru").block_tokens == 2000
    many = prompts(2000, *[20] * 10)
    assert curve_of(many, REFERENCE, "lru").block_tokens <= 20 * 16


def test_short_prompts_are_replayed_as_they_are() -> None:
    assert curve_of(prompts(12, 12, 12), REFERENCE, "lru").block_tokens == 16


def test_sizes_above_one_that_has_all_hits_are_not_replayed() -> None:
    once = [Request(1e3 * n, 16, 0, ((n, n + 1),)) for n in range(100, 1000)]
    again = [Request(1e7 + n, 16, 0, ((0, 1),)) for n in range(100)]
    curve = curve_of(Trace(16, 1000, [*once, *again]), REFERENCE, "lru")
    assert curve.replays == 1
    full = curve.points[-1].token_hits
    assert full == pytest.approx(0.099) and curve.points[1].token_hits >= full - NEARLY_ALL


def test_blocks_that_cannot_be_made_of_the_trace_s_are_refused() -> None:
    with pytest.raises(TraceError, match="24 tokens are not some of 16"):
        curve_of(prompts(20), REFERENCE, "lru", block_tokens=24)
