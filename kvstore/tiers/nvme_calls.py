"""A disk of which it is known whether it answers.

Of a transfer that takes long nobody can tell from outside whether the drive is slow, busy with
a segment that is emptied for it, or gone: so each call to the drive is looked at by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvstore.clock import Clock
from kvstore.tiers.nvme_disk import Disk, DiskFile

DATA_NS = 3_000_000_000
"""No read or write of a block takes as long, unless the drive is stuck."""
UPKEEP_NS = 30_000_000_000
"""As long may it take to make or sync a file, or the index, on a disk that many write to."""


class Calls:
    """Those to a drive that have not come back. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        # By when each should have come back.
        self._due_ns: dict[int, int] = {}

    def overdue(self) -> bool:
        """One of them has been under way for longer than anything takes."""
        now_ns = self._clock.now_ns()
        return any(now_ns >= due_ns for due_ns in list(self._due_ns.values()))

    @contextmanager
    def under_way(self, patience_ns: int) -> Iterator[None]:
        number = next(self._numbers)
        self._due_ns[number] = self._clock.now_ns() + patience_ns
        try:
            yield
        finally:
            del self._due_ns[number]


class WatchedFile:
    """A `DiskFile`."""

    def __init__(self, file: DiskFile, calls: Calls) -> None:
        self.nbytes = file.nbytes
        self._file = file
        self._calls = calls

    @property
    def descriptor(self) -> int | None:
        return self._file.descriptor

    def before_close(self, call: Callable[[], None]) -> None:
        self._file.before_close(call)

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        with self._calls.under_way(DATA_NS):
            return self._file.pwritev(buffers, offset)

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        with self._calls.under_way(DATA_NS):
            return self._file.preadv(buffers, offset)

    def fdatasync(self) -> None:
        with self._calls.under_way(UPKEEP_NS):
            self._file.fdatasync()

    def close(self) -> None:
        self._file.close()


class WatchedDisk:
    """A `Disk`."""

    def __init__(self, disk: Disk, calls: Calls) -> None:
        self._disk = disk
        self._calls = calls

    def names(self) -> list[str]:
        return self._disk.names()

    def create(self, name: str, nbytes: int) -> WatchedFile:
        with self._calls.under_way(UPKEEP_NS):
            return WatchedFile(self._disk.create(name, nbytes), self._calls)

    def open(self, name: str) -> WatchedFile:
        return WatchedFile(self._disk.open(name), self._calls)

    def remove(self, name: str) -> None:
        self._disk.remove(name)

    def sync_names(self) -> None:
        with self._calls.under_way(UPKEEP_NS):
            self._disk.sync_names()
