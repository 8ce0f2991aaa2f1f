"""Blocks that a real server reads from its files straight into a stand-in GPU's memory, as a
worker and a scheduler on its sockets find them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.device.mirrors import Mirrors
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import Unavailable
from kvstore.types import GPU_ONLY, ChainQuery, LeaseGrant, VramStats
from tests.integration.server.blocks import SPEC, connected, content, key, kill, store
from tests.integration.server.harness import PATIENCE_S, Daemon, daemon
from tests.integration.server.test_failing_disk import Faults, eventually, faults
from tests.unit.device.gpus import StandInGpu

__all__ = ["faults"]

BLOCKS = range(1, 21)
READER = b"an engine"


class Served:
    """A server, and what an engine has of it: a scheduler's session and a worker's."""

    def __init__(self, server: Daemon, scheduler: Client, layout: Layout, gpu: StandInGpu) -> None:
        self.server, self.scheduler, self.layout = server, scheduler, layout
        self.worker = Client(str(server.socket_path))
        self.worker.register_layout(SPEC)
        grant = self.worker.vram(gpu.name, [layout.id], reader=READER)
        memory = StandInVram(gpu.name)
        self.mirrors = Mirrors(grant.descriptor, grant.extent_bytes, grant.fetch, memory.open)

    def acquire(self, numbers: range) -> LeaseGrant:
        chain = ChainQuery([self.layout.id], [key(number) for number in numbers])
        (grant,) = self.scheduler.acquire_many([chain], 5000, reader=READER)
        return grant

    def load(self, numbers: range) -> tuple[int, int]:
        """How many blocks were leased from the drive's end of the chain on, and how many of them
        were read, from the GPU's memory alone; each as it was stored."""
        grant = self.acquire(numbers)
        alone = [i for i, address in enumerate(grant.addresses) if address >= GPU_ONLY]
        found = self.mirrors.find(grant.addresses, grant.checksums)
        loaded = 0
        if found is not None:
            datas = [ctypes.string_at(each, SPEC.block_bytes) for each in found.addresses]
            kept = self.mirrors.kept(found)
            for index, data, same in zip(found.indexes, datas, kept, strict=True):
                if same:
                    assert data == content(numbers[index])
                    loaded += index in alone
        if grant.held:
            self.scheduler.release([grant.lease_id])
        return grant.held, loaded

    def load_straight(self, numbers: range) -> None:
        """Once the GPU has an extent for them."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.load(numbers) == (len(numbers), len(numbers)):
                return
            self.scheduler.flush(True)
            time.sleep(0.02)
        raise AssertionError("the blocks never came")

    @property
    def vram(self) -> VramStats:
        (stats,) = self.scheduler.stats().vram
        return stats

    def close(self) -> None:
        self.mirrors.close()
        self.worker.close()


@contextmanager
def straight(directory: Path, *args: str) -> Iterator[Served]:
    gpu = StandInGpu(directory / "gpu.json", 1 << 30)
    sizes = ("--vram-capacity", "64MiB", "--vram-reserve", "8MiB", *args)
    gpus = ("--vram-gpus", gpu.name, "--vram-gpudirect", "true", *sizes)
    with connected(directory, *gpus) as (server, client, layout):
        served = Served(server, client, layout, gpu)
        try:
            yield served
        finally:
            served.close()


def test_blocks_go_from_a_drive_to_a_workers_gpu_and_come_again_after_a_kill(
    tmp_path: Path,
) -> None:
    with straight(tmp_path) as served:
        store(served.scheduler, served.layout, BLOCKS)
        served.scheduler.flush(True)
        served.load_straight(BLOCKS)
        assert served.vram.reads_straight
        assert served.vram.straight_blocks >= len(BLOCKS)
        assert served.vram.bounced_blocks == 0
        assert served.scheduler.get(served.layout, key(1)) == content(1), "for others, from DRAM"
        kill(served.server)
    with straight(tmp_path) as served:
        served.load_straight(BLOCKS)
        served.scheduler.clear()
        assert served.load(BLOCKS) == (0, 0)


def test_what_is_damaged_on_the_drive_reaches_no_worker(tmp_path: Path) -> None:
    with straight(tmp_path) as served:
        store(served.scheduler, served.layout, BLOCKS)
        served.scheduler.flush(True)
        damaged = 0
        for file in (tmp_path / "data").rglob("*.seg"):
            data = file.read_bytes()
            with file.open("r+b") as segment:
                for number in BLOCKS:
                    begin = data.find(content(number))
                    if begin >= 0:
                        segment.seek(begin + SPEC.block_bytes // 2)
                        segment.write(b"damage")
                        damaged += 1
                os.fsync(segment.fileno())
        assert damaged >= len(BLOCKS)
        for _ in range(len(BLOCKS)):
            held, loaded = served.load(BLOCKS)
            assert (held, loaded) == (0, 0)
        assert served.scheduler.stats().corrupt_blocks > 0
        assert served.vram.healthy
        store(served.scheduler, served.layout, BLOCKS)
        served.scheduler.flush(True)
        served.load_straight(BLOCKS)


@pytest.mark.slow
def test_a_server_whose_drive_hangs_in_a_straight_read_stops_all_the_same(
    faults: Faults,
    tmp_path: Path,
) -> None:
    with straight(tmp_path, "--drain-s", "0.5") as served:
        store(served.scheduler, served.layout, BLOCKS)
        served.scheduler.flush(True)
        served.load_straight(BLOCKS[:10])
        faults.begin("hang")
        asking = threading.Thread(target=_ask_in_vain, args=(served,))
        asking.start()
        eventually(lambda: served.vram.used_bytes > 10 * SPEC.slot_bytes)
        served.server.process.terminate()
        code, said = served.server.end()
        asking.join()
    assert code == os.EX_IOERR
    assert "does not answer and was left as it is" in said
    faults.end("hang")
    with daemon(tmp_path) as server:
        server.wait_ready()


def _ask_in_vain(served: Served) -> None:
    """Of a server that is about to end."""
    with contextlib.suppress(Unavailable):
        assert served.acquire(BLOCKS[10:]).held == 0
