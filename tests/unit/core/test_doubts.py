"""Who waits for what will not be there, or not be worth it, is told so at once: within a
millisecond of the moment from which the planner could know, whatever has broken what it said.

The drive is calculated and in virtual time. At every tenth of a millisecond everybody who
waits is asked about, which the planner itself never does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import inf

import pytest

from kvstore.core.calls.alarms import Alarms
from kvstore.core.calls.doubts import LOOKED, SLOWER, SOONEST_NS
from kvstore.core.chores import PART
from kvstore.core.links.learned import Prediction
from kvstore.core.sessions import Session
from kvstore.core.tickets import AcquireTicket
from kvstore.core.transfers import TransferClass
from kvstore.tiers.nvme_calls import DATA_NS
from kvstore.types import ChainQuery, Hints, Refusal, Tier
from tests.simulation.model import LEASE_MS, SLOT, Shell, chain, layout, make_planner

MS = 1_000_000
STEP_NS = MS // 10
BLOCK_NS = 200_000
"""What a block takes on the drive."""
BLOCKS = 100
SLOTS = 16
"""Of a block: its bytes take longer than its latency."""


class World(Shell):
    """Chains on a drive that moves a block at a time, `slow(now)` times slower than it can."""

    def __init__(
        self, chains: int = 8, blocks: int = BLOCKS, tenants: str = "t", *,
        learned: Mapping[str, Mapping[str, object]] | None,
    ) -> None:  # fmt: skip
        slots = chains * blocks * SLOTS * len(tenants)
        super().__init__(make_planner(2 * slots, 2 * slots, extent_slots=8 * SLOTS))
        self.slow: Callable[[int], float] = lambda now_ns: 1.0
        self.broke: dict[AcquireTicket, int] = {}
        """Since when what each was promised does not hold any more."""
        self.late_ns: dict[AcquireTicket, int] = {}
        """How long after that it heard of it."""
        self._begun = 0.0
        self._ticks_ns = self._asked_ns = self._ends_ns = self.now_ns
        self.clients, self.layout_id = {}, b""
        for number, tenant in enumerate(tenants):
            self.clients[tenant] = self.session(number + 1, tenant)
            self.layout_id = self.planner.register_layout(tenant, layout(slots=SLOTS))
            for base in range(1, chains + 1):
                self.put(self.clients[tenant], self.layout_id, chain(base, blocks))
            self.planner.flush(tenant, drop=True)
            self.run()
            self.settle()
        self.blocks = blocks
        self.asked: dict[AcquireTicket, tuple[int, Refusal | None]] = {}
        if learned is not None:
            # Well known, and lately: a moment of it says little else.
            for _ in range(8):
                self.planner.restore_learned(learned)
            for cost in self.planner.residency.transfers.costs.values():
                cost._noted_ns = self.now_ns

    def ask(
        self, base: int, *, within_ms: float | None = None, ms_a_block: float | None = None,
        priority: int = 50, tenant: str = "t", client: Session | None = None,
    ) -> AcquireTicket:  # fmt: skip
        """`ms_a_block`: what computing one takes."""
        speed = None if ms_a_block is None else 16e3 / ms_a_block
        ticket = self.acquire(
            client or self.clients[tenant], [self.layout_id], chain(base, self.blocks), wait=True,
            within_ms=within_ms, hints=Hints(priority, speed),
        )  # fmt: skip
        self.asked[ticket] = self._promise(ticket)
        return ticket

    def pass_ms(self, ms: float) -> None:
        end_ns = self.now_ns + int(ms * MS)
        while self.now_ns < end_ns:
            self._step()

    def wait_for(self, *tickets: AcquireTicket, most_ms: float = 60_000) -> None:
        end_ns = self.now_ns + most_ms * MS
        while any(ticket.answer is None for ticket in tickets):
            assert self.now_ns < end_ns
            self._step()

    def _step(self) -> None:
        self.now_ns += STEP_NS
        self._begun += STEP_NS / self.slow(self.now_ns)
        while self.copies and self._begun >= BLOCK_NS:
            self._begun -= BLOCK_NS
            self._asked_ns = self.now_ns
            self.end_copy()
        if not self.copies:
            self._begun = 0.0
            self._asked_ns = self.now_ns
        looks_ns = self.planner.looks_ns()
        if looks_ns is not None and looks_ns <= self.now_ns:
            self.run()
        self.look_from_outside()
        if self.now_ns - self._ticks_ns >= 100 * MS:
            self._ticks_ns = self.now_ns
            self.planner.tick(self.now_ns, stuck=self.now_ns - self._asked_ns >= DATA_NS)
            self.run()

    def look_from_outside(self) -> None:
        for ticket, promise in list(self.asked.items()):
            now = self._promise(ticket)
            if now != promise or not ticket.missing:
                # It was told of something else, or has got all.
                if ticket in self.broke:
                    self.late_ns[ticket] = self.now_ns - self.broke.pop(ticket)
                self.asked[ticket] = now
            if ticket.answer is not None:
                del self.asked[ticket]
            elif ticket.missing and self._is_broken(ticket):
                self.broke.setdefault(ticket, self.now_ns)
            else:
                # Somebody else gave up.
                self.broke.pop(ticket, None)

    def _is_broken(self, ticket: AcquireTicket) -> bool:
        """As far as the planner can know, by more than a link may change unnoticed."""
        doubts, now_ns = self.planner.acquires.doubts, self.now_ns
        said, _ = doubts._said(ticket, now_ns)
        said = Prediction(said.ns / SLOWER, said.error_ns / SLOWER)
        worth_it = doubts._is_worth_it(ticket, said, now_ns)
        return not (worth_it and doubts._is_in_time(ticket, said, now_ns))

    def _promise(self, ticket: AcquireTicket) -> tuple[int, Refusal | None]:
        [claim] = ticket.claims
        return claim.most, ticket.why or claim.refusal

    @property
    def latest_ns(self) -> int:
        waiting = [self.now_ns - since_ns for since_ns in self.broke.values()]
        return max([*self.late_ns.values(), *waiting], default=0)


@cache
def learned() -> Mapping[str, Mapping[str, object]]:
    """Of the drive, when it does as it should."""
    world = World(learned=None)
    for _ in range(6):
        world.wait_for(*(world.ask(base) for base in range(1, 9)))
        world.pass_ms(LEASE_MS + 100)
        world.planner.flush("t", drop=True)
        world.run()
    return world.planner.learned()


@pytest.fixture
def world() -> World:
    return World(learned=learned())


def from_now(world: World, ms: float, slow: float) -> Callable[[int], float]:
    since_ns = world.now_ns + int(ms * MS)
    return lambda now_ns: slow if now_ns >= since_ns else 1.0


def test_what_gets_on_as_it_should_is_waited_for(world: World) -> None:
    tickets = [
        world.ask(1, ms_a_block=2 * BLOCK_NS / MS, within_ms=50),
        world.ask(2, within_ms=2.6 * BLOCKS * BLOCK_NS / MS),
    ]
    world.wait_for(*tickets)
    assert [ticket.answer[0].held for ticket in tickets if ticket.answer] == [BLOCKS, BLOCKS]
    assert world.planner.counters.given_up == 0


@pytest.mark.parametrize("slow", [3.0, 10.0, 100.0, inf])
def test_when_a_drive_becomes_slow_all_are_told_in_time(world: World, slow: float) -> None:
    each_ms = BLOCKS * BLOCK_NS / MS
    computing = [world.ask(base, ms_a_block=1.5 * base * BLOCK_NS / MS) for base in (1, 2, 3)]
    limited = [world.ask(base, within_ms=1.3 * base * each_ms) for base in (4, 5, 6)]
    both = world.ask(7, ms_a_block=15 * BLOCK_NS / MS, within_ms=10 * each_ms)
    world.slow = from_now(world, 0.5 * each_ms, slow)
    world.wait_for(*computing, *limited, both, most_ms=4000)
    assert world.planner.counters.given_up + world.planner.counters.refused[Refusal.LATE] > 3
    assert world.latest_ns <= MS


def test_what_came_is_kept_and_the_rest_is_computed(world: World) -> None:
    ticket = world.ask(1, ms_a_block=1.5 * BLOCK_NS / MS)
    world.slow = from_now(world, 0.5 * BLOCKS * BLOCK_NS / MS, 10.0)
    world.wait_for(ticket)
    assert ticket.answer is not None
    [grant] = ticket.answer
    assert 0.4 * BLOCKS < grant.held < 0.7 * BLOCKS
    assert grant.refusal is Refusal.RECOMPUTE


def test_a_load_is_cut_to_what_is_there_in_time_and_no_more_is_moved_for_it(world: World) -> None:
    within_ms = 1.5 * BLOCKS * BLOCK_NS / MS
    asked_ns = world.now_ns
    ticket = world.ask(1, within_ms=within_ms)
    world.slow = from_now(world, 0.5 * BLOCKS * BLOCK_NS / MS, 3.0)
    link = world.planner.residency.transfers
    while ticket.claims[0].most == BLOCKS:
        world.pass_ms(0.1)
    assert world.now_ns - asked_ns < within_ms * MS
    assert link.depth(TransferClass.DEMAND) < 0.5 * BLOCKS
    world.wait_for(ticket)
    assert ticket.answer is not None
    [grant] = ticket.answer
    assert 0.6 * BLOCKS < grant.held < 0.95 * BLOCKS
    assert grant.refusal is Refusal.LATE
    assert world.now_ns - asked_ns <= within_ms * MS
    assert world.planner.counters.refused[Refusal.LATE] == 1


def test_what_comes_while_a_load_is_being_cut_short_does_no_harm(world: World) -> None:
    ticket = world.ask(1, within_ms=1_000)
    acquires, left = world.planner.acquires, len(ticket.missing)
    for _ in acquires.shorten(ticket, world.now_ns, lambda work_ns: False):
        for _ in range(min(2, len(world.copies))):
            world.end_copy()
    assert left == BLOCKS and not ticket.missing and not ticket.missing_ns
    world.wait_for(ticket)
    world.planner.check_integrity()


def test_a_hiccup_does_not_cost_those_who_have_time(world: World) -> None:
    ticket = world.ask(1, within_ms=1000)
    since_ns = world.now_ns + 5 * MS
    world.slow = lambda now_ns: inf if since_ns <= now_ns < since_ns + 300 * MS else 1.0
    world.wait_for(ticket)
    assert ticket.answer is not None and ticket.answer[0].held == BLOCKS


def test_who_waits_when_a_drive_hangs_is_told_by_when_the_breaker_opens(world: World) -> None:
    world.slow = lambda now_ns: inf
    began_ns = world.now_ns
    tickets = [world.ask(base, within_ms=60_000) for base in (1, 2, 3)]
    world.wait_for(*tickets)
    assert world.now_ns - began_ns <= DATA_NS + 101 * MS
    assert world.answered[-3:] == tickets, "in the order in which they asked"
    for ticket in tickets:
        assert ticket.answer is not None
        assert ticket.answer[0].refusal is Refusal.STALLED
    refused = world.ask(4, within_ms=60_000)
    assert refused.answer is not None and refused.answer[0].refusal is Refusal.STALLED
    world.pass_ms(30_000)
    world.slow = lambda now_ns: 1.0
    world.pass_ms(1_000)
    again = world.ask(5, within_ms=60_000)
    world.wait_for(again)
    assert again.answer is not None and again.answer[0].held == BLOCKS, "it closes by itself"


def test_who_is_passed_by_is_told_with_the_call_that_does_it(world: World) -> None:
    each_ms = BLOCKS * BLOCK_NS / MS
    low = [
        world.ask(1, priority=10, ms_a_block=1.7 * BLOCK_NS / MS),
        world.ask(2, priority=10, within_ms=3 * each_ms),
    ]
    world.pass_ms(1)
    assert [ticket.answer for ticket in low] == [None, None]
    for base in (3, 4, 5):
        world.ask(base, priority=90)
    assert low[0].answer is not None, "computing is faster now"
    assert low[0].why is Refusal.RECOMPUTE
    assert low[1].claims[0].refusal is Refusal.LATE
    assert low[1].claims[0].most < BLOCKS
    world.look_from_outside()
    assert world.latest_ns == 0


def test_who_asks_later_and_is_no_more_important_changes_nothing(world: World) -> None:
    first = world.ask(1, within_ms=1.3 * BLOCKS * BLOCK_NS / MS)
    for base in range(2, 8):
        world.ask(base, within_ms=1000)
        world.ask(base, within_ms=1000, priority=20)
    world.wait_for(first)
    assert first.answer is not None and first.answer[0].held == BLOCKS


def test_another_tenant_who_comes_takes_its_share_and_who_waits_is_told() -> None:
    blocks = 3 * BLOCKS
    world = World(2, blocks, tenants="ab", learned=learned())
    ticket = world.ask(1, tenant="a", within_ms=1.3 * blocks * BLOCK_NS / MS)
    world.pass_ms(1)
    assert ticket.claims[0].refusal is None
    for base in (1, 2):
        world.ask(base, tenant="b", within_ms=1000)
    assert ticket.claims[0].refusal is Refusal.LATE
    world.wait_for(ticket)
    assert ticket.answer is not None and 0.4 * blocks < ticket.answer[0].held < 0.9 * blocks
    assert world.latest_ns <= MS


@pytest.mark.parametrize("hours", [-1, 1])
def test_when_the_clock_steps_nobody_waits_for_ever(world: World, hours: int) -> None:
    tickets = [world.ask(1, ms_a_block=1.0), world.ask(2, within_ms=1000)]
    world.pass_ms(5)
    world.now_ns += hours * 3_600_000 * MS
    world._ticks_ns = world.now_ns
    world.wait_for(*tickets, most_ms=4000)
    world.planner.check_integrity()


def test_who_asks_and_never_reads_leaves_nothing_behind(world: World) -> None:
    client = world.clients["t"]
    for number in range(200):
        if len(client.leases) + len(client.tickets) < 60:
            world.ask(1 + number % 7, within_ms=5 + number % 50, priority=number % 3)
        world.pass_ms(0.3)
    world.pass_ms(LEASE_MS + 500)
    assert not client.tickets
    assert not client.leases, "they have ended"
    doubts = world.planner.acquires.doubts
    assert doubts.looks_ns() is None
    assert not doubts._by_work and not len(doubts._by_time) and not doubts._due
    world.planner.check_integrity()
    assert world.latest_ns <= MS


def test_what_breaks_for_many_at_once_is_looked_at_in_parts() -> None:
    """And each once."""
    world = World(3, blocks=4, learned=learned())
    planner, doubts = world.planner, world.planner.acquires.doubts
    world.clients = {"t": world.clients["t"], **{str(n): world.session(n) for n in range(9, 22)}}
    tickets = [
        world.ask(1, within_ms=900 + number % 7, client=client)
        for client in world.clients.values()
        for number in range(50)
    ]
    world.chores_by_hand = True
    looked: list[AcquireTicket] = []
    look = doubts._said

    def count(ticket: AcquireTicket, now_ns: int) -> object:
        looked.append(ticket)
        return look(ticket, now_ns)

    doubts._said = count  # type: ignore[method-assign, assignment]
    world.now_ns += 500 * MS
    parts = 0
    world.run()
    while planner.chores:
        seen = len(looked)
        world.do_chores()
        parts += 1
        assert len(looked) - seen <= 2 * PART / LOOKED
    assert parts > 1
    assert len(set(looked)) == len(tickets)


def test_what_is_left_is_the_work_of_the_blocks_that_are(world: World) -> None:
    """Of layouts of different sizes."""
    big, small = layout("big", slots=16), layout("small")
    planner, client = world.planner, world.clients["t"]
    ids = [planner.register_layout("t", spec) for spec in (big, small)]
    keys = chain(99, 10)
    for layout_id in ids:
        world.put(client, layout_id, keys)
    planner.flush("t", drop=True)
    world.run()
    world.settle()
    ticket = planner.acquire(
        client, [ChainQuery(ids, keys)], wait=True, now_ns=world.now_ns,
        deadline_ns=world.now_ns + 10**9,
    )  # fmt: skip
    work_ns = planner.residency.transfers.costs[Tier.DRAM].nominal.work_ns
    world.run()
    for _ in range(20):
        left = [replica.block.layout.stored_bytes for replica in ticket.missing]
        assert ticket.missing_ns == sum(map(work_ns, left))
        assert {SLOT, 16 * SLOT} >= set(left)
        world.end_copy()
    assert ticket.missing_ns == 0


def test_alarms_ring_in_order_once_and_the_latest_counts() -> None:
    alarms: Alarms[str] = Alarms()
    for step in range(1000):
        alarms.set("often", 10_000 - step)
    alarms.set("a", 5)
    alarms.set("b", 3)
    alarms.set("gone", 1)
    alarms.drop("gone")
    assert len(alarms._heap) < 100
    assert (alarms.first(), list(alarms.rung(5))) == (3, ["b", "a"])
    assert (list(alarms.rung(9_000)), alarms.first()) == ([], 9_001)
    assert list(alarms.rung(9_001)) == ["often"]
    assert (len(alarms), alarms.first()) == (0, None)


def test_nobody_is_looked_at_again_and_again_in_no_time(world: World) -> None:
    ticket = world.ask(1, within_ms=1.02 * BLOCKS * BLOCK_NS / MS)
    looks = 0
    while ticket.answer is None:
        looks_ns = world.planner.looks_ns()
        looks += looks_ns is not None and looks_ns <= world.now_ns + STEP_NS
        world.pass_ms(0.1)
    assert looks <= BLOCKS * BLOCK_NS / SOONEST_NS + 10
