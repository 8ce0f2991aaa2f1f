"""Blocks from a drive into a GPU's memory: by way of the host's, as the store takes them, and
straight, as it takes them where it is told to: by cuFile, with the checksum taken on the GPU
(docs/decisions/0019-straight-reads.md). Both take the checksum that they compare.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvstore.device.cufile import CuFileStraight
from kvstore.errors import DeviceError
from kvstore.local import copy
from kvstore.tiers.nvme_disk import Directory, read_all, write_all
from kvstore.types import ALIGNMENT
from kvstore_benchmarks.figures import finite, gbps, median, ratio, timed
from kvstore_benchmarks.gpu.rig import Rig

THREADS = 4
"""As many as the server reads with."""

_HEADER_BYTES = ALIGNMENT
"""A page before each block, as in the store's slots."""


class _Blocks:
    """Random blocks on a drive, in slots as the store's, and what reads them. To be closed."""

    def __init__(self, rig: Rig, path: Path, nbytes: int) -> None:
        """Raises OSError, EINVAL where the file system has no O_DIRECT."""
        self._rig = rig
        self._nbytes = nbytes
        self._count = rig.nbytes // nbytes
        self._file = Directory(path.parent).create(path.name, self._count * self._slot_bytes)
        self._written = np.frombuffer(np.random.default_rng().bytes(rig.nbytes), np.uint8)
        self._checksums: list[int] = []
        self._told = np.zeros(self._count, bool)
        slot = memoryview(mmap.mmap(-1, self._slot_bytes))
        for number in range(self._count):
            slot[_HEADER_BYTES:] = self._written[number * nbytes : (number + 1) * nbytes].data
            self._checksums.append(copy.checksum(slot[_HEADER_BYTES:]))
            write_all(self._file, [slot], number * self._slot_bytes)
        self._file.fdatasync()
        self._slots = rig.slots(self._count, nbytes)
        self._device = rig.device(0)
        rig.pin(self._device, self._slots)
        self._kv_cache: Any = SimpleNamespace(address=rig.on_gpu)
        self._own = threading.local()
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(THREADS, initializer=self._enter)
        self.wrong = 0

    @property
    def _slot_bytes(self) -> int:
        return _HEADER_BYTES + self._nbytes

    @property
    def nbytes(self) -> int:
        return self._count * self._nbytes

    def close(self) -> None:
        self._threads.shutdown()
        self._file.close()
        self._slots = []
        self._device.close()

    def seconds(self, read: Callable[[int], None]) -> float:
        """What `read` takes for all of them. Blocks that are not there then, or whose checksum
        is not, are counted."""
        plain = np.frombuffer(self._rig.plain, np.uint8)
        plain[:] = 0
        self._rig.copy_plainly(to_gpu=True)
        with timed() as timer:
            list(self._threads.map(read, range(self._count)))
        self._rig.copy_plainly(to_gpu=False)
        same = plain[: self.nbytes] == self._written[: self.nbytes]
        right = same.reshape(self._count, -1).all(axis=1) & self._told
        self.wrong += self._count - int(right.sum())
        return timer.seconds

    def by_host(self, number: int) -> None:
        """Into a slot of pinned memory, with its checksum taken, and from there."""
        slot = self._slots[number]
        read_all(self._file, [self._own.header, slot], number * self._slot_bytes)
        self._told[number] = copy.checksum(slot) == self._checksums[number]
        source = int(np.frombuffer(slot, np.uint8).__array_interface__["data"][0])
        to = self._rig.on_gpu + number * self._nbytes
        ends = [np.array([each], np.uint64) for each in (to, source, self._nbytes)]
        driver = self._rig.driver
        driver.copy(ends[0], ends[1], ends[2], self._own.stream)
        driver.synchronize(driver.record(self._own.stream))

    def open_straight(self) -> CuFileStraight:
        """Raises `DeviceError`, with the reason, where this file cannot be read straight."""
        straight = CuFileStraight(self._rig.driver, THREADS, self._nbytes)
        try:
            straight.fill(0, self._file, _HEADER_BYTES, self._nbytes)
        except DeviceError:
            straight.close()
            raise
        return straight

    def by(self, straight: CuFileStraight) -> Callable[[int], None]:
        """Straight, into a slot of the GPU's memory, and from there."""

        def read(number: int) -> None:
            at = number * self._slot_bytes
            read_all(self._file, [self._own.header], at)
            slot = self._own.slot
            begin = at + _HEADER_BYTES
            checksum = straight.fill(slot, self._file, begin, self._nbytes)
            self._told[number] = checksum == self._checksums[number]
            straight.deliver(slot, self._kv_cache, number * self._nbytes, self._nbytes)

        return read

    def _enter(self) -> None:
        self._own.header = memoryview(mmap.mmap(-1, _HEADER_BYTES))
        self._own.slot = next(self._numbers)
        self._own.stream = self._rig.driver.new_stream()


def from_drive(rig: Rig, directory: Path | None, nbytes: int, rounds: int) -> dict[str, Any]:
    """GB/s by way of the host and straight, and the second to the first within a round; None,
    with a reason, for what cannot be measured. `directory`: on the drive; None: where temporary
    files lie. `nbytes`: of a block, whole pages."""
    figures: dict[str, Any] = {"by_host": None, "straight": None, "ratio": None}
    figures |= {"reason": "", "wrong": 0}
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=directory) as made:
        path = Path(made) / "blocks"
        try:
            blocks = _Blocks(rig, path, nbytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return figures | {"reason": f"no O_DIRECT in {Path(made).parent}"}
        with closing(blocks), ExitStack() as undo:
            straight: CuFileStraight | None = None
            try:
                straight = blocks.open_straight()
                undo.callback(straight.close)
            except DeviceError as error:
                figures["reason"] = str(error)
            taken: list[tuple[float, float]] = []
            for number in range(rounds + 1):
                by_host = blocks.seconds(blocks.by_host)
                other = blocks.seconds(blocks.by(straight)) if straight else float("nan")
                if number:
                    taken.append((by_host, other))
            speeds = [gbps(blocks.nbytes, median(list(each))) for each in zip(*taken, strict=True)]
            figures |= {"by_host": finite(speeds[0], 2), "wrong": blocks.wrong}
            if straight:
                gained = median([ratio(by_host, other) for by_host, other in taken])
                figures |= {"straight": finite(speeds[1], 2), "ratio": finite(gained, 3)}
    return figures
