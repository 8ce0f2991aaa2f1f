"""A disk that fails as disks do, at the call and in the way it is told to.

`MemoryDisk` forgets in a crash what was not synced, and what it keeps of that is torn
by sectors and in no order. `FaultyDisk` stands in front of any disk and spoils calls:
errors, writes cut short, lost or gone elsewhere, bits flipped on the way, syncs that
do nothing, delays. What is spoilt, and when, comes from a plan: a seeded one for
simulations, a single call for tests that go through all calls one by one.

Everything else in the tier runs unchanged on top.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvstore.tiers.nvme_disk import Disk, DiskFile
from kvstore.types import ALIGNMENT

SECTOR_BYTES = 512


class Crash(BaseException):
    """The machine died in this call. Nobody handles it: nothing runs afterwards."""


class _Unsynced(NamedTuple):
    offset: int
    before: bytes
    after: bytes


class MemoryFile:
    """A `DiskFile`."""

    descriptor = None

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._data = bytearray(nbytes)
        self._unsynced: list[_Unsynced] = []

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        after = b"".join(buffers)
        end = offset + len(after)
        if end > self.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unsynced.append(_Unsynced(offset, bytes(self._data[offset:end]), after))
        self._data[offset:end] = after
        return len(after)

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        start = offset
        for buffer in buffers:
            part = self._data[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - start

    def fdatasync(self) -> None:
        self._unsynced.clear()

    def before_close(self, call: Callable[[], None]) -> None:
        return None

    def close(self) -> None:
        return None

    def crash(self, rng: random.Random) -> None:
        """Keep of what was not synced what a drive may have kept: any sectors of any
        of the writes, in any order."""
        for offset, before, _ in reversed(self._unsynced):
            self._data[offset : offset + len(before)] = before
        writes = self._unsynced[:]
        self._unsynced.clear()
        rng.shuffle(writes)
        for offset, _, after in writes:
            fate = rng.random()
            if fate < 0.3:
                continue
            for at in range(0, len(after), SECTOR_BYTES):
                if fate < 0.6 or rng.random() < 0.7:
                    self._data[offset + at : offset + at + SECTOR_BYTES] = after[
                        at : at + SECTOR_BYTES
                    ]

    def flip(self, bit: int) -> None:
        """What lies on the medium rots."""
        self._data[bit >> 3] ^= 1 << (bit & 7)


class MemoryDisk:
    """A `Disk`. What is on it outlives whoever uses it."""

    def __init__(self) -> None:
        self.files: dict[str, MemoryFile] = {}
        self._synced_names: dict[str, MemoryFile] = {}

    def names(self) -> list[str]:
        return list(self.files)

    def create(self, name: str, nbytes: int) -> MemoryFile:
        self.files[name] = file = MemoryFile(nbytes)
        return file

    def open(self, name: str) -> MemoryFile:
        return self.files[name]

    def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def sync_names(self) -> None:
        self._synced_names = dict(self.files)

    def crash(self, rng: random.Random) -> None:
        """The machine dies. Names not synced are there or not."""
        names = {**self._synced_names, **self.files}
        self.files = {
            name: file
            for name, file in names.items()
            if (name in self.files) == (name in self._synced_names) or rng.random() < 0.5
        }
        self._synced_names = dict(self.files)
        for file in self.files.values():
            file.crash(rng)


class Fault(NamedTuple):
    """What becomes of a call.

    `kind`: "error" (with `code`), "short", "lost" (reported as done), "misdirected",
    "flip" (a bit, on its way), "delay" (`seconds`; a hang where the disk's `pause` does not
    end), "crash" (before the call).
    """

    kind: str
    code: int = errno.EIO
    seconds: float = 0.0


FaultPlan = Callable[[str], Fault | None]
"""The fault of the next call, by its name: a method of `Disk` or `DiskFile`."""


class SeededFaults:
    """Faults at random, `rates` a call: {"pwritev": {"error": 0.001, ...}, ...}; "full"
    is an error that says so."""

    def __init__(self, rng: random.Random, rates: Mapping[str, Mapping[str, float]]) -> None:
        self.injected: dict[str, int] = {}
        self.crash_after: int | None = None
        """Calls until the machine dies."""
        self._rng = rng
        self._rates = rates

    def __call__(self, call: str) -> Fault | None:
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after < 0:
                return Fault("crash")
        rates = self._rates.get(call)
        if not rates:
            return None
        drawn = self._rng.random()
        for kind, rate in rates.items():
            drawn -= rate
            if drawn < 0:
                self.injected[kind] = self.injected.get(kind, 0) + 1
                return Fault("error", errno.ENOSPC) if kind == "full" else Fault(kind)
        return None


class FaultAtCall:
    """One fault, at the nth call (from 1) of those named."""

    def __init__(self, fault: Fault, n: int, calls: frozenset[str] | None = None) -> None:
        self.left = n
        self._fault = fault
        self._calls = calls

    def __call__(self, call: str) -> Fault | None:
        if self._calls is not None and call not in self._calls:
            return None
        self.left -= 1
        return self._fault if self.left == 0 else None


class FaultyFile:
    """A `DiskFile` in front of another. No faults are in that one's descriptor."""

    descriptor = None

    def __init__(
        self, file: DiskFile, plan: FaultPlan, rng: random.Random, pause: Callable[[float], None]
    ) -> None:
        self.nbytes = file.nbytes
        self._file = file
        self._plan = plan
        self._rng = rng
        self._pause = pause

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        fault = _begin(self._plan, "pwritev", self._pause)
        if fault is None:
            return self._file.pwritev(buffers, offset)
        if fault.kind == "lost":
            return sum(map(len, buffers))
        if fault.kind == "short":
            return self._file.pwritev(*self._cut(buffers), offset)
        if fault.kind == "misdirected":
            return self._file.pwritev(buffers, self._elsewhere(buffers, offset))
        return self._file.pwritev(self._flipped(buffers), offset)

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        fault = _begin(self._plan, "preadv", self._pause)
        if fault is None:
            return self._file.preadv(buffers, offset)
        if fault.kind == "short":
            return self._file.preadv(*self._cut(buffers), offset)
        if fault.kind == "misdirected":
            return self._file.preadv(buffers, self._elsewhere(buffers, offset))
        done = self._file.preadv(buffers, offset)
        buffer = self._rng.choice(buffers)
        buffer[self._rng.randrange(len(buffer))] ^= 1 << self._rng.randrange(8)
        return done

    def fdatasync(self) -> None:
        if _begin(self._plan, "fdatasync", self._pause) is None:
            self._file.fdatasync()

    def before_close(self, call: Callable[[], None]) -> None:
        return None

    def close(self) -> None:
        self._file.close()

    def _cut(self, buffers: list[memoryview]) -> tuple[list[memoryview]]:
        """The beginning of what was to be moved: whole pages, at least one."""
        pages = sum(map(len, buffers)) // ALIGNMENT
        left = self._rng.randint(1, max(1, pages - 1)) * ALIGNMENT
        cut: list[memoryview] = []
        for buffer in buffers:
            if left > 0:
                cut.append(buffer[:left])
                left -= len(buffer)
        return (cut,)

    def _elsewhere(self, buffers: list[memoryview], offset: int) -> int:
        pages = (self.nbytes - sum(map(len, buffers))) // ALIGNMENT
        return self._rng.randint(0, pages) * ALIGNMENT

    def _flipped(self, buffers: list[memoryview]) -> list[memoryview]:
        copies = [bytearray(buffer) for buffer in buffers]
        copy = self._rng.choice(copies)
        copy[self._rng.randrange(len(copy))] ^= 1 << self._rng.randrange(8)
        return [memoryview(copy) for copy in copies]


class FaultyDisk:
    """A `Disk` in front of another."""

    def __init__(
        self,
        disk: Disk,
        plan: FaultPlan,
        rng: random.Random,
        *,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`pause`: how a delay is spent, in seconds."""
        self._disk = disk
        self._plan = plan
        self._rng = rng
        self._pause = pause

    def names(self) -> list[str]:
        return self._disk.names()

    def create(self, name: str, nbytes: int) -> DiskFile:
        _begin(self._plan, "create", self._pause)
        return self._faulty(self._disk.create(name, nbytes))

    def open(self, name: str) -> DiskFile:
        _begin(self._plan, "open", self._pause)
        return self._faulty(self._disk.open(name))

    def remove(self, name: str) -> None:
        _begin(self._plan, "remove", self._pause)
        self._disk.remove(name)

    def sync_names(self) -> None:
        if _begin(self._plan, "sync_names", self._pause) is None:
            self._disk.sync_names()

    def _faulty(self, file: DiskFile) -> FaultyFile:
        return FaultyFile(file, self._plan, self._rng, self._pause)


def _begin(plan: FaultPlan, call: str, pause: Callable[[float], None]) -> Fault | None:
    """The fault that the call itself must bring about, if any."""
    fault = plan(call)
    if fault is None:
        return None
    if fault.kind == "crash":
        raise Crash(call)
    if fault.kind == "error":
        raise OSError(fault.code, os.strerror(fault.code))
    if fault.kind == "delay":
        pause(fault.seconds)
        return None
    return fault
