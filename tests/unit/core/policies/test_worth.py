"""What Worth learns, and what it may not be talked into."""

from __future__ import annotations

import pytest

from kvstore.core.policies import Use
from kvstore.core.policies.worth import (
    _AGES,
    BUCKETS,
    MOST_WATCHED,
    WATCHED_A_HELD,
    Worth,
    _bucket,
    _densities,
)
from tests.unit.core.policies.harness import Cache, replica


def test_each_age_is_in_the_bucket_that_begins_below_it() -> None:
    for bucket in range(BUCKETS):
        assert _bucket(_AGES[bucket]) == bucket == _bucket(_AGES[bucket + 1] - 1)
    assert _bucket(1 << 200) == BUCKETS - 1


def test_a_use_that_is_sure_to_come_is_worth_more_the_nearer_it_is() -> None:
    hazard = [0.0] * BUCKETS
    hazard[_bucket(100)] = 0.999
    dense = _densities(hazard, _bucket(1000), shortest=1)
    assert 0.005 < dense[0] < dense[_bucket(50)] < dense[_bucket(90)] < 0.1
    assert dense[_bucket(200)] == 0.0


def mixed(policy: Worth, *, api_priority: int = 50, turns: int = 2000) -> float:
    """Conversations that return after a while among prompts that never do: which part of
    each is found again. A tier that holds both for as long is four times as large."""
    cache = Cache(policy, 400)
    hits = asked = single = 0
    for turn in range(turns):
        policy.use(Use(now_ms=turn, category="chat"))
        for number in range(4):
            hit = cache.access(turn % 60 * 4 + number)
            if turn > turns // 2:
                hits += hit
                asked += 1
        policy.use(Use(now_ms=turn, category="api", priority=api_priority))
        for _ in range(20):
            single += 1
            cache.access(10_000 + single)
    return hits / asked


def test_what_never_returns_leaves_first_once_that_is_known() -> None:
    found = mixed(Worth())
    assert found > 0.95


def test_a_false_priority_does_not_make_worthless_blocks_stay() -> None:
    """A flood that calls itself all-important, of blocks that are never used again."""
    found = mixed(Worth(), api_priority=100)
    assert found > 0.9


def test_of_requests_that_return_alike_the_more_important_stay() -> None:
    policy = Worth()
    cache = Cache(policy, 300)
    hits = {20: 0, 80: 0}
    for turn in range(6000):
        priority = 80 if turn % 2 else 20
        policy.use(Use(now_ms=turn, priority=priority))
        # Each of 100 prompts of either kind, 4 blocks long, in turn.
        first = (turn % 2) * 10_000 + (turn // 2 % 60) * 4
        for number in range(4):
            hits[priority] += cache.access(first + number)
    assert hits[80] > 2 * hits[20]


def test_what_is_not_told_of_requests_is_ordered_by_uses() -> None:
    """Where nobody calls `use`: blocks that were used often outlive a flood of others."""
    cache = Cache(Worth(), 300)
    for number in [*range(100)] * 60:
        cache.access(number)
    found = single = 0
    for turn in range(2000):
        for number in range(4):
            found += cache.access(turn % 25 * 4 + number)
        for _ in range(30):
            single += 1
            cache.access(10_000 + single)
    assert found > 0.9 * 4 * 2000


def test_within_a_request_the_deepest_goes_first() -> None:
    policy = Worth()
    for request in range(3):
        policy.use(Use(now_ms=request))
        for depth in range(9, -1, -1):
            policy.insert(replica(request * 10 + depth, depth))
    order = [r.address for r in policy.candidates()]
    for request in range(3):
        mine = [address for address in order if address // 10 == request and address % 10 < 9]
        assert mine == sorted(mine, reverse=True)


@pytest.mark.parametrize("room", [100, 20_000])
def test_the_sample_is_bounded_whatever_is_held(room: int) -> None:
    policy = Worth()
    cache = Cache(policy, room)
    for number in range(3 * room + 2000):
        cache.access(number)
    assert len(policy._watched) <= min(MOST_WATCHED, WATCHED_A_HELD * room)
    assert len(policy._watched) > min(MOST_WATCHED // 8, WATCHED_A_HELD * room // 16)
