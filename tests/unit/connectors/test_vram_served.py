"""The way of a block through a GPU's memory, each part in its own process: a server that has
memory of a stand-in GPU, vLLM's worker, which loads from it, and another, which hands prompts
over to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.device.base import Memory, Piece
from kvstore.device.host import HostDevice
from kvstore.device.vram_stand_in import StandInVram
from kvstore.types import ChainQuery, LeaseGrant, VramStats
from tests.integration.client.conftest import MIB, Server, block, key, layout_of
from tests.unit.device.gpus import StandInGpu

ROOT = Path(__file__).parents[3]
BLOCK = 64 << 10
EXTENT = 8 * MIB
SIZES = ("--vram-capacity", "32MiB", "--vram-reserve", "8MiB")


@pytest.fixture
def gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "gpu.json", 16 * EXTENT)


@pytest.fixture
def gpu_server(tmp_path: Path, gpu: StandInGpu) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start("--vram-gpus", gpu.name, *SIZES)
    yield server
    server.kill()


class Worker:
    """A rank of vLLM's on the stand-in: its KV cache and the thread that loads into it."""

    def __init__(self, server: Server, gpu: StandInGpu, reader: bytes = b"") -> None:
        import numpy as np

        from kvstore_connectors.vllm.link import StoreLink
        from kvstore_connectors.vllm.loader import Loader

        self.memory = np.zeros(64 * BLOCK, np.uint8)
        device = HostDevice(StandInVram(gpu.name))
        memory = Memory(self.memory.ctypes.data, len(self.memory), self.memory)
        pieces = [Piece(0, BLOCK // 2, BLOCK // 2), Piece(32 * BLOCK, BLOCK // 2, BLOCK // 2)]
        blocks = device.blocks(memory, pieces, 64)
        with kvstore.Client(server.socket) as client:
            spec = layout_of(client, BLOCK).spec
        self.link: Any = StoreLink(lambda: kvstore.Client(server.socket), [spec], "test")
        self.link.start()
        assert self.link.wait_attached(30)
        self.loader = Loader(self.link, device, [blocks], 0, lambda: None, reader=reader)

    def load(self, scheduler: kvstore.Client, keys: list[bytes]) -> int:
        """Has the blocks of these keys loaded into as many of the KV cache's: how many came from
        the GPU's memory."""
        layout = layout_of(scheduler, BLOCK)
        (grant,) = scheduler.acquire_many([ChainQuery([layout.id], keys)], 30_000)
        assert grant.held == len(keys)
        failed, counted = self.load_leased(grant, scheduler.epoch)
        assert not failed
        scheduler.release([grant.lease_id])
        return int(counted.get("vram_blocks", 0))

    def load_leased(self, grant: LeaseGrant, epoch: bytes) -> tuple[set[int], dict[str, float]]:
        """(blocks that failed, what was counted), where the others are as they must be."""
        from kvstore_connectors.vllm.metadata import LoadJob, LoadPart

        self.memory[:] = 0
        part = LoadPart(0, list(range(grant.held)), [grant.addresses], [grant.checksums])
        self.loader.submit(LoadJob("r", [part], grant.expires_ns, epoch))
        eventually(self.loader.has_results)
        results = self.loader.take_results()
        assert not results.failed
        halves = self.memory.reshape(2, 64, BLOCK // 2)
        for index in set(range(grant.held)) - results.failed_blocks:
            assert halves[:, index].tobytes() == block(index, BLOCK), index
        stats = self.loader.take_stats()
        return results.failed_blocks, {} if stats is None else stats.data

    def close(self) -> None:
        self.loader.close()
        self.link.close()


@pytest.fixture
def worker(gpu_server: Server, gpu: StandInGpu) -> Iterator[Worker]:
    worker = Worker(gpu_server, gpu)
    yield worker
    worker.close()


@pytest.fixture
def scheduler(gpu_server: Server) -> Iterator[kvstore.Client]:
    with kvstore.Client(gpu_server.socket, timeout_s=60) as client:
        yield client


KEYS = [key(number) for number in range(20)]


def store(client: kvstore.Client) -> None:
    layout = layout_of(client, BLOCK)
    datas = [block(number, BLOCK) for number in range(len(KEYS))]
    client.put_many(layout, KEYS, datas, wait_ms=30_000)


def eventually(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def warm(worker: Worker, scheduler: kvstore.Client) -> None:
    eventually(lambda: worker.load(scheduler, KEYS) == len(KEYS))


def test_what_is_loaded_again_and_again_comes_from_the_gpus_memory(
    worker: Worker, scheduler: kvstore.Client
) -> None:
    store(scheduler)
    assert worker.load(scheduler, KEYS) == 0
    warm(worker, scheduler)


def test_under_pressure_it_comes_from_host_memory_and_the_gpu_has_its_own_back(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    warm(worker, scheduler)
    gpu.say(taken=16 * EXTENT)
    eventually(lambda: worker.load(scheduler, KEYS) == 0)
    shared = worker.loader._nearby._shared
    assert shared is not None
    mirrors = shared._mirrors
    assert mirrors is not None
    eventually(lambda: mirrors.opened_extents == 0)


def test_a_gpu_that_is_lost_to_the_server_costs_the_short_cut_only(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    store(scheduler)
    warm(worker, scheduler)
    gpu.say(lost=True)
    eventually(lambda: worker.load(scheduler, KEYS) == 0)


def test_a_server_that_is_killed_and_started_again_is_used_again(
    worker: Worker, gpu_server: Server, gpu: StandInGpu
) -> None:
    with kvstore.Client(gpu_server.socket, timeout_s=60) as client:
        store(client)
        warm(worker, client)
    gpu_server.kill()
    gpu_server.start("--vram-gpus", gpu.name, *SIZES)
    with kvstore.Client(gpu_server.socket, timeout_s=60) as client:
        store(client)
        eventually(lambda: worker.link.current is not None)
        eventually(lambda: worker.link.current and worker.link.current.epoch == client.epoch)
        warm(worker, client)


DIES_READING = """
import signal, sys
import kvstore
from kvstore.device.mirrors import Mirrors
from kvstore.device.vram_stand_in import StandInVram
from kvstore.types import ChainQuery
client = kvstore.Client(sys.argv[1])
spec = kvstore.LayoutSpec(model="m", dtype="bfloat16", block_tokens=16, block_bytes=65536)
layout = client.register_layout(spec)
vram = StandInVram(sys.argv[2])
grant = client.vram(vram.name, [layout.id])
mirrors = Mirrors(grant.descriptor, grant.extent_bytes, grant.fetch, vram.open)
(lease,) = client.acquire_many([ChainQuery([layout.id], [bytes.fromhex(sys.argv[3])])], 1000)
assert mirrors.find(lease.addresses, lease.checksums) is not None
print("open", flush=True)
signal.pause()
"""


def test_a_worker_that_is_killed_with_memory_open_is_soon_forgotten(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu, gpu_server: Server
) -> None:
    store(scheduler)
    warm(worker, scheduler)
    dying = subprocess.Popen(
        [sys.executable, "-c", DIES_READING, gpu_server.socket, gpu.name, KEYS[0].hex()],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with dying:
        assert dying.stdout is not None
        assert dying.stdout.readline() == "open\n"
        dying.kill()
    eventually(lambda: scheduler.stats().leases == 0)
    assert worker.load(scheduler, KEYS) == len(KEYS)


def test_a_gpu_that_cannot_be_used_leaves_the_server_working(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start("--vram-gpus", f"7,stand-in:{tmp_path}/none")
    try:
        with kvstore.Client(server.socket) as client:
            store(client)
        said = (tmp_path / "log").read_text()
        assert said.count("is not used") == 2
    finally:
        server.kill()


# What is handed over

PREFILLS = """
import sys
from tests.gpu.conftest import stand_in_for_vllm
stand_in_for_vllm()
import numpy as np
import time
import kvstore
from kvstore.device.base import Memory, Piece
from kvstore.device.host import HostDevice
from kvstore.device.vram_stand_in import StandInVram
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.metadata import StoreJob
from kvstore_connectors.vllm.saver import Saver
from tests.integration.client.conftest import block

socket, gpu, nbytes, *keys = sys.argv[1:]
keys, nbytes = [bytes.fromhex(key) for key in keys], int(nbytes)
memory = np.zeros(64 * nbytes, np.uint8)
halves = memory.reshape(2, 64, nbytes // 2)
for index in range(64):
    halves[:, index] = np.frombuffer(block(index, nbytes), np.uint8).reshape(2, -1)
device = HostDevice(StandInVram(gpu))
pieces = [Piece(0, nbytes // 2, nbytes // 2), Piece(32 * nbytes, nbytes // 2, nbytes // 2)]
blocks = device.blocks(Memory(memory.ctypes.data, len(memory), memory), pieces, 64)
spec = kvstore.LayoutSpec(model="m", dtype="bfloat16", block_tokens=16, block_bytes=nbytes)
link = StoreLink(lambda: kvstore.Client(socket), [spec], "prefill")
link.start()
assert link.wait_attached(30)
saver = Saver(link, device, [blocks], lambda: None)
for number, line in enumerate(sys.stdin, 1):
    part = keys[: int(line)] if int(line) else [(10**9 + number).to_bytes(32, "big")]
    job = StoreJob(number, "r", 0, list(range(len(part))), part, [b"", *part[:-1]])
    job.handed_over = True
    saver.submit(job)
    while not saver.take_reports():
        time.sleep(0.001)
    stats = saver.take_stats()
    print(int(stats.data.get("landed_blocks", 0)), flush=True)
saver.close()
link.close()
"""


class Prefill:
    """Hands over as many of `KEYS` as it is told, from a GPU of its own."""

    def __init__(self, server: Server, gpu: StandInGpu) -> None:
        keys = [each.hex() for each in KEYS]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREFILLS, server.socket, gpu.name, str(BLOCK), *keys],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def hand_over(self, count: int) -> int:
        """How many landed. Of a block of no meaning where `count` is 0."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    @property
    def maps_memory_of_a_gpu(self) -> bool:
        return "memfd:kvstore-vram" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture
def prefill(gpu_server: Server, worker: Worker, tmp_path: Path) -> Iterator[Prefill]:
    """One that has somewhere to land."""
    prefill = Prefill(gpu_server, StandInGpu(tmp_path / "prefill.json", 16 * EXTENT))
    eventually(lambda: prefill.hand_over(0))
    yield prefill
    prefill.close()


def on_gpu(client: kvstore.Client) -> VramStats:
    (stats,) = client.stats().vram
    return stats


def test_what_is_handed_over_is_loaded_at_once_from_where_it_landed(
    prefill: Prefill, worker: Worker, scheduler: kvstore.Client
) -> None:
    assert prefill.hand_over(len(KEYS)) == len(KEYS)
    assert worker.load(scheduler, KEYS) == len(KEYS)
    stats = on_gpu(scheduler)
    assert stats.landed_hits == len(KEYS)
    assert stats.copied_bytes == 0, "no second way over the link"


def test_what_has_landed_gives_way_to_pressure_and_who_wrote_it_lets_go(
    prefill: Prefill, worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu
) -> None:
    assert prefill.hand_over(len(KEYS)) == len(KEYS)
    assert prefill.maps_memory_of_a_gpu
    gpu.say(taken=16 * EXTENT)
    eventually(lambda: on_gpu(scheduler).held_bytes == 0)
    assert on_gpu(scheduler).extents_given_back
    eventually(lambda: not prefill.maps_memory_of_a_gpu)
    assert worker.load(scheduler, KEYS) == 0
    assert prefill.hand_over(0) == 0


DIES_WRITING = """
import ctypes, os, sys
import kvstore
from kvstore.device.mirrors import Mirrors
from kvstore.device.vram_stand_in import StandInVram
client = kvstore.Client(sys.argv[1])
spec = kvstore.LayoutSpec(model="m", dtype="bfloat16", block_tokens=16, block_bytes=65536)
layout = client.register_layout(spec)
grant = client.reserve(layout, 4, 1000)
(landing,) = client.land(layout, range(grant.first_slot, grant.first_slot + 4))
vram = StandInVram(sys.argv[2])
table = client.vram(landing.gpu, [])
opens = lambda *given: vram.open_to_write(*given, landing.gpu)
mirrors = Mirrors(table.descriptor, table.extent_bytes, table.fetch, opens)
places = mirrors.places(landing.addresses)
if os.fork():
    os.wait()
# Writes on though its session has ended, as copies of a GPU may.
print("writing", os.getpid(), all(places), flush=True)
while True:
    for place in places:
        ctypes.memset(place, 0xAA, 65536)
"""


def test_whoever_is_killed_while_it_writes_spoils_nothing_and_its_space_comes_back(
    prefill: Prefill, worker: Worker, scheduler: kvstore.Client, gpu_server: Server, gpu: StandInGpu
) -> None:
    command = [sys.executable, "-c", DIES_WRITING, gpu_server.socket, gpu.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None
        said, orphan, has_places = dying.stdout.readline().split()
        assert (said, has_places) == ("writing", "True")
        dying.kill()
        try:
            eventually(lambda: scheduler.stats().reservations == 0)
            eventually(lambda: on_gpu(scheduler).used_bytes == 0)
            eventually(lambda: prefill.hand_over(0))
            assert prefill.hand_over(len(KEYS)) == len(KEYS)
            assert worker.load(scheduler, KEYS) == len(KEYS)
        finally:
            os.kill(int(orphan), signal.SIGKILL)
