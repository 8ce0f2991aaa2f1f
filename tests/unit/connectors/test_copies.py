"""Loading and storing: nothing wrong is published, nothing wrong counts as loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import xxhash

from kvstore.device.adversarial import AdversarialDevice
from kvstore.device.base import Coding, Device, Piece
from kvstore.device.host import HostDevice
from kvstore.errors import BadRequest, Unavailable
from kvstore.types import ChainQuery, LeaseGrant
from kvstore_connectors.vllm import loader as loader_module
from kvstore_connectors.vllm import saver as saver_module
from kvstore_connectors.vllm import slots as slots_module
from kvstore_connectors.vllm import threads as threads_module
from kvstore_connectors.vllm.blocks import Geometry, blocks_of
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.loader import Loader, LoadResults
from kvstore_connectors.vllm.metadata import (
    Arrivals,
    JobReport,
    LoadJob,
    LoadPart,
    StoreJob,
)
from kvstore_connectors.vllm.saver import Saver
from tests.unit.connectors.fakes import FAR_NS, FakeStore, spec

BLOCKS, PIECE = 64, 64
GEOMETRY = Geometry(
    pieces=(Piece(0, PIECE, PIECE), Piece(BLOCKS * PIECE, PIECE, PIECE)),
    num_blocks=BLOCKS,
    block_tokens=4,
    allocation_bytes=2 * BLOCKS * PIECE,
)


class Rank:
    """One rank's KV cache of two layers, and the threads that copy it."""

    def __init__(
        self,
        groups: int = 1,
        device: Device | None = None,
        loader: Callable[..., Loader] = Loader,
        saver: type[Saver] = Saver,
        where: str = "cpu",
        coding: Coding | None = None,
    ) -> None:
        device = device or HostDevice()
        self.store = FakeStore()
        self.memory = torch.arange(2 * BLOCKS * PIECE, dtype=torch.int32).to(torch.uint8).to(where)
        layers = self.memory.view(2, BLOCKS, PIECE)
        tensors = {"0": layers[0], "1": layers[1]}
        geometry = replace(GEOMETRY, coding=coding)
        blocks = [blocks_of(device, tensors, geometry) for _ in range(groups)]
        self.layers = layers
        nbytes = blocks[0].block_bytes
        specs = [spec(block_bytes=nbytes, group=group) for group in range(groups)]
        self.link = StoreLink(self.store.connect, specs, "test")
        self.link.start()
        assert self.link.wait_attached(30)
        self.loader = loader(self.link, device, blocks, 0, lambda: None)
        self.saver = saver(self.link, device, blocks, lambda: None)

    def bytes_of(self, block: int) -> bytes:
        return bytes(self.layers[:, block].reshape(-1).tolist())

    def store_job(self, job_id: int, block_ids: list[int], group: int = 0) -> StoreJob:
        keys = [bytes([job_id, block]) for block in block_ids]
        return StoreJob(job_id, "r", group, block_ids, keys, [b"", *keys[:-1]])

    def load_job(self, datas: list[bytes], block_ids: list[int], **changes: object) -> LoadJob:
        part = LoadPart(
            group=0,
            block_ids=block_ids,
            addresses=[[self.store.place(data) for data in datas]],
            checksums=[[xxhash.xxh3_64_intdigest(data) for data in datas]],
        )
        job = LoadJob("r", [part], FAR_NS, b"epoch")
        for name, value in changes.items():
            setattr(job, name, value)
        return job

    def follow_job(self, keys: list[bytes], block_ids: list[int], patience_s: float) -> LoadJob:
        self.store.shows_directory = True
        return LoadJob("r", [], 0, b"epoch", Arrivals(0, block_ids, keys, patience_s))

    def run(self, job: LoadJob) -> LoadResults:
        self.loader.submit(job)
        return self.wait(job)

    def wait(self, job: LoadJob) -> LoadResults:
        eventually(self.loader.has_results)
        results = self.loader.take_results()
        assert results.finished == {job.request_id}
        assert self.loader.busy == bool(self.loader._waiting)
        return results

    def load(self, job: LoadJob) -> list[int]:
        results = self.run(job)
        assert not results.failed
        return [block for block in job.parts[0].block_ids if block in results.failed_blocks]

    def close(self) -> None:
        self.store.gate.set()
        self.saver.close()
        self.loader.close()
        self.link.close()


def eventually(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for seconds is no hung server, and no idle one."""
    monkeypatch.setattr(saver_module, "STUCK_S", 60.0)
    monkeypatch.setattr(saver_module, "IDLE_S", 60.0)


@pytest.fixture(params=[HostDevice, AdversarialDevice])
def rank(request: pytest.FixtureRequest) -> Iterator[Rank]:
    rank = Rank(device=request.param())
    yield rank
    rank.close()


def data(seed: int) -> bytes:
    return bytes((seed * 7 + index) % 251 for index in range(2 * PIECE))


# -- loads ------------------------------------------------------------------------


def test_a_load_fills_every_layers_piece_of_every_block(rank: Rank) -> None:
    datas = [data(seed) for seed in range(40)]
    block_ids = list(range(50, 10, -1))
    others = {block: rank.bytes_of(block) for block in range(11)}
    assert rank.load(rank.load_job(datas, block_ids)) == []
    assert [rank.bytes_of(block) for block in block_ids] == datas
    assert {block: rank.bytes_of(block) for block in others} == others


def test_damaged_bytes_fail_the_load_from_there_on(rank: Rank) -> None:
    job = rank.load_job([data(seed) for seed in range(40)], list(range(40)))
    damaged = [job.parts[0].addresses[0][block] for block in (20, 30)]
    for address in damaged:
        rank.store.slots[address][5] ^= 1
    assert rank.load(job) == list(range(20, 40))
    eventually(lambda: rank.store.reported)
    assert rank.store.reported == damaged
    stats = rank.loader.take_stats()
    assert stats is not None
    assert stats.data["damaged_blocks"] == 2
    assert stats.data["loaded_blocks"] == 20


def test_a_lease_that_ended_during_the_copy_fails_the_load(rank: Rank) -> None:
    assert rank.load(rank.load_job([data(0)], [3], expires_ns=1)) == [3]


def test_addresses_of_an_earlier_server_life_are_not_followed(rank: Rank) -> None:
    before = rank.bytes_of(3)
    rank.store.epoch = b"next"
    assert rank.link.seeks(b"next")
    eventually(lambda: rank.link.generation == 2)
    assert rank.load(rank.load_job([data(0)], [3])) == [3]
    assert rank.bytes_of(3) == before


def test_a_server_that_only_the_scheduler_has_found_again_is_looked_for(rank: Rank) -> None:
    rank.store.epoch = b"next"
    assert rank.load(rank.load_job([data(0)], [3], epoch=b"next")) == []
    assert rank.bytes_of(3) == data(0)
    assert rank.link.generation == 2


def test_a_server_that_is_never_found_fails_the_load(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "LOOK_FOR_SERVER_S", 0.05)
    assert rank.load(rank.load_job([data(0)], [3], epoch=b"never")) == [3]


def test_a_lost_server_fails_the_load_and_the_next_one_works(rank: Rank) -> None:
    job = rank.load_job([data(0)], [3])

    def lost() -> None:
        raise Unavailable("gone")

    rank.store.before_slot = lost
    assert rank.load(job) == [3]
    rank.store.before_slot = None
    assert rank.load(job) == []


def test_several_loads_end_each_for_itself(rank: Rank) -> None:
    jobs = []
    for index in range(3):
        job = rank.load_job([data(index)] * 17, list(range(20 * index, 20 * index + 17)))
        job.request_id = f"r{index}"
        jobs.append(job)
    jobs[1].parts[0].checksums[0][0] ^= 1
    for job in jobs:
        rank.loader.submit(job)
    finished: set[str] = set()
    failed: set[int] = set()
    while len(finished) < 3:
        eventually(rank.loader.has_results)
        results = rank.loader.take_results()
        finished |= results.finished
        failed |= results.failed_blocks
    assert failed == set(range(20, 37))


def test_of_several_groups_all_are_loaded_or_the_request_has_failed() -> None:
    rank = Rank(groups=2)
    first, second = rank.load_job([data(0)], [3]), rank.load_job([data(1)], [4])
    second.parts[0].group = 1
    both = rank.load_job([], [], parts=first.parts + second.parts)
    assert rank.run(both) == LoadResults({"r"})
    assert [rank.bytes_of(3), rank.bytes_of(4)] == [data(0), data(1)]
    second.parts[0].checksums[0][0] ^= 1
    assert rank.run(both) == LoadResults({"r"}, {"r"})
    rank.close()


# -- loads of what another engine is storing ----------------------------------------

KEYS = [bytes([number]) * 32 for number in range(4)]
TARGETS = [10, 11, 12, 13]


def test_blocks_are_loaded_as_they_come(rank: Rank) -> None:
    job = rank.follow_job(KEYS, TARGETS, patience_s=30)
    rank.loader.submit(job)
    for number, key in enumerate(KEYS):
        assert not rank.loader.has_results()
        rank.store.blocks[key] = data(number)
        eventually(lambda number=number: rank.bytes_of(TARGETS[number]) == data(number))
    results = rank.wait(job)
    assert (results.failed, results.failed_blocks) == (set(), set())
    assert not rank.store.leases
    assert not rank.loader._waiting


def test_what_does_not_come_in_time_is_computed(rank: Rank) -> None:
    rank.store.blocks |= {KEYS[0]: data(0), KEYS[2]: data(2)}
    assert rank.run(rank.follow_job(KEYS, TARGETS, 0.02)).failed_blocks == set(TARGETS[1:])
    assert rank.bytes_of(10) == data(0)
    stats = rank.loader.take_stats()
    assert stats is not None
    assert stats.data["handover_timeouts"] == stats.data["failed_loads"] == 1
    assert not rank.store.leases


def test_a_request_that_has_ended_is_not_waited_for(rank: Rank) -> None:
    job = rank.follow_job(KEYS, TARGETS, 30)
    rank.loader.submit(job)
    rank.loader.give_up(["r", "another"])
    assert rank.wait(job).failed_blocks == set(TARGETS)


def test_damaged_bytes_that_come_end_the_wait(rank: Rank) -> None:
    rank.store.blocks |= {key: data(number) for number, key in enumerate(KEYS)}
    good = rank.store._grant

    def grant(chain: ChainQuery) -> LeaseGrant:
        granted = good(chain)
        granted.checksums[2] ^= 1
        return granted

    rank.store._grant = grant  # type: ignore[method-assign]
    assert rank.run(rank.follow_job(KEYS, TARGETS, 30)).failed_blocks == set(TARGETS[2:])
    assert not rank.store.leases


@pytest.mark.parametrize("how", ["lost", "other layouts"])
def test_a_store_that_goes_away_ends_the_wait_and_what_came_counts(rank: Rank, how: str) -> None:
    rank.store.blocks[KEYS[0]] = data(0)
    job = rank.follow_job(KEYS, TARGETS, 30)
    rank.loader.submit(job)
    eventually(lambda: rank.bytes_of(10) == data(0) and not rank.store.leases)
    if how == "lost":
        rank.store.error = Unavailable("gone")
        rank.link.suspect()
    else:
        rank.link.change_layouts([spec(block_bytes=4 * PIECE)])
    assert rank.wait(job).failed_blocks == set(TARGETS[1:])


def test_waiting_for_one_prompt_holds_up_no_other(rank: Rank) -> None:
    rank.loader.submit(rank.follow_job(KEYS, TARGETS, 30))
    other = rank.load_job([data(7)], [3], request_id="other")
    rank.loader.submit(other)
    assert rank.wait(other).failed_blocks == set()
    assert rank.bytes_of(3) == data(7)


# -- stores -----------------------------------------------------------------------


def test_a_store_publishes_exactly_the_blocks_bytes(rank: Rank) -> None:
    rank.saver.submit(rank.store_job(1, [5, 9, 2]))
    eventually(lambda: len(rank.store.blocks) == 3)
    eventually(lambda: rank.saver.take_reports())
    assert rank.store.blocks == {bytes([1, b]): rank.bytes_of(b) for b in (5, 9, 2)}


def test_groups_are_published_under_their_own_layouts_in_turn() -> None:
    rank = Rank(groups=2)
    rank.store.gate.clear()
    for job_id, group in enumerate((0, 1, 0, 1), start=1):
        rank.saver.submit(rank.store_job(job_id, [job_id], group))
    rank.store.gate.set()
    eventually(lambda: len(rank.store.blocks) == 4)
    layouts = [spec(block_bytes=2 * PIECE, group=group).layout_id for group in (0, 1)]
    committed = dict(rank.store.committed)
    assert [committed[bytes([n, n])] for n in (1, 2, 3, 4)] == [*layouts, *layouts]
    rank.close()


def test_a_store_after_the_first_costs_one_call(rank: Rank) -> None:
    for job_id in (1, 2, 3):
        rank.saver.submit(rank.store_job(job_id, [5, 9]))
        eventually(rank.saver.take_reports)
    calls = [call for call in rank.store.calls if call in ("reserve", "commit", "abort")]
    assert calls == ["reserve", "commit", "commit", "commit"]


def test_jobs_that_wait_together_are_published_by_one_call(rank: Rank) -> None:
    rank.store.gate.clear()
    rank.saver.submit(rank.store_job(1, [1]))
    eventually(lambda: "reserve" in rank.store.calls)
    for job_id in (2, 3, 4):
        rank.saver.submit(rank.store_job(job_id, [job_id]))
    rank.store.gate.set()
    eventually(lambda: len(rank.store.blocks) == 4)
    assert rank.store.calls.count("commit") == 2


def test_memory_reserved_ahead_is_given_back_when_nothing_is_stored(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "IDLE_S", 0.01)
    rank.saver.submit(rank.store_job(1, [5, 9]))
    eventually(lambda: "abort" in rank.store.calls)
    eventually(lambda: not rank.store.reserved)


def test_slots_that_are_about_to_expire_are_not_written(rank: Rank) -> None:
    rank.store.expires_ns = time.monotonic_ns() + slots_module.MARGIN_NS
    for job_id in (1, 2):
        rank.saver.submit(rank.store_job(job_id, [5]))
        eventually(rank.saver.take_reports)
    assert [c for c in rank.store.calls if c in ("reserve", "commit", "abort")] == [
        "reserve", "commit", "abort", "reserve", "commit",
    ]  # fmt: skip


@pytest.mark.parametrize("blocks", [[5, 6], [5, 6, 7]])
def test_slots_of_a_lost_session_are_not_written(rank: Rank, blocks: list[int]) -> None:
    rank.saver.submit(rank.store_job(1, [1, 2]))
    eventually(rank.saver.take_reports)
    others = list(rank.store.reserved.values())
    rank.store.lose_session()
    rank.saver.submit(rank.store_job(2, blocks))
    eventually(rank.saver.take_reports)
    assert len(others) == 2
    assert all(bytes(rank.store.slots[address]) == bytes(2 * PIECE) for address in others)
    assert len(rank.store.blocks) == 2 + len(blocks)


def test_a_session_that_is_lost_while_slots_are_taken_ends_the_copy(rank: Rank) -> None:
    rank.store.before_slot = rank.store.lose_session
    rank.saver.submit(rank.store_job(1, [5, 6]))
    eventually(rank.saver.take_reports)
    assert not rank.store.blocks
    assert not any(map(any, rank.store.slots.values()))


def test_a_bug_costs_a_store_and_not_the_thread(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads_module, "PAUSE_S", 0.001)
    monkeypatch.setattr(saver_module, "IDLE_S", 0.01)
    failing = ["abort", "commit"]

    def bug(call: str) -> None:
        if failing[:1] == [call]:
            del failing[0]
            raise RuntimeError("a bug")

    rank.store.on_call = bug
    for job_id in (1, 2, 3):
        # Slots at hand are given back in between, which fails the first time.
        rank.saver.submit(rank.store_job(job_id, [5]))
        eventually(rank.saver.take_reports)
        eventually(lambda: not rank.saver._groups[0].slots)
    assert set(rank.store.blocks) == {b"\x01\x05", b"\x03\x05"}
    stats = rank.saver.take_stats()
    assert stats is not None
    assert stats.data["thread_errors"] == 2


def test_a_job_that_is_only_partly_given_room_is_lost_and_the_others_are_not(rank: Rank) -> None:
    rank.store.room = 3
    rank.store.gate.clear()
    rank.saver.submit(rank.store_job(1, [1]))
    eventually(lambda: "reserve" in rank.store.calls)
    rank.saver.submit(rank.store_job(2, [2]))
    rank.saver.submit(rank.store_job(3, [3, 4]))
    rank.store.gate.set()
    reports: dict[int, JobReport] = {}
    eventually(lambda: reports.update(rank.saver.take_reports()) or len(reports) == 3)
    assert {job_id for job_id, report in reports.items() if report.lost} == {3}


def test_blocks_reused_before_the_copy_are_not_published(rank: Rank) -> None:
    rank.store.gate.clear()
    rank.saver.submit(rank.store_job(1, [5]))
    eventually(lambda: "reserve" in rank.store.calls)
    rank.saver.cancel([1])
    assert rank.saver.take_reports()[1].lost
    rank.memory.fill_(0xEE)
    rank.store.gate.set()
    rank.saver.submit(rank.store_job(2, [6]))
    eventually(lambda: rank.store.blocks)
    assert set(rank.store.blocks) == {b"\x02\x06"}


@pytest.mark.parametrize("block_ids", [[5], [5, 6]])
def test_blocks_reused_during_the_copy_are_not_published(rank: Rank, block_ids: list[int]) -> None:
    copying, reused = threading.Event(), threading.Event()

    def in_the_middle() -> None:
        copying.set()
        reused.wait(60)

    rank.store.before_slot = in_the_middle
    rank.saver.submit(rank.store_job(1, block_ids))
    copying.wait(60)
    rank.saver.cancel([1])
    rank.memory.fill_(0xEE)
    reused.set()
    rank.saver.submit(rank.store_job(2, [7]))
    eventually(lambda: rank.store.blocks)
    assert rank.store.blocks == {b"\x02\x07": rank.bytes_of(7)}


def test_cancelling_one_job_leaves_the_others(rank: Rank) -> None:
    rank.store.gate.clear()
    for job_id in (1, 2, 3):
        rank.saver.submit(rank.store_job(job_id, [job_id]))
    rank.saver.cancel([2, 99])
    rank.store.gate.set()
    eventually(lambda: len(rank.store.blocks) == 2)
    assert set(rank.store.blocks) == {b"\x01\x01", b"\x03\x03"}


def test_a_hung_server_keeps_blocks_for_a_moment_only(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.store.gate.clear()
    rank.saver.submit(rank.store_job(1, [5]))
    rank.saver.submit(rank.store_job(2, [6]))
    assert rank.saver.take_reports() == {}
    monkeypatch.setattr(saver_module, "STUCK_S", 0.05)
    time.sleep(0.06)
    reports = rank.saver.take_reports()
    assert all(reports[job_id].lost for job_id in (1, 2))
    assert not rank.saver.busy


def test_too_much_queued_is_skipped_not_waited_for(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "MAX_QUEUED_BYTES", 3 * 2 * PIECE)
    rank.store.gate.clear()
    rank.saver.submit(rank.store_job(1, [1]))
    eventually(lambda: "reserve" in rank.store.calls)
    rank.saver.submit(rank.store_job(2, [1, 2, 3]))
    rank.saver.submit(rank.store_job(3, [4]))
    reports = rank.saver.take_reports()
    assert list(reports) == [3]
    assert reports[3].lost
    stats = rank.saver.take_stats()
    assert stats is not None
    assert stats.data["skipped_blocks"] == 1


def test_what_the_server_has_no_room_for_is_lost(rank: Rank) -> None:
    rank.store.room = 0
    rank.saver.submit(rank.store_job(1, [5]))
    reports: dict[int, JobReport] = {}
    eventually(lambda: reports.update(rank.saver.take_reports()) or reports)
    assert reports[1].lost


def test_an_error_of_the_server_loses_the_job_and_nothing_else(rank: Rank) -> None:
    rank.store.error = BadRequest("no")
    rank.saver.submit(rank.store_job(1, [5]))
    eventually(rank.saver.take_reports)
    assert rank.link.up
    rank.store.error = None
    rank.saver.submit(rank.store_job(2, [5]))
    eventually(lambda: rank.store.blocks)


def test_without_a_server_a_job_is_lost_at_once(rank: Rank) -> None:
    rank.store.error = Unavailable("gone")
    rank.link.suspect()
    rank.saver.submit(rank.store_job(1, [5]))
    assert rank.saver.take_reports()[1].lost
