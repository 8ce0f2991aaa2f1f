"""What transfers are made on: a drive that is calculated, and one that is there."""

from __future__ import annotations

import mmap
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from kvstore.core.transfers import Batch
from kvstore.tiers.modelled import Drive, Request
from kvstore.tiers.nvme_disk import Directory, DiskFile
from kvstore.types import Tier


class Ended(NamedTuple):
    batch: Batch
    at_ns: int


class Device(Protocol):
    def now_ns(self) -> int: ...

    def begin(self, batch: Batch) -> None: ...

    def wait(self, until_ns: int) -> list[Ended]:
        """What has ended; where nothing has, it waits for that until then."""
        ...


class Modelled:
    """A drive in virtual time: a block costs a latency, and all that run share the
    bandwidth evenly. Writes take `write_cost` times the share of reads."""

    def __init__(self, bytes_per_s: float, latency_s: float, write_cost: float = 1.0) -> None:
        self._ns_a_byte = 1e9 / bytes_per_s
        self._latency_ns = latency_s * 1e9
        self._write_cost = write_cost
        self._drive = Drive(depth=1024)
        self._running: list[tuple[Batch, Request]] = []

    def now_ns(self) -> int:
        return int(self._drive.now_ns)

    def begin(self, batch: Batch) -> None:
        nbytes = sum(transfer.nbytes for transfer in batch.transfers)
        cost = self._write_cost if batch.transfers[0].into is Tier.NVME else 1.0
        latency_ns = self._latency_ns * len(batch.transfers)
        request = self._drive.begin(latency_ns, nbytes * self._ns_a_byte * cost)
        self._running.append((batch, request))

    def wait(self, until_ns: int) -> list[Ended]:
        while (next_ns := self._drive.next_ns()) <= until_ns:
            self._drive.advance(next_ns)
            ended = [batch for batch, request in self._running if request.over]
            if ended:
                self._running = [each for each in self._running if not each[1].over]
                return [Ended(batch, self.now_ns()) for batch in ended]
        self._drive.advance(until_ns)
        return []


class Real:
    """A file of a directory, read and written with O_DIRECT by threads."""

    FILE_BYTES = 1 << 30

    def __init__(self, folder: Path, depth: int, block_bytes: int) -> None:
        self._disk = Directory(folder)
        self._file: DiskFile = self._disk.create("transfers.bench", self.FILE_BYTES)
        self._threads = ThreadPoolExecutor(depth)
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(depth):
            self._buffers.put(memoryview(mmap.mmap(-1, block_bytes)))
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._blocks = self.FILE_BYTES // block_bytes
        self._next = 0
        self._fill(block_bytes)

    def _fill(self, block_bytes: int) -> None:
        """So that no read is of a hole."""
        buffer = self._buffers.get()
        for number in range(self._blocks):
            self._file.pwritev([buffer], number * block_bytes)
        self._file.fdatasync()
        self._buffers.put(buffer)

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def begin(self, batch: Batch) -> None:
        self._threads.submit(self._make, batch)

    def _make(self, batch: Batch) -> None:
        buffer = self._buffers.get()
        for transfer in batch.transfers:
            self._next = (self._next + 7919) % self._blocks
            part = buffer[: transfer.nbytes]
            move = self._file.pwritev if transfer.into is Tier.NVME else self._file.preadv
            move([part], self._next * len(buffer))
        self._buffers.put(buffer)
        self._ended.put(Ended(batch, time.monotonic_ns()))

    def wait(self, until_ns: int) -> list[Ended]:
        try:
            ended = [self._ended.get(timeout=max(0, until_ns - self.now_ns()) / 1e9)]
        except queue.Empty:
            return []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def close(self) -> None:
        self._threads.shutdown()
        self._file.close()
        self._disk.remove("transfers.bench")
