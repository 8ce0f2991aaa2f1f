"""A disk that is no faster than another one, named in a table of hardware.

Every read and write is made at once, on the disk that is there, and meanwhile a drive is
calculated (`kvstore.drive`) to which the same was sent. The caller gets its answer when both
are done: so nothing is faster than the drive that is modelled, and where the real one is
slower than that, nothing is added. Bytes are what the real disk makes of them. All of it
happens on the threads that the tier reads and writes with anyway.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvstore.clock import Clock
from kvstore.drive import Drive, Pace, Request
from kvstore.parts import Device
from kvstore.tiers.nvme_disk import Disk, DiskFile

T = TypeVar("T")


class Modelled:
    """What a named device would have taken. Thread-safe."""

    def __init__(
        self, device: Device, clock: Clock, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """`pause`: how to wait, in seconds."""
        ssd, host_gbps = device.ssd, math.inf if device.gpu is None else device.gpu.host_gbps
        self._read = Pace(ssd.read_us * 1e3, 1 / min(ssd.read_gbps, host_gbps))
        self._write = Pace(ssd.write_us * 1e3, 1 / ssd.write_gbps)
        self._clock = clock
        self._pause = pause
        self._drive = Drive(ssd.depth, clock.now_ns())
        self._lock = threading.Lock()

    def reading(self, nbytes: int, call: Callable[[], T]) -> T:
        """`call`, which reads so many bytes, and what is left of the time that takes."""
        return self._slowed(self._read, nbytes, call)

    def writing(self, nbytes: int, call: Callable[[], T]) -> T:
        return self._slowed(self._write, nbytes, call)

    def _slowed(self, pace: Pace, nbytes: int, call: Callable[[], T]) -> T:
        with self._lock:
            self._drive.advance(self._clock.now_ns())
            request = self._drive.begin(pace.latency_ns, nbytes * pace.ns_a_byte)
        result = call()
        while (left_ns := self._left_ns(request)) > 0:
            self._pause(left_ns / 1e9)
        return result

    def _left_ns(self, request: Request) -> float:
        """At least; others that come meanwhile take their shares."""
        with self._lock:
            now_ns = self._clock.now_ns()
            self._drive.advance(now_ns)
            return 0.0 if request.over else self._drive.ends_ns(request) - now_ns


class ModelledDisk:
    """A `Disk` in front of another. Making and removing files takes no more than there."""

    def __init__(self, disk: Disk, model: Modelled) -> None:
        self._disk = disk
        self._model = model

    def names(self) -> list[str]:
        return self._disk.names()

    def create(self, name: str, nbytes: int) -> DiskFile:
        return ModelledFile(self._disk.create(name, nbytes), self._model)

    def open(self, name: str) -> DiskFile:
        return ModelledFile(self._disk.open(name), self._model)

    def remove(self, name: str) -> None:
        self._disk.remove(name)

    def sync_names(self) -> None:
        self._disk.sync_names()


class ModelledFile:
    """A `DiskFile` in front of another. Who reads by that one's descriptor reads as fast as the
    real drive."""

    descriptor = None

    def __init__(self, file: DiskFile, model: Modelled) -> None:
        self.nbytes = file.nbytes
        self._file = file
        self._model = model

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        return self._model.writing(
            sum(map(len, buffers)), lambda: self._file.pwritev(buffers, offset)
        )

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        return self._model.reading(
            sum(map(len, buffers)), lambda: self._file.preadv(buffers, offset)
        )

    def fdatasync(self) -> None:
        # Such drives keep what they took when the power goes: a sync is one more request.
        self._model.writing(0, self._file.fdatasync)

    def before_close(self, call: Callable[[], None]) -> None:
        return None

    def close(self) -> None:
        self._file.close()
