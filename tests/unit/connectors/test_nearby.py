"""Blocks from the store's memory on the GPU: what is right, or else host memory's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kvstore.client.link import VramGrant
from kvstore.device.adversarial import AdversarialDevice, Temper
from kvstore.device.mirrors import Mirrors, MirrorTable
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import BadRequest, DeviceStuck, Unavailable
from kvstore.tiers.vram import VramArena, open_vram
from kvstore.types import GPU_ONLY
from kvstore_connectors.vllm.loader import Loader
from tests.unit.connectors.test_copies import PIECE, Rank, data, eventually
from tests.unit.device.gpus import StandInGpu

EXTENT = 1 << 16
SLOT = 4096
READER = b"engine"


class NearRank(Rank):
    """A rank on a stand-in GPU, of whose memory the store has extent 1."""

    def __init__(
        self,
        gpu: StandInGpu,
        temper: Temper = Temper.LATE,
        seed: int = 1,
        loader: Callable[..., Loader] = Loader,
    ) -> None:
        self.gpu = gpu
        self.arena = VramArena(open_vram(gpu.name), EXTENT)
        self.arena.open_extent(1)
        self.table = MirrorTable(64, 4)
        self.table.open(1)
        self.opened = 0
        self.during: Callable[[], None] | None = None
        self.device = Device(self, temper, seed)
        super().__init__(device=self.device, loader=partial(loader, reader=READER))
        self.store.on_gpu = self.grant
        self.store.place(b"")  # No memory lies at address 0.

    def grant(self, name: str) -> VramGrant:
        assert name == self.gpu.name
        self.opened += 1
        return VramGrant(os.dup(self.table.fd), EXTENT, self.fetch)

    def fetch(self, extent: int) -> tuple[int, int]:
        descriptor = self.arena.extent_fd(extent)
        if descriptor is None:
            raise BadRequest("no such extent")
        return os.dup(descriptor), EXTENT

    @property
    def mirrors(self) -> Mirrors | None:
        """What it has open of the store's memory."""
        shared = self.loader._nearby._shared
        assert shared is not None
        return shared._mirrors

    def load_mirrored(self) -> int:
        """Loads one block from there: the address of its slot."""
        datas = [data(1)]
        job = self.load_job(datas, [1])
        self.mirror(job, [0], datas)
        assert self.load(job) == []
        return job.parts[0].addresses[0][0]

    def mirror(self, job: Any, indexes: list[int], datas: list[bytes]) -> None:
        """Copies of blocks of a job, which only they are right of: host memory is spoilt."""
        part = job.parts[0]
        for index in indexes:
            source, address = part.addresses[0][index], EXTENT + index * SLOT
            self.arena.write(address, memoryview(datas[index]))
            self.table.put(source, address, part.checksums[0][index])
            self.store.slots[source][:] = b"\0" * len(datas[index])

    def leave_alone(self, job: Any, indexes: list[int], datas: list[bytes]) -> None:
        """Blocks of a job that are there and nowhere else."""
        part = job.parts[0]
        for index in indexes:
            place = EXTENT + index * SLOT
            self.store.slots.pop(part.addresses[0][index], None)
            part.addresses[0][index] = GPU_ONLY | place
            self.arena.write(place, memoryview(datas[index]))
            self.table.put(GPU_ONLY | place, place, part.checksums[0][index])

    def take_back(self, index: int) -> None:
        """The place of such a block is another's."""
        place = EXTENT + index * SLOT
        self.table.strike(GPU_ONLY | place)
        self.arena.write(place, memoryview(b"!" * 2 * PIECE))

    def from_gpu(self) -> float:
        return self.counted().get("vram_blocks", 0)

    def counted(self) -> dict[str, float]:
        """Since the last time."""
        stats = self.loader.take_stats()
        return {} if stats is None else stats.data

    def close(self) -> None:
        super().close()
        self.table.close()
        self.arena.close()


class Device(AdversarialDevice):
    """Does something between the start of a copy and its end."""

    def __init__(self, rank: NearRank, temper: Temper, seed: int) -> None:
        super().__init__(seed, temper, StandInVram(rank.gpu.name))
        self._rank = rank

    def do(self, tasks: Any) -> None:
        during, self._rank.during = self._rank.during, None
        if during is not None:
            during()
        super().do(tasks)


@pytest.fixture
def gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "gpu.json", 16 * EXTENT)


@pytest.fixture(params=Temper)
def rank(request: pytest.FixtureRequest, gpu: StandInGpu) -> Iterator[NearRank]:
    rank = NearRank(gpu, request.param)
    yield rank
    rank.close()


def test_what_is_on_the_gpu_is_loaded_from_there_and_the_rest_from_slots(rank: NearRank) -> None:
    datas = [data(seed) for seed in range(8)]
    job = rank.load_job(datas, list(range(20, 28)))
    rank.mirror(job, [0, 3, 4, 7], datas)
    assert rank.load(job) == []
    assert [rank.bytes_of(block) for block in range(20, 28)] == datas
    assert rank.from_gpu() == 4
    assert rank.store.reported == []


def test_what_the_store_takes_back_during_the_copy_is_loaded_from_its_slot(rank: NearRank) -> None:
    datas = [data(seed) for seed in range(4)]
    job = rank.load_job(datas, [5, 6, 7, 8])
    rank.mirror(job, [0, 1, 2, 3], datas)
    for index, address in enumerate(job.parts[0].addresses[0]):
        rank.store.slots[address][:] = datas[index]

    def take_back() -> None:
        address = job.parts[0].addresses[0][1]
        rank.table.strike(address)
        rank.arena.write(EXTENT + SLOT, memoryview(b"!" * 2 * PIECE))
        rank.table.put(address, EXTENT + SLOT, job.parts[0].checksums[0][1])

    rank.during = take_back
    assert rank.load(job) == []
    assert [rank.bytes_of(block) for block in (5, 6, 7, 8)] == datas
    assert rank.from_gpu() == 3


def test_another_blocks_row_at_the_same_slot_is_not_loaded(rank: NearRank) -> None:
    """The lease's session was cut, and its slot is another block's, which landed at once."""
    datas = [data(seed) for seed in range(2)]
    job = rank.load_job(datas, [5, 6])
    rank.mirror(job, [0, 1], datas)
    source, address = job.parts[0].addresses[0][0], EXTENT
    rank.table.strike(source)
    rank.arena.write(address, memoryview(data(9)))
    rank.table.put(source, address, xxhash.xxh3_64_intdigest(data(9)))
    assert rank.load(job) == [5, 6]
    assert rank.bytes_of(6) == datas[1]


def test_a_bad_slot_after_good_ones_on_the_gpu_fails_from_there_on(rank: NearRank) -> None:
    datas = [data(seed) for seed in range(6)]
    job = rank.load_job(datas, list(range(10, 16)))
    rank.mirror(job, [0, 1, 4], datas)
    job.parts[0].checksums[0][3] ^= 1
    assert rank.load(job) == [13, 14, 15]
    assert rank.from_gpu() == 2
    assert rank.store.reported == [job.parts[0].addresses[0][3]]


def test_after_the_leases_end_nothing_counts(rank: NearRank) -> None:
    datas = [data(1)]
    job = rank.load_job(datas, [9], expires_ns=1)
    rank.mirror(job, [0], datas)
    assert rank.load(job) == [9]
    assert rank.from_gpu() == 0


@pytest.mark.parametrize("fault", ["lost", "no such memory", "extent closed", "store without"])
def test_whatever_is_wrong_with_the_gpus_memory_slots_are_loaded(
    rank: NearRank, fault: str
) -> None:
    datas = [data(seed) for seed in range(3)]
    job = rank.load_job(datas, [1, 2, 3])
    rank.mirror(job, [0, 1], datas)
    for index, address in enumerate(job.parts[0].addresses[0]):
        rank.store.slots[address][:] = datas[index]
    match fault:
        case "lost":
            rank.gpu.say(lost=True)
        case "no such memory":
            rank.gpu.say(refuses=["open"])
        case "extent closed":
            rank.arena.close_extent(1)
        case "store without":
            rank.store.on_gpu = None
    for _ in range(2):
        assert rank.load(job) == []
        assert rank.from_gpu() == 0
    rank.gpu.say(lost=False)


def test_a_copy_that_may_be_under_way_yet_fails_the_load(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded from its slot, the block would be written over by the other copy after that."""
    rank = NearRank(gpu)
    datas = [data(1)]
    job = rank.load_job(datas, [1])
    rank.mirror(job, [0], datas)
    rank.store.slots[job.parts[0].addresses[0][0]][:] = datas[0]

    def stuck(*_: Any) -> Any:
        raise DeviceStuck("no answer")

    monkeypatch.setattr(rank.loader._stream, "load_within", stuck)
    assert rank.load(job) == [1]
    assert rank.mirrors is not None
    assert rank.mirrors.opened_extents == 1, "it is not taken from under the copy"
    rank.close()


def test_a_rank_whose_blocks_cannot_be_copied_within_the_gpu_reads_nothing_there(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.device.adversarial._Blocks.within", False)
    rank = NearRank(gpu)
    assert rank.load(rank.load_job([data(1)], [1])) == []
    assert not rank.loader._nearby.possible
    assert "vram" not in rank.store.calls
    rank.close()


def test_a_store_without_memory_there_is_asked_once_a_connection(rank: NearRank) -> None:
    rank.store.on_gpu = None
    job = rank.load_job([data(1)], [1])
    for _ in range(3):
        assert rank.load(job) == []
    assert rank.store.calls.count("vram") == 1
    rank.store.lose_session()
    assert rank.load(job) == []
    assert rank.store.calls.count("vram") == 2


def test_a_server_that_goes_away_while_it_is_asked_costs_the_short_cut_only(
    rank: NearRank,
) -> None:
    def gone(name: str) -> VramGrant:
        raise Unavailable("gone")

    rank.store.on_gpu = gone
    assert rank.load(rank.load_job([data(1)], [1])) == []


def test_an_idle_rank_lets_go_of_what_the_store_gives_back(
    rank: NearRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_connectors.vllm.loader.LOOK_S", 0.01)
    source = rank.load_mirrored()
    mirrors = rank.mirrors
    assert mirrors is not None
    assert mirrors.opened_extents == 1
    rank.table.strike(source)
    rank.table.close_extent(1)
    eventually(lambda: mirrors.opened_extents == 0)


def test_a_rank_without_a_connection_holds_no_memory(
    rank: NearRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_connectors.vllm.loader.LOOK_S", 0.01)
    rank.load_mirrored()
    rank.store.error = Unavailable("gone")
    rank.link.suspect()
    eventually(lambda: rank.mirrors is None)
    rank.store.error = None


def test_without_the_look_after_the_copy_bytes_are_wrong(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = NearRank(gpu, Temper.LATE)
    monkeypatch.setattr(Mirrors, "kept", lambda self, found: [True] * len(found.indexes))
    with pytest.raises(AssertionError, match=r"assert \[b|At index 1"):
        test_what_the_store_takes_back_during_the_copy_is_loaded_from_its_slot(rank)
    rank.close()
