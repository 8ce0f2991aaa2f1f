"""What transfers are made on: a drive that is calculated, and one that is there."""

from __future__ import annotations

import mmap
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from kvstore.core.transfers import Batch
from kvstore.drive import Pace
from kvstore.sim.batches import Batches
from kvstore.sim.events import Events
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
    bandwidth evenly."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self._events = Events()
        pace = Pace(latency_s * 1e9, 1e9 / bytes_per_s)
        self._drive = Batches(self._events, dict.fromkeys(Tier, pace))
        self._ended: list[Ended] = []

    def now_ns(self) -> int:
        return self._events.now_ns

    def begin(self, batch: Batch) -> None:
        nbytes = sum(transfer.nbytes for transfer in batch.transfers)
        into, blocks = batch.transfers[0].into, len(batch.transfers)
        self._drive.begin(into, blocks, nbytes, partial(self._end, batch))

    def _end(self, batch: Batch) -> None:
        self._ended.append(Ended(batch, self.now_ns()))

    def wait(self, until_ns: int) -> list[Ended]:
        while not self._ended and self._events.step(until_ns):
            pass
        ended, self._ended = self._ended, []
        return ended


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
