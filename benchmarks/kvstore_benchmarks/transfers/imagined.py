"""Tiers without bytes, and a loop whose threads are as fast as a calculated drive."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from kvstore.errors import BadRequest
from kvstore.parts import Ssd
from kvstore.tiers.base import BlockHeader, RecoveredBlocks
from kvstore.tiers.modelled import Drive, Request
from kvstore.tiers.null import NullStorage
from kvstore_benchmarks.virtual import VirtualLoop

PAYLOAD = bytes(64)
"""What every block's bytes are, as far as anybody looks."""
CHECKSUM = xxhash.xxh3_64_intdigest(PAYLOAD)


class ImaginedMemory:
    """A `MemoryTier`."""

    def __init__(self, extent_bytes: int, capacity_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        self.usable_bytes = capacity_bytes // extent_bytes * extent_bytes
        self._bytes = memoryview(bytearray(PAYLOAD))

    def open_extent(self, extent: int) -> None:
        return None

    def close_extent(self, extent: int) -> None:
        return None

    def view(self, address: int, nbytes: int) -> memoryview:
        return self._bytes

    def extent_fd(self, extent: int) -> int:
        raise BadRequest("this memory cannot be shared")

    def close(self) -> None:
        return None


class ImaginedStorage(NullStorage):
    """A `StorageTier` that takes and gives everything. What its drive has to do for that
    is in `asked`: latency and work of each request, nanoseconds."""

    def __init__(
        self, extent_bytes: int, capacity_bytes: int, ssd: Ssd,
        found: Callable[[], Iterable[tuple[int, int, RecoveredBlocks]]],
        layouts: Sequence[tuple[str, dict[str, object]]],
    ) -> None:  # fmt: skip
        """`found`: extents that are there at the start, their slots' size and blocks."""
        super().__init__(extent_bytes)
        self.usable_bytes = capacity_bytes // extent_bytes * extent_bytes
        self.asked: deque[tuple[float, float]] = deque()
        self._ssd = ssd
        self._found = list(found())
        self._layouts = layouts

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        return None

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        self.asked.append((self._ssd.write_us * 1e3, header.length / self._ssd.write_gbps))

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        self.asked.append((self._ssd.read_us * 1e3, header.length / self._ssd.read_gbps))

    def recovered_layouts(self) -> Iterable[tuple[str, dict[str, object]]]:
        return self._layouts

    def recovered_extents(self) -> Iterable[tuple[int, int]]:
        return [(extent, slot_bytes) for extent, slot_bytes, _ in self._found]

    def recovered_blocks(self) -> Iterable[RecoveredBlocks]:
        return [blocks for _, _, blocks in self._found]


@dataclass(eq=False, slots=True)
class _Job:
    """A thread's work: requests one after the other."""

    future: asyncio.Future[Any]
    result: Any
    asked: deque[tuple[float, float]]
    request: Request | None = None


class DriveLoop(VirtualLoop):
    """What is done in threads is done at once, and is over when the drive would be."""

    def __init__(self, storage: ImaginedStorage, depth: int) -> None:
        super().__init__()
        self._storage = storage
        self._drive = Drive(depth, self.now_ns())
        self._jobs: list[_Job] = []
        self._alarm: asyncio.TimerHandle | None = None

    def set_speed(self, speed: float) -> None:
        """From now on, of what the drive does by its data sheet."""
        self._look(self.now_ns())
        self._drive.speed = speed
        self._set_alarm()

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        result = func(*args)
        job = _Job(future, result, self._storage.asked)
        self._storage.asked = deque()
        self._drive.advance(self.now_ns())
        if self._goes_on(job):
            self._jobs.append(job)
            self._set_alarm()
        return future

    def _goes_on(self, job: _Job) -> bool:
        """Begin the next request of a job, or end it."""
        if job.asked:
            job.request = self._drive.begin(*job.asked.popleft())
            return True
        if not job.future.done():
            job.future.set_result(job.result)
        return False

    def _look(self, now_ns: float) -> None:
        self._drive.advance(now_ns)
        self._jobs = [
            job
            for job in self._jobs
            if (job.request is not None and not job.request.over) or self._goes_on(job)
        ]
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        next_ns = self._drive.next_ns()
        # Told the time that it is set for: the loop's own is rounded.
        if next_ns < math.inf:
            self._alarm = self.call_at(next_ns / 1e9, self._look, next_ns)
