"""Blocks that a server reads from its drive straight into a stand-in GPU's memory, and a worker of
vLLM's loads from there, each in its own process."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore.client import gets
from kvstore.types import GPU_ONLY, ChainQuery, LeaseGrant, VramStats
from tests.integration.client.conftest import Server, block, key, layout_of
from tests.unit.connectors.test_vram_served import (
    BLOCK,
    EXTENT,
    KEYS,
    SIZES,
    Worker,
    eventually,
    store,
)
from tests.unit.device.gpus import StandInGpu

READER = b"engine"
DATAS = [block(number, BLOCK) for number in range(len(KEYS))]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only on the drive comes up however busy the machine is."""
    monkeypatch.setattr(gets, "GET_WAIT_MS", 30_000)


@pytest.fixture
def gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "gpu.json", 16 * EXTENT)


@pytest.fixture
def other_gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "other.json", 16 * EXTENT)


@pytest.fixture
def server(tmp_path: Path, gpu: StandInGpu, other_gpu: StandInGpu) -> Iterator[Server]:
    server = Server(tmp_path, nvme=True)
    server.arguments += ["--vram-gpus", f"{gpu.name},{other_gpu.name}", *SIZES]
    server.arguments += ["--vram-gpudirect", "true"]
    server.start()
    yield server
    server.kill()


@pytest.fixture
def worker(server: Server, gpu: StandInGpu) -> Iterator[Worker]:
    worker = Worker(server, gpu, READER)
    yield worker
    worker.close()


@pytest.fixture
def scheduler(server: Server) -> Iterator[kvstore.Client]:
    with kvstore.Client(server.socket, timeout_s=60) as client:
        yield client


def lease(scheduler: kvstore.Client, reader: bytes = READER) -> LeaseGrant:
    """On blocks that were on the drive alone, if they are in no GPU's memory."""
    scheduler.flush(drop=True)
    chain = ChainQuery([layout_of(scheduler, BLOCK).id], KEYS)
    (grant,) = scheduler.acquire_many([chain], 30_000, reader=reader)
    return grant


def is_straight(grant: LeaseGrant) -> bool:
    """All of it; there is nothing in between here."""
    there = [address >= GPU_ONLY for address in grant.addresses]
    assert grant.held == len(KEYS)
    assert all(there) or not any(there)
    return all(there)


def straight_lease(scheduler: kvstore.Client) -> LeaseGrant:
    """Once the GPU has room, which it gets when it is first asked for."""
    return _lease_when(scheduler, lambda grant: all(each >= GPU_ONLY for each in grant.addresses))


def usual_lease(scheduler: kvstore.Client) -> LeaseGrant:
    """Once the server has heard that it is to be one of host memory."""
    return _lease_when(scheduler, lambda grant: all(each < GPU_ONLY for each in grant.addresses))


def _lease_when(scheduler: kvstore.Client, condition: Callable[[LeaseGrant], bool]) -> LeaseGrant:
    grants: list[LeaseGrant] = []

    def granted() -> bool:
        if grants:
            scheduler.release([grants[-1].lease_id])
        grants.append(lease(scheduler))
        return condition(grants[-1])

    eventually(granted)
    return grants[-1]


def on_gpu(client: kvstore.Client, gpu: StandInGpu) -> VramStats:
    (stats,) = (each for each in client.stats().vram if each.gpu == gpu.name)
    return stats


def check_no_damage(client: kvstore.Client, counted: dict[str, float]) -> None:
    assert client.stats().corrupt_blocks == 0
    assert not {"damaged_blocks", "thread_errors"} & set(counted)


def test_blocks_come_from_the_drive_without_a_place_in_host_memory(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    grant = straight_lease(scheduler)
    failed, counted = worker.load_leased(grant, scheduler.epoch)
    assert not failed
    assert counted["straight_blocks"] == counted["vram_blocks"] == len(KEYS)
    read = on_gpu(scheduler, gpu).straight_blocks
    assert read >= len(KEYS)
    scheduler.release([grant.lease_id])
    again = lease(scheduler)
    assert is_straight(again)
    assert not worker.load_leased(again, scheduler.epoch)[0]
    assert on_gpu(scheduler, gpu).straight_blocks == read, "it was there yet"
    check_no_damage(scheduler, counted)


@pytest.mark.parametrize("reader", [b"", b"another"])
def test_whoever_does_not_read_there_gets_them_in_host_memory(
    worker: Worker, scheduler: kvstore.Client, reader: bytes
) -> None:
    store(scheduler)
    scheduler.release([straight_lease(scheduler).lease_id])
    grant = lease(scheduler, reader)
    assert not is_straight(grant)
    failed, counted = worker.load_leased(grant, scheduler.epoch)
    assert not failed
    assert "straight_blocks" not in counted


def test_a_name_that_is_read_under_on_two_gpus_gets_them_in_host_memory(
    worker: Worker, scheduler: kvstore.Client, server: Server, other_gpu: StandInGpu
) -> None:
    """What one of them has the other could not load."""
    store(scheduler)
    scheduler.release([straight_lease(scheduler).lease_id])
    other = Worker(server, other_gpu, READER)
    grant = usual_lease(scheduler)
    for each in (worker, other):
        assert not each.load_leased(grant, scheduler.epoch)[0]
    other.close()
    scheduler.release([grant.lease_id])
    straight_lease(scheduler)


def test_a_client_of_the_server_reads_them_from_host_memory_or_not_at_all(
    worker: Worker, scheduler: kvstore.Client
) -> None:
    store(scheduler)
    layout = layout_of(scheduler, BLOCK)
    scheduler.release([straight_lease(scheduler).lease_id])
    with scheduler.acquire(layout, KEYS, wait_ms=30_000, reader=READER) as held:
        assert held.held == len(KEYS)
        assert [held.read(index) for index in range(3)] == [None] * 3
        with pytest.raises(kvstore.errors.BadRequest):
            held.view(0)
        scheduler.report_damage(held.addresses)
    assert scheduler.get_many(layout, KEYS) == DATAS
    assert scheduler.counters.corrupt == 0
    assert scheduler.stats().corrupt_blocks == 0


def test_a_remote_client_reads_them_from_host_memory(
    worker: Worker, scheduler: kvstore.Client, server: Server
) -> None:
    store(scheduler)
    scheduler.release([straight_lease(scheduler).lease_id])
    with kvstore.Client(server.remote, timeout_s=60) as remote:
        layout = layout_of(remote, BLOCK)
        assert remote.get_many(layout, KEYS) == DATAS
        with remote.acquire(layout, KEYS, wait_ms=30_000, reader=READER) as held:
            assert [held.read(index) for index in range(held.held)] == DATAS


def test_what_the_engine_takes_back_is_a_miss_and_comes_by_host_memory_next(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    grant = straight_lease(scheduler)
    gpu.say(taken=16 * EXTENT)
    eventually(lambda: on_gpu(scheduler, gpu).held_bytes == 0)
    failed, counted = worker.load_leased(grant, scheduler.epoch)
    assert failed == set(range(len(KEYS)))
    assert counted["straight_misses"] == len(KEYS)
    check_no_damage(scheduler, counted)
    scheduler.release([grant.lease_id])
    grant = lease(scheduler)
    assert not is_straight(grant)
    assert not worker.load_leased(grant, scheduler.epoch)[0]


def test_a_gpu_that_is_lost_costs_what_was_leased_there(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    grant = straight_lease(scheduler)
    gpu.say(lost=True)
    eventually(lambda: not on_gpu(scheduler, gpu).healthy)
    failed, counted = worker.load_leased(grant, scheduler.epoch)
    assert failed == set(range(len(KEYS)))
    check_no_damage(scheduler, counted)
    grant = lease(scheduler)
    assert not is_straight(grant)
    assert not worker.load_leased(grant, scheduler.epoch)[0]


def test_a_worker_that_cannot_open_the_memory_loses_one_load_only(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    gpu.say(refuses=["open"])
    grant = straight_lease(scheduler)
    failed, counted = worker.load_leased(grant, scheduler.epoch)
    assert failed == set(range(len(KEYS)))
    check_no_damage(scheduler, counted)
    scheduler.release([grant.lease_id])
    assert not worker.load_leased(usual_lease(scheduler), scheduler.epoch)[0]


@pytest.mark.parametrize("fault", [{"refuses": ["fill"]}, {"spoils": ["fill"]}])
def test_what_cannot_be_read_straight_comes_to_the_same_place_by_host_memory(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu, fault: dict[str, list[str]]
) -> None:
    store(scheduler)
    scheduler.release([straight_lease(scheduler).lease_id])
    scheduler.clear()
    store(scheduler)
    gpu.say(**fault)
    grant = lease(scheduler)
    failed, counted = worker.load_leased(grant, scheduler.epoch)
    assert not failed
    check_no_damage(scheduler, counted)
    assert on_gpu(scheduler, gpu).bounced_blocks
    assert not on_gpu(scheduler, gpu).reads_straight, "after three in a row"


def test_names_of_a_server_that_was_killed_mean_nothing_to_the_next(
    worker: Worker, server: Server
) -> None:
    with kvstore.Client(server.socket, timeout_s=60) as scheduler:
        store(scheduler)
        grant, epoch = straight_lease(scheduler), scheduler.epoch
    server.kill()
    server.start()
    with kvstore.Client(server.socket, timeout_s=60) as scheduler:
        eventually(lambda: worker.link.current and worker.link.current.epoch == scheduler.epoch)
        store(scheduler)
        failed, _ = worker.load_leased(grant, epoch)
        assert failed == set(range(len(KEYS)))
        grant = straight_lease(scheduler)
        failed, counted = worker.load_leased(grant, scheduler.epoch)
        assert not failed
        assert counted["straight_blocks"] == len(KEYS)


def test_a_place_that_is_another_blocks_by_now_is_not_loaded(
    worker: Worker, scheduler: kvstore.Client
) -> None:
    """The lease ended with a clear, of which the worker hears nothing."""
    store(scheduler)
    stale = straight_lease(scheduler)
    scheduler.clear()
    others = [key(1000 + number) for number in range(len(KEYS))]
    layout = layout_of(scheduler, BLOCK)
    scheduler.put_many(layout, others, [block(1000 + n, BLOCK) for n in range(len(others))])
    scheduler.flush(drop=True)
    (grant,) = scheduler.acquire_many([ChainQuery([layout.id], others)], 30_000, reader=READER)
    assert set(grant.addresses) & set(stale.addresses), "the test shows nothing without"
    assert worker.load_leased(stale, scheduler.epoch)[0] == set(range(len(KEYS)))


def test_while_the_engine_takes_and_gives_back_nothing_wrong_is_loaded(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    scheduler.release([straight_lease(scheduler).lease_id])
    chance, straight = random.Random(3), 0
    for _ in range(30):
        gpu.say(taken=chance.choice([0, 0, 16 * EXTENT]))
        grant = lease(scheduler)
        straight += any(address >= GPU_ONLY for address in grant.addresses)
        gpu.say(taken=chance.choice([0, 16 * EXTENT]))
        time.sleep(chance.choice([0, 0, 0.05, 0.15]))
        _, counted = worker.load_leased(grant, scheduler.epoch)
        check_no_damage(scheduler, counted)
        scheduler.release([grant.lease_id])
    assert straight


READS_AND_DIES = """
import sys
import kvstore
from kvstore.device.mirrors import Mirrors
from kvstore.device.vram_stand_in import StandInVram
client = kvstore.Client(sys.argv[1])
spec = kvstore.LayoutSpec(model="m", dtype="bfloat16", block_tokens=16, block_bytes=65536)
layout = client.register_layout(spec)
vram = StandInVram(sys.argv[2])
grant = client.vram(vram.name, [layout.id], reader=b"engine")
mirrors = Mirrors(grant.descriptor, grant.extent_bytes, grant.fetch, vram.open)
print("reads", flush=True)
sys.stdin.readline()
"""


def test_when_the_worker_is_killed_they_come_by_host_memory(
    server: Server, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    """An engine whose worker is another now, or none."""
    store(scheduler)
    dying = subprocess.Popen(
        [sys.executable, "-c", READS_AND_DIES, server.socket, gpu.name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with dying:
        assert dying.stdout is not None
        assert dying.stdout.readline() == "reads\n"
        scheduler.release([straight_lease(scheduler).lease_id])
        dying.kill()
    usual_lease(scheduler)
    assert scheduler.get_many(layout_of(scheduler, BLOCK), KEYS) == DATAS
