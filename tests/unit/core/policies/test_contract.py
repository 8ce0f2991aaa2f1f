"""What every policy owes the pool, whatever it does with its replicas."""

from __future__ import annotations

import random
from collections import deque

import pytest

from kvstore.core.catalog import Replica
from kvstore.core.policies import POLICIES, SessionState, Use
from kvstore.types import Retention
from tests.unit.core.policies.harness import Cache, replica

NAMES = list(POLICIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_replica_held_is_a_candidate_once(name: str) -> None:
    """One that is not could never be evicted; one given twice could be evicted twice."""
    draw = random.Random(1)
    policy = POLICIES[name]()
    held: list[Replica] = []
    for step in range(4000):
        act = draw.random()
        if act < 0.01:
            policy.hint(draw.randrange(5), draw.choice(list(SessionState)), draw.random() * 1e5)
        elif act < 0.03:
            policy.use(
                Use(
                    now_ms=step,
                    category=draw.choice("ab"),
                    session=draw.randrange(5),
                    priority=draw.randrange(101),
                    retention=draw.choice(((), (Retention(16, 99, 90, 50.0),))),
                    request=draw.choice((None, 1, 2)),
                    tenant=draw.choice("ab"),
                )
            )
        elif act < 0.4 or not held:
            new = replica(draw.randrange(500), draw.randrange(20))
            if all(new.address != other.address for other in held):
                policy.miss(new.block.stored_key)
                policy.insert(new)
                held.append(new)
        elif act < 0.6:
            policy.touch(draw.choice(held))
        elif act < 0.7:
            begin = draw.randrange(len(held))
            policy.touch_run(iter(held[begin : begin + 9]))
        elif act < 0.9 or len(held) > 100:
            victim = next(policy.candidates())
            policy.remove(victim)
            held.remove(victim)
        else:
            leaving = held.pop(draw.randrange(len(held)))
            policy.remove(leaving)
        assert len(policy) == len(held)
        if step % 5 == 0:
            order = list(policy.candidates())
            assert len(order) == len(held)
            assert set(order) == set(held)
    for leaving in held:
        policy.remove(leaving)
    assert not list(policy.candidates()) and not len(policy)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_request_names_twice_is_held_once(name: str) -> None:
    policy = POLICIES[name]()
    held = [replica(number, depth=9 - number) for number in range(10)]
    policy.use(Use(now_ms=1.0))
    policy.insert_all(held)
    for now in (2.0, 3.0):
        policy.use(Use(now_ms=now))
        policy.touch_run([*held[:5], *held[:5], held[4], held[9], held[9]])
    policy.use(Use(now_ms=4.0))
    assert sorted(r.address for r in policy.candidates()) == list(range(10)) and len(policy) == 10
    for leaving in held:
        policy.remove(leaving)
    assert not len(policy)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_decides_alike_each_time(name: str) -> None:
    def run() -> list[bool]:
        draw = random.Random(2)
        cache = Cache(POLICIES[name](), 40)
        return [cache.access(int(draw.paretovariate(0.6)) % 300) for _ in range(3000)]

    assert run() == run()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_policy_remembers_is_bounded(name: str) -> None:
    """A server runs for months, and sees far more blocks than it holds."""
    cache = Cache(POLICIES[name](), 50)
    sizes = []
    for number in range(20_000):
        cache.access(number)
        if number % 10_000 == 9_999:
            sizes.append(_objects(cache.policy))
    assert sizes[1] < sizes[0] + 500


def _objects(thing: object) -> int:
    """Entries of all containers that hang together with it."""
    seen: set[int] = set()
    todo = [thing]
    total = 0
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            total += len(one)
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | deque):
            total += len(one)
            todo += one
        elif type(one).__module__.startswith("kvstore.core.policies"):
            slots = getattr(type(one), "__slots__", None)
            todo += vars(one).values() if slots is None else [getattr(one, s) for s in slots]
    return total


def cycle(name: str, room: int, hot: int, scan: int) -> float:
    """The part of the hot blocks' uses that hit while blocks pass by that never return."""
    cache = Cache(POLICIES[name](), room)
    hits = uses = passing = 0
    for number in [*range(hot)] * 3:
        cache.access(number)
    for turn in range(60):
        for number in range(hot):
            hit = cache.access(number)
            if turn > 10:
                hits += hit
                uses += 1
        for _ in range(scan):
            passing += 1
            cache.access(1000 + passing)
    return hits / uses


@pytest.mark.parametrize("name", ["2q", "arc", "lirs", "s3-fifo", "w-tinylfu", "lfu", "sieve"])
def test_blocks_that_never_return_do_not_push_out_what_does(name: str) -> None:
    assert cycle("lru", room=100, hot=40, scan=80) == 0.0
    assert cycle(name, room=100, hot=40, scan=80) > 0.9


def test_hits_to_come_are_learned_from_those_there_were() -> None:
    """LHD comes to prefer what is used every time to what passes by."""
    assert cycle("lhd", room=100, hot=40, scan=80) > 0.5


def test_the_lower_priority_goes_first_and_recency_decides_between_equals() -> None:
    policy = POLICIES["priority-lru"]()
    order = []
    for number, priority in enumerate((50, 20, 90, 20)):
        policy.use(Use(now_ms=number, priority=priority))
        order.append(replica(number))
        policy.insert(order[-1])
    assert [r.address for r in policy.candidates()] == [1, 3, 0, 2]
    policy.use(Use(now_ms=5, priority=20))
    policy.touch(order[1])
    assert [r.address for r in policy.candidates()] == [3, 1, 0, 2]


def test_a_priority_that_ends_is_the_default_again() -> None:
    policy = POLICIES["priority-lru"]()
    policy.use(Use(now_ms=0, priority=50, retention=(Retention(0, 16, 90, 100),)))
    policy.insert(replica(0))
    policy.use(Use(now_ms=10))
    policy.insert(replica(1))
    policy.use(Use(now_ms=99))
    assert next(policy.candidates()).address == 1
    policy.use(Use(now_ms=100))
    assert [r.address for r in policy.candidates()] == [1, 0]
    policy.use(Use(now_ms=101, retention=(Retention(0, 16, 10, 1),)))
    policy.insert(replica(2))
    assert next(policy.candidates()).address == 2
    policy.use(Use(now_ms=102))
    assert [r.address for r in policy.candidates()] == [1, 0, 2]


def test_a_dear_block_outlives_a_cheap_one() -> None:
    """GDSF: of blocks used alike, the deep ones cost more to compute again."""
    cache = Cache(POLICIES["gdsf"](), 2)
    cache.access(0, depth=4000)
    cache.access(1, depth=0)
    cache.access(2, depth=0)
    assert set(cache.held) == {0, 2}


def test_a_category_that_returns_is_kept_before_one_that_does_not() -> None:
    policy = POLICIES["workload-aware"]()
    cache = Cache(policy, 60)
    now = single = hits = 0
    for turn in range(400):
        now += 10
        policy.use(Use(now_ms=now, category="chat"))
        block = turn % 10
        hit = cache.access(block)
        hits += hit if turn > 200 else 0
        policy.use(Use(now_ms=now + 1, category="api"))
        for _ in range(8):
            single += 1
            cache.access(1000 + single)
    assert hits > 190
