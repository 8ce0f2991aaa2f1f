"""Replays by the piece come to what replays block by block come to."""

from __future__ import annotations

import pytest

from kvstore.core.cost import Prefill
from kvstore.core.policies import LRU, POLICIES, SessionState, Use
from kvstore.sim.bounds import NEVER, Clairvoyant
from kvstore.sim.replay import Replay, Result
from kvstore.sim.trace import Request, Trace
from tests.unit.core.policies.naive import MODELS
from tests.unit.sim.workloads import prompt_of, sessions

SIZES = (1, 7, 40, 150, 600)


def replay(name: str, trace: Trace, capacity: int, *, by_chain: bool = False) -> Result:
    return Replay(POLICIES[name](), trace, capacity).run(by_chain=by_chain)


@pytest.mark.parametrize("name", ["lru", "fifo", "clock", "lfu", "sieve", "arc"])
def test_a_replay_is_that_of_its_references_one_by_one(name: str) -> None:
    trace = sessions(12, seed=3)
    for size in SIZES:
        access = MODELS[name](size)
        hits = [[access(block) for block in prompt_of(r)] for r in trace.requests]
        result = replay(name, trace, size)
        assert result.blocks == sum(map(len, hits))
        assert result.block_hits == sum(map(sum, hits))
        leading = sum(row.index(False) if False in row else len(row) for row in hits)
        assert result.token_hits == 16 * leading


def belady(trace: Trace, capacity: int, *, bypass: bool) -> int:
    references = [block for request in trace.requests for block in prompt_of(request)]
    following = [NEVER] * len(references)
    last: dict[int, int] = {}
    for place in range(len(references) - 1, -1, -1):
        following[place] = last.get(references[place], NEVER)
        last[references[place]] = place
    held: dict[int, int] = {}
    hits = 0
    for block, next_use in zip(references, following, strict=True):
        if block in held:
            hits += 1
        elif len(held) == capacity:
            victim = max(held, key=lambda b: held[b])
            if bypass and next_use >= held[victim]:
                continue
            del held[victim]
        held[block] = next_use
    return hits


@pytest.mark.parametrize("bypass", [True, False])
def test_the_bound_is_that_of_its_references_one_by_one(bypass: bool) -> None:
    trace = sessions(12, seed=4)
    for size in SIZES:
        hits = Clairvoyant(trace, size, bypass=bypass).run().block_hits
        assert hits == belady(trace, size, bypass=bypass)


def test_no_policy_is_above_the_bound() -> None:
    trace = sessions(8, seed=5)
    for size in (1, 40, 150):
        bound = Clairvoyant(trace, size).run()
        assert bound.block_hits * 16 == bound.token_hits
        for name in POLICIES:
            for by_chain in (False, True):
                assert replay(name, trace, size, by_chain=by_chain).block_hits <= bound.block_hits


def test_knowing_the_cost_keeps_the_deep_prompt_for_the_shallow_ones() -> None:
    deep, shallow = ((0, 40),), ((40, 60),)
    asked = [Request(now, 640, 1, deep if now % 3 == 0 else shallow) for now in range(30)]
    trace = Trace(16, 60, asked)
    prefill = Prefill(parameters=2e7)  # A token costs twice as much after 76 others.
    plain = Clairvoyant(trace, 40, prefill=prefill).run()
    dear = Clairvoyant(trace, 40, by_cost=True, prefill=prefill).run()
    assert dear.saved_ms > plain.saved_ms
    assert dear.block_hits < plain.block_hits


def test_in_the_order_of_the_server_children_leave_before_parents() -> None:
    """What is held of a prompt is a prefix: no hit lies behind a hole."""
    for seed in range(3):
        trace = sessions(12, seed)
        for size in (40, 150):
            result = replay("lru", trace, size, by_chain=True)
            assert result.token_hits == 16 * result.block_hits
            assert result.token_hits > replay("lru", trace, size).token_hits


def test_policies_are_told_of_sessions_unless_they_are_not_to_be() -> None:
    class Listening(LRU):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[object] = []

        def use(self, use: Use) -> None:
            self.told.append(use.session)

        def hint(
            self, session: object, state: SessionState, expected_ms: float | None = None
        ) -> None:
            self.told.append((session, state, expected_ms))

    waiting, ended = SessionState.WAITING, SessionState.ENDED
    asked = [
        Request(0, 16, 1, ((0, 1),), session=7),
        Request(1, 16, 1, ((0, 1),), 7, then=waiting, expected_ms=3.0),
        Request(4, 16, 1, ((0, 1),), 7, then=ended),
    ]
    said = [7, 7, (7, waiting, 3.0), 7, (7, ended, None)]
    for hints, told in ((True, said), (False, [None] * 3)):
        policy = Listening()
        Replay(policy, Trace(16, 1, asked), 10, hints=hints).run(by_chain=True)
        assert policy.told == told


def test_a_prompt_larger_than_the_tier_leaves_its_root_there() -> None:
    long = Request(0, 1600, 1, ((0, 100),))
    result = replay("lru", Trace(16, 100, [long, long]), 30, by_chain=True)
    assert result.block_hits == 30 and result.token_hits == 480


def test_a_block_named_twice_in_a_prompt_is_held_once() -> None:
    odd = Request(0, 64, 1, ((0, 2), (0, 2)))
    for by_chain in (False, True):
        result = replay("lru", Trace(16, 2, [odd, odd]), 10, by_chain=by_chain)
        assert result.blocks == 8 and result.block_hits in (4, 6)


def test_saved_prefill_counts_the_depth() -> None:
    trace = Trace(512, 4, [Request(0, 1024, 1, ((0, 2),)), Request(1, 2000, 1, ((0, 4),))])
    result = replay("lru", trace, 10)
    prefill = Prefill()
    assert result.saved_ms == prefill.ms(1024)
    assert result.prefill_ms == prefill.ms(1024) + prefill.ms(2000)
    assert prefill.ms(2000) > 2000 / 1024 * prefill.ms(1024)
    assert result.compute_saved_ratio < result.token_hit_ratio
