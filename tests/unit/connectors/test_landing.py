"""Prompts that are handed over land in the memory of the GPU that decodes, or else are loaded from
host memory: never half of one, and never at anybody's expense."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.link import VramGrant
from kvstore.device.adversarial import AdversarialDevice, Temper
from kvstore.device.mirrors import MirrorTable
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import BadRequest, DeviceError, DeviceLost, DeviceStuck
from kvstore.tiers.vram import VramArena, open_vram
from kvstore.types import Landing
from kvstore_connectors.vllm.metadata import StoreJob
from tests.unit.connectors.fakes import FakeStore
from tests.unit.connectors.test_copies import PIECE, Rank, eventually
from tests.unit.device.gpus import StandInGpu

EXTENT = 1 << 16
SLOT = 4096
NBYTES = 2 * PIECE


class Ground:
    """A GPU where others read, of whose memory the store has extent 1, and grants places in it."""

    def __init__(self, gpu: StandInGpu) -> None:
        self.gpu = gpu
        self.arena = VramArena(open_vram(gpu.name), EXTENT)
        self.arena.open_extent(1)
        self.table = MirrorTable(64, 4)
        self.table.open(1)
        descriptor = self.arena.extent_fd(1)
        assert descriptor is not None
        self._memory = StandInVram(gpu.name).open_to_write(descriptor, EXTENT, gpu.name)
        self.granted: dict[int, int] = {}
        self.grants = 0
        self.not_on: list[list[str]] = []

    def serve(self, store: FakeStore) -> None:
        store.on_gpu = self._grant
        store.lands = self._land

    def _grant(self, name: str) -> VramGrant:
        if name != self.gpu.name:
            raise BadRequest("no memory on this GPU")
        self.grants += 1
        return VramGrant(os.dup(self.table.fd), EXTENT, self._fetch)

    def _fetch(self, extent: int) -> tuple[int, int]:
        descriptor = self.arena.extent_fd(extent)
        if descriptor is None:
            raise BadRequest("no such extent")
        return os.dup(descriptor), EXTENT

    def _land(self, slots: Sequence[int], not_on: Sequence[str]) -> list[Landing]:
        self.not_on.append(list(not_on))
        if self.gpu.name in not_on:
            return []
        for slot in slots:
            self.granted.setdefault(slot, EXTENT + SLOT * (len(self.granted) % 16))
        return [Landing(self.gpu.name, [self.granted[slot] for slot in slots])]

    def at(self, address: int) -> bytes:
        start = address - EXTENT
        return bytes(self._memory._bytes[start : start + NBYTES].tobytes())

    def fill(self, byte: int) -> None:
        self._memory._bytes[:] = byte

    def close(self) -> None:
        self._memory.close()
        self.table.close()
        self.arena.close()


def on(gpu: StandInGpu, temper: Temper = Temper.LATE, seed: int = 1) -> AdversarialDevice:
    return AdversarialDevice(seed, temper, StandInVram(gpu.name))


def handed_over(rank: Rank, job_id: int, block_ids: list[int]) -> StoreJob:
    job = rank.store_job(job_id, block_ids)
    job.handed_over = True
    return job


@pytest.fixture
def prefill(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "prefill.json", 4 * EXTENT)


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    ground = Ground(StandInGpu(tmp_path / "decode.json", 4 * EXTENT))
    yield ground
    ground.close()


@pytest.fixture(params=Temper)
def rank(request: pytest.FixtureRequest, prefill: StandInGpu, ground: Ground) -> Iterator[Rank]:
    rank = Rank(device=on(prefill, request.param))
    ground.serve(rank.store)
    yield rank
    rank.close()


def stored(rank: Rank, job: StoreJob) -> dict[str, Any]:
    """What came of it, once it is stored, which it is, whatever else."""
    rank.saver.submit(job)
    reports: dict[int, Any] = {}
    eventually(lambda: reports.update(rank.saver.take_reports()) or reports)
    assert not reports[job.job_id].lost
    assert set(job.keys) <= set(rank.store.blocks)
    stats = rank.saver.take_stats()
    return {} if stats is None else stats.data


@contextlib.contextmanager
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How often it was said that a GPU is left alone."""
    logger = logging.getLogger("vllm.kvstore")
    logger.addHandler(caplog.handler)
    try:
        # vLLM's loggers may pass records on: each is counted once.
        yield lambda: len({id(each) for each in caplog.records if ", not " in each.message})
    finally:
        logger.removeHandler(caplog.handler)


def test_what_is_handed_over_lands_and_nothing_else_does(rank: Rank, ground: Ground) -> None:
    assert "landed_blocks" not in stored(rank, rank.store_job(1, [1, 2]))
    assert "land" not in rank.store.calls
    stats = stored(rank, handed_over(rank, 2, [5, 6, 7]))
    assert stats["landed_blocks"] == 3
    assert "not_landed_blocks" not in stats
    assert sorted(rank.store.landed.values()) == [bytes([2, block]) for block in (5, 6, 7)]
    for address, name in rank.store.landed.items():
        assert ground.at(address) == rank.store.blocks[name] == rank.bytes_of(name[1])


def test_a_gpu_out_of_reach_is_said_once_and_not_asked_for_again(
    rank: Rank, ground: Ground, prefill: StandInGpu, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.say(refuses=["peer"])
    with warnings(caplog) as said:
        for number in (1, 2, 3):
            assert stored(rank, handed_over(rank, number, [4, 5]))["not_landed_blocks"] == 2
    assert ground.not_on == [[], [ground.gpu.name], [ground.gpu.name]]
    assert said() == 1
    assert not rank.store.landed


def test_memory_that_is_gone_before_it_is_written_costs_the_short_cut_only(
    rank: Rank, ground: Ground
) -> None:
    ground.arena.close_extent(1)
    assert stored(rank, handed_over(rank, 1, [4, 5]))["not_landed_blocks"] == 2
    assert not rank.store.landed
    assert ground.not_on == [[]]


@pytest.mark.parametrize("where", ["start", "end", "gpu lost"])
def test_a_copy_that_fails_costs_the_short_cut_only(
    rank: Rank,
    ground: Ground,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = rank.saver._stream.save_within

    class Fails:
        def finish(self) -> list[int]:
            raise DeviceError("refused")

    def save_within(*arguments: Any) -> Any:
        if where == "start":
            raise DeviceError("refused")
        real(*arguments).finish()
        return Fails()

    def lost(*_: Any, **__: Any) -> Any:
        raise DeviceLost("gone")

    if where == "gpu lost":
        monkeypatch.setattr(StandInVram, "open_to_write", lost)
    else:
        monkeypatch.setattr(rank.saver._stream, "save_within", save_within)
    with warnings(caplog) as said:
        for job_id in (1, 2, 3):
            assert "landed_blocks" not in stored(rank, handed_over(rank, job_id, [4, 5]))
    assert not rank.store.landed
    assert ground.not_on == [[], [ground.gpu.name], [ground.gpu.name]]
    assert said() == 1, "once a connection"


@pytest.mark.parametrize("where", ["start", "end"])
@pytest.mark.parametrize("error", [DeviceStuck, DeviceLost])
def test_of_a_place_that_may_be_written_yet_nothing_is_said_and_the_session_ends(
    rank: Rank, where: str, error: type[DeviceError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that names it would have it read, any other, or an abort, would have it be
    another's."""

    class Fails:
        def finish(self) -> list[int]:
            raise error("no answer")

    def save_within(*arguments: Any) -> Any:
        if where == "start":
            raise error("no answer")
        return Fails()

    monkeypatch.setattr(rank.saver._stream, "save_within", save_within)
    attached = rank.link.current
    assert attached is not None
    rank.saver.submit(handed_over(rank, 1, [4, 5]))
    reports: dict[int, Any] = {}
    eventually(lambda: reports.update(rank.saver.take_reports()) or reports)
    assert reports[1].lost
    assert attached.dropped
    assert not {"abort", "commit"} & set(rank.store.calls)
    eventually(lambda: rank.link.current is not None)


def test_blocks_that_cannot_be_copied_within_the_gpu_have_no_places(rank: Rank) -> None:
    rank.saver._groups[0].blocks.within = False  # type: ignore[misc]
    assert "landed_blocks" not in stored(rank, handed_over(rank, 1, [4, 5]))
    assert "land" not in rank.store.calls


def test_a_cancelled_job_lands_nowhere(rank: Rank, ground: Ground) -> None:
    rank.store.on_call = lambda call: rank.saver.cancel([1]) if call == "land" else None
    rank.saver.submit(handed_over(rank, 1, [4, 5]))
    reports: dict[int, Any] = {}
    eventually(lambda: reports.update(rank.saver.take_reports()) or reports)
    rank.store.on_call = None
    stored(rank, handed_over(rank, 2, [6]))
    assert set(rank.store.landed.values()) == {bytes([2, 6])}


def test_memory_that_the_store_takes_back_is_let_go_of(
    rank: Rank, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(rank, handed_over(rank, 1, [4, 5]))
    mirrors = rank.saver._landing._gpus[ground.gpu.name]._mirrors
    assert mirrors is not None
    assert mirrors.opened_extents == 1
    ground.table.close_extent(1)
    eventually(lambda: mirrors.opened_extents == 0)


def test_another_connection_finds_the_memory_again(rank: Rank, ground: Ground) -> None:
    stored(rank, handed_over(rank, 1, [4]))
    rank.store.lose_session()
    assert stored(rank, handed_over(rank, 2, [5]))["landed_blocks"] == 1
    assert ground.grants == 2


def test_a_rank_without_a_gpu_asks_for_no_place() -> None:
    rank = Rank()
    assert "not_landed_blocks" not in stored(rank, handed_over(rank, 1, [4, 5]))
    assert "land" not in rank.store.calls
    rank.close()
