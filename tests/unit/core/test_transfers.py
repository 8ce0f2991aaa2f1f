"""The order of transfers: promises one by one, and any order of events."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable

import pytest

from kvstore.core import transfers as transfers_module
from kvstore.core.links.breaker import BreakerState
from kvstore.core.links.learned import LinkCost, Speed
from kvstore.core.transfers import (
    BATCH_BLOCKS,
    BATCH_BYTES,
    PATIENCE_NS,
    Link,
    Transfer,
    TransferClass,
    Wish,
)
from kvstore.types import Refusal, Tier

DEMAND, PREFETCH, WRITE_BACK, REPAIR = TransferClass
MS = 1_000_000
SPEED = Speed(0.0, 1e9)


def link(depth: int = 1, weight: Callable[[str], float] = lambda tenant: 1.0) -> Link:
    return Link(depth, {tier: LinkCost(SPEED) for tier in Tier}, weight)


def push(
    line: Link, name: Hashable, transfer_class: TransferClass = DEMAND, *,
    nbytes: int = BATCH_BYTES, tenant: str = "", into: Tier = Tier.DRAM, asked_ns: int = 0,
    priority: int = 50, deadline_ns: int | None = None,
) -> Transfer:  # fmt: skip
    wish = Wish(transfer_class, asked_ns, priority, deadline_ns)
    transfer = Transfer(name, nbytes, into, tenant, wish)
    assert line.refusal(transfer_class) is None
    line.push(transfer)
    return transfer


def drain(line: Link, most: int = 10**6) -> list[Transfer]:
    """Transfers in the order in which they ran."""
    order: list[Transfer] = []
    while len(order) < most and (begun := line.start(0)):
        for batch in begun:
            for transfer in batch.transfers:
                order.append(line.ended(transfer.target, 0, well=True))
    return order


def test_demand_goes_first_and_nobody_starves() -> None:
    line = link()
    for number in range(1000):
        for transfer_class in TransferClass:
            push(line, (transfer_class, number), transfer_class)
    first = drain(line, 1000)
    counts = {c: sum(t.transfer_class is c for t in first) for c in TransferClass}
    assert counts[DEMAND] > 0.94 * 1000
    for transfer_class, share in transfers_module.MINIMUM.items():
        assert counts[transfer_class] >= share * 1000 - 2


def test_a_class_that_was_idle_has_saved_nothing_up() -> None:
    line = link()
    push(line, "w", WRITE_BACK)
    for number in range(200):
        push(line, number)
    drain(line)
    for number in range(100):
        push(line, ("w", number), WRITE_BACK)
        push(line, ("d", number))
    assert all(t.transfer_class is DEMAND for t in drain(line, 25))


def test_a_block_larger_than_what_its_class_is_owed_is_paid_for_afterwards() -> None:
    line = link()
    for number in range(20):
        push(line, ("w", number), WRITE_BACK, nbytes=16 * BATCH_BYTES)
    for number in range(2000):
        push(line, ("d", number))
    first = drain(line, 1000)
    written = sum(t.nbytes for t in first if t.transfer_class is WRITE_BACK)
    assert written <= 0.05 * sum(t.nbytes for t in first)


def test_background_leaves_a_place_free() -> None:
    line = link(depth=4)
    for number in range(8):
        push(line, ("p", number), PREFETCH)
        push(line, ("w", number), WRITE_BACK, into=Tier.NVME)
    assert len(line.start(0)) == 3
    push(line, "d")
    assert [batch.transfer_class for batch in line.start(0)] == [DEMAND]


def test_tenants_share_by_weight_and_borrow_what_others_leave() -> None:
    line = link(weight={"a": 3.0, "b": 1.0}.__getitem__)
    for number in range(400):
        push(line, ("b", number), tenant="b")
    assert all(t.tenant == "b" for t in drain(line, 100))
    for number in range(400):
        push(line, ("a", number), tenant="a")
    shared = drain(line, 200)
    assert abs(sum(t.tenant == "a" for t in shared) - 150) <= 3


def test_what_must_start_first_goes_first_and_priority_counts_as_time() -> None:
    line = link()
    push(line, "late", deadline_ns=900 * MS)
    push(line, "soon", deadline_ns=100 * MS)
    push(line, "dear", deadline_ns=900 * MS, priority=100)
    assert [t.target for t in drain(line)] == ["dear", "soon", "late"]


def test_low_priority_is_not_passed_for_ever() -> None:
    line = link()
    push(line, "low", priority=0)
    served: list[Hashable] = []
    for step in range(400):
        push(line, step, priority=100, asked_ns=step * 10 * MS)
        served += [t.target for t in drain(line, 1)]
    assert "low" in served[:250]


def test_a_long_load_holds_others_up_for_a_batch_at_most() -> None:
    line = link()
    for number in range(100):
        push(line, ("long", number))
    [begun] = line.start(0)
    push(line, "short", priority=60)
    assert line.start(0) == []
    for transfer in begun.transfers:
        line.ended(transfer.target, 0, well=True)
    assert line.start(0)[0].transfers[0].target == "short"


def test_small_blocks_go_together_and_every_place_gets_some() -> None:
    line = link(depth=4)
    for number in range(10):
        push(line, number, nbytes=4096)
    assert sorted(len(batch.transfers) for batch in line.start(0)) == [2, 2, 3, 3]
    line = link(depth=1)
    for number in range(1000):
        push(line, number, nbytes=4096)
    assert len(line.start(0)[0].transfers) == BATCH_BLOCKS
    line = link(depth=1)
    for number in range(9):
        push(line, number, nbytes=BATCH_BYTES // 2)
    assert len(line.start(0)[0].transfers) == 2


def test_a_batch_has_one_direction() -> None:
    line = link()
    for number in range(6):
        push(line, number, into=Tier.DRAM if number % 2 else Tier.NVME, nbytes=1)
    while batches := line.start(0):
        [batch] = batches
        assert len({transfer.into for transfer in batch.transfers}) == 1
        for transfer in batch.transfers:
            line.ended(transfer.target, 0, well=True)
    assert len(line) == 0


def test_a_prefetch_becomes_demand_when_somebody_waits_for_it() -> None:
    line = link()
    push(line, "first", PREFETCH)
    push(line, "wanted", PREFETCH)
    line.hurry("wanted", Wish(DEMAND, 0, 70, 50 * MS))
    order = drain(line)
    assert [t.target for t in order] == ["wanted", "first"]
    assert order[0].transfer_class is DEMAND


def test_who_is_less_urgent_does_not_slow_down_what_is_wanted_already() -> None:
    line = link()
    push(line, "x", priority=90, deadline_ns=10 * MS)
    push(line, "y", priority=80, deadline_ns=10 * MS)
    line.hurry("x", Wish(DEMAND, 0, 10, 900 * MS))
    line.hurry("x", Wish(PREFETCH, 0, 100, 1))
    assert [t.target for t in drain(line)] == ["x", "y"]


def test_what_is_cancelled_does_not_start_and_what_runs_is_not_cancelled() -> None:
    line = link()
    push(line, "x")
    push(line, "y")
    [batch] = line.start(0)
    running = batch.transfers[0].target
    assert line.cancel(running) is None
    assert line.cancel("y" if running == "x" else "x") is not None
    line.ended(running, 0, well=True)
    assert line.start(0) == []
    assert len(line) == 0


def test_a_full_queue_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers_module, "MOST_QUEUED", 3)
    line = link()
    for number in range(3):
        push(line, number, PREFETCH)
    assert line.refusal(PREFETCH) is Refusal.FULL
    assert line.refusal(DEMAND) is None, "queues are bounded class by class"


def test_what_is_said_of_when_demand_is_ready_holds() -> None:
    """The prediction for demand that joins a queue of others' demand, prefetch and
    write-back is what then comes about, on a link that does what it nominally does."""
    rng = random.Random(5)
    for _ in range(50):
        line = link(weight={"a": 2.0, "b": 1.0, "c": 1.0}.__getitem__)
        for number in range(rng.randrange(200)):
            push(
                line, number, rng.choice([DEMAND, DEMAND, PREFETCH, WRITE_BACK]),
                tenant=rng.choice("abc"), priority=rng.choice([30, 50, 80]),
            )  # fmt: skip
        size = rng.randint(1, 30)
        said = line.ready(Tier.DRAM, "a", 50, 0, size * SPEED.work_ns(BATCH_BYTES))
        for number in range(size):
            push(line, ("mine", number), tenant="a", deadline_ns=PATIENCE_NS + number)
        now_ns = waited_ns = 0
        while batches := line.start(now_ns):
            [batch] = batches
            now_ns += batch.work_ns
            for transfer in batch.transfers:
                line.ended(transfer.target, now_ns, well=True)
                if isinstance(transfer.target, tuple):
                    waited_ns = now_ns
        assert said.ns == pytest.approx(waited_ns, rel=0.15, abs=3 * SPEED.work_ns(BATCH_BYTES))


def test_who_matters_less_is_told_of_those_that_will_come_in_between() -> None:
    """At the rate at which they came lately, while it waits."""
    rng, now_ns, work_ns = random.Random(6), 0, SPEED.work_ns(BATCH_BYTES)
    line = link()

    def pass_time() -> None:
        nonlocal now_ns
        if rng.random() < 0.4:
            push(line, ("high", now_ns), priority=90, asked_ns=now_ns)
        batches = line.start(now_ns)
        now_ns += work_ns
        for batch in batches:
            for transfer in batch.transfers:
                line.ended(transfer.target, now_ns, well=True)

    for _ in range(10_000):
        pass_time()
    began_ns = now_ns
    said = line.ready(Tier.DRAM, "", 10, now_ns, 100 * work_ns)
    high = line.ready(Tier.DRAM, "", 90, now_ns, 100 * work_ns)
    low = {push(line, number, priority=10, asked_ns=now_ns).target for number in range(100)}
    while low & {transfer.target for transfer in line}:
        pass_time()
    assert said.ns == pytest.approx(now_ns - began_ns, rel=0.15)
    assert high.ns < 0.7 * said.ns


def test_a_link_that_breaks_is_learned_anew() -> None:
    line, now_ns, work_ns = link(depth=4), 0, SPEED.work_ns(BATCH_BYTES)

    def move(count: int, slower: int) -> None:
        """Four at a time, while more is waiting."""
        nonlocal now_ns
        for number in range(count + 4):
            push(line, (now_ns, number), asked_ns=now_ns)
        running: list[Transfer] = []
        while len(line) > 4:
            for batch in line.start(now_ns):
                running += batch.transfers
            now_ns += 4 * slower * work_ns
            for transfer in running:
                line.ended(transfer.target, now_ns, well=True)
            running.clear()
        for transfer in line:
            line.cancel(transfer.target)

    cost = line.costs[Tier.DRAM]
    move(400, 1)
    before = cost.fades
    assert cost.passing(work_ns).ns == pytest.approx(work_ns, rel=0.1)
    move(12, 10)
    assert cost.fades == before + 1
    assert cost.passing(work_ns).ns == pytest.approx(10 * work_ns, rel=0.1)


def test_what_was_said_and_what_was_is_kept() -> None:
    line = link()
    work_ns = SPEED.work_ns(BATCH_BYTES)
    for number in range(40):
        push(line, number)
        line.start(number * 100 * MS)
        line.ended(number, number * 100 * MS + 3 * work_ns, well=True)
    cost = line.costs[Tier.DRAM]
    assert cost.actual_ns == pytest.approx(40 * 3 * work_ns)
    assert cost.error_ns < 0.3 * cost.actual_ns, "it was learned after a few"
    assert line.ready(Tier.DRAM, "", 50, 4000 * MS, work_ns).ns == pytest.approx(3 * work_ns)


def test_a_link_that_is_stuck_is_left_alone_until_it_answers() -> None:
    line = link(depth=4)
    push(line, "stuck")
    line.start(0)
    push(line, "other", asked_ns=1)
    assert not line.breaker.look(9 * MS, stuck=False)
    assert line.breaker.look(10 * MS, stuck=True), "it opens"
    assert line.breaker.opened == 1
    assert line.refusal(DEMAND) is Refusal.STALLED
    assert line.start(11 * MS) == [], "nothing more is sent there"
    assert not line.breaker.look(12 * MS, stuck=True), "it is open already"
    assert not line.breaker.look(20 * MS, stuck=False)
    assert line.breaker.state is BreakerState.TRYING
    line.ended("stuck", 21 * MS, well=True)
    assert line.breaker.state is BreakerState.TRYING, "that was not the try"
    push(line, "third")
    [trial] = line.start(22 * MS)
    push(line, "fourth")
    assert line.start(22 * MS) == [], "one at a time"
    for transfer in trial.transfers:
        line.ended(transfer.target, 100_000 * MS, well=True)
    assert line.breaker.state is BreakerState.CLOSED, "however long it took"
    assert len(line.start(100_000 * MS)) > 0


def test_a_try_that_is_stuck_opens_the_breaker_again() -> None:
    line = link(depth=4)
    push(line, 1)
    line.start(0)
    line.breaker.look(10 * MS, stuck=True)
    line.ended(1, 20 * MS, well=False)
    line.breaker.look(20 * MS, stuck=False)
    push(line, 2)
    line.start(20 * MS)
    assert line.breaker.look(30 * MS, stuck=True)
    assert line.breaker.opened == 2


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_events_runs_everything_once_and_keeps_count(seed: int) -> None:
    rng = random.Random(seed)
    depth = rng.choice([1, 2, 4])
    line = link(depth, {"a": 3.0, "b": 1.0}.__getitem__)
    waiting: set[Hashable] = set()
    running: list[Transfer] = []
    number = now_ns = 0
    for _ in range(600):
        now_ns += rng.randrange(5 * MS)
        move = rng.random()
        wish = Wish(
            rng.choice(list(TransferClass)), now_ns, rng.randrange(101),
            rng.choice([None, now_ns + 10**9, now_ns - 5]),
        )  # fmt: skip
        if move < 0.4:
            number += 1
            waiting.add(number)
            push(
                line, number, wish.transfer_class, nbytes=rng.choice([1, 4096, 3 * BATCH_BYTES]),
                tenant=rng.choice("ab"), into=rng.choice(list(Tier)), asked_ns=wish.asked_ns,
                priority=wish.priority, deadline_ns=wish.deadline_ns,
            )  # fmt: skip
        elif move < 0.5 and waiting:
            line.hurry(rng.choice(sorted(waiting)), wish)  # type: ignore[type-var]
        elif move < 0.55 and waiting:
            target = rng.choice(sorted(waiting))  # type: ignore[type-var]
            assert line.cancel(target) is not None
            waiting.remove(target)
        elif move < 0.75:
            for batch in line.start(now_ns):
                running += batch.transfers
                assert {t.target for t in batch.transfers} <= waiting
                waiting -= {t.target for t in batch.transfers}
        elif running:
            ended = running.pop(rng.randrange(len(running)))
            line.ended(ended.target, now_ns, well=rng.random() < 0.95)
        assert {t.target for t in line} == waiting | {t.target for t in running}
        assert {t.target for c in TransferClass for t in line.queued(c)} == waiting
        assert sum(map(line.depth, TransferClass)) == len(waiting) + len(running)
    while len(line):
        for batch in line.start(now_ns):
            running += batch.transfers
        line.ended(running.pop().target, now_ns, well=True)
    assert not running
    assert line.start(now_ns) == []
