"""What is read straight from NVMe into a GPU's memory: nobody is given what is not there, nobody is
given it who does not read there, and nothing is left behind when it goes."""

from __future__ import annotations

import random

import pytest

from kvstore.core.catalog import Block, Layout
from kvstore.core.places.shares import NO_PLACE
from kvstore.core.places.straight import GUESTS_SHARE, STRAIGHT_SHARE, Slots
from kvstore.core.places.vram_room import SETTLES_NS
from kvstore.core.sessions import Session
from kvstore.core.tickets import AcquireTicket
from kvstore.types import GPU_ONLY, ChainQuery, LayoutSpec, LeaseGrant, Segment, Tier
from tests.simulation.model import LEASE_MS, SLOT, ModelGpu, Shell, chain, layout, make_planner

READER = b"engine"


class Rig(Shell):
    """Blocks on NVMe, and an engine whose worker reads on the first GPU, which has extents."""

    def __init__(
        self, slots: int = 16, gpus: int = 1, *, warm: bool = True,
        dram_slots: int = 16, nvme_slots: int = 64,
    ) -> None:  # fmt: skip
        super().__init__(make_planner(dram_slots, nvme_slots))
        self.client = self.session(1)
        self.engine = self.session(2)
        self.worker = self.session(3)
        self.lid = self.planner.register_layout("t", layout())
        for number in range(gpus):
            gpu = ModelGpu(self, f"gpu{number}", slots, 1 + 1000 * number)
            gpu.mirrors.straight_bytes = SLOT
        self.gpu = self.gpus[0]
        self.reads(self.gpu)
        while warm and len(self.gpu.open) < self.gpu.mirrors.space.max_extents:
            self.gpu.mirrors.too_small.add(self.layout.dram_class)
            self.work()

    @property
    def layout(self) -> Layout:
        return self.planner.catalog.layout("t", self.lid)

    def reads(self, gpu: ModelGpu, session: Session | None = None, reader: bytes = READER) -> None:
        gpu.mirrors.reads(self.layout, session or self.worker, self.now_ns, reader)

    def work(self, free: int = 1 << 40) -> None:
        self.gpu.begin(free)
        self.gpu.end()
        self.check()

    def check(self) -> None:
        self.planner.check_integrity()
        for gpu in self.gpus:
            gpu.check()

    def store(self, keys: list[bytes]) -> None:
        """Value and checksum are one number, new each time."""
        slots = self.slots(self.client, self.lid, len(keys))
        sums = [random.getrandbits(60) for _ in keys]
        for slot, value in zip(slots, sums, strict=True):
            self.memory[Tier.DRAM][self.planner.slot(self.client, slot).address] = value
        self.planner.commit(
            self.client, self.lid, [Segment(b"", keys, slots, sums)], reserve=0, now_ns=self.now_ns
        )
        self.run()

    def cold(self, keys: list[bytes]) -> list[bytes]:
        """Stored, and on NVMe only."""
        self.store(keys)
        self.planner.flush("t", drop=True)
        self.run()
        self.settle()
        assert self.planner.lookup("t", ChainQuery([self.lid], keys)) == (len(keys), 0)
        return keys

    def ask(
        self, keys: list[bytes], reader: bytes = READER, *, wait: bool = True,
        session: Session | None = None,
    ) -> AcquireTicket:  # fmt: skip
        ticket = self.acquire(session or self.engine, [self.lid], keys, wait=wait, reader=reader)
        self.check()
        return ticket

    def get(self, keys: list[bytes], reader: bytes = READER, *, wait: bool = True) -> LeaseGrant:
        ticket = self.ask(keys, reader, wait=wait)
        self.settle()
        self.check()
        assert ticket.answer is not None
        return ticket.answer[0]

    def read(self, grant: LeaseGrant) -> list[object]:
        """What a worker on the first GPU reads; None for what it does not find."""
        return [
            self.gpu.read(address, checksum)
            if address >= GPU_ONLY
            else self.memory[Tier.DRAM][address]
            for address, checksum in zip(grant.addresses, grant.checksums, strict=True)
        ]

    def block(self, key: bytes) -> Block:
        block = self.planner.catalog.find(self.layout, key)
        assert block is not None
        return block


def straight(grant: LeaseGrant) -> int:
    return sum(address >= GPU_ONLY for address in grant.addresses)


def test_a_block_on_nvme_is_read_into_the_memory_of_the_gpu_that_reads_it() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 3))
    grant = rig.get(keys)
    assert (grant.held, straight(grant), grant.from_dram) == (3, 3, 0)
    assert rig.read(grant) == grant.checksums
    assert rig.planner.lookup("t", ChainQuery([rig.lid], keys)).in_dram == 0
    assert rig.planner.residency.dram.space.used_bytes == 0


def test_nothing_is_leased_before_its_bytes_are_there() -> None:
    rig = Rig()
    ticket = rig.ask(rig.cold(chain(1, 2)))
    assert ticket.answer is None
    assert not rig.gpu.table
    rig.end_copy()
    assert ticket.answer is None
    rig.end_copy()
    assert ticket.answer is not None
    assert rig.read(ticket.answer[0]) == ticket.answer[0].checksums


def test_what_is_there_is_a_hit_for_who_does_not_wait() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 3))
    rig.get(keys)
    again = rig.ask(keys, wait=False).answer
    assert again is not None
    assert (again[0].held, straight(again[0])) == (3, 3)
    assert not rig.copies
    assert rig.gpu.mirrors.hits == 3
    assert rig.planner.counters.acquired_hits_dram == 0


@pytest.mark.parametrize(
    "who", ["nobody", "another", "remote", "other layout", "other tenant", "on two", "not straight",
            "too large", "asked for under none", "two of no name"],
)  # fmt: skip
def test_nobody_else_is_given_what_is_on_a_gpu_only(who: str) -> None:
    rig = Rig(gpus=2)
    keys = rig.cold(chain(1, 2))
    reader, session = READER, rig.engine
    match who:
        case "nobody":
            reader = b""
        case "another":
            reader = b"another engine"
        case "remote":
            session = rig.session(9, local=False)
        case "other layout":
            other = rig.planner.register_layout("t", layout("n"))
            rig.gpu.mirrors.reads_no_more(rig.layout, rig.worker)
            rig.gpu.mirrors.reads(rig.planner.catalog.layout("t", other), rig.worker, 0, READER)
        case "other tenant":
            rig.gpu.mirrors.reads_no_more(rig.layout, rig.worker)
            other = rig.planner.register_layout("u", layout())
            rig.gpu.mirrors.reads(rig.planner.catalog.layout("u", other), rig.worker, 0, READER)
        case "on two":
            rig.reads(rig.gpus[1], rig.session(9))
        case "not straight":
            rig.gpu.mirrors.straight_bytes = 0
        case "too large":
            rig.gpu.mirrors.straight_bytes = SLOT - 1
        case "two of no name":
            rig.reads(rig.gpu, reader=b"")
            reader = b""
        case "asked for under none":
            rig.reads(rig.gpu, reader=b"")
    ticket = rig.ask(keys, reader, session=session)
    rig.settle()
    assert ticket.answer is not None
    assert (ticket.answer[0].held, straight(ticket.answer[0])) == (2, 0)
    assert not rig.gpu.table


def test_who_reads_where_there_are_two_is_not_taken_for_one_where_only_one_reads_straight() -> None:
    rig = Rig(gpus=2)
    rig.gpus[1].mirrors.straight_bytes = 0
    rig.reads(rig.gpus[1], rig.session(9))
    assert straight(rig.get(rig.cold(chain(1, 2)))) == 0


def test_bytes_that_a_codec_made_are_not_read_straight() -> None:
    rig = Rig()
    coded = LayoutSpec("c", "float32", 16, SLOT, codec="fp8")
    lid = rig.planner.register_layout("t", coded)
    layout_ = rig.planner.catalog.layout("t", lid)
    assert not rig.gpu.mirrors.reads_straight(layout_)
    assert rig.gpu.mirrors.reads_straight(rig.layout)


def test_a_block_in_dram_is_leased_from_dram() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    assert straight(rig.get(keys)) == 2
    assert straight(rig.get(keys, b"")) == 0, "it has come into DRAM beside"
    grant = rig.get(keys)
    assert (straight(grant), grant.from_dram) == (0, 2)


def test_who_waits_for_a_block_waits_for_the_one_transfer_into_its_gpu() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    first = rig.ask(keys)
    second = rig.ask(keys)
    assert len(rig.copies) == 2
    other = rig.ask(keys, b"")
    assert len(rig.copies) == 4, "who does not read there has it brought into DRAM"
    rig.settle()
    for ticket, where in ((first, 2), (second, 2), (other, 0)):
        assert ticket.answer is not None
        assert (ticket.answer[0].held, straight(ticket.answer[0])) == (2, where)
    rig.check()


def test_what_is_in_dram_behind_what_is_on_a_gpu_is_leased_from_dram() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    assert straight(rig.get(keys)) == 2
    rig.get(keys[1:], b"")
    grant = rig.get(keys)
    assert [address >= GPU_ONLY for address in grant.addresses] == [True, False]


def test_what_comes_into_dram_already_is_not_read_a_second_time() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    rig.ask(keys, b"")
    ticket = rig.ask(keys)
    assert len(rig.copies) == 2
    rig.settle()
    assert ticket.answer is not None
    assert (ticket.answer[0].held, straight(ticket.answer[0])) == (2, 0)


@pytest.mark.parametrize("running", [False, True])
def test_a_place_that_is_given_back_meanwhile_is_no_hit_and_is_written_no_more(
    running: bool,
) -> None:
    rig = Rig(slots=4)
    keys = rig.cold(chain(1, 2))
    ticket = rig.ask(keys)
    copies = list(rig.copies)
    if running:
        rig.end_copy()
        rig.check()
    rig.work(free=0)
    assert rig.gpu.mirrors.space.used_bytes == 0
    assert not rig.gpu.open
    assert copies[1].target.address == NO_PLACE
    assert not rig.gpu.table
    rig.settle()
    rig.check()
    assert ticket.answer is not None
    assert ticket.answer[0].held == 0
    assert rig.held(rig.client, rig.lid, keys) == 2, "nothing was damaged"


def test_what_arrives_after_its_memory_went_is_named_nowhere() -> None:
    rig = Rig(slots=4)
    keys = rig.cold(chain(1, 2))
    ticket = rig.ask(keys)
    rig.work(free=0)
    second = rig.ask(keys)
    assert len(rig.copies) == 4, "nobody waits for what will not be there"
    for copy in rig.copies[:2]:
        rig.planner.transfer_done(copy, rig.now_ns)
    del rig.copies[:2]
    rig.run()
    rig.check()
    assert not rig.gpu.table
    rig.settle()
    rig.check()
    assert ticket.answer is not None
    assert ticket.answer[0].held == 0
    assert second.answer is not None
    assert second.answer[0].held == 2


def test_memory_is_given_back_under_a_lease_and_the_lease_ends_as_ever() -> None:
    rig = Rig(slots=4)
    grant = rig.get(rig.cold(chain(1, 2)))
    rig.work(free=0)
    assert rig.read(grant) == [None] * 2
    rig.planner.release(rig.engine, [grant.lease_id])
    rig.run()
    rig.check()
    assert rig.planner.open_leases == 0


def test_the_place_of_a_transfer_is_nobody_elses_before_it_has_ended() -> None:
    rig = Rig(slots=8)
    keys = rig.cold(chain(1, 2))
    first = rig.ask(keys)
    places = {copy.target.address for copy in rig.copies}
    rig.planner.clear("t")
    rig.planner.give_up(first, rig.now_ns)
    rig.run()
    rig.check()
    assert rig.copies, "they have begun"
    more = chain(2, 2)
    rig.store(more)
    rig.planner.flush("t", drop=True)
    rig.run()
    under_way = [copy for copy in rig.copies if copy.target.tier is Tier.VRAM]
    while any(copy.target.tier is not Tier.VRAM for copy in rig.copies):
        rig.end_copy(next(i for i, c in enumerate(rig.copies) if c.target.tier is not Tier.VRAM))
    rig.ask(more)
    late = [c for c in rig.copies if c.target.tier is Tier.VRAM and c not in under_way]
    assert late
    assert not places & {copy.target.address for copy in late}
    rig.settle()
    rig.check()


@pytest.mark.parametrize("how", ["cleared", "damaged", "failed", "left"])
def test_what_nvme_has_no_more_is_not_found_on_a_gpu(how: str) -> None:
    rig = Rig(slots=16, nvme_slots=8)
    keys = rig.cold(chain(1, 2))
    grant = rig.get(keys)
    assert rig.read(grant) == grant.checksums
    match how:
        case "cleared":
            rig.planner.clear("t")
        case "damaged":
            rig.ask(keys, b"")
            rig.corrupt_copy()
            rig.corrupt_copy()
        case "failed":
            rig.planner.tier_failed(rig.now_ns)
        case "left":
            rig.cold(chain(2, 8)[:6])
            rig.store(chain(3, 8)[:6])
            rig.planner.flush("t", drop=True)
            rig.run()
            rig.settle()
    rig.run()
    rig.check()
    assert rig.read(grant) == [None, None]
    assert not rig.gpu.table
    rig.planner.release(rig.engine, [grant.lease_id])
    rig.settle()
    rig.check()


@pytest.mark.parametrize("how", ["cleared", "failed"])
def test_what_goes_while_it_is_read_is_never_named(how: str) -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    ticket = rig.ask(keys)
    if how == "cleared":
        rig.planner.clear("t")
    else:
        rig.planner.tier_failed(rig.now_ns)
    rig.run()
    rig.settle()
    rig.check()
    assert ticket.answer is not None
    assert ticket.answer[0].held == 0
    assert not rig.gpu.table
    assert rig.gpu.mirrors.space.used_bytes == 0


def test_damage_that_a_straight_read_finds_is_the_blocks_end() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    ticket = rig.ask(keys)
    rig.corrupt_copy(1)
    rig.settle()
    rig.check()
    assert ticket.answer is not None
    assert ticket.answer[0].held == 1
    assert rig.held(rig.client, rig.lid, keys) == 1


def test_a_read_that_fails_leaves_the_block_where_it_was() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    ticket = rig.ask(keys)
    rig.end_copy(1, fail=True)
    rig.settle()
    rig.check()
    assert ticket.answer is not None
    assert ticket.answer[0].held == 1
    assert rig.gpu.mirrors.space.used_bytes == SLOT
    assert straight(rig.get(keys)) == 2


def test_who_waits_no_longer_leaves_no_place_taken() -> None:
    rig = Rig(slots=32)
    before, keys = rig.cold(chain(1, 3)), rig.cold(chain(2, 4))
    rig.ask(before)
    ticket = rig.ask(keys)
    assert len(rig.copies) == 3, "the rest waits"
    assert rig.gpu.mirrors.space.used_bytes == 7 * SLOT
    rig.planner.give_up(ticket, rig.now_ns)
    rig.run()
    rig.check()
    assert rig.gpu.mirrors.space.used_bytes == 3 * SLOT
    rig.settle()
    rig.check()


@pytest.mark.parametrize("how", ["the session ends", "the lease expires"])
def test_a_lease_that_ends_leaves_what_was_read_for_the_next(how: str) -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 2))
    rig.get(keys)
    if how == "the session ends":
        rig.planner.close_session(rig.engine)
        rig.engine = rig.session(8)
    else:
        rig.advance(LEASE_MS + 1)
    rig.run()
    rig.check()
    assert rig.planner.open_leases == 0
    again = rig.get(keys, wait=False)
    assert (again.held, straight(again)) == (2, 2)


def test_a_flood_leaves_what_is_hot_and_what_is_leased() -> None:
    rig = Rig(slots=16, nvme_slots=64, dram_slots=64)
    hot = rig.cold(chain(1, 4))
    for _ in range(2):
        rig.planner.release(rig.engine, [rig.get(hot).lease_id])
    kept = rig.get(rig.cold(chain(2, 3)))
    for base in range(3, 9):
        grant = rig.get(rig.cold(chain(base, 6)))
        assert grant.held == 6, "what finds no room there comes into DRAM"
        rig.planner.release(rig.engine, [grant.lease_id])
        rig.run()
        assert rig.gpu.mirrors.straight.held_bytes <= STRAIGHT_SHARE * 16 * SLOT
    assert rig.read(kept) == kept.checksums
    assert straight(rig.get(hot, wait=False)) == 4
    assert rig.gpu.mirrors.evictions > 0


def test_what_lands_and_what_is_read_straight_leave_a_part_to_what_is_hot() -> None:
    rig = Rig(slots=16, dram_slots=32)
    slots = rig.slots(rig.client, rig.lid, 8)
    (landing,) = rig.planner.land(rig.client, rig.lid, slots, not_on=(), now_ns=rig.now_ns)
    assert NO_PLACE not in landing.addresses
    grant = rig.get(rig.cold(chain(1, 6)))
    assert (grant.held, straight(grant)) == (6, GUESTS_SHARE * 16 - 8)
    rig.planner.abort(rig.client, slots)
    rig.check()


def test_who_asks_for_more_than_there_is_room_for_keeps_the_first_of_it() -> None:
    rig = Rig(slots=8, dram_slots=32)
    grant = rig.get(rig.cold(chain(1, 14)))
    assert grant.held == 14
    assert [address >= GPU_ONLY for address in grant.addresses] == [True] * 4 + [False] * 10
    assert rig.read(grant) == grant.checksums


def test_a_gpu_without_an_extent_gets_one_and_the_first_blocks_come_into_dram() -> None:
    rig = Rig(warm=False)
    keys = rig.cold(chain(1, 2))
    assert straight(rig.get(keys)) == 0
    rig.gpu.begin()
    rig.gpu.end()
    rig.gpu.begin()
    rig.gpu.end()
    assert rig.gpu.open
    rig.planner.flush("t", drop=True)
    rig.advance(LEASE_MS + 1)
    rig.planner.flush("t", drop=True)
    rig.run()
    assert straight(rig.get(keys)) == 2


def test_nothing_is_read_into_an_extent_that_may_never_be() -> None:
    rig = Rig(slots=16, warm=False)
    keys = rig.cold(chain(1, 2))
    rig.gpu.mirrors.too_small.add(rig.layout.dram_class)
    rig.gpu.begin()
    rig.gpu.end()
    rig.gpu.mirrors.too_small.add(rig.layout.dram_class)
    rig.gpu.begin()
    assert rig.gpu.under_way is not None
    assert rig.gpu.under_way.opens
    assert straight(rig.get(keys)) == 0
    rig.gpu.end(opened=False)
    rig.check()


def test_a_gpu_that_is_lost_ends_what_is_under_way_and_takes_no_more() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 3))
    grant = rig.get(keys[:1])
    ticket = rig.ask(keys)
    rig.gpu.lose()
    rig.check()
    rig.settle()
    rig.check()
    assert rig.read(grant) == [None]
    assert ticket.answer is not None
    assert ticket.answer[0].held == 0
    assert straight(rig.get(keys)) == 0
    assert rig.get(keys).held == 3
    block = rig.block(keys[0])
    assert block.nvme is not None
    assert rig.gpu.mirrors.straight.bring(block.nvme, rig.now_ns) is None
    assert rig.gpu.mirrors.idle


def test_who_waits_for_room_gets_none_on_a_gpu_that_reads_straight_no_more() -> None:
    rig = Rig()
    block = rig.block(rig.cold(chain(1, 1))[0])
    assert block.nvme is not None
    rig.gpu.mirrors.straight_bytes = 0
    assert rig.gpu.mirrors.straight.bring(block.nvme, rig.now_ns) is None


def test_memory_of_a_gpu_is_no_suspect() -> None:
    rig = Rig()
    grant = rig.get(rig.cold(chain(1, 2)))
    assert rig.planner.suspects("t", grant.addresses) == []
    rig.check()


def test_what_is_read_on_a_gpu_stays_on_nvme() -> None:
    """Its uses count there, or it would leave as what nobody asks for."""
    rig = Rig(nvme_slots=32)
    keys = rig.cold(chain(1, 4))
    for base in range(2, 16):
        rig.cold(chain(base, 4))
        grant = rig.get(keys)
        assert (grant.held, straight(grant)) == (4, 4)
    assert rig.held(rig.client, rig.lid, keys) == 4


def test_what_is_there_is_offered_at_no_cost() -> None:
    rig = Rig()
    keys = rig.cold(chain(1, 3))
    rig.get(keys[:2])
    ticket = rig.ask(keys)
    nominal = rig.planner.residency.transfers.costs[Tier.DRAM].nominal.work_ns(SLOT)
    assert ticket.missing_ns == nominal
    assert len(rig.copies) == 1
    rig.settle()
    soon = rig.acquire(rig.engine, [rig.lid], keys, wait=True, within_ms=1e-5, reader=READER)
    assert soon.answer is not None
    assert (soon.answer[0].held, soon.answer[0].refusal) == (3, None)


SLOTS_BYTES = 3 * SLOT


def looks(rig: Rig, free: int) -> Slots:
    rig.work(free)
    return rig.gpu.mirrors.straight.slots


def test_slots_are_taken_where_others_have_plenty_and_go_back_when_they_have_not() -> None:
    rig = Rig()
    straight_, reserve = rig.gpu.mirrors.straight, rig.gpu.mirrors._reserve_bytes
    straight_.slots_bytes = SLOTS_BYTES
    enough = reserve + 2 * SLOTS_BYTES
    assert looks(rig, enough - 1) is Slots.SHORT
    assert looks(rig, enough) is Slots.TAKEN
    assert looks(rig, reserve) is Slots.TAKEN, "what they took is their own"
    assert looks(rig, reserve - 1) is Slots.SHORT
    rig.advance(4_000)
    assert looks(rig, enough) is Slots.SHORT, "not at once again"
    rig.advance(1_001)
    assert looks(rig, enough) is Slots.TAKEN
    straight_.not_taken(rig.now_ns)
    assert looks(rig, enough) is Slots.SHORT
    rig.gpu.mirrors.reads_no_more(rig.layout, rig.worker)
    assert not straight_.idle, "they are there until that was seen"
    assert looks(rig, enough) is Slots.UNUSED
    assert straight_.idle


@pytest.mark.parametrize("who", ["nobody", "of no name", "too large", "not straight"])
def test_slots_are_for_those_who_read_straight(who: str) -> None:
    rig = Rig()
    rig.gpu.mirrors.straight.slots_bytes = SLOTS_BYTES
    rig.gpu.mirrors.reads_no_more(rig.layout, rig.worker)
    match who:
        case "of no name":
            rig.reads(rig.gpu, reader=b"")
        case "too large":
            rig.gpu.mirrors.straight_bytes = SLOT - 1
            rig.reads(rig.gpu)
        case "not straight":
            rig.reads(rig.gpu)
            rig.gpu.mirrors.straight_bytes = 0
    assert looks(rig, 1 << 40) is Slots.UNUSED
    assert rig.gpu.mirrors.straight.idle


def test_without_slots_blocks_come_into_dram_and_those_that_are_there_are_found() -> None:
    rig = Rig()
    before = rig.cold(chain(1, 2))
    rig.get(before)
    rig.gpu.mirrors.straight.has_slots = False
    assert straight(rig.get(rig.cold(chain(2, 2)))) == 0
    again = rig.get(before, wait=False)
    assert straight(again) == 2
    assert rig.read(again) == again.checksums


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_what_is_leased_is_there_or_is_a_miss(seed: int) -> None:
    """Reads, pressure, clears, damage, failing copies and lost sessions in any order: a lease
    shows what was stored under its name, or nothing where a GPU has it no more."""
    luck = random.Random(seed)
    random.seed(seed)
    rig = Rig(slots=luck.choice([8, 16]), gpus=2, dram_slots=12, nvme_slots=luck.choice([16, 64]))
    stored: dict[bytes, set[object]] = {}
    leases: list[tuple[AcquireTicket, list[bytes]]] = []
    read = 0
    for _ in range(600):
        rig.now_ns += luck.randrange(1 << 27)
        keys = chain(luck.randrange(5), luck.randint(1, 6))
        match luck.randrange(14):
            case 0 | 1:
                space, room = rig.planner.residency.dram.space, rig.layout.dram_class
                absent = [k for k in keys if rig.planner.catalog.find(rig.layout, k) is None]
                if absent and space.free_slots(room) >= len(absent):
                    rig.store(absent)
                    for key in absent:
                        block = rig.planner.catalog.find(rig.layout, key)
                        if block is not None:
                            stored.setdefault(key, set()).add(block.checksum)
            case 2 | 3:
                rig.planner.flush("t", drop=True)
            case 4 | 5 | 6 | 7:
                reader = luck.choice([READER, READER, READER, b"", b"another"])
                leases.append((rig.ask(keys, reader, wait=luck.random() < 0.9), keys))
            case 8 | 9:
                gpu = luck.choice(rig.gpus)
                if gpu.under_way is None:
                    gpu.begin(luck.choice([0, *[1 << 40] * 20]))
                else:
                    gpu.end(well=luck.random() < 0.9, opened=luck.random() < 0.9)
            case 10 | 11:
                for _ in range(luck.randrange(16)):
                    if rig.copies:
                        index = luck.randrange(len(rig.copies))
                        kind = luck.random()
                        if kind < 0.05:
                            rig.end_copy(index, fail=True)
                        elif kind < 0.07:
                            rig.corrupt_copy(index)
                        else:
                            rig.end_copy(index)
                if rig.forgets:
                    rig.end_forget()
            case 12:
                if luck.random() < 0.2:
                    rig.reads(rig.gpus[1], luck.choice([rig.worker, rig.client]))
                else:
                    for session in (rig.worker, rig.client):
                        rig.gpus[1].mirrors.reads_no_more(rig.layout, session)
                if luck.random() < 0.1:
                    rig.planner.clear("t")
            case 13:
                rig.tick()
                if leases and luck.random() < 0.3:
                    rig.planner.give_up(luck.choice(leases)[0], rig.now_ns)
        rig.run()
        rig.check()
        for ticket, asked in leases:
            grant = None if ticket.answer is None else ticket.answer[0]
            if grant is None or grant.lease_id not in ticket.session.leases:
                continue
            for index in range(grant.held):
                address, checksum = grant.addresses[index], grant.checksums[index]
                assert checksum in stored[asked[index]]
                value: object = None
                if address >= GPU_ONLY:
                    for gpu in rig.gpus:
                        value = value or gpu.read(address, checksum)
                    read += value is not None
                else:
                    value = rig.memory[Tier.DRAM][address]
                assert value in (checksum, None)
                assert value is not None or address >= GPU_ONLY
        while len(leases) > 6:
            ticket, _ = leases.pop(luck.randrange(len(leases)))
            if ticket.answer is not None:
                rig.planner.release(ticket.session, [ticket.answer[0].lease_id])
            else:
                rig.planner.withdraw(ticket, rig.now_ns)
    assert read > 10
    for session in (rig.engine, rig.worker, rig.client):
        for gpu in rig.gpus:
            gpu.mirrors.reads_no_more(rig.layout, session)
        rig.planner.close_session(session)
    rig.settle()
    rig.now_ns += SETTLES_NS
    for gpu in rig.gpus:
        gpu.wind_down()
    rig.check()
