"""The way of a block through a GPU's memory, each part in its own process: a server that has
memory of a stand-in GPU, and vLLM's worker, which loads from it."""

from __future__ import annotations

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
from kvstore.types import ChainQuery
from tests.integration.client.conftest import MIB, Server, block, key, layout_of
from tests.unit.device.gpus import StandInGpu

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

    def __init__(self, server: Server, gpu: StandInGpu) -> None:
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
        assert self.link.wait_attached(10)
        self.loader = Loader(self.link, device, [blocks], 0, lambda: None)

    def load(self, scheduler: kvstore.Client, keys: list[bytes]) -> int:
        """Has the blocks of these keys loaded into as many of the KV cache's: how many came from
        the GPU's memory."""
        from kvstore_connectors.vllm.metadata import LoadJob, LoadPart

        layout = layout_of(scheduler, BLOCK)
        (grant,) = scheduler.acquire_many([ChainQuery([layout.id], keys)], 1000)
        assert grant.held == len(keys)
        self.memory[:] = 0
        part = LoadPart(0, list(range(len(keys))), [grant.addresses], [grant.checksums])
        self.loader.submit(LoadJob("r", [part], grant.expires_ns, scheduler.epoch))
        eventually(self.loader.has_results)
        results = self.loader.take_results()
        assert not results.failed
        assert not results.failed_blocks
        scheduler.release([grant.lease_id])
        halves = self.memory.reshape(2, 64, BLOCK // 2)
        for index in range(len(keys)):
            assert halves[:, index].tobytes() == block(index, BLOCK), index
        stats = self.loader.take_stats()
        return 0 if stats is None else int(stats.data.get("vram_blocks", 0))

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
    with kvstore.Client(gpu_server.socket) as client:
        yield client


KEYS = [key(number) for number in range(20)]


def store(client: kvstore.Client) -> None:
    layout = layout_of(client, BLOCK)
    client.put_many(layout, KEYS, [block(number, BLOCK) for number in range(len(KEYS))])


def eventually(condition: Any, seconds: float = 15.0) -> None:
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
    mirrors = worker.loader._nearby._mirrors
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
    with kvstore.Client(gpu_server.socket) as client:
        store(client)
        warm(worker, client)
    gpu_server.kill()
    gpu_server.start("--vram-gpus", gpu.name, *SIZES)
    with kvstore.Client(gpu_server.socket) as client:
        store(client)
        eventually(lambda: worker.link.current is not None)
        eventually(lambda: worker.link.current and worker.link.current.epoch == client.epoch)
        warm(worker, client)


DIES = """
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
assert mirrors.find(lease.addresses) is not None
print("open", flush=True)
signal.pause()
"""


def test_a_worker_that_is_killed_with_memory_open_is_soon_forgotten(
    worker: Worker, scheduler: kvstore.Client, gpu: StandInGpu, gpu_server: Server
) -> None:
    store(scheduler)
    warm(worker, scheduler)
    dying = subprocess.Popen(
        [sys.executable, "-c", DIES, gpu_server.socket, gpu.name, KEYS[0].hex()],
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
