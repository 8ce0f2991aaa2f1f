"""What somebody will want soon is brought up before, at nobody's expense, and only while it
is of use."""

from __future__ import annotations

import pytest

from kvstore.core import transfers
from kvstore.core.foresight import returns
from kvstore.core.foresight.delays import ENOUGH, Delays
from kvstore.core.foresight.returns import MOST_SESSIONS
from kvstore.core.limits import Limits
from kvstore.core.places.foreseen import ASKED, GUESSED, LEAST, TOLD, Reason, Waste
from kvstore.core.places.stays import EVERY_NS, FOR_GOOD, WATCHED
from kvstore.core.planner import Planner
from kvstore.core.space import Space, SpaceClass
from kvstore.core.tickets import PrefetchTicket
from kvstore.core.transfers import TransferClass
from kvstore.types import ChainQuery, Reuse, Segment, SessionState, Tier
from tests.simulation.model import SLOT, Shell, chain, layout, tenant_key

SLOTS = 32
LENGTH = 4
SECOND_NS = 1_000_000_000


class Rig(Shell):
    """A shell whose DRAM is full of chains that are on NVMe too, others being there only."""

    def __init__(self, share: float = 0.25) -> None:
        limits = Limits(
            lease_ms=1000, reservation_ms=1000, max_sessions=16, max_leases=64,
            max_reservations=16, max_layouts=8, max_running=3, prefetch_share=share,
        )  # fmt: skip
        planner = Planner(
            limits,
            tenant_key=tenant_key,
            eviction="lru",
            dram=Space(SLOTS * SLOT, 4 * SLOT),
            nvme=Space(16 * SLOTS * SLOT, 4 * SLOT),
            nvme_slot_bytes=lambda nbytes: nbytes,
        )
        super().__init__(planner)
        self.client = self.session(1)
        self.layout_id = planner.register_layout("t", layout())
        self.advance(0)

    def store(self, base: int, *, session: bytes = b"", request: bytes = b"") -> None:
        """A chain, of a request of an agent's session."""
        self.store_keys(chain(base, LENGTH), b"", Reuse(session=session, request=request))

    def store_keys(self, keys: list[bytes], parent: bytes, reuse: Reuse) -> None:
        ticket = self.reserve(self.client, self.layout_id, len(keys), wait=True)
        self.settle()
        assert ticket.answer is not None
        first, addresses = ticket.answer.first_slot, ticket.answer.addresses
        assert len(addresses) == len(keys)
        self.memory[Tier.DRAM].update(zip(addresses, keys, strict=True))
        slots = list(range(first, first + len(keys)))
        segment = Segment(parent, keys, slots, [0] * len(keys), reuse)
        self.planner.commit(self.client, self.layout_id, [segment], reserve=0, now_ns=self.now_ns)
        self.run()

    def push_down(self, *bases: int) -> None:
        """Store chains, and drop all that is in DRAM."""
        for base in bases:
            self.store(base)
        self.planner.flush("t", drop=True)
        self.run()
        self.settle()

    def fill(self, first: int = 100) -> None:
        """Fill DRAM with what is on NVMe too."""
        for base in range(first, first + SLOTS // LENGTH):
            self.store(base)
        self.planner.flush("t", drop=False)
        self.run()
        self.settle()

    def prefetch(self, *bases: int, within_ms: int = 0) -> PrefetchTicket:
        queries = [ChainQuery([self.layout_id], chain(base, LENGTH)) for base in bases]
        ticket = self.planner.prefetch(
            "t", queries, within_ns=within_ms * 1_000_000, now_ns=self.now_ns, session=self.client
        )
        self.run()
        return ticket

    def read(self, base: int, *, session: bytes = b"", request: bytes = b"") -> None:
        query = ChainQuery(
            [self.layout_id], chain(base, LENGTH), Reuse(session=session, request=request)
        )
        ticket = self.planner.acquire(self.client, [query], wait=True, now_ns=self.now_ns)
        self.run()
        self.settle()
        assert ticket.answer is not None
        self.planner.release(self.client, [grant.lease_id for grant in ticket.answer])
        self.run()

    def in_dram(self, base: int) -> int:
        query = ChainQuery([self.layout_id], chain(base, LENGTH))
        return self.planner.lookup("t", query).in_dram

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.advance(100)
            self.settle()

    def hint(self, session: bytes, state: SessionState, seconds: float | None = None) -> None:
        expected_ms = None if seconds is None else seconds * 1e3
        self.planner.hint("t", session, state, expected_ms)

    @property
    def space_class(self) -> SpaceClass:
        return self.planner.catalog.layout("t", self.layout_id).dram_class

    @property
    def room_bytes(self) -> float:
        """For all that is foreseen."""
        return 0.25 * SLOTS * SLOT

    @property
    def queued(self) -> int:
        return self.planner.residency.transfers.depth(TransferClass.PREFETCH)

    def away(self) -> None:
        """A session whose blocks have been pushed out of DRAM."""
        self.store(1, session=b"s", request=b"1")
        self.push_down()
        self.fill()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """In which callers' words are believed at once: there are few blocks."""
    monkeypatch.setattr(returns, "TOLD", ASKED)
    return Rig()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "BATCH_BLOCKS", 1)


# What it may take


def test_in_a_full_memory_it_takes_the_place_of_what_was_used_longest_ago(rig: Rig) -> None:
    rig.push_down(1)
    rig.fill()
    rig.read(100)
    assert rig.prefetch(1).answer == LENGTH
    rig.settle()
    assert rig.in_dram(1) == LENGTH
    assert rig.in_dram(100) == LENGTH, "what was just used stays"
    assert rig.in_dram(101) == 0
    rig.planner.check_integrity()


def test_what_is_read_stays(rig: Rig) -> None:
    rig.push_down(1)
    rig.fill()
    for base in range(100, 100 + SLOTS // LENGTH):
        rig.acquire(rig.client, [rig.layout_id], chain(base, LENGTH))
    assert rig.prefetch(1).answer == 0
    assert all(rig.in_dram(base) == LENGTH for base in range(100, 100 + SLOTS // LENGTH))


def test_prefetches_do_not_push_out_each_other(rig: Rig) -> None:
    rig.push_down(1, 2, 3)
    rig.fill()
    started = [rig.prefetch(base).answer for base in (1, 2, 3)]
    rig.settle()
    assert started == [LENGTH, LENGTH, 0], "a quarter of memory, and no more"
    assert [rig.in_dram(base) for base in (1, 2, 3)] == [LENGTH, LENGTH, 0]


def test_without_a_budget_nothing_is_prefetched() -> None:
    rig = Rig(share=0.0)
    rig.away()
    assert rig.prefetch(1).answer == 0
    rig.hint(b"s", SessionState.WAITING, 5)
    rig.pass_time(6)
    assert rig.in_dram(1) == 0


def test_what_is_there_already_is_kept(rig: Rig) -> None:
    rig.fill()
    assert rig.prefetch(100).answer == 0, "nothing is lacking"
    for base in range(1, SLOTS // LENGTH):
        rig.store(base)
        rig.settle()
        rig.advance(100)
    assert rig.in_dram(100) == LENGTH


# For how long it stays


def test_what_is_brought_up_is_there_until_its_time_is_over_and_then_leaves_first(
    rig: Rig,
) -> None:
    rig.push_down(1)
    rig.fill()
    rig.prefetch(1, within_ms=5000)
    rig.settle()
    rig.fill(200)
    rig.pass_time(4)
    rig.fill(300)
    assert rig.in_dram(1) == LENGTH
    rig.pass_time(2)
    rig.store(400)
    rig.settle()
    assert rig.in_dram(1) == 0
    assert all(rig.in_dram(base) for base in range(302, 300 + SLOTS // LENGTH))
    assert rig.planner.holdings.foreseen.wasted[Waste.OVERDUE] == LENGTH * SLOT
    rig.planner.check_integrity()


def test_of_a_chain_that_nobody_came_for_the_deepest_leaves_first(rig: Rig) -> None:
    rig.push_down(1)
    rig.fill()
    rig.prefetch(1, within_ms=1000)
    rig.settle()
    rig.pass_time(2)
    rig.store_keys(chain(400, 1), b"", Reuse())
    assert rig.in_dram(1) == LENGTH - 1


def test_who_has_read_what_was_kept_for_him_keeps_no_more_of_it_than_others(rig: Rig) -> None:
    rig.push_down(1)
    rig.fill()
    rig.prefetch(1, within_ms=60_000)
    rig.settle()
    rig.read(1)
    assert rig.planner.holdings.kept(rig.space_class) == 0
    rig.fill(200)
    assert rig.in_dram(1) == 0


def test_who_comes_back_with_something_else_is_not_waited_for_any_more(rig: Rig) -> None:
    rig.away()
    rig.hint(b"s", SessionState.WAITING, 10)
    rig.pass_time(9)
    assert rig.in_dram(1) == LENGTH
    rig.store(2, session=b"s", request=b"2")
    rig.pass_time(1.5)
    rig.fill(200)
    assert rig.in_dram(1) == 0
    assert rig.planner.holdings.foreseen.wasted[Waste.UNWANTED] == LENGTH * SLOT


def test_who_waits_for_more_than_the_rest_of_memory_gets_what_was_kept(rig: Rig) -> None:
    rig.push_down(*range(1, 1 + SLOTS // LENGTH))
    rig.push_down(50)
    rig.prefetch(50, within_ms=60_000)
    rig.settle()
    queries = [
        ChainQuery([rig.layout_id], chain(base, LENGTH)) for base in range(1, 1 + SLOTS // LENGTH)
    ]
    ticket = rig.planner.acquire(rig.client, queries, wait=True, now_ns=rig.now_ns)
    rig.run()
    rig.settle()
    assert ticket.answer is not None
    assert sum(grant.held for grant in ticket.answer) == SLOTS
    assert rig.planner.holdings.foreseen.wasted[Waste.PUSHED_OUT] == LENGTH * SLOT


def test_what_is_kept_is_not_counted_among_what_may_leave_for_others() -> None:
    """Or nothing would be written ahead, and who stores would wait for the drive."""
    rig = Rig(share=0.5)
    rig.push_down(*range(1, 5))
    for base in range(1, 5):
        rig.prefetch(base, within_ms=60_000)
    rig.settle()
    assert rig.planner.holdings.kept(rig.space_class) == SLOTS // 2
    for base in range(100, 100 + SLOTS // 2 // LENGTH):
        rig.store(base)
        rig.settle()
    room = rig.planner.holdings.dram.space.free_slots(rig.space_class)
    clean = SLOTS - room - len(rig.planner.holdings.dirty(rig.space_class)) - SLOTS // 2
    assert room + clean >= SLOTS // 4


# Until when


def test_what_there_is_no_room_for_is_tried_again_until_its_time_is_over(rig: Rig) -> None:
    rig.push_down(1, 2, 3, 4)
    rig.fill()
    rig.prefetch(1, 2)
    later, never = rig.prefetch(3, within_ms=5000), rig.prefetch(4)
    assert (later.answer, never.answer) == (0, 0)
    rig.settle()
    rig.read(1)
    rig.pass_time(0.2)
    assert rig.in_dram(3) == LENGTH
    assert rig.in_dram(4) == 0
    rig.prefetch(4, within_ms=300)
    rig.pass_time(0.5)
    rig.read(2)
    rig.pass_time(0.5)
    assert rig.in_dram(4) == 0


def test_a_deadline_in_the_past_begins_nothing(rig: Rig) -> None:
    rig.push_down(1)
    assert rig.prefetch(1, within_ms=-1).answer == 0
    assert not rig.copies
    rig.pass_time(0.2)
    assert rig.in_dram(1) == 0


def test_what_a_client_asked_for_is_called_off_when_it_goes(rig: Rig, one_by_one: None) -> None:
    rig.push_down(1, 2, 3, 4)
    rig.prefetch(1, 2)
    rig.prefetch(3, within_ms=60_000)
    begun = len(rig.copies)
    rig.planner.close_session(rig.client)
    rig.advance(100)
    assert rig.queued == begun
    rig.settle()
    rig.advance(100)
    assert rig.in_dram(1) + rig.in_dram(2) + rig.in_dram(3) == begun
    rig.planner.check_integrity()


def test_what_somebody_else_waits_for_is_not_called_off(rig: Rig, one_by_one: None) -> None:
    rig.push_down(1, 2)
    rig.prefetch(1, 2)
    other = rig.session(2)
    ticket = rig.acquire(other, [rig.layout_id], chain(2, LENGTH), wait=True)
    rig.planner.close_session(rig.client)
    rig.advance(100)
    rig.settle()
    assert ticket.answer is not None and ticket.answer[0].held == LENGTH


def test_what_is_asked_for_while_it_comes_up_counts_as_used(rig: Rig) -> None:
    rig.push_down(1)
    rig.prefetch(1)
    rig.read(1)
    seen = rig.planner.holdings.foreseen
    assert (seen.used_bytes, seen.unused_bytes) == (LENGTH * SLOT, 0)


def test_who_asks_and_never_reads_gets_less_and_less(rig: Rig) -> None:
    rig.push_down(*range(1, 9))
    started = []
    for base in range(1, 9):
        started.append(rig.prefetch(base).answer)
        rig.settle()
        rig.push_down()
    assert started[0] == LENGTH
    assert started[-1] == 1
    assert rig.planner.holdings.foreseen.wasted_bytes < 5 * LENGTH * SLOT


def test_who_was_never_right_may_still_be_one_day_however_small_memory_is(rig: Rig) -> None:
    rig.push_down(*range(1, 9))
    for base in range(1, 9):
        rig.prefetch(base)
        rig.settle()
        rig.push_down()
    assert rig.room_bytes * LEAST < SLOT, "the least part of the room is less than a block"
    started = []
    for base in [*range(1, 9)] * 8:
        started.append(rig.prefetch(base).answer)
        rig.settle()
        rig.read(base)
        rig.push_down()
    assert started[0] == 1
    assert (started[-1] or 0) > 1, "what it brought up was used, and it is believed again"


def test_who_was_not_tried_yet_is_believed_for_a_little() -> None:
    """One session that does not come back would waste all that there is room for."""
    rig = Rig(share=1.0)
    rig.store_keys(chain(1, 3 * LENGTH), b"", Reuse(session=b"s", request=b"1"))
    rig.push_down()
    rig.hint(b"s", SessionState.WAITING, 10)
    rig.pass_time(9)
    assert rig.in_dram(1) == int(SLOTS * Reason(TOLD).stake) == 3


def test_what_one_errand_may_waste_is_earned_by_others() -> None:
    reason = Reason(GUESSED)
    assert reason.stake == LEAST
    for _ in range(40):
        reason.note(0.25, used=True)
    assert reason.stake == pytest.approx(0.9, abs=0.1)
    reason.note(0.5, used=False)
    assert reason.stake == pytest.approx(0.4, abs=0.1)
    reason.note(0.5, used=False)
    assert reason.stake == LEAST


def test_what_is_dirty_and_would_have_made_way_is_written(rig: Rig) -> None:
    """Or all that is clean goes to prefetches, and the next load waits for writes."""
    rig.push_down(1, 50, 51, 52, 53)
    for base in range(100, 104):
        rig.store(base)
    for base in range(50, 54):
        rig.read(base)
    dirty = rig.planner.holdings.dirty(rig.space_class)
    assert len(dirty) == SLOTS // 2
    rig.prefetch(1, within_ms=60_000)
    rig.settle()
    assert rig.in_dram(1) == LENGTH
    assert len(dirty) == SLOTS // 2 - LENGTH


# Sessions that will be back


def test_a_session_that_waits_finds_its_blocks_when_it_is_back(rig: Rig) -> None:
    rig.away()
    rig.hint(b"s", SessionState.WAITING, 60)
    rig.pass_time(20)
    assert rig.in_dram(1) == 0, "not before its time"
    rig.pass_time(38)
    assert rig.in_dram(1) == LENGTH
    rig.read(1, session=b"s", request=b"2")
    assert rig.planner.holdings.foreseen.used_bytes == LENGTH * SLOT


def test_what_is_known_of_a_session_is_all_that_its_latest_request_used(rig: Rig) -> None:
    keys = chain(1, 2 * LENGTH)
    rig.store(1)
    rig.store_keys(keys[LENGTH:], keys[LENGTH - 1], Reuse(session=b"s", request=b"1"))
    rig.push_down()
    rig.hint(b"s", SessionState.WAITING, 10)
    rig.pass_time(11)
    assert rig.planner.lookup("t", ChainQuery([rig.layout_id], keys)).in_dram == 2 * LENGTH


def test_nobody_brings_back_a_session_that_has_ended(rig: Rig) -> None:
    rig.away()
    rig.hint(b"s", SessionState.WAITING, 10)
    rig.hint(b"s", SessionState.ENDED)
    rig.pass_time(12)
    assert rig.in_dram(1) == 0


def test_what_was_to_come_up_for_a_session_is_called_off_when_it_ends(
    rig: Rig, one_by_one: None
) -> None:
    rig.away()
    rig.hint(b"s", SessionState.WAITING, 10)
    while not rig.queued:
        rig.advance(100)
    begun = len(rig.copies)
    assert begun < LENGTH
    rig.hint(b"s", SessionState.ENDED)
    rig.advance(100)
    assert rig.queued == begun


def test_blocks_that_are_each_others_parents_are_gone_through_once(rig: Rig) -> None:
    """Parents are what clients say they are: the walk to the root must end in a ring too."""
    ring = chain(1, LENGTH)
    rig.store_keys(ring, ring[-1], Reuse(session=b"s", request=b"1"))
    rig.push_down()
    rig.fill()
    rig.hint(b"s", SessionState.WAITING, 5)
    for _ in range(60):
        rig.advance(100)
        for _ in range(10):
            rig.planner.chores.next_turn()
            rig.planner.chores.go_on()
            rig.run()
        assert not len(rig.planner.chores)


def test_a_hint_for_a_session_that_is_not_known_changes_nothing(rig: Rig) -> None:
    rig.away()
    rig.hint(b"nobody", SessionState.WAITING, 1)
    rig.planner.hint("other", b"s", SessionState.WAITING, 1000.0)
    rig.pass_time(3)
    assert rig.in_dram(1) == 0


@pytest.mark.parametrize("expected_s", [-5.0, 0.0, 1e18])
def test_times_that_cannot_be_are_survived(rig: Rig, expected_s: float) -> None:
    rig.away()
    for _ in range(3):
        rig.hint(b"s", SessionState.WAITING, expected_s)
        rig.pass_time(0.5)
    rig.planner.check_integrity()


def test_a_request_that_still_stores_is_not_a_session_that_is_back(rig: Rig) -> None:
    rig.store(1, session=b"s", request=b"1")
    rig.hint(b"s", SessionState.WAITING, 10)
    rig.store(2, session=b"s", request=b"1")
    rig.push_down()
    rig.pass_time(11)
    assert rig.in_dram(2) == LENGTH


def test_what_does_not_stay_long_enough_is_not_brought_up(rig: Rig) -> None:
    stays = rig.planner.holdings.stays
    rig.away()
    stays._latest.extend([SECOND_NS // 10] * 8)
    rig.hint(b"s", SessionState.WAITING, 60)
    rig.pass_time(80)
    assert rig.planner.holdings.foreseen.unused_bytes == 0
    assert rig.in_dram(1) == 0


def test_sessions_that_are_remembered_are_bounded(rig: Rig) -> None:
    for number in range(MOST_SESSIONS + 100):
        query = ChainQuery([rig.layout_id], chain(1, 1), Reuse(session=number.to_bytes(4, "big")))
        rig.planner.prefetches.asked("t", [query], rig.now_ns)
    assert len(rig.planner.prefetches._returns) == MOST_SESSIONS


# When


def test_what_is_said_is_believed_as_far_as_it_was_true() -> None:
    said = Delays(told=True)
    begin = said.begin(1.0, 0.1, 0.9)
    assert begin is not None and 0.4 < begin < 0.9
    for _ in range(1000):
        said.note(2.0)
    begin = said.begin(1.0, 0.1, 0.9)
    assert begin is not None and 1.7 < begin < 2.0, "they take twice as long as they say"
    for number in range(1000):
        said.note(2.0 if number % 2 else None)
    assert said.begin(1.0, 0.1, 0.9) is None, "every second one does not come at all"


def test_how_long_somebody_is_waited_for_is_told_by_those_who_came() -> None:
    seen = Delays(told=False)
    for number in range(1000):
        seen.note(8.0 if number % 20 < 18 else 64.0)
    most = seen.wait(4.0, 0.8)
    assert most is not None
    assert most.end == pytest.approx(8.0, rel=0.2)
    assert most.mean == pytest.approx(5.0, rel=0.25), "until they come, or that time"
    all_of_them = seen.wait(4.0, 0.99)
    assert all_of_them is not None
    assert all_of_them.end == pytest.approx(64.0, rel=0.2)
    late = seen.wait(16.0, 0.8)
    assert late is not None and late.mean == pytest.approx(60.0, rel=0.1)
    for _ in range(200):
        seen.note(None)
    assert seen.wait(4.0, 0.9) is None, "too many do not come"


def test_where_nothing_is_said_nothing_is_expected_before_something_was_seen() -> None:
    unsaid = Delays(told=False)
    assert unsaid.begin(1e9, 0.0, 0.9) is None
    for _ in range(2 * int(ENOUGH)):
        unsaid.note(10.0)
    assert unsaid.begin(20.0, 1.0, 0.9) is not None
    assert unsaid.begin(0.5, 1.0, 0.9) is None, "it cannot be held for so long"


def test_how_long_things_stay_is_seen_of_a_few(rig: Rig) -> None:
    stays = rig.planner.holdings.stays
    assert stays.stay_ns == FOR_GOOD
    rig.push_down(1)
    rig.now_ns += EVERY_NS
    rig.planner.tick(rig.now_ns)
    rig.read(1)
    rig.pass_time(7)
    rig.fill()
    rig.fill(200)
    assert 6.5 * SECOND_NS < stays.stay_ns < 8 * SECOND_NS
    assert len(stays._watched) <= WATCHED
