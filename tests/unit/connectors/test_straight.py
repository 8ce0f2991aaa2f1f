"""Blocks that are in the GPU's memory alone: their bytes are right, or they count as failed. There
is nothing that could be copied instead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import xxhash

from kvstore.client.link import VramGrant
from kvstore.device import flight
from kvstore.device.adversarial import Temper
from kvstore.device.mirrors import Mirrors
from kvstore.errors import DeviceError, Unavailable
from kvstore.types import GPU_ONLY
from kvstore_connectors.vllm import loader, nearby
from kvstore_connectors.vllm.acquire import AcquireQueue, TicketState
from tests.unit.connectors.fakes import FULL
from tests.unit.connectors.test_copies import PIECE, data, eventually
from tests.unit.connectors.test_link import submit
from tests.unit.connectors.test_nearby import EXTENT, READER, SLOT, NearRank
from tests.unit.device.gpus import StandInGpu
from tests.unit.device.planting import waits, without


@pytest.fixture
def gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "gpu.json", 16 * EXTENT)


@pytest.fixture(params=Temper)
def rank(request: pytest.FixtureRequest, gpu: StandInGpu) -> Iterator[NearRank]:
    rank = NearRank(gpu, request.param)
    yield rank
    rank.close()


def check_no_word(rank: NearRank, counted: dict[str, float]) -> None:
    """Of damage, which there was none of, or of an error that nobody foresaw."""
    assert rank.store.reported == []
    assert not {"damaged_blocks", "thread_errors"} & set(counted)


def test_they_are_loaded_beside_others_and_counted(rank: NearRank) -> None:
    datas = [data(seed) for seed in range(8)]
    job = rank.load_job(datas, list(range(20, 28)))
    rank.leave_alone(job, [1, 4, 7], datas)
    rank.mirror(job, [0, 5], datas)
    assert rank.load(job) == []
    assert [rank.bytes_of(block) for block in range(20, 28)] == datas
    counted = rank.counted()
    assert (counted["vram_blocks"], counted["straight_blocks"]) == (5, 3)
    assert "straight_misses" not in counted
    check_no_word(rank, counted)


@pytest.mark.parametrize("lost", [[0], [3], [3, 5], [7]])
def test_the_load_ends_before_one_that_is_gone(rank: NearRank, lost: list[int]) -> None:
    datas = [data(seed) for seed in range(8)]
    job = rank.load_job(datas, list(range(20, 28)))
    rank.leave_alone(job, [0, 3, 5, 7], datas)
    for index in lost:
        rank.take_back(index)
    assert rank.load(job) == list(range(20 + lost[0], 28))
    good = list(range(20, 20 + lost[0]))
    assert [rank.bytes_of(block) for block in good] == datas[: lost[0]]
    counted = rank.counted()
    assert counted["straight_misses"] == len(lost)
    assert counted.get("loaded_blocks", 0) == lost[0]
    assert counted["failed_loads"] == 1
    check_no_word(rank, counted)


def anew(rank: NearRank, index: int) -> None:
    """The same block was read to the same place a second time."""
    rank.take_back(index)
    place = EXTENT + index * SLOT
    rank.arena.write(place, memoryview(data(index)))
    rank.table.put(GPU_ONLY | place, place, xxhash.xxh3_64_intdigest(data(index)))


def another(rank: NearRank, index: int) -> None:
    """Another block was read to the same place."""
    rank.take_back(index)
    place = EXTENT + index * SLOT
    rank.arena.write(place, memoryview(data(99)))
    rank.table.put(GPU_ONLY | place, place, xxhash.xxh3_64_intdigest(data(99)))


CHANGES = [NearRank.take_back, anew, another]


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_changes_while_it_is_copied_has_failed(
    rank: NearRank, change: Callable[[NearRank, int], None]
) -> None:
    datas = [data(seed) for seed in range(4)]
    job = rank.load_job(datas, [5, 6, 7, 8])
    rank.leave_alone(job, [0, 1, 2, 3], datas)
    rank.during = lambda: change(rank, 2)
    assert rank.load(job) == [7, 8]
    assert [rank.bytes_of(block) for block in (5, 6)] == datas[:2]
    counted = rank.counted()
    assert counted["straight_misses"] == 1
    check_no_word(rank, counted)


def test_another_blocks_place_is_not_loaded(rank: NearRank) -> None:
    datas = [data(1)]
    job = rank.load_job(datas, [5])
    rank.leave_alone(job, [0], datas)
    another(rank, 0)
    assert rank.load(job) == [5]
    check_no_word(rank, rank.counted())


def test_after_the_leases_end_they_do_not_count(rank: NearRank) -> None:
    datas = [data(1), data(2)]
    job = rank.load_job(datas, [8, 9], expires_ns=1)
    rank.leave_alone(job, [0, 1], datas)
    assert rank.load(job) == [8, 9]
    check_no_word(rank, rank.counted())


def test_names_of_an_earlier_server_are_not_looked_for(
    rank: NearRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may name a block of its own so."""
    monkeypatch.setattr(loader, "LOOK_FOR_SERVER_S", 0.05)
    datas = [data(1)]
    job = rank.load_job(datas, [5], epoch=b"earlier")
    rank.leave_alone(job, [0], datas)
    assert rank.load(job) == [5]
    assert "vram_blocks" not in rank.counted()


def test_a_server_that_is_another_after_the_copy_fails_the_load(rank: NearRank) -> None:
    datas = [data(1), data(2)]
    job = rank.load_job(datas, [5, 6])
    rank.leave_alone(job, [0, 1], datas)
    rank.during = lambda: setattr(rank.store, "epoch", b"next")
    assert rank.load(job) == [5, 6]
    check_no_word(rank, rank.counted())


def test_they_are_found_in_the_next_session_too(rank: NearRank) -> None:
    datas = [data(1)]
    job = rank.load_job(datas, [5])
    rank.leave_alone(job, [0], datas)
    rank.store.lose_session()
    assert rank.load(job) == []
    assert rank.bytes_of(5) == datas[0]


def test_of_a_model_with_several_groups_all_of_the_request_fails(gpu: StandInGpu) -> None:
    rank = NearRank(gpu)
    rank.loader._blocks = [rank.loader._blocks[0]] * 2
    datas = [data(1), data(2)]
    job = rank.load_job(datas, [5, 6])
    rank.leave_alone(job, [0, 1], datas)
    rank.take_back(1)
    assert rank.run(job).failed == {"r"}
    rank.close()


# What the store is told


def names(rank: NearRank) -> list[bytes]:
    """The reader of each time that it was told."""
    return [reader for reader, _ in rank.store.reads]


def test_the_store_is_told_of_the_reader_before_there_is_anything_to_load(gpu: StandInGpu) -> None:
    rank = NearRank(gpu)
    eventually(lambda: rank.store.reads)
    layouts = [layout.layout_id for layout in rank.link.specs]
    assert rank.store.reads == [(READER, layouts)]
    rank.close()


@pytest.mark.parametrize("fault", ["lost", "no such memory"])
def test_memory_that_cannot_be_had_fails_them_and_the_store_is_told_once(
    rank: NearRank, fault: str
) -> None:
    """Else it would grant nothing but misses for as long as the connection lasts."""
    datas = [data(seed) for seed in range(3)]
    job = rank.load_job(datas, [1, 2, 3])
    rank.leave_alone(job, [1, 2], datas)
    rank.gpu.say(lost=True) if fault == "lost" else rank.gpu.say(refuses=["open"])
    for _ in range(3):
        assert rank.load(job) == [2, 3]
        assert rank.bytes_of(1) == datas[0]
    eventually(lambda: names(rank) == [READER, b""])
    layouts = [layout.layout_id for layout in rank.link.specs]
    assert rank.store.reads[1] == (b"", layouts), "they are read there yet, for what lands"
    check_no_word(rank, rank.counted())
    rank.gpu.say(lost=False, refuses=[])
    rank.store.lose_session()
    assert rank.load(job) == []
    assert names(rank) == [READER, b"", READER], "another connection may fare better"


def test_a_copy_that_is_refused_fails_them_and_the_store_is_told(
    rank: NearRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    datas = [data(seed) for seed in range(3)]
    job = rank.load_job(datas, [1, 2, 3])
    rank.leave_alone(job, [1], datas)

    def refused(*_: Any) -> Any:
        raise DeviceError("refused")

    monkeypatch.setattr(rank.loader._stream, "load_within", refused)
    assert rank.load(job) == [2, 3]
    eventually(lambda: names(rank) == [READER, b""])


def test_what_the_store_could_not_be_told_is_said_again(
    rank: NearRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "LOOK_S", 0.001)
    datas = [data(1)]
    job = rank.load_job(datas, [1])
    rank.leave_alone(job, [0], datas)
    eventually(lambda: names(rank))
    unheard = 3

    def grant(name: str) -> VramGrant:
        nonlocal unheard
        unheard -= 1
        if unheard >= 0:
            raise Unavailable("no answer in time")
        return rank.grant(name)

    rank.store.on_gpu = grant
    rank.gpu.say(lost=True)
    assert rank.load(job) == [1]
    eventually(lambda: len(names(rank)) == 5)
    assert names(rank) == [READER, b"", b"", b"", b""]
    rank.gpu.say(lost=False)


def test_a_question_that_was_not_answered_may_have_been_heard(gpu: StandInGpu) -> None:
    """The store counts on a reader then who has no table."""
    rank = NearRank(gpu)
    heard = threading.Event()

    def grant(name: str) -> VramGrant:
        if not heard.is_set():
            heard.set()
            raise Unavailable("no answer in time")
        return rank.grant(name)

    eventually(lambda: names(rank))
    rank.store.on_gpu = grant
    rank.store.lose_session()
    assert rank.load(rank.load_job([data(1)], [1])) == []
    eventually(lambda: names(rank) == [READER, READER, b""])
    rank.close()


def test_an_extent_that_was_closed_is_no_reason_to_say_anything(rank: NearRank) -> None:
    datas = [data(1)]
    job = rank.load_job(datas, [1])
    rank.leave_alone(job, [0], datas)
    rank.arena.close_extent(1)
    assert rank.load(job) == [1]
    assert names(rank) == [READER]


def test_an_extent_that_could_not_be_had_for_a_moment_is_asked_for_again(rank: NearRank) -> None:
    datas = [data(1)]
    job = rank.load_job(datas, [1])
    rank.leave_alone(job, [0], datas)
    fetch, asked = rank.fetch, 0

    def hangs(extent: int) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise Unavailable("no answer in time")
        return fetch(extent)

    eventually(lambda: rank.mirrors)
    assert rank.mirrors is not None
    rank.mirrors._fetch = hangs
    assert rank.load(job) == [1]
    assert rank.load(job) == []


def test_leases_name_the_reader_and_prefetches_and_hand_overs_do_not(gpu: StandInGpu) -> None:
    rank = NearRank(gpu)
    store = rank.store
    queue = AcquireQueue(rank.link, FULL, 10, True, READER)
    queue.start()
    store.blocks = {b"a": data(1)}
    ticket = submit(queue, b"a")
    eventually(lambda: ticket.state is TicketState.ANSWERED)
    assert store.readers == [READER]
    job = rank.follow_job([b"a"], [1], 1.0)
    rank.run(job)
    assert store.readers == [READER, b""], "what has just been stored is in host memory"
    queue.close()
    rank.close()


# That it is needed

NAMES = ("wait_event", "finish")
PLANTED = [(module, line) for module in (loader, flight) for line in waits(module, *NAMES)]


def right(gpu: StandInGpu, kind: type[loader.Loader]) -> bool:
    """Whether all that counts as loaded is, and stays so, whatever the device does."""
    return all(
        scenario(NearRank(gpu, temper, seed, kind))
        for scenario in (is_taken_back_later, is_taken_back_during_the_copy, fails_half_way)
        for temper in Temper
        for seed in range(2)
    )


def prepared(rank: NearRank) -> tuple[Any, list[bytes], list[int]]:
    datas, block_ids = [data(seed) for seed in range(12)], list(range(40, 52))
    job = rank.load_job(datas, block_ids)
    rank.leave_alone(job, list(range(12)), datas)
    # Their last owner is still using the blocks.
    rank.device.compute(lambda: rank.memory.fill_(0xEE))
    return job, datas, block_ids


def loaded_well(rank: NearRank, failed: list[int], datas: list[bytes], ids: list[int]) -> bool:
    rank.device.settle()
    there = {block: rank.bytes_of(block) for block in ids if block not in failed}
    rank.close()
    return all(there[block] == datas[block - ids[0]] for block in there)


def is_taken_back_later(rank: NearRank) -> bool:
    """Nothing is copied any more once the load is reported."""
    job, datas, ids = prepared(rank)
    failed = rank.load(job)
    for index in range(12):
        rank.take_back(index)
    return not failed and loaded_well(rank, failed, datas, ids)


def is_taken_back_during_the_copy(rank: NearRank) -> bool:
    job, datas, ids = prepared(rank)

    def during() -> None:
        for index in (4, 8):
            rank.take_back(index)

    rank.during = during
    return loaded_well(rank, rank.load(job), datas, ids)


def fails_half_way(rank: NearRank) -> bool:
    """The second copy is refused, and the engine computes the blocks instead."""
    job, _, ids = prepared(rank)
    real, started = rank.loader._stream.load_within, 0

    def load_within(*arguments: Any) -> Any:
        nonlocal started
        started += 1
        if started == 2:
            raise DeviceError("refused")
        return real(*arguments)

    rank.loader._stream.load_within = load_within  # type: ignore[assignment, method-assign]
    # So that a copy that is not waited for finds its memory yet.
    rank.loader._nearby.close = lambda: None  # type: ignore[method-assign]
    failed = rank.load(job)
    rank.device.compute(lambda: rank.memory.fill_(0x33))
    rank.device.settle()
    there = b"".join(map(rank.bytes_of, ids))
    rank.close()
    return failed == ids and set(there) == {0x33}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "CHUNK_BYTES", 4 * 2 * PIECE)


def test_with_all_of_it_bytes_are_right(gpu: StandInGpu) -> None:
    assert right(gpu, loader.Loader)


@pytest.mark.parametrize(("module", "line"), PLANTED)
def test_without_a_wait_before_the_row_is_looked_at_again_they_are_not(
    module: ModuleType, line: int, gpu: StandInGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = without(module, line, NAMES, tmp_path)
    if module is flight:
        monkeypatch.setattr(nearby, "Flight", changed.Flight)
    assert not right(gpu, changed.Loader if module is loader else loader.Loader)


def test_without_the_look_at_the_row_they_are_not(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mirrors, "kept", lambda self, found: [True] * len(found.indexes))
    assert not right(gpu, loader.Loader)


def test_a_look_at_the_row_before_the_wait_is_none(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, kept = Mirrors.find, Mirrors.kept

    def looks_at_once(self: Mirrors, *asked: Any) -> Any:
        found = find(self, *asked)
        if found is not None:
            seen = kept(self, found)
            monkeypatch.setattr(self, "kept", lambda _: seen, raising=False)
        return found

    monkeypatch.setattr(Mirrors, "find", looks_at_once)
    assert not right(gpu, loader.Loader)
