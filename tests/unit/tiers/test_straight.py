"""Blocks that a GPU reads from a tier itself: the very bytes or an error that is true, and none
in memory that is being given back."""

from __future__ import annotations

import ctypes
import errno
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from kvstore.device.vram import Straight, StraightFile
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import CorruptBlock, DeviceError, DeviceLost, InternalError, TierFailed
from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.tiers.faulty import Fault, FaultAtCall, FaultyDisk, MemoryDisk, SeededFaults
from kvstore.tiers.null import NullStorage
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_disk import Directory
from kvstore.tiers.nvme_slot import HEADER_BYTES
from kvstore.tiers.vram import VramArena
from tests.unit.device.gpus import StandInGpu
from tests.unit.tiers.blocks import BLOCK_BYTES, EXTENT_BYTES, get, payload_of, put
from tests.unit.tiers.test_nvme import fill, open_tier, slot_file
from tests.unit.tiers.test_storage_contract import MAKERS, slots

VRAM_EXTENT = 1 << 18
PLACE = SimpleNamespace(address=VRAM_EXTENT + 4096)
LARGEST = 65536
LENGTHS = (1, 240, 241, 4095, 4096, 4097, BLOCK_BYTES, LARGEST)


class Rig(NamedTuple):
    """A GPU with one extent of the store's, and what reads straight to it."""

    gpu: StandInGpu
    arena: VramArena
    straight: Straight

    def fill(self, file: StraightFile, offset: int, nbytes: int) -> int:
        return self.straight.fill(0, file, offset, nbytes)

    def at_place(self, nbytes: int) -> bytes:
        return ctypes.string_at(self.arena._open[1].address + PLACE.address - VRAM_EXTENT, nbytes)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    gpu = StandInGpu(tmp_path / "gpu", 1 << 24)
    arena = VramArena(StandInVram(gpu.name), VRAM_EXTENT)
    arena.open_extent(1)
    straight = arena.vram.straight(2, LARGEST)
    yield Rig(gpu, arena, straight)
    straight.close()
    arena.close()


@pytest.fixture(params=MAKERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageTier]:
    made = MAKERS[request.param](tmp_path / "data")
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_a_block_is_read_straight_as_it_was_written(
    tier: StorageTier, rig: Rig, nbytes: int
) -> None:
    tier.open_extent(0, tier.slot_bytes(nbytes))
    address = slots(tier, 0, nbytes)[-1]
    header = put(tier, address, 7, nbytes)
    tier.read_straight(address, header, rig.fill)
    assert rig.arena.deliver(PLACE, rig.straight, 0, nbytes)
    assert rig.at_place(nbytes + 1) == bytes(payload_of(7, nbytes)) + b"\0"


@pytest.mark.parametrize("change", ["stored_key", "parent", "tenant", "checksum"])
def test_another_block_is_not_the_one_that_was_asked_for(
    tier: StorageTier, rig: Rig, change: str
) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 0, 7)
    others = {"stored_key": b"k" * 16, "parent": b"p" * 16, "tenant": "bob", "checksum": 1}
    with pytest.raises(CorruptBlock):
        tier.read_straight(0, header._replace(**{change: others[change]}), rig.fill)
    tier.read_straight(0, header, rig.fill)


def test_where_there_is_no_block_none_is_read(tier: StorageTier, rig: Rig) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 0, 7)
    tier.forget(0, header)
    for one in (tier, NullStorage(EXTENT_BYTES)):
        with pytest.raises(CorruptBlock):
            one.read_straight(0, header, rig.fill)


@pytest.mark.parametrize("says", [{"refuses": ["fill"]}, {"spoils": ["fill"]}, {"lost": True}])
def test_a_gpu_that_fails_harms_no_block(tier: StorageTier, rig: Rig, says: dict[str, Any]) -> None:
    """Nor one that damages whatever it reads."""
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 0, 7)
    rig.gpu.say(**says)
    for _ in range(3):
        with pytest.raises(DeviceLost if says.get("lost") else DeviceError):
            tier.read_straight(0, header, rig.fill)
    assert get(tier, 0, header) == bytes(payload_of(7))
    rig.gpu.say(refuses=[], spoils=[], lost=False)
    tier.read_straight(0, header, rig.fill)


# Of NVMe


def damage(tier: NvmeTier, path: Path, address: int, at: int) -> None:
    file, offset = slot_file(tier, path, address)
    with file.open("r+b") as stream:
        stream.seek(offset + at)
        stream.write(b"damage")


@pytest.mark.parametrize("at", [20, HEADER_BYTES, HEADER_BYTES + BLOCK_BYTES - 6])
def test_a_damaged_block_is_dropped_and_its_place_not_used_again(
    tmp_path: Path, rig: Rig, at: int
) -> None:
    tier = open_tier(tmp_path / "data", direct=False)
    headers = fill(tier, 1)
    address, header = list(headers.items())[3]
    found = tier._log.where(address)
    assert found is not None
    damage(tier, tmp_path / "data", address, at)
    for _ in range(2):
        with pytest.raises(CorruptBlock):
            tier.read_straight(address, header, rig.fill)
    segment, place = found
    assert segment.bad.issuperset(segment._pages(place.slot))
    with pytest.raises(CorruptBlock):
        get(tier, address, header)
    tier.close()


def test_a_block_that_leaves_while_it_is_read_is_read_where_it_is_then(
    tmp_path: Path, rig: Rig
) -> None:
    """Its segment is emptied and filled with others after its header was read."""
    tier = open_tier(tmp_path / "data")
    everything = fill(tier, tier.usable_bytes // EXTENT_BYTES)
    address, header = next(iter(everything.items()))
    others, rng = list(everything)[1:], random.Random(1)
    fills = []

    def overtaken(file: StraightFile, offset: int, nbytes: int) -> int:
        before = tier._log.where(address)
        assert before is not None
        if not fills:
            while before[0].life == before[1].life or before[0].next <= before[1].slot:
                put(tier, rng.choice(others), 1)
        fills.append(offset)
        return rig.fill(file, offset, nbytes)

    tier.read_straight(address, header, overtaken)
    assert len(fills) == 2
    assert rig.arena.deliver(PLACE, rig.straight, 0, BLOCK_BYTES)
    assert rig.at_place(BLOCK_BYTES) == bytes(payload_of(address))
    tier.check_integrity()
    tier.close()


@pytest.mark.parametrize("call", [1, 2])
def test_a_drive_that_says_no_ends_the_tier(tmp_path: Path, rig: Rig, call: int) -> None:
    """To the processor, which reads the header, or to the GPU."""
    plan = FaultAtCall(Fault("error", errno.EIO), 10**9)
    disk = FaultyDisk(MemoryDisk(), plan, random.Random(1))
    tier = open_tier(tmp_path / "data", disk=disk)
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 0, 7)
    plan.left = call
    with pytest.raises(TierFailed):
        tier.read_straight(0, header, rig.fill)
    assert not tier.healthy
    tier.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_drive_that_lies_and_dawdles_is_never_believed(
    tmp_path: Path, rig: Rig, seed: int
) -> None:
    """Short reads, bits that flip on their way, reads of other places, and a GPU that damages
    what it reads now and then: what is delivered is the block, or nothing is."""
    rng = random.Random(seed)
    rates: dict[str, dict[str, float]] = {}
    lies = SeededFaults(rng, rates)
    tier = open_tier(tmp_path / "data", disk=FaultyDisk(MemoryDisk(), lies, rng))
    held = fill(tier, 3)
    rates["preadv"] = {"short": 0.1, "flip": 0.1, "misdirected": 0.1}
    outcomes: Counter[str] = Counter()
    for _ in range(200):
        if not held:
            break
        address = rng.choice(list(held))
        rig.gpu.say(spoils=["fill"] if rng.random() < 0.1 else [])
        try:
            tier.read_straight(address, held[address], rig.fill)
        except CorruptBlock:
            # As far as the drive says, twice.
            del held[address]
            outcomes["corrupt"] += 1
        except DeviceError:
            outcomes["not straight"] += 1
        else:
            assert rig.arena.deliver(PLACE, rig.straight, 0, BLOCK_BYTES)
            assert rig.at_place(BLOCK_BYTES) == bytes(payload_of(address))
            outcomes["there"] += 1
    assert min(outcomes.values()) > 0
    assert len(outcomes) == 3
    tier.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_has_a_descriptor_to_read_by_where_nothing_is_between(
    tmp_path: Path, direct: bool
) -> None:
    try:
        file = Directory(tmp_path, direct=direct).create("file", 4096)
    except OSError:
        pytest.skip("no O_DIRECT for temporary files")
    assert (file.descriptor is not None) == direct
    closed: list[int | None] = []
    file.before_close(lambda: closed.append(file.descriptor))
    file.close()
    assert closed == [None], "told once, and nobody registers it any more"
    behind = FaultyDisk(Directory(tmp_path), lambda call: None, random.Random(1))
    assert behind.open("file").descriptor is None


# Of the arena


def delivering(rig: Rig, header: BlockHeader, tier: StorageTier) -> Callable[[], bool]:
    tier.read_straight(0, header, rig.fill)
    return lambda: rig.arena.deliver(PLACE, rig.straight, 0, BLOCK_BYTES)


@pytest.fixture
def filled(tmp_path: Path, rig: Rig) -> Iterator[Callable[[], bool]]:
    tier = open_tier(tmp_path / "data")
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    yield delivering(rig, put(tier, 0, 7), tier)
    tier.close()


def test_a_place_whose_extent_is_closed_is_nobodys(rig: Rig, filled: Callable[[], bool]) -> None:
    rig.arena.close_extent(1)
    assert not filled()
    assert not rig.arena.write_now(PLACE, payload_of(1))
    rig.arena.open_extent(2)
    assert not rig.arena.write_now(PLACE, payload_of(1))


@pytest.mark.parametrize("call", ["deliver", "write_now"])
def test_an_extent_is_closed_after_the_copies_into_it(
    rig: Rig, filled: Callable[[], bool], call: str
) -> None:
    rig.gpu.say(hangs=[call])
    memory = rig.arena._open[1]
    ended: list[object] = []
    free = memory.free
    memory.free = lambda: (ended.append("freed"), free())  # type: ignore[method-assign]

    def copy() -> None:
        copied = filled() if call == "deliver" else rig.arena.write_now(PLACE, payload_of(7))
        ended.append(copied)

    copying = threading.Thread(target=copy)
    copying.start()
    while not rig.arena._copying:
        pass
    closing = threading.Thread(target=rig.arena.close_extent, args=(1,))
    closing.start()
    while rig.arena.extent_fd(1) is not None:
        pass
    # Who comes later finds none, and waits for nobody.
    assert not rig.arena.write_now(PLACE, payload_of(7))
    assert ended == []
    rig.gpu.say(hangs=[])
    copying.join()
    closing.join()
    assert set(map(str, ended)) == {"True", "freed"}


def test_who_stands_still_before_a_copy_does_not_write_what_is_anothers_by_then(
    rig: Rig, filled: Callable[[], bool]
) -> None:
    def go() -> None:
        place.address = 0
        rig.arena.close_extent(1)
        rig.arena.open_extent(1)

    class Place:
        _address = PLACE.address
        going = threading.Thread(target=go)

        @property
        def address(self) -> int:
            address = self._address
            if address:
                self.going.start()
                # All of it, unless it has to wait.
                self.going.join(0.2)
            return address

        @address.setter
        def address(self, address: int) -> None:
            self._address = address

    place = Place()
    rig.arena.write_now(place, payload_of(7))
    place.going.join()
    assert rig.at_place(BLOCK_BYTES) == bytes(BLOCK_BYTES)
    assert not rig.arena.write_now(place, payload_of(7))


def test_a_drive_that_hangs_keeps_no_extent_open(
    tmp_path: Path, rig: Rig, filled: Callable[[], bool]
) -> None:
    rig.gpu.say(hangs=["fill"])
    file = Directory(tmp_path, direct=False).create("file", 4096)
    sums: list[int] = []
    reading = threading.Thread(target=lambda: sums.append(rig.straight.fill(1, file, 0, 4096)))
    reading.start()
    rig.arena.close_extent(1)
    assert sums == []
    rig.gpu.say(hangs=[])
    reading.join()
    assert sums
    file.close()


def test_a_copy_that_fails_lets_go_of_its_extent(rig: Rig, filled: Callable[[], bool]) -> None:
    rig.gpu.say(refuses=["deliver", "write_now"])
    with pytest.raises(DeviceError):
        filled()
    with pytest.raises(DeviceError):
        rig.arena.write_now(PLACE, payload_of(1))
    rig.arena.close_extent(1)


# Of the stand-in


def test_a_slot_is_one_threads_at_a_time_and_delivered_once(
    rig: Rig, filled: Callable[[], bool], tmp_path: Path
) -> None:
    assert filled()
    assert rig.at_place(BLOCK_BYTES) == bytes(payload_of(7))
    assert filled()
    assert rig.at_place(BLOCK_BYTES) != bytes(payload_of(7))
    rig.gpu.say(hangs=["deliver"])
    delivering = threading.Thread(target=filled)
    delivering.start()
    while not rig.arena._copying:
        pass
    file = Directory(tmp_path, direct=False).create("file", 4096)
    with pytest.raises(InternalError, match="two threads"):
        while True:
            rig.straight.fill(0, file, 0, 4096)
    rig.gpu.say(hangs=[])
    delivering.join()
    file.close()


def test_a_gpu_that_reads_nothing_straight_says_so(rig: Rig) -> None:
    rig.gpu.say(refuses=["straight"])
    with pytest.raises(DeviceError, match="straight"):
        rig.arena.vram.straight(1, 4096)
