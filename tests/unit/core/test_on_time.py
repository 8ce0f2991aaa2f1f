"""What is worth waiting for is loaded, in time; what is not is refused at once."""

from __future__ import annotations

import random
import sys
from functools import partial

import pytest

from kvstore.core import transfers
from kvstore.core.calls.choice import WORTH_IT, choose, is_settled
from kvstore.core.links.learned import UNSEEN_NS, Prediction
from kvstore.core.tickets import AcquireTicket
from kvstore.core.transfers import TransferClass
from kvstore.types import ChainQuery, Hints, LeaseGrant, Refusal, Tier
from tests.simulation.model import Shell, chain, layout, make_planner

BLOCKS = 8
SLOW, FAST = Hints(tokens_per_s=100.0), Hints(tokens_per_s=1e8)
UNTOLD = Hints(tokens_per_s=0.0)


class Rig(Shell):
    """A shell with a chain that is on NVMe only."""

    def __init__(self) -> None:
        super().__init__(make_planner(dram_slots=4 * BLOCKS, nvme_slots=8 * BLOCKS))
        self.client = self.session(1)
        self.layout_id = self.planner.register_layout("t", layout())
        self.keys = chain(1, BLOCKS)
        self.put(self.client, self.layout_id, self.keys)
        self.planner.flush("t", drop=True)
        self.run()
        self.settle()
        assert self.planner.lookup("t", self.query) == (BLOCKS, 0)

    @property
    def query(self) -> ChainQuery:
        return ChainQuery([self.layout_id], self.keys)

    def ask(self, hints: Hints = UNTOLD, within_ms: float | None = None) -> AcquireTicket:
        return self.acquire(
            self.client, [self.layout_id], self.keys, wait=True, within_ms=within_ms, hints=hints
        )

    def drop_from_dram(self) -> None:
        self.planner.flush("t", drop=True)
        self.run()
        self.settle()

    def take(self, ticket: AcquireTicket, each_ms: float = 0.0) -> LeaseGrant:
        """Let all copies end, each after so long; the lease is given back."""
        while self.copies:
            self.now_ns += int(each_ms * 1e6)
            self.end_copy()
        assert ticket.answer is not None
        [grant] = ticket.answer
        self.planner.release(self.client, [grant.lease_id])
        return grant

    def pass_until_it_looks(self) -> None:
        """Time, while nothing happens."""
        looks_ns = self.planner.looks_ns()
        assert looks_ns is not None and looks_ns > self.now_ns
        self.now_ns = looks_ns

    @property
    def refused(self) -> dict[Refusal, int]:
        return {why: n for why, n in self.planner.counters.refused.items() if n}


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "BATCH_BLOCKS", 1)


def test_the_best_of_loading_and_computing_is_chosen_within_the_deadline() -> None:
    """Against every k, tried one by one, on links of any speed."""
    rng = random.Random(3)
    for _ in range(500):
        positions, work_ns = rng.randint(1, 40), rng.choice([100, 300])
        wait, pace = rng.choice([0, 50, 5000]), rng.choice([0.5, 1.0, 10.0])
        compute_ns = rng.choice([10.0, 90.0, 1000.0])
        left_ns = rng.choice([None, 40, 3000, 10**6])
        load = partial(_ready, wait, pace)
        works = [k * work_ns for k in range(positions + 1)]
        choice = choose(works, load, left_ns, compute_ns)
        computed_ns = WORTH_IT * compute_ns
        times = [positions * computed_ns] + [
            load(works[k]).ns + (positions - k) * computed_ns
            for k in range(1, positions + 1)
            if left_ns is None or load(works[k]).ns <= left_ns
        ]
        assert times[choice.positions] == pytest.approx(min(times))
        assert (choice.refusal is None) == (choice.positions == positions)


def test_what_is_settled_stays_so_whatever_follows() -> None:
    rng = random.Random(4)
    settled = 0
    for _ in range(300):
        positions, work_ns = rng.randint(2, 40), rng.choice([100, 300])
        load = partial(_ready, rng.choice([0, 50, 5000]), rng.choice([0.5, 1.0, 10.0]))
        asked = rng.choice([None, 40, 3000, 10**6]), rng.choice([0.0, 10.0, 90.0, 1000.0])
        works = [k * work_ns for k in range(positions + 1)]
        if is_settled(works, load, *asked):
            settled += 1
            more = [*works, *(works[-1] + k * work_ns for k in range(1, 50))]
            assert choose(more, load, *asked)[::2] == choose(works, load, *asked)[::2]
    assert settled > 50


def test_who_does_not_compute_gets_all_that_can_be_there_in_time() -> None:
    load = partial(_ready, 50, 1.0)
    assert choose([0, 100, 200, 300], load, None, 0.0).positions == 3
    late = choose([0, 100, 200, 300], load, 260, 0.0)
    assert (late.positions, late.refusal) == (2, Refusal.LATE)


def _ready(wait: float, pace: float, work_ns: int) -> Prediction:
    return Prediction(wait + pace * work_ns, 0.0)


def test_what_cannot_be_there_in_time_is_refused_at_once(rig: Rig) -> None:
    ticket = rig.ask(within_ms=0.05)
    assert ticket.answer is not None, "at once"
    assert ticket.answer[0].held == 0
    assert ticket.answer[0].refusal is Refusal.LATE
    assert rig.refused == {Refusal.LATE: 1}


def test_a_deadline_that_has_passed_is_not_met(rig: Rig) -> None:
    ticket = rig.ask(within_ms=-1000)
    assert ticket.answer is not None
    assert ticket.answer[0].refusal is Refusal.LATE


def test_as_much_is_loaded_as_can_be_there_in_time(rig: Rig) -> None:
    one_ms = rig.planner.residency.transfers.costs[Tier.DRAM].nominal.work_ns(4096) / 1e6
    ticket = rig.ask(within_ms=3.5 * one_ms)
    grant = rig.take(ticket)
    assert grant.held == 3
    assert grant.refusal is Refusal.LATE


def test_what_is_queued_already_counts(rig: Rig) -> None:
    first = rig.ask(within_ms=1000)
    other = chain(2, BLOCKS)
    rig.put(rig.client, rig.layout_id, other)
    late = rig.acquire(rig.client, [rig.layout_id], other, wait=True, within_ms=1000)
    assert late.answer is not None and late.answer[0].held == BLOCKS, "what is in DRAM is there"
    assert rig.take(first).held == BLOCKS


def test_computing_is_preferred_where_it_is_faster(rig: Rig) -> None:
    ticket = rig.ask(FAST)
    assert ticket.answer is not None
    assert ticket.answer[0].refusal is Refusal.RECOMPUTE
    assert rig.refused == {Refusal.RECOMPUTE: 1}


def test_what_is_hardly_worth_it_is_not_done(rig: Rig) -> None:
    def loaded(part: float) -> bool:
        """Where computing takes `part` of what loading does."""
        compute_ns = part * _ready(50, 1.0, 800).ns / 8
        works = [100 * k for k in range(9)]
        return choose(works, partial(_ready, 50, 1.0), None, compute_ns).positions == 8

    assert not loaded(1.05)
    assert loaded(1.2)


def test_loading_is_preferred_where_it_is_faster(rig: Rig) -> None:
    grant = rig.take(rig.ask(SLOW))
    assert grant.held == BLOCKS
    assert grant.refusal is None


def test_who_does_not_compute_is_never_told_to(rig: Rig) -> None:
    rig.take(rig.ask(FAST))
    assert rig.take(rig.ask(Hints())).held == BLOCKS


def test_who_has_not_measured_goes_by_what_others_said(rig: Rig) -> None:
    assert rig.take(rig.ask(UNTOLD)).held == BLOCKS, "nobody knows: it may be worth it"
    rig.drop_from_dram()
    rig.ask(FAST)
    ticket = rig.ask(UNTOLD)
    assert ticket.answer is not None
    assert ticket.answer[0].refusal is Refusal.RECOMPUTE


def test_a_link_that_became_slow_is_tried_again_later_and_nobody_waits(rig: Rig) -> None:
    hints = Hints(tokens_per_s=16 / 0.004)  # A position costs 4 ms.
    for _ in range(12):
        assert rig.take(rig.ask(hints), each_ms=0.1).held == BLOCKS
        rig.drop_from_dram()
    refused = 0
    for _ in range(12):
        ticket = rig.ask(hints)
        rig.take(ticket, each_ms=40)
        refused += ticket.answer is not None and ticket.answer[0].held == 0
        rig.drop_from_dram()
    assert refused > 3, "it is ten times slower than computing"
    assert not rig.copies
    rig.now_ns += UNSEEN_NS
    ticket = rig.ask(hints)
    assert ticket.answer is not None and ticket.answer[0].held == 0
    assert rig.copies
    rig.take(ticket, each_ms=0.1)
    for _ in range(5):
        rig.now_ns += UNSEEN_NS
        rig.drop_from_dram()
        if rig.take(ticket := rig.ask(hints), each_ms=0.1).held == BLOCKS:
            break
    assert ticket.answer is not None and ticket.answer[0].held == BLOCKS, "it is found out"


def test_who_comes_while_a_drive_hangs_does_not_count_on_it(rig: Rig) -> None:
    hints = Hints(tokens_per_s=16 / 0.004)
    for _ in range(12):
        rig.take(rig.ask(hints), each_ms=0.1)
        rig.drop_from_dram()
    waiting = rig.ask(hints)
    assert waiting.answer is None
    rig.now_ns += 100_000_000
    other = rig.ask(hints)
    assert other.answer is not None
    assert other.answer[0].refusal is Refusal.RECOMPUTE


def test_what_takes_longer_than_was_predicted_is_given_up_and_what_came_is_kept(rig: Rig) -> None:
    ticket = rig.ask(Hints(tokens_per_s=16 / 0.004))
    rig.end_copy()
    rig.end_copy()
    came = BLOCKS - len(ticket.missing)
    rig.now_ns += 200_000_000
    rig.run()
    assert ticket.answer is not None, "it is not waited for any more"
    assert ticket.answer[0].held == came > 0
    assert rig.planner.counters.given_up == 1


def test_a_drive_that_becomes_slow_is_noticed_long_before_a_load_should_be_over(
    monkeypatch: pytest.MonkeyPatch, one_by_one: None
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", 64)
    rig, each_ms = Rig(), 10.0
    twice_as_long_to_compute = Hints(tokens_per_s=16 / 0.02)
    for _ in range(4):
        assert rig.take(rig.ask(UNTOLD), each_ms).held == BLOCKS
        rig.drop_from_dram()
    began_ns, ticket = rig.now_ns, rig.ask(twice_as_long_to_compute)
    for _ in range(20):
        rig.now_ns += int(each_ms * 1e6)
        rig.end_copy()
        rig.run()
    assert ticket.answer is None, "as long as it gets on"
    assert ticket.promised_ns - began_ns > 600_000_000
    while ticket.answer is None:
        rig.pass_until_it_looks()
        rig.run()
    assert ticket.answer[0].held == 20
    assert rig.now_ns - began_ns < (20 + 20) * each_ms * 1e6


def test_what_is_queued_behind_a_load_does_not_make_it_give_up(rig: Rig, one_by_one: None) -> None:
    others = [chain(number, BLOCKS) for number in (2, 3)]
    for keys in others:
        rig.put(rig.client, rig.layout_id, keys)
    rig.drop_from_dram()
    for _ in range(4):
        rig.take(rig.ask(UNTOLD), each_ms=10)
        rig.planner.flush("t", drop=True)
        rig.run()
        rig.settle()
    ticket = rig.ask(Hints(tokens_per_s=16 / 0.04))
    for keys in others:
        rig.acquire(rig.client, [rig.layout_id], keys, wait=True)
    while ticket.answer is None:
        rig.now_ns += 10_000_000
        rig.end_copy()
        rig.run()
    assert ticket.answer[0].held == BLOCKS


def test_what_is_late_but_still_worth_it_is_waited_for(rig: Rig) -> None:
    ticket = rig.ask(SLOW)
    rig.pass_until_it_looks()
    before_ns = rig.now_ns
    rig.run()
    assert ticket.answer is None
    looks_ns = rig.planner.looks_ns()
    assert looks_ns is not None and looks_ns > before_ns
    assert rig.take(ticket).held == BLOCKS


def test_nobody_waits_on_and_on_for_what_is_always_late(rig: Rig) -> None:
    ticket = rig.ask(Hints(tokens_per_s=16 / 0.05))
    began_ns = rig.now_ns
    while ticket.answer is None:
        rig.pass_until_it_looks()
        rig.run()
    assert rig.now_ns - began_ns < 2 * BLOCKS * 50_000_000
    assert ticket.doubts > 0


def test_a_deadline_that_is_missed_is_counted(rig: Rig) -> None:
    ticket = rig.ask(within_ms=1000)
    rig.planner.give_up(ticket, rig.now_ns)
    assert rig.planner.counters.missed_deadlines == 1


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_steps_costs_loads_until_the_drive_is_measured_again(
    rig: Rig, hours: int
) -> None:
    for _ in range(4):
        rig.take(rig.ask(UNTOLD), each_ms=10)
        rig.drop_from_dram()
    ticket = rig.ask(Hints(tokens_per_s=16 / 0.04))
    rig.end_copy()
    rig.now_ns += hours * 3_600_000_000_000
    for _ in range(3):
        rig.advance(100)
        rig.run()
        rig.settle()
    assert ticket.answer is not None
    rig.planner.release(rig.client, [grant.lease_id for grant in ticket.answer])
    for _ in range(8):
        rig.drop_from_dram()
        rig.now_ns += UNSEEN_NS
        if rig.take(again := rig.ask(UNTOLD), each_ms=10).held == BLOCKS:
            break
    assert again.answer is not None and again.answer[0].held == BLOCKS
    rig.planner.check_integrity()


def test_what_is_more_important_is_brought_up_first(rig: Rig, one_by_one: None) -> None:
    other = chain(2, BLOCKS)
    rig.put(rig.client, rig.layout_id, other)
    rig.drop_from_dram()
    low = rig.ask(Hints(priority=10))
    high = rig.acquire(
        rig.client, [rig.layout_id], other, wait=True, hints=Hints(priority=90)
    )  # fmt: skip
    running = len(rig.copies)
    while high.answer is None:
        rig.end_copy()
    assert low.answer is None
    assert len(low.missing) >= BLOCKS - running - 1


def prefetch(rig: Rig, within_ms: int = 0) -> None:
    rig.planner.prefetch(
        "t", [rig.query], within_ns=within_ms * 1_000_000, now_ns=rig.now_ns
    )  # fmt: skip
    rig.run()


def test_prefetched_bytes_are_counted_as_used_when_they_are_asked_for(rig: Rig) -> None:
    prefetch(rig)
    rig.settle()
    foreseen = rig.planner.holdings.foreseen
    assert foreseen.unused_bytes == BLOCKS * 4096
    rig.take(rig.ask())
    rig.take(rig.ask())
    assert (foreseen.unused_bytes, foreseen.used_bytes) == (0, BLOCKS * 4096)
    rig.drop_from_dram()
    assert foreseen.wasted_bytes == 0


def test_prefetched_bytes_that_nobody_asked_for_are_counted_as_wasted(rig: Rig) -> None:
    prefetch(rig)
    rig.settle()
    rig.drop_from_dram()
    assert rig.planner.holdings.foreseen.wasted_bytes == BLOCKS * 4096


def test_a_prefetch_that_comes_too_late_does_not_begin(rig: Rig, one_by_one: None) -> None:
    prefetch(rig, within_ms=50)
    begun = len(rig.copies)
    assert begun < BLOCKS
    rig.advance(100)
    rig.settle()
    assert rig.planner.lookup("t", rig.query).in_dram == begun
    assert not rig.planner.residency.transfers.depth(TransferClass.PREFETCH)


def test_prefetches_leave_three_quarters_of_memory_to_what_is_used(rig: Rig) -> None:
    for base in range(2, 6):
        rig.put(rig.client, rig.layout_id, chain(base, BLOCKS))
        rig.drop_from_dram()
    for base in range(1, 6):
        query = ChainQuery([rig.layout_id], chain(base, BLOCKS))
        rig.planner.prefetch("t", [query], now_ns=rig.now_ns)
        rig.run()
        rig.settle()
    assert rig.planner.holdings.foreseen.unused_bytes == BLOCKS * 4096


def test_what_was_learned_is_told_to_the_next_planner(rig: Rig) -> None:
    for _ in range(12):
        rig.take(rig.ask(Hints(tokens_per_s=16 / 0.004)), each_ms=40)
        rig.drop_from_dram()
    again = Rig()
    again.planner.restore_learned(rig.planner.learned())
    ticket = again.ask(UNTOLD)
    assert ticket.answer is not None
    assert ticket.answer[0].refusal is Refusal.RECOMPUTE
