"""Copies in a GPU's memory: only of what is in DRAM, only while others can spare the room."""

from __future__ import annotations

import random

import pytest

from kvstore.core.actions import Action, Mirrored, Unmirrored
from kvstore.core.catalog import Layout
from kvstore.core.places.mirrors import Mirrors, MirrorWork
from kvstore.core.places.vram_room import CALM_NS, SETTLES_NS
from kvstore.core.space import Space
from kvstore.types import PutOutcome
from tests.simulation.model import SLOT, Shell, chain, layout, make_planner

EXTENT = 4 * SLOT
PLENTY = 1 << 40


class Gpu(Shell):
    """Ends the copies to a GPU at once, unless told otherwise, and keeps its workers' table."""

    def __init__(self, slots: int = 8, reserve: int = EXTENT, **sizes: int) -> None:
        super().__init__(make_planner(**({"dram_slots": 16, "nvme_slots": 0} | sizes)))
        self.mirrors = Mirrors(self.planner.holdings, Space(slots * SLOT, EXTENT), reserve)
        self.planner.holdings.mirrors.append(self.mirrors)
        self.table: dict[int, int] = {}
        self.open: set[int] = set()
        self.client = self.session(1)
        self.lid = self.planner.register_layout("t", layout())
        self.reader = self.session(2)
        self.mirrors.reads(self.layout, self.reader)
        take = self.planner.take_actions

        def noting(now_ns: int) -> list[Action]:
            actions = take(now_ns)
            for action in actions:
                self.note(action)
            return actions

        self.planner.take_actions = noting  # type: ignore[method-assign]

    @property
    def layout(self) -> Layout:
        return self.planner.catalog.layout("t", self.lid)

    def note(self, action: object) -> None:
        match action:
            case Mirrored(_, mirror):
                assert mirror.source.address not in self.table
                assert mirror.address // EXTENT in self.open
                self.table[mirror.source.address] = mirror.address
            case Unmirrored(_, mirror):
                assert self.table.pop(mirror.source.address) == mirror.address

    def store(self, keys: list[bytes], lid: bytes | None = None) -> None:
        outcomes = self.put(self.client, lid or self.lid, keys)
        assert set(outcomes) == {PutOutcome.STORED}

    def warm(self, keys: list[bytes]) -> list[int]:
        """Store what is hot then: where it lies in DRAM."""
        self.store(keys)
        return self.use(keys)

    def use(self, keys: list[bytes], times: int = 2, lid: bytes | None = None) -> list[int]:
        """Where they lie in DRAM."""
        grant = None
        for _ in range(times):
            answer = self.acquire(self.client, [lid or self.lid], keys).answer
            assert answer is not None
            (grant,) = answer
            assert grant.held == len(keys)
            self.planner.release(self.client, [grant.lease_id])
        self.run()
        assert grant is not None
        return list(grant.addresses)

    def begin(self, free: int = PLENTY) -> MirrorWork:
        work = self.mirrors.work(free, self.now_ns)
        self.run()
        self.open -= set(work.closes)
        self.open |= set(work.opens)
        assert len(self.open) <= self.mirrors.space.max_extents
        return work

    def end(self, work: MirrorWork, *, well: bool = True) -> None:
        if work.opens:
            self.mirrors.opened()
        for mirror in work.copies:
            self.mirrors.ended(mirror, well=well)
        self.run()
        self.planner.check_integrity()

    def work(self, free: int = PLENTY) -> MirrorWork:
        work = self.begin(free)
        self.end(work)
        return work


def test_what_is_asked_for_again_is_copied_and_named() -> None:
    gpu = Gpu()
    keys = chain(1, 3)
    gpu.store(keys)
    gpu.use(keys, times=1)
    assert not gpu.work()
    addresses = gpu.use(keys, times=1)
    work = gpu.work()
    assert len(work.copies) == 3
    assert len(work.opens) == 1
    assert set(gpu.table) == set(addresses)


def test_nothing_is_copied_for_nobody() -> None:
    gpu = Gpu()
    gpu.store(chain(1, 3))
    gpu.mirrors.reads_no_more(gpu.layout, gpu.reader)
    gpu.use(chain(1, 3), times=5)
    assert gpu.mirrors.idle
    gpu.mirrors.reads(gpu.layout, gpu.reader)
    gpu.use(chain(1, 3))
    assert len(gpu.work().copies) == 3
    gpu.mirrors.reads_no_more(gpu.layout, gpu.reader)
    assert len(gpu.work().closes) == 1, "who comes next finds the GPU as it was"
    assert gpu.mirrors.idle
    assert not gpu.table


def test_a_mirror_goes_before_its_slot_in_dram_is_anothers() -> None:
    gpu = Gpu(dram_slots=4)
    keys = chain(1, 4)
    gpu.warm(keys)
    gpu.work()
    assert len(gpu.table) == 4
    gpu.store(chain(2, 4))
    assert not gpu.table
    gpu.planner.check_integrity()


def test_what_is_cleared_while_it_is_leased_is_named_no_more() -> None:
    gpu = Gpu()
    keys = chain(1, 2)
    gpu.warm(keys)
    gpu.work()
    gpu.acquire(gpu.client, [gpu.lid], keys)
    gpu.planner.clear("t")
    gpu.run()
    assert not gpu.table
    gpu.planner.check_integrity()


def test_what_goes_while_it_is_copied_is_never_named() -> None:
    gpu = Gpu()
    keys = chain(1, 2)
    gpu.warm(keys)
    work = gpu.begin()
    gpu.planner.clear("t")
    gpu.run()
    gpu.planner.check_integrity()
    gpu.end(work)
    assert not gpu.table
    assert gpu.mirrors.space.used_bytes == 0


def test_a_copy_that_fails_leaves_nothing_behind() -> None:
    gpu = Gpu()
    gpu.warm(chain(1, 2))
    gpu.end(gpu.begin(), well=False)
    assert not gpu.table
    assert gpu.mirrors.space.used_bytes == 0
    gpu.use(chain(1, 2), times=1)
    assert len(gpu.work().copies) == 2


def test_what_is_used_more_takes_the_place_of_what_is_used_less() -> None:
    gpu = Gpu(slots=4)
    gpu.store(chain(1, 4))
    gpu.store(chain(2, 4))
    gpu.use(chain(1, 4), times=3)
    gpu.work()
    gpu.use(chain(2, 4), times=3)
    assert not gpu.work(), "as good is not better"
    addresses = gpu.use(chain(2, 4), times=1)
    gpu.work()
    assert set(gpu.table) == set(addresses)
    assert gpu.mirrors.evictions == 4


def test_memory_that_others_need_is_given_back_until_they_have_it() -> None:
    gpu = Gpu(slots=12, reserve=2 * EXTENT)
    keys = chain(1, 12)
    gpu.warm(keys)
    while gpu.work():
        gpu.use(keys, times=1)
    assert len(gpu.table) == 12
    assert gpu.mirrors.space.spare_extents == 0
    lacking_two = gpu.work(free=EXTENT // 2)
    assert len(lacking_two.closes) == 2
    assert len(gpu.table) == 4
    assert not gpu.work(free=EXTENT // 2), "readers need their time to let go"
    gpu.now_ns += SETTLES_NS + 1
    assert len(gpu.work(free=0).closes) == 1
    assert not gpu.table


def test_after_pressure_nothing_is_taken_for_a_while() -> None:
    gpu = Gpu(reserve=EXTENT)
    gpu.warm(chain(1, 4))
    assert not gpu.work(free=0)
    gpu.use(chain(1, 4))
    assert not gpu.work()
    gpu.now_ns += CALM_NS + 1
    gpu.use(chain(1, 4))
    assert not gpu.work(free=2 * EXTENT), "it would have to go back at once"
    gpu.use(chain(1, 4))
    assert gpu.work().opens


def test_an_extent_that_there_is_no_memory_for_is_forgotten() -> None:
    gpu = Gpu()
    gpu.warm(chain(1, 4))
    work = gpu.begin()
    for mirror in work.copies:
        gpu.mirrors.ended(mirror, well=False)
    gpu.mirrors.not_opened(work.opens[0], gpu.now_ns)
    gpu.open -= set(work.opens)
    gpu.planner.check_integrity()
    gpu.use(chain(1, 4))
    assert not gpu.work()
    gpu.now_ns += CALM_NS + 1
    gpu.use(chain(1, 4))
    assert len(gpu.work().copies) == 4


def test_a_layout_that_has_nothing_gets_its_first_extent_from_another() -> None:
    gpu = Gpu(slots=8)
    gpu.warm(chain(1, 8))
    while gpu.work():
        gpu.use(chain(1, 8), times=1)
    other = gpu.planner.register_layout("t", layout("n", slots=2))
    gpu.mirrors.reads(gpu.planner.catalog.layout("t", other), gpu.reader)
    gpu.store(chain(2, 2), other)
    gpu.use(chain(2, 2), lid=other)
    work = gpu.work()
    assert (len(work.closes), len(work.opens), len(work.copies)) == (1, 1, 2)


def test_a_lost_gpu_leaves_nothing_behind() -> None:
    gpu = Gpu()
    gpu.warm(chain(1, 4))
    gpu.work()
    gpu.mirrors.lost()
    gpu.run()
    assert not gpu.table
    gpu.use(chain(1, 4))
    assert len(gpu.mirrors) == 0
    gpu.planner.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_in_whatever_order_the_table_is_right(seed: int) -> None:
    """Copies under way across evictions, clears, pressure and failures: what the table names is
    in DRAM, at that address, and its bytes are on the GPU."""
    random_ = random.Random(seed)
    gpu = Gpu(slots=12, reserve=EXTENT, dram_slots=16, nvme_slots=random_.choice([0, 64]))
    under_way: list[MirrorWork] = []
    for _ in range(300):
        gpu.now_ns += random_.randrange(1 << 29)
        match random_.randrange(8):
            case 0 | 1:
                keys = chain(random_.randrange(6), random_.randint(1, 5))
                gpu.put(gpu.client, gpu.lid, keys)
            case 2 | 3 | 4:
                keys = chain(random_.randrange(6), 5)
                ticket = gpu.acquire(gpu.client, [gpu.lid], keys)
                if ticket.answer and random_.random() < 0.8:
                    gpu.planner.release(gpu.client, [ticket.answer[0].lease_id])
            case 5 if not under_way:
                under_way.append(gpu.begin(random_.choice([0, EXTENT, PLENTY, PLENTY])))
            case 6 if under_way:
                gpu.end(under_way.pop(), well=random_.random() < 0.9)
            case 7:
                if random_.random() < 0.1:
                    gpu.planner.clear("t")
                while gpu.copies:
                    gpu.end_copy()
                gpu.planner.tick(gpu.now_ns)
        gpu.run()
        gpu.planner.check_integrity()
        space = gpu.planner.residency.dram.space
        for source, address in gpu.table.items():
            resident, mirror = space.at(source), gpu.mirrors.space.at(address)
            assert resident is not None
            assert mirror is not None
            assert mirror.block is resident.block


def test_that_others_lack_memory_is_not_said_for_ever() -> None:
    gpu = Gpu()
    gpu.warm(chain(1, 3))
    gpu.work()
    gpu.begin(0)
    assert gpu.mirrors.idle
    assert not gpu.mirrors.short, "nobody looks any more"
