"""A disk that is no faster than another one, named in a table of hardware.

Every read and write is made at once, on the disk that is there, and meanwhile a drive is
calculated to which the same was sent. The caller gets its answer when both are done: so
nothing is faster than the drive that is modelled, and where the real one is slower than
that, nothing is added. Bytes are what the real disk makes of them. All of it happens on
the threads that the tier reads and writes with anyway.

Nothing of what the drive's insides do is modelled: caches, wear, pauses to clean up.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvstore.clock import Clock
from kvstore.parts import Device
from kvstore.tiers.nvme_disk import Disk, DiskFile

T = TypeVar("T")

SMALLEST_NS = 1e-3
"""What is left of a request by rounding is nothing."""


@dataclass(eq=False, slots=True)
class Request:
    """`latency_ns` are left that pass beside those of others, and then `work_ns` of the
    drive's whole time."""

    latency_ns: float
    work_ns: float

    @property
    def over(self) -> bool:
        return self.latency_ns <= 0 and self.work_ns <= 0


class Drive:
    """Up to `depth` requests at a time, the others in turn; each has its latency to itself
    and then an even share of the drive. Not thread-safe. Times are the caller's."""

    def __init__(self, depth: int, now_ns: float = 0.0) -> None:
        self.speed = 1.0
        """What of its time the drive makes use of; 0.0: it hangs. To be changed right
        after `advance`."""
        self._depth = depth
        self._now_ns = now_ns
        self._under_way: list[Request] = []
        self._waiting: deque[Request] = deque()

    @property
    def now_ns(self) -> float:
        return self._now_ns

    def begin(self, latency_ns: float, work_ns: float) -> Request:
        """A request comes, now. One that is nothing is over."""
        request = Request(latency_ns, work_ns)
        if not request.over:
            self._waiting.append(request)
            self._fill_up()
        return request

    def next_ns(self) -> float:
        """When something about the requests changes, if no other begins."""
        step_ns = self._step_ns()
        return self._now_ns + step_ns / self.speed if self.speed else math.inf

    def advance(self, now_ns: float) -> None:
        """Time has passed. A clock that went back has stood still."""
        while (next_ns := self.next_ns()) <= now_ns:
            self._pass(self._step_ns())
            self._now_ns = next_ns
        if now_ns > self._now_ns:
            self._pass((now_ns - self._now_ns) * self.speed)
            self._now_ns = now_ns

    def ends_ns(self, request: Request) -> float:
        """When a request is over, if no other begins before."""
        ahead = Drive(self._depth, self._now_ns)
        ahead.speed = self.speed
        copies = {id(r): Request(r.latency_ns, r.work_ns) for r in self._all()}
        ahead._under_way = [copies[id(r)] for r in self._under_way]
        ahead._waiting.extend(copies[id(r)] for r in self._waiting)
        copy = copies.get(id(request))
        while copy is not None and not copy.over:
            next_ns = ahead.next_ns()
            if next_ns == math.inf:
                return next_ns
            ahead.advance(next_ns)
        return ahead._now_ns

    def _all(self) -> list[Request]:
        return [*self._under_way, *self._waiting]

    def _fill_up(self) -> None:
        while self._waiting and len(self._under_way) < self._depth:
            self._under_way.append(self._waiting.popleft())

    def _moving(self) -> int:
        return sum(request.latency_ns <= 0 for request in self._under_way)

    def _step_ns(self) -> float:
        """At full speed, until a latency or a request is over."""
        moving = self._moving()
        return min(
            (r.latency_ns if r.latency_ns > 0 else r.work_ns * moving for r in self._under_way),
            default=math.inf,
        )

    def _pass(self, ns: float) -> None:
        moving = self._moving()
        for request in self._under_way:
            if request.latency_ns > 0:
                left = request.latency_ns - ns
                request.latency_ns = left if left > SMALLEST_NS else 0.0
            else:
                left = request.work_ns - ns / moving
                request.work_ns = left if left > SMALLEST_NS else 0.0
        if any(request.over for request in self._under_way):
            self._under_way = [r for r in self._under_way if not r.over]
            self._fill_up()


class Modelled:
    """What a named device would have taken. Thread-safe."""

    def __init__(
        self, device: Device, clock: Clock, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """`pause`: how to wait, in seconds."""
        ssd, host_gbps = device.ssd, math.inf if device.gpu is None else device.gpu.host_gbps
        self._read = ssd.read_us * 1e3, 1 / min(ssd.read_gbps, host_gbps)
        self._write = ssd.write_us * 1e3, 1 / ssd.write_gbps
        self._clock = clock
        self._pause = pause
        self._drive = Drive(ssd.depth, clock.now_ns())
        self._lock = threading.Lock()

    def reading(self, nbytes: int, call: Callable[[], T]) -> T:
        """`call`, which reads so many bytes, and what is left of the time that takes."""
        return self._slowed(*self._read, nbytes, call)

    def writing(self, nbytes: int, call: Callable[[], T]) -> T:
        return self._slowed(*self._write, nbytes, call)

    def _slowed(self, latency_ns: float, ns_a_byte: float, nbytes: int, call: Callable[[], T]) -> T:
        with self._lock:
            self._drive.advance(self._clock.now_ns())
            request = self._drive.begin(latency_ns, nbytes * ns_a_byte)
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
    """A `DiskFile` in front of another."""

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

    def close(self) -> None:
        self._file.close()
