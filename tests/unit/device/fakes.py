"""A GPU's driver without a GPU: streams, events, pinned memory and faults.

"GPU memory" is memory of this process that only what runs on a stream may touch. What is
put into a stream is held back and done in any order that CUDA allows: each stream's in
order, streams side by side, the copies of one call in any order.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from kvstore.device import codec
from kvstore.device.adversarial import Temper
from kvstore.device.checksum_kernel import LANES, RESULT_BYTES, sums_bytes
from kvstore.device.coding_kernels import DTYPES, ENCODE_KERNEL, GROUPS_BYTES
from kvstore.device.gpu_driver import Addresses
from kvstore.device.kernels import RUN_BYTES
from kvstore.errors import DeviceError, DeviceFull, DeviceLost
from kvstore.types import CODECS, GROUP, coded_bytes, element_bytes
from tests.unit.device import xxh3


class NotTouched(Exception):
    """What runs on a stream would have touched memory that is not the GPU's; it is left out, and
    told in `FakeDriver.wrong`, for it may be anybody's."""


class FakeEvent:
    def __init__(self) -> None:
        self.past = False


class FakeStream:
    def __init__(self) -> None:
        self.queue: deque[Callable[[], None] | FakeEvent | tuple[FakeEvent]] = deque()
        """Something to do, an event to make past, or (an event,) to wait for."""


class FakeDriver:
    """`refuses`: calls that raise `DeviceFull`. `fails_after`: calls until it is lost.
    `hangs`: whoever asks whether something is over is told that it is not."""

    def __init__(self, seed: int = 0, temper: Temper = Temper.LATE) -> None:
        self.has_kernel = True
        self.has_coding = True
        self.has_checksum = True
        self.refuses: set[str] = set()
        self.fails_after: int | None = None
        self.hangs = False
        self.calls: list[str] = []
        self.copies: list[int] = []
        """Sizes that the copy engines moved."""
        self.registered: dict[int, int] = {}
        self.on_host: dict[int, Any] = {}
        self.on_gpu: dict[int, Any] = {}
        self.wrong: list[str] = []
        self._random = random.Random(seed)
        self._temper = temper
        self._lock = threading.RLock()
        self._engine = FakeStream()
        self._streams = [self._engine]

    # -- the test's side ----------------------------------------------------------

    def give_kv_cache(self, nbytes: int) -> np.ndarray[Any, Any]:
        """Memory of the GPU, for the test to look at while nothing runs."""
        address = self.allocate(nbytes)
        return np.frombuffer(self.on_gpu[address], np.uint8)

    def launch(self, run: Callable[[], None]) -> None:
        """As the engine does."""
        with self._lock:
            self._put(self._engine, run)

    def settle(self) -> None:
        with self._lock:
            while self._one():
                pass

    # -- gpu_driver.Driver ---------------------------------------------------------------

    def new_stream(self) -> FakeStream:
        self._call("new_stream")
        with self._lock:
            self._streams.append(FakeStream())
            return self._streams[-1]

    def record(self, stream: FakeStream) -> FakeEvent:
        self._call("record")
        event = FakeEvent()
        with self._lock:
            self._put(stream, event)
        return event

    def record_engine(self) -> FakeEvent:
        return self.record(self._engine)

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self._call("wait")
        with self._lock:
            self._put(stream, (event,))

    def synchronize(self, event: FakeEvent) -> None:
        self._call("synchronize")
        with self._lock:
            while not event.past:
                assert self._one(), "waits for something that is never reached"

    def drain(self, stream: FakeStream) -> None:
        self._call("drain")
        with self._lock:
            while stream.queue:
                assert self._one(), "waits for something that is never reached"

    def is_over(self, stream: FakeStream) -> bool:
        self._call("is_over")
        with self._lock:
            if not self.hangs:
                self._one()
            return not stream.queue

    def copy(self, to: Addresses, from_: Addresses, sizes: Addresses, stream: FakeStream) -> None:
        self._call("copy")
        runs = list(zip(to.tolist(), from_.tolist(), sizes.tolist(), strict=True))
        with self._lock:
            self.copies += [nbytes for _, _, nbytes in runs]
            self._put(stream, lambda: self._copy_runs(runs, by_link=True))

    def run_kernel(self, table: int, count: int, stream: FakeStream) -> None:
        self._call("run_kernel")

        def run() -> None:
            # Read when it runs, as the GPU does.
            self._check(table, count * RUN_BYTES, self.on_host)
            array = np.frombuffer((ctypes.c_ubyte * (count * RUN_BYTES)).from_address(table))
            runs = array.view(np.uint64).reshape(-1, 3).tolist()
            self._copy_runs(runs, by_link=False)

        with self._lock:
            self._put(stream, run)

    def can_code(self) -> bool:
        return self.has_coding

    def run_coding(
        self, kernel: str, kind: int, table: int, count: int, stream: FakeStream
    ) -> None:
        self._call("run_coding")
        coding = divmod(kind, len(DTYPES))
        name, dtype = list(CODECS)[coding[0]], DTYPES[coding[1]]

        def run() -> None:
            self._check(table, count * GROUPS_BYTES, self.on_host)
            array = np.frombuffer((ctypes.c_ubyte * (count * GROUPS_BYTES)).from_address(table))
            for row in self._random.sample(array.view(np.uint64).reshape(-1, 4).tolist(), count):
                self._code(kernel, name, dtype, *row)

        with self._lock:
            self._put(stream, run)

    def enter(self) -> None:
        self._call("enter")

    def can_checksum(self) -> bool:
        return self.has_checksum

    def run_checksum(self, from_: int, nbytes: int, sums: int, to: int, stream: FakeStream) -> None:
        self._call("run_checksum")
        self.take_sums(from_, nbytes, sums, stream)
        self.chain_sums(sums, nbytes, to, stream)

    def take_sums(self, from_: int, nbytes: int, sums: int, stream: FakeStream) -> None:
        """The first kernel."""
        assert from_ % 16 == 0
        taken = 8 * LANES * ((nbytes - 1) // 1024 + 1)
        assert taken <= sums_bytes(nbytes)

        def run() -> None:
            self._check(from_, nbytes, self.on_gpu)
            self._check(sums, taken, self.on_gpu)
            data = np.frombuffer(ctypes.string_at(from_, nbytes), np.uint8)
            ctypes.memmove(sums, xxh3.rows(data).tobytes(), taken)

        with self._lock:
            self._put(stream, run)

    def chain_sums(self, sums: int, nbytes: int, to: int, stream: FakeStream) -> None:
        """The second, of what the first has left by then."""
        taken = 8 * LANES * ((nbytes - 1) // 1024 + 1)

        def run() -> None:
            self._check(sums, taken, self.on_gpu)
            self._check(to, RESULT_BYTES, self.on_host)
            rows = np.frombuffer(ctypes.string_at(sums, taken), np.uint64)
            ctypes.memmove(to, xxh3.chained(rows.reshape(-1, LANES)).tobytes(), RESULT_BYTES)

        with self._lock:
            self._put(stream, run)

    def allocate(self, nbytes: int) -> int:
        self._call("allocate")
        return self._allocate(self.on_gpu, nbytes)

    def free(self, address: int) -> None:
        self._call("free")
        self._free(self.on_gpu, address)

    def allocate_host(self, nbytes: int) -> int:
        self._call("allocate_host")
        return self._allocate(self.on_host, nbytes)

    def free_host(self, address: int) -> None:
        self._call("free_host")
        self._free(self.on_host, address)

    def register(self, address: int, nbytes: int) -> None:
        self._call("register")
        assert address not in self.registered
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        self._call("unregister")
        del self.registered[address]

    # -- how ----------------------------------------------------------------------

    def _call(self, name: str) -> None:
        with self._lock:
            self.calls.append(name)
            if self.fails_after is not None:
                self.fails_after -= 1
                if self.fails_after < 0:
                    for stream in self._streams:
                        stream.queue.clear()
                    raise DeviceLost("fell off the bus")
            if name in self.refuses:
                raise DeviceFull(f"{name}: no more")
            if f"!{name}" in self.refuses:
                raise DeviceError(f"{name}: refused")

    def _put(self, stream: FakeStream, item: Any) -> None:
        stream.queue.append(item)
        if self._temper is Temper.EAGER:
            self.settle()
        elif self._temper is Temper.ANY:
            for _ in range(self._random.randint(0, 3)):
                self._one()

    def _one(self) -> bool:
        """Do the next thing of one stream; False where none has any."""
        ready = [
            stream
            for stream in self._streams
            if stream.queue
            and not (isinstance(stream.queue[0], tuple) and not stream.queue[0][0].past)
        ]
        if not ready:
            return False
        # The newest streams first shows what an order that is seldom seen would break.
        late = self._temper is not Temper.ANY and self._random.random() < 0.8
        stream = ready[-1] if late else self._random.choice(ready)
        item = stream.queue.popleft()
        if isinstance(item, FakeEvent):
            item.past = True
        elif not isinstance(item, tuple):
            with contextlib.suppress(NotTouched):
                item()
        return True

    def _copy_runs(self, runs: list[Any], *, by_link: bool) -> None:
        for to, from_, nbytes in self._random.sample(runs, len(runs)):
            ends = [(to, nbytes), (from_, nbytes)]
            if by_link:
                on_gpu = [self._inside(*end, self.on_gpu) for end in ends]
                if not any(on_gpu):
                    self.wrong.append("a copy between host and host")
                for end, here in zip(ends, on_gpu, strict=True):
                    if not here:
                        self._check(*end, {**self.on_host, **self.registered})
            else:
                for end in ends:
                    self._check(*end, self.on_gpu)
            ctypes.memmove(to, from_, nbytes)

    def _code(
        self, kernel: str, name: str, dtype: str, raw: int, scales: int, codes: int, groups: int
    ) -> None:
        """A run of groups, as the reference does a block of them."""
        raw_bytes = groups * GROUP * element_bytes(dtype)
        codes_bytes = groups * GROUP * CODECS[name] // 8
        scales_bytes = coded_bytes(name, dtype, raw_bytes) - codes_bytes
        ends = [(raw, raw_bytes), (scales, scales_bytes), (codes, codes_bytes)]
        for end in ends:
            self._check(*end, self.on_gpu)
        block, *parts = (memoryview(ctypes.string_at(*end)) for end in ends)
        if kernel == ENCODE_KERNEL:
            coded = bytearray(scales_bytes + codes_bytes)
            codec.encode(name, dtype, block, memoryview(coded))
            ctypes.memmove(scales, bytes(coded[:scales_bytes]), scales_bytes)
            ctypes.memmove(codes, bytes(coded[scales_bytes:]), codes_bytes)
        else:
            back = bytearray(raw_bytes)
            codec.decode(name, dtype, memoryview(b"".join(parts)), memoryview(back))
            ctypes.memmove(raw, bytes(back), raw_bytes)

    def _check(self, address: int, nbytes: int, memory: dict[int, Any]) -> None:
        if not self._inside(address, nbytes, memory):
            self.wrong.append(f"{nbytes} bytes at {address:#x} are not the GPU's to touch")
            raise NotTouched

    def _inside(self, address: int, nbytes: int, memory: dict[int, Any]) -> bool:
        with self._lock:
            return any(
                start <= address and address + nbytes <= start + _size(held)
                for start, held in memory.items()
            )

    def _allocate(self, memory: dict[int, Any], nbytes: int) -> int:
        buffer = (ctypes.c_ubyte * nbytes)()
        # Whoever reads what was not written finds it.
        ctypes.memset(buffer, 0xA5, nbytes)
        address = ctypes.addressof(buffer)
        with self._lock:
            memory[address] = buffer
        return address

    def _free(self, memory: dict[int, Any], address: int) -> None:
        with self._lock:
            ctypes.memset(memory[address], 0x5A, ctypes.sizeof(memory[address]))
            del memory[address]


def _size(held: Any) -> int:
    return held if isinstance(held, int) else ctypes.sizeof(held)
