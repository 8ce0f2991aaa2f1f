"""Traces made of others: in larger blocks, and with callers who say more."""

from __future__ import annotations

import pytest

from kvstore.sim.trace import Request, Trace, TraceError, coarsened, expecting
from tests.unit.sim.workloads import prompt_of, sessions


def test_larger_blocks_are_equal_where_the_prompts_are_up_to_their_ends() -> None:
    asked = [((0, 5),), ((0, 3), (7, 10)), ((0, 6),), ((20, 21),), ()]
    trace = Trace(16, 21, [Request(n, 99, 1, pieces) for n, pieces in enumerate(asked)])
    coarse = coarsened(trace, 32)
    assert [prompt_of(request) for request in coarse.requests] == [
        [0, 1],
        [0, 2, 3],
        [0, 1, 4],
        [],
        [],
    ]
    assert (coarse.block_tokens, coarse.blocks) == (32, 5)
    assert [request.tokens for request in coarse.requests] == [99] * 5


def test_blocks_of_the_same_size_are_the_same_prompts() -> None:
    trace = sessions(4, seed=3)
    names: dict[int, int] = {}
    same = coarsened(trace, trace.block_tokens)
    for before, after in zip(trace.requests, same.requests, strict=True):
        for old, new in zip(prompt_of(before), prompt_of(after), strict=True):
            assert names.setdefault(old, new) == new
    assert len(set(names.values())) == len(names) == same.blocks


@pytest.mark.parametrize("tokens", [8, 24])
def test_blocks_that_are_not_made_of_the_trace_s_are_refused(tokens: int) -> None:
    with pytest.raises(TraceError, match=f"{tokens} tokens are not some of 16"):
        coarsened(Trace(16, 1, []), tokens)


def test_blocks_that_no_prompt_fills_are_refused() -> None:
    with pytest.raises(TraceError, match="no prompt fills a block of 64 tokens"):
        coarsened(Trace(16, 3, [Request(0, 48, 1, ((0, 3),))]), 64)


def test_callers_say_when_sessions_are_back_as_well_as_they_are_to_know_it() -> None:
    times = {1: [0, 100, 400], 2: [50], None: [60, 70]}
    requests = [
        Request(time, 16, 1, ((0, 1),), session) for session, each in times.items() for time in each
    ]
    trace = Trace(16, 1, sorted(requests, key=lambda request: request.time_ms))
    said = [request.expected_ms for request in expecting(trace, 0.0, seed=1).requests]
    assert said == [100, None, None, None, 300, None]
    rough = expecting(trace, 0.25, seed=1).requests[4].expected_ms
    assert rough is not None and rough != 300 and abs(rough - 300) <= 75
