"""The table of mirrors, and memory that processes share: nobody is ever told of a block that is
not there."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.device.mirrors import Found, Mirrors, MirrorTable
from kvstore.device.vram_stand_in import PREFIX, StandInVram
from kvstore.errors import BadRequest, DeviceFull, DeviceLost, InternalError, NoDevice
from kvstore.tiers.vram import VramArena, open_vram
from kvstore.types import GPU_ONLY
from tests.unit.device.gpus import StandInGpu

EXTENT = 1 << 16


@pytest.fixture
def gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "gpu.json", 64 * EXTENT)


def checksum_of(source: int) -> int:
    return (1 << 64) - source


class Rig:
    def __init__(self, gpu: StandInGpu) -> None:
        self.gpu = gpu
        self.vram = StandInVram(gpu.name)
        self.arena = VramArena(open_vram(gpu.name), EXTENT)
        self.table = MirrorTable(rows=64, extents=8)
        self.fetched: list[int] = []
        self.mirrors = Mirrors(os.dup(self.table.fd), EXTENT, self.fetch, self.vram.open)

    def fetch(self, extent: int) -> tuple[int, int]:
        self.fetched.append(extent)
        descriptor = self.arena.extent_fd(extent)
        if descriptor is None:
            raise BadRequest("no such extent")
        return os.dup(descriptor), EXTENT

    def open(self, extent: int) -> None:
        self.arena.open_extent(extent)
        self.table.open(extent)

    def close(self, extent: int) -> None:
        self.table.close_extent(extent)
        self.arena.close_extent(extent)

    def put(self, source: int, address: int, data: bytes) -> None:
        self.arena.write(address, memoryview(data))
        self.arena.finish()
        self.table.put(source, address, checksum_of(source))

    def find(self, sources: list[int]) -> Found | None:
        return self.mirrors.find(sources, [checksum_of(source) for source in sources])


@pytest.fixture
def rig(gpu: StandInGpu) -> Iterator[Rig]:
    rig = Rig(gpu)
    yield rig
    rig.mirrors.close()
    rig.table.close()
    rig.arena.close()


def at(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def test_what_is_listed_is_found_where_it_lies(rig: Rig) -> None:
    rig.open(7)
    rig.open(9)
    for number in range(20):
        extent = 7 if number % 2 else 9
        rig.put(1000 + number, extent * EXTENT + number * 64, bytes([number]) * 64)
    found = rig.find([5, 1003, 1018, 999, 1019, 4000])
    assert found is not None
    assert found.indexes == [1, 2, 4]
    assert [at(each, 64)[0] for each in found.addresses] == [3, 18, 19]
    assert rig.mirrors.kept(found) == [True] * 3
    assert sorted(rig.fetched) == [7, 9], "an extent is opened once"


def test_what_is_struck_or_replaced_during_a_copy_is_not_kept(rig: Rig) -> None:
    rig.open(7)
    for source in (1, 2, 3):
        rig.put(source, 7 * EXTENT + source * 64, bytes([source]) * 64)
    found = rig.find([1, 2, 3])
    assert found is not None
    rig.table.strike(1)
    rig.table.strike(2)
    rig.put(2, 7 * EXTENT + 2 * 64, b"!" * 64)
    assert rig.mirrors.kept(found) == [False, False, True], "not even at the same place again"
    assert rig.find([1]) is None


def test_a_row_of_another_block_than_the_one_leased_is_passed_over(rig: Rig) -> None:
    """A lease that was cut short may name a slot that is another block's by now."""
    rig.open(7)
    for source in (1, 2):
        rig.put(source, 7 * EXTENT + source * 64, bytes([source]) * 64)
    found = rig.mirrors.find([1, 2], [checksum_of(9), checksum_of(2)])
    assert found is not None
    assert found.indexes == [1]
    assert rig.mirrors.find([1], [checksum_of(2)]) is None


def test_blocks_in_this_memory_alone_are_found_by_all_their_64_bits(rig: Rig) -> None:
    """Neither as the address of DRAM that is left without the highest, nor as the float or the
    signed number that others make of them."""
    rig.open(7)
    low = [4096, 7 * EXTENT, 7 * EXTENT + 1]
    high = [GPU_ONLY | each for each in (0, *low)] + [(1 << 64) - 4096]
    there = [source for pair in zip(low, high, strict=False) for source in pair] + high[3:]
    for number, source in enumerate(there):
        rig.arena.write(7 * EXTENT + number * 64, memoryview(bytes([number + 1]) * 64))
        rig.table.put(source, 7 * EXTENT + number * 64, (1 << 64) - 1)
    rig.arena.finish()
    asked = sorted({*low, *high, *(each ^ GPU_ONLY for each in (*low, *high))}, key=hash)
    found = rig.mirrors.find(asked, [(1 << 64) - 1] * len(asked))
    assert found is not None
    assert [asked[index] for index in found.indexes] == [each for each in asked if each in there]
    read = [at(address, 64)[0] - 1 for address in found.addresses]
    assert [there[number] for number in read] == [each for each in asked if each in there]
    assert rig.mirrors.kept(found) == [True] * len(there)
    for source in (GPU_ONLY, GPU_ONLY | 4096):
        rig.table.strike(source)
    gone = [
        asked[i] for i, kept in zip(found.indexes, rig.mirrors.kept(found), strict=True) if not kept
    ]
    assert set(gone) == {GPU_ONLY, GPU_ONLY | 4096}
    assert rig.mirrors.find([GPU_ONLY, GPU_ONLY | 4096], [(1 << 64) - 1] * 2) is None


def test_a_place_that_is_another_blocks_or_the_same_blocks_anew_is_not_kept(rig: Rig) -> None:
    """Its name is the place's, so only checksum and generation tell."""
    rig.open(7)
    sources = [GPU_ONLY | 7 * EXTENT, GPU_ONLY | 7 * EXTENT + 64]
    for source in sources:
        rig.put(source, source - GPU_ONLY, b"x" * 64)
    found = rig.find(sources)
    assert found is not None
    rig.table.strike(sources[0])
    rig.table.put(sources[0], 7 * EXTENT, checksum_of(1))
    rig.table.strike(sources[1])
    rig.put(sources[1], 7 * EXTENT + 64, b"x" * 64)
    assert rig.mirrors.kept(found) == [False, False]
    again = rig.find(sources)
    assert again is not None
    assert again.indexes == [1]


def test_memory_that_the_store_gives_back_is_closed_at_the_next_look(rig: Rig) -> None:
    rig.open(7)
    rig.put(1, 7 * EXTENT, b"x" * 64)
    found = rig.find([1])
    assert found is not None
    rig.table.strike(1)
    rig.close(7)
    assert at(found.addresses[0], 1) == b"x", "it is there for who has it open"
    assert rig.mirrors.opened_extents == 1
    rig.mirrors.look()
    assert rig.mirrors.opened_extents == 0


@pytest.mark.parametrize("refusal", ["the store's", "the GPU's"])
def test_an_extent_that_cannot_be_opened_has_no_mirrors_and_is_asked_for_once(
    rig: Rig, refusal: str
) -> None:
    rig.open(7)
    rig.open(8)
    rig.put(1, 7 * EXTENT, b"x" * 64)
    rig.put(2, 8 * EXTENT, b"y" * 64)
    if refusal == "the store's":
        rig.arena.close_extent(7)
    else:
        found = rig.find([2])
        rig.gpu.say(refuses=["open"])
    for _ in range(2):
        found = rig.find([1, 2])
        assert found is not None
        assert found.indexes == [1]
    assert rig.fetched.count(7) == 1
    if refusal == "the store's":
        rig.arena.open_extent(7)


def test_a_lost_gpu_is_told_of(rig: Rig) -> None:
    rig.open(7)
    rig.put(1, 7 * EXTENT, b"x" * 64)
    rig.gpu.say(lost=True)
    with pytest.raises(DeviceLost):
        rig.find([1])
    rig.gpu.say(lost=False)


def test_what_is_no_table_is_refused(tmp_path: Path, rig: Rig) -> None:
    for content in (b"", b"x" * 10_000):
        path = tmp_path / "table"
        path.write_bytes(content)
        descriptor = os.open(path, os.O_RDONLY)
        with pytest.raises(InternalError):
            Mirrors(descriptor, EXTENT, rig.fetch, rig.vram.open)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(descriptor)


def test_a_closed_table_names_nothing(gpu: StandInGpu) -> None:
    rig = Rig(gpu)
    rig.open(7)
    rig.put(1, 7 * EXTENT, b"x" * 64)
    assert rig.find([1]) is not None
    rig.table.close()
    assert rig.find([1]) is None
    assert rig.mirrors.opened_extents == 0
    rig.arena.close()


def test_any_order_of_changes_is_seen_as_it_is(rig: Rig) -> None:
    random_ = random.Random(0)
    listed: dict[int, int] = {}
    slots = [extent * EXTENT + offset for extent in (1, 2, 3) for offset in range(0, EXTENT, 4096)]
    free = set(slots)
    for extent in (1, 2, 3):
        rig.open(extent)
    for _ in range(1500):
        source = random_.randrange(1, 100)
        if source in listed:
            rig.table.strike(source)
            free.add(listed.pop(source))
        elif free:
            listed[source] = address = random_.choice(sorted(free))
            free.discard(address)
            rig.put(source, address, source.to_bytes(4, "little") * 4)
        asked = random_.sample(range(1, 120), 30)
        found = rig.find(asked)
        named = {} if found is None else dict(zip(found.indexes, found.addresses, strict=True))
        assert {asked[index] for index in named} == listed.keys() & set(asked)
        assert all(at(a, 4) == asked[i].to_bytes(4, "little") for i, a in named.items())


def test_memory_comes_and_goes_as_the_gpu_has_it(gpu: StandInGpu) -> None:
    arena = VramArena(open_vram(gpu.name), EXTENT)
    before = arena.free_bytes()
    arena.open_extent(1)
    assert arena.free_bytes() == before - EXTENT
    gpu.say(taken=before - EXTENT - 10)
    assert arena.free_bytes() == 10
    with pytest.raises(DeviceFull):
        arena.open_extent(2)
    arena.close_extent(1)
    arena.open_extent(2)
    arena.close()


@pytest.mark.parametrize("name", ["", "GPU", "-1", f"{PREFIX}/there/is/none"])
def test_a_gpu_that_is_not_there_is_named_in_the_error(name: str) -> None:
    with pytest.raises(NoDevice):
        open_vram(name)


HOLDS = """
import ctypes, signal, sys
from kvstore.device.vram_stand_in import StandInVram
opened = StandInVram(sys.argv[1]).open(int(sys.argv[2]), int(sys.argv[3]))
print(ctypes.string_at(opened.address, 4).decode(), flush=True)
signal.pause()
"""


def test_a_reader_that_dies_with_memory_open_holds_nobody_up(gpu: StandInGpu) -> None:
    """Another process sees the very bytes; killed, it leaves the arena as usable as before."""
    arena = VramArena(open_vram(gpu.name), EXTENT)
    arena.open_extent(1)
    arena.write(EXTENT, memoryview(b"here"))
    arena.finish()
    descriptor = arena.extent_fd(1)
    assert descriptor is not None
    reader = subprocess.Popen(
        [sys.executable, "-c", HOLDS, gpu.name, str(descriptor), str(EXTENT)],
        pass_fds=[descriptor], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "here\n"
        reader.kill()
    arena.close_extent(1)
    arena.open_extent(2)
    arena.write(2 * EXTENT, memoryview(b"next"))
    arena.close()
