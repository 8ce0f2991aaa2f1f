"""What is handed over, written straight into a GPU's memory: nobody is told of a place that is
not written, or that anybody else may still write into."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from kvstore.core.calls.reservations import MOST_GPUS
from kvstore.core.places.landings import LANDED_NS, LANDED_SHARE
from kvstore.core.places.mirrors import Mirrors, MirrorWork
from kvstore.core.places.shares import NO_PLACE
from kvstore.core.places.vram_room import CALM_NS
from kvstore.core.sessions import Session
from kvstore.core.space import Space
from kvstore.errors import BadRequest, ReservationExpired
from kvstore.types import Landing, Segment
from tests.simulation.model import RESERVATION_MS, SLOT, chain, key, layout
from tests.unit.core.test_mirrors import EXTENT, PLENTY, Gpu

SLOTS = 16


class Zone(Gpu):
    """One GPU with an extent that is open."""

    def __init__(self, slots: int = SLOTS, **sizes: int) -> None:
        super().__init__(slots, **sizes)
        self.writer = self.session(3)
        (slot,) = self.slots(self.writer, self.lid)
        assert self.land([slot]) == [NO_PLACE]
        self.planner.abort(self.writer, [slot])
        assert self.work().opens

    def land(self, slots: list[int], writer: Session | None = None) -> Sequence[int] | None:
        """Places on the GPU; None for nobody's."""
        landings = self.planner.land(
            writer or self.writer, self.lid, slots, not_on=(), now_ns=self.now_ns
        )
        self.run()
        self.planner.check_integrity()
        return landings[0].addresses if landings else None

    def commit_landed(
        self,
        keys: list[bytes],
        slots: list[int],
        places: Sequence[int],
        writer: Session | None = None,
    ) -> None:
        segment = Segment(b"", keys, slots, [1] * len(keys))
        landed = [Landing(self.mirrors.gpu, places)]
        self.planner.commit(
            writer or self.writer, self.lid, [segment],
            reserve=0, now_ns=self.now_ns, landed=landed,
        )  # fmt: skip
        self.run()
        self.planner.check_integrity()

    def hand_over(self, keys: list[bytes]) -> Sequence[int]:
        slots = self.slots(self.writer, self.lid, len(keys))
        places = self.land(slots)
        assert places is not None
        self.commit_landed(keys, slots, [place for place in places if place])
        return places

    @property
    def named(self) -> set[int]:
        return set(self.table.values())


def test_what_was_written_is_named_when_it_is_committed() -> None:
    gpu = Zone()
    slots = gpu.slots(gpu.writer, gpu.lid, 3)
    places = gpu.land(slots)
    assert places is not None
    assert NO_PLACE not in places
    assert not gpu.table
    assert gpu.land(slots) == places, "a slot has one place"
    gpu.commit_landed(chain(1, 3), slots, places[:2])
    assert gpu.named == set(places[:2])
    assert gpu.mirrors.space.used_bytes == 2 * SLOT, "what was not written is free"


def test_nothing_lands_for_its_own_writer_or_for_nobody() -> None:
    gpu = Zone()
    gpu.mirrors.reads(gpu.layout, gpu.writer)
    gpu.mirrors.reads_no_more(gpu.layout, gpu.reader)
    assert gpu.land(gpu.slots(gpu.writer, gpu.lid)) is None
    slots = gpu.slots(gpu.client, gpu.lid)
    assert gpu.land(slots, gpu.client) is not None


def test_a_gpu_out_of_reach_is_left_out() -> None:
    gpu = Zone()
    slots = gpu.slots(gpu.writer, gpu.lid)
    gone = gpu.planner.land(gpu.writer, gpu.lid, slots, not_on=["gpu"], now_ns=gpu.now_ns)
    assert gone == []


def test_only_open_slots_of_processes_of_the_host_have_places() -> None:
    gpu = Zone()
    (slot,) = gpu.slots(gpu.writer, gpu.lid)
    with pytest.raises(ReservationExpired):
        gpu.land([slot], gpu.client)
    remote = gpu.session(9, local=False)
    with pytest.raises(BadRequest):
        gpu.land(gpu.slots(remote, gpu.lid), remote)
    other = gpu.planner.register_layout("t", layout("n"))
    with pytest.raises(BadRequest):
        gpu.planner.land(gpu.writer, other, [slot], not_on=(), now_ns=0)


def test_a_slot_that_is_given_up_gives_its_place_back() -> None:
    gpu = Zone()
    slots = gpu.slots(gpu.writer, gpu.lid, 2)
    gpu.land(slots)
    gpu.planner.abort(gpu.writer, slots)
    gpu.run()
    assert gpu.mirrors.space.used_bytes == 0
    gpu.planner.check_integrity()


@pytest.mark.parametrize("late", [True, False])
def test_the_place_of_a_writer_that_is_late_or_died_is_nobodys_and_its_memory_goes(
    late: bool,
) -> None:
    gpu = Zone()
    slots = gpu.slots(gpu.writer, gpu.lid)
    places = gpu.land(slots)
    assert places is not None
    (extent,) = gpu.open
    if late:
        gpu.now_ns += (RESERVATION_MS + 1) * 1_000_000
        gpu.planner.tick(gpu.now_ns)
    else:
        gpu.planner.close_session(gpu.writer)
    gpu.run()
    gpu.planner.check_integrity()
    again = gpu.slots(gpu.client, gpu.lid, 3)
    assert places[0] not in (gpu.land(again, gpu.client) or ())
    assert gpu.work().closes == [extent]
    assert gpu.mirrors.space.used_bytes == 0
    gpu.commit_landed(chain(1, 3), again, [], gpu.client)
    if late:
        gpu.planner.abort(gpu.writer, slots)
        gpu.run()
        gpu.planner.check_integrity()


def test_late_writers_leave_the_share_of_what_lands_to_others() -> None:
    gpu = Zone(dram_slots=40)
    most = int(LANDED_SHARE * SLOTS)
    while gpu.mirrors.space.open_slots(gpu.layout.dram_class) < most:
        gpu.land(gpu.slots(gpu.client, gpu.lid, most), gpu.client)
        gpu.work()
        gpu.planner.abort(gpu.client, list(gpu.client.slots))
    places = gpu.land(gpu.slots(gpu.writer, gpu.lid, most))
    assert places is not None
    assert NO_PLACE not in places
    gpu.now_ns += (RESERVATION_MS + 1) * 1_000_000
    gpu.planner.tick(gpu.now_ns)
    gpu.run()
    gpu.work()
    for _ in range(2):
        slots = gpu.slots(gpu.client, gpu.lid)
        (place,) = gpu.land(slots, gpu.client) or [NO_PLACE]
        gpu.work()
    assert place != NO_PLACE


def test_no_place_is_granted_where_an_extent_may_never_be() -> None:
    gpu = Zone(slots=8)
    gpu.warm(chain(1, 4))
    gpu.work()
    slots = gpu.slots(gpu.writer, gpu.lid)
    assert gpu.land(slots) == [NO_PLACE]
    work = gpu.begin()
    (opening,) = work.opens
    assert gpu.land(slots) == [NO_PLACE]
    assert len(gpu.table) == 4, "nor does anybody go for it"
    gpu.mirrors.not_opened(opening, gpu.now_ns)
    gpu.planner.check_integrity()
    assert not gpu.mirrors.space.residents_of(opening)


def test_where_no_more_rows_are_to_be_had_what_lands_pushes_out_the_coldest() -> None:
    gpu = Zone(slots=16, dram_slots=32)
    gpu.mirrors.space.max_slots = 4
    gpu.warm(chain(1, 4))
    gpu.work()
    places = gpu.hand_over(chain(2, 1))
    assert NO_PLACE not in places
    assert len(gpu.table) == 4


def test_a_block_lands_where_it_has_been_read_for_longest_and_not_everywhere() -> None:
    gpu = Zone()
    gpu.mirrors.reads_no_more(gpu.layout, gpu.reader)
    for number, name in enumerate("bcd"):
        other = Mirrors(gpu.planner.holdings, Space(8 * SLOT, EXTENT), EXTENT, name)
        gpu.planner.holdings.mirrors.append(other)
        other.reads(gpu.layout, gpu.reader, now_ns=9 - number)
    gpu.mirrors.reads(gpu.layout, gpu.reader, now_ns=8)
    slots = gpu.slots(gpu.writer, gpu.lid)

    def lands_on(*not_on: str) -> list[str]:
        landings = gpu.planner.land(gpu.writer, gpu.lid, slots, not_on=not_on, now_ns=gpu.now_ns)
        return [each.gpu for each in landings]

    assert lands_on() == ["d", "gpu"]
    assert lands_on("d") == ["gpu", "c"]
    assert MOST_GPUS == 2


def test_memory_that_goes_while_it_is_written_is_named_by_no_commit() -> None:
    gpu = Zone()
    slots = gpu.slots(gpu.writer, gpu.lid, 2)
    places = gpu.land(slots)
    assert places is not None
    assert len(gpu.work(free=0).closes) == 1, "nobody is waited for"
    gpu.now_ns += CALM_NS + 1
    assert gpu.land(slots) == [NO_PLACE] * 2
    gpu.work()
    anew = gpu.land(slots)
    assert anew is not None
    assert not set(anew) & set(places)
    gpu.commit_landed(chain(1, 2), slots, places)
    assert not gpu.table, "what was written is not where the block would be looked for"


def test_what_lands_takes_a_share_and_the_newest_takes_the_oldests_place() -> None:
    gpu = Zone(dram_slots=64)
    for base in range(1, 8):
        gpu.hand_over(chain(base, 3))
        gpu.work()
    most = int(LANDED_SHARE * SLOTS)
    assert len(gpu.table) == most
    gpu.hand_over(chain(9, 3))
    held = {address for address in gpu.table if gpu.planner.residency.dram.space.at(address)}
    newest = [gpu.layout.name(each) for each in chain(9, 3)]
    blocks = [gpu.planner.residency.dram.space.at(address) for address in held]
    assert set(newest) <= {each.block.stored_key for each in blocks if each}
    assert len(gpu.table) == most


def test_what_lands_pushes_out_the_coldest_mirror_where_there_is_no_more_memory() -> None:
    gpu = Zone(slots=4, dram_slots=32)
    gpu.warm(chain(1, 4))
    gpu.work()
    assert len(gpu.table) == 4
    places = gpu.hand_over(chain(2, 3))
    assert sum(place != NO_PLACE for place in places) == 2, "its share, no more"
    assert len(gpu.table) == 4
    assert (gpu.mirrors.landings.no_room, gpu.mirrors.landings.no_share) == (1, 1)


def test_what_nobody_comes_for_goes_and_what_many_come_for_stays() -> None:
    gpu = Zone()
    gpu.hand_over(chain(1, 2))
    gpu.use(chain(1, 1))
    assert gpu.mirrors.landings.hits == 2
    gpu.now_ns += LANDED_NS
    gpu.work()
    assert len(gpu.table) == 1
    assert gpu.mirrors.hits == 2


def test_a_lost_gpu_has_no_places() -> None:
    gpu = Zone()
    slots = gpu.slots(gpu.writer, gpu.lid, 2)
    places = gpu.land(slots)
    gpu.hand_over(chain(1, 2))
    gpu.mirrors.lost()
    gpu.run()
    assert not gpu.table
    gpu.commit_landed(chain(2, 2), slots, places or ())
    assert not gpu.table


class Writer:
    """Writes into its places when it likes, until all its slots are committed or given up; of
    one that was killed nobody knows when its last write comes."""

    def __init__(self, gpu: Zone, session: Session, keys: list[bytes]) -> None:
        self.session = session
        self.keys = keys
        self.slots = gpu.slots(session, gpu.lid, len(keys))
        self.places = list(gpu.land(self.slots, session) or [])

    def scribble(self, memory: dict[int, object]) -> None:
        memory.update(dict.fromkeys(filter(None, self.places), "half"))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_writers_do_what_is_named_is_what_it_says(seed: int) -> None:
    random_ = random.Random(seed)
    gpu = Zone(slots=12, dram_slots=40)
    memory: dict[int, object] = {}
    writers: list[Writer] = []
    dead: list[Writer] = []
    under_way: list[MirrorWork] = []
    named, numbers = 0, iter(range(1_000_000, 2_000_000))
    for number in range(300):
        gpu.now_ns += random_.randrange(1 << 28)
        for writer in (*writers, *dead):
            if random_.random() < 0.3:
                writer.scribble(memory)
        match random_.randrange(10):
            case 0 | 1 | 2 if len(writers) < 3 and gpu.mirrors.space.classes():
                keys = [key(next(numbers)) for _ in range(random_.randint(1, 4))]
                if gpu.planner.residency.dram.space.free_slots(gpu.layout.dram_class) >= len(keys):
                    writers.append(Writer(gpu, gpu.session(100 + number), keys))
            case 3 | 4 | 5 if writers:
                writer = writers.pop(random_.randrange(len(writers)))
                told = [place for place in writer.places if random_.random() < 0.9]
                stored = [gpu.layout.name(each) for each in writer.keys]
                written = zip(writer.places, stored, strict=False)
                memory.update({place: name for place, name in written if place in told})
                try:
                    gpu.commit_landed(writer.keys, writer.slots, told, writer.session)
                except ReservationExpired:
                    gpu.planner.abort(writer.session, writer.slots)
                gpu.planner.close_session(writer.session)
            case 6 if writers and random_.random() < 0.5:
                dead.append(writers.pop())
                gpu.planner.close_session(dead[-1].session)
            case 7 if not under_way:
                under_way.append(gpu.begin(random_.choice([0, EXTENT, PLENTY, PLENTY])))
            case 8 if under_way:
                work = under_way.pop()
                memory.update({each.address: each.block.stored_key for each in work.copies})
                gpu.end(work)
            case 9:
                gpu.put(gpu.client, gpu.lid, chain(number % 5, 3))
                for _ in range(2):
                    ticket = gpu.acquire(gpu.client, [gpu.lid], chain(number % 5, 3))
                    if ticket.answer:
                        gpu.planner.release(gpu.client, [ticket.answer[0].lease_id])
                gpu.land(gpu.slots(gpu.writer, gpu.lid))
                gpu.planner.abort(gpu.writer, list(gpu.writer.slots))
                gpu.planner.tick(gpu.now_ns)
        gpu.run()
        gpu.planner.check_integrity()
        space = gpu.planner.residency.dram.space
        for source, address in gpu.table.items():
            resident = space.at(source)
            assert resident is not None
            assert memory[address] == resident.block.stored_key
        named += len(gpu.table)
    assert named > 50
