"""A KV cache on a GPU: copies by its copy engines, beside the engine's computing.

A stream here is two of the GPU's: one that copies over the link to the host, and one that
gathers and scatters within the GPU's memory. Copies go in *steps* of `Tuning.step_bytes`,
so that checksums of one step are taken while the next is copied. Three ways lead between
blocks and slots:

    pieces are large, slots are pinned    the link's copies take piece by piece
    pieces are small                      a kernel gathers them into (spreads them from)
                                          staging memory on the GPU; one copy a block
    slots are not pinned (yet)            the link's copies end (begin) in pinned staging
                                          memory; the processor copies from (to) the slots

and the last two go together. What lies in other memory of the GPU is copied from there,
large pieces by the copy engines and small ones by the kernel. Staging is bounded:
`Tuning.steps_ahead` steps a stream.

Each hand-over has its event: from the engine's computing to a stream (`wait_event`), from
one of a stream's two to the other, and from the stream to the processor, which alone says
that staging memory, table, block or slot may be used again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.device.base import Blocks, Copies, Event, Memory, Piece, Stream
from kvstore.device.kernels import RUN_BYTES
from kvstore.device.pins import Pins
from kvstore.device.vram import Vram
from kvstore.errors import DeviceError, DeviceFull, DeviceLost
from kvstore.local import copy

Addresses = npt.NDArray[np.uint64]


class Driver(Protocol):
    """The calls of one GPU's driver that this is made of; `cuda` has the real ones.

    Streams are those of CUDA: what is put into one runs in order, streams run side by side.
    No call waits but `synchronize`, `register` and those that make and give back memory. All
    raise `DeviceError`, memory that is not to be had `DeviceFull`, and may be called from any
    thread.
    """

    has_kernel: bool

    def new_stream(self) -> Any: ...

    def record(self, stream: Any) -> Any:
        """An event at the stream's end."""

    def record_engine(self) -> Any:
        """An event at the end of the stream that the engine's thread launches into."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is put into the stream from now on begins after the event."""

    def synchronize(self, event: Any) -> None:
        """Return when the event is past; others may run meanwhile."""

    def copy(self, to: Addresses, from_: Addresses, sizes: Addresses, stream: Any) -> None:
        """Copies by the copy engines, in any order. Host memory must be pinned. The arrays
        are read before this returns."""

    def run_kernel(self, table: int, count: int, stream: Any) -> None:
        """`kernels.SOURCE` on `count` runs, which are read from pinned memory at `table`."""

    def allocate(self, nbytes: int) -> int:
        """Memory of the GPU."""

    def free(self, address: int) -> None: ...

    def allocate_host(self, nbytes: int) -> int:
        """Pinned memory of the host."""

    def free_host(self, address: int) -> None: ...

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of the host."""

    def unregister(self, address: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Tuning:
    """`kernel_below`: pieces smaller than this many bytes are gathered; batches of copies
    fall from 40-51 to 5-7 GB/s on an H100 below 28 KiB each. `step_bytes`: at least a
    block. `steps_ahead`: of a stream, in staging memory."""

    kernel_below: int = 64 << 10
    step_bytes: int = 16 << 20
    steps_ahead: int = 2


class GpuDevice:
    """One GPU, whose KV cache one engine owns. Takes the driver over."""

    def __init__(
        self,
        driver: Driver,
        tuning: Tuning | None = None,
        *,
        vram: Vram | None = None,
        pin_in_background: bool = True,
    ) -> None:
        self.driver = driver
        self.vram = vram
        self.tuning = tuning or Tuning()
        self.pins = Pins(driver, in_background=pin_in_background)
        self.checksums: Callable[[Sequence[memoryview]], list[int]] = copy.checksum_many
        """Of slots; by the processor, whatever the copies take."""
        self.open_streams: set[Stream] = set()
        self.gathers = driver.has_kernel
        """Until the GPU has no memory to spare for it."""

    def blocks(self, memory: Memory, pieces: Sequence[Piece], num_blocks: int) -> Blocks:
        return GpuBlocks(memory, pieces)

    def stream(self) -> Stream:
        stream = _GpuStream(self)
        self.open_streams.add(stream)
        return stream

    def computed(self) -> Event:
        try:
            return _Recorded(self.driver.record_engine())
        except DeviceError as error:
            return _Recorded(None, error)

    def close(self) -> None:
        # Copies of a stream that was not closed may be under way: its memory stays pinned.
        if not self.open_streams:
            self.pins.close()


class _Recorded(NamedTuple):
    event: Any
    error: DeviceError | None = None


class GpuBlocks:
    def __init__(self, memory: Memory, pieces: Sequence[Piece]) -> None:
        self._owner = memory.owner
        self._starts = np.array([memory.address + each.offset for each in pieces], np.uint64)
        self._strides = np.array([each.stride for each in pieces], np.uint64)
        self.sizes = np.array([each.nbytes for each in pieces], np.uint64)
        self.block_bytes = int(self.sizes.sum())
        self.offsets = (np.cumsum(self.sizes) - self.sizes).astype(np.uint64)
        """Of each piece in a slot."""

    def addresses(self, block_ids: Sequence[int]) -> Addresses:
        """[block, piece]"""
        ids = np.array(block_ids, np.uint64)
        return self._starts + ids[:, None] * self._strides


class _Staging:
    """Memory that one step at a time passes through, of the kinds that were needed."""

    def __init__(self, driver: Driver, least: int) -> None:
        """`least`: bytes to take at a time, so that nothing grows while an engine runs."""
        self._driver = driver
        self._least = least
        self._held: dict[str, tuple[int, int]] = {}

    def on_gpu(self, nbytes: int) -> int:
        return self._at_least("gpu", max(nbytes, self._least))

    def on_host(self, nbytes: int) -> int:
        return self._at_least("host", max(nbytes, self._least))

    def table(self, runs: int) -> int:
        return self._at_least("table", runs * RUN_BYTES)

    def free(self) -> None:
        for kind in list(self._held):
            self._free(kind)

    def _at_least(self, kind: str, nbytes: int) -> int:
        address, held = self._held.get(kind, (0, 0))
        if held < nbytes:
            self._free(kind)
            allocate = self._driver.allocate if kind == "gpu" else self._driver.allocate_host
            address = allocate(nbytes)
            self._held[kind] = (address, nbytes)
        return address

    def _free(self, kind: str) -> None:
        address, _ = self._held.pop(kind, (0, 0))
        if address:
            free = self._driver.free if kind == "gpu" else self._driver.free_host
            # A GPU that is lost has taken it along.
            with contextlib.suppress(DeviceLost):
                free(address)


class _GpuStream:
    def __init__(self, device: GpuDevice) -> None:
        self.device = device
        self.driver = device.driver
        tuning = device.tuning
        self._idle = [_Staging(self.driver, tuning.step_bytes) for _ in range(tuning.steps_ahead)]
        self._staged: deque[_Step | _CopiesWithin] = deque()

    # Made when first used, which is where a GPU that fails may be told of.

    @cached_property
    def link(self) -> Any:
        return self.driver.new_stream()

    @cached_property
    def gathering(self) -> Any:
        return self.driver.new_stream()

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, _Recorded)
        if event.error is not None:
            raise event.error
        self.driver.wait(self.link, event.event)
        self.driver.wait(self.gathering, event.event)

    def load(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        assert isinstance(blocks, GpuBlocks)
        return _GpuCopies(self, blocks, block_ids, slots, save=False)

    def save(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        assert isinstance(blocks, GpuBlocks)
        return _GpuCopies(self, blocks, block_ids, slots, save=True)

    def load_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        assert isinstance(blocks, GpuBlocks)
        return _CopiesWithin(self, blocks, block_ids, addresses)

    def close(self) -> None:
        idle, self._idle = self._idle, []
        for staging in idle:
            staging.free()
        self.device.open_streams.discard(self)

    @property
    def has_room(self) -> bool:
        return bool(self._idle)

    def take_staging(self, step: _Step | _CopiesWithin) -> _Staging:
        """Waits for the oldest step that has some where there is none to spare."""
        while not self._idle:
            self._staged[0].finish()
        self._staged.append(step)
        return self._idle.pop()

    def give_back(self, step: _Step | _CopiesWithin, staging: _Staging) -> None:
        self._staged.remove(step)
        self._idle.append(staging)


class _GpuCopies:
    """Steps that were started, and those that have yet to be, for want of staging."""

    def __init__(
        self,
        stream: _GpuStream,
        blocks: GpuBlocks,
        block_ids: Sequence[int],
        slots: Sequence[memoryview],
        *,
        save: bool,
    ) -> None:
        size = max(1, stream.device.tuning.step_bytes // blocks.block_bytes)
        self._stream = stream
        self._to_start: deque[_Step] = deque()
        self._started: deque[_Step] = deque()
        for start in range(0, len(block_ids), size):
            part = slice(start, start + size)
            self._to_start.append(_Step(stream, blocks, block_ids[part], slots[part], save))
        try:
            self._start()
        except BaseException:
            self._abandon()
            raise

    def finish(self) -> list[int]:
        sums: list[int] = []
        try:
            while self._started or self._to_start:
                if not self._started:
                    self._start_next()
                step = self._started[0]
                step.finish()
                self._started.popleft()
                self._start()
                sums += self._stream.device.checksums(step.slots)
        except BaseException:
            self._abandon()
            raise
        return sums

    def _start(self) -> None:
        """All that can be without waiting."""
        while self._to_start and (self._stream.has_room or self._to_start[0].direct):
            self._start_next()

    def _start_next(self) -> None:
        # Among the started first: what fails half way is under way too.
        step = self._to_start.popleft()
        self._started.append(step)
        step.start()

    def _abandon(self) -> None:
        self._to_start.clear()
        while self._started:
            self._started.popleft().abandon()


class _Step:
    """Some blocks, from start to end. `finish` and `abandon` may be repeated."""

    def __init__(
        self,
        stream: _GpuStream,
        blocks: GpuBlocks,
        block_ids: Sequence[int],
        slots: Sequence[memoryview],
        save: bool,
    ) -> None:
        device = stream.device
        self.slots = slots
        self._stream = stream
        self._driver = stream.driver
        self._blocks = blocks
        self._block_ids = block_ids
        self._save = save
        self._gathers = (
            device.gathers
            and len(blocks.sizes) > 1
            and int(blocks.sizes.min()) < device.tuning.kernel_below
        )
        self._unpinned = [not device.pins.covers(slot) for slot in slots]
        self._staging: _Staging | None = None
        self._on_host = 0
        self._done: Any = None

    @property
    def direct(self) -> bool:
        """Whether it needs no staging."""
        return not self._gathers and not any(self._unpinned)

    def start(self) -> None:
        if not self.direct:
            self._staging = self._stream.take_staging(self)
        pieces = self._blocks.addresses(self._block_ids)
        host = self._host_addresses()
        on_gpu = self._gathering_memory()
        if on_gpu is None:
            ends = host[:, None] + self._blocks.offsets
            sizes = np.broadcast_to(self._blocks.sizes, pieces.shape)
            self._copy(pieces, ends, sizes, self._stream.link)
            self._done = self._driver.record(self._stream.link)
            return
        gathered = on_gpu + self._blocks.block_bytes * np.arange(len(host), dtype=np.uint64)
        sizes = np.full(len(host), self._blocks.block_bytes, np.uint64)
        link, gathering = self._stream.link, self._stream.gathering
        if self._save:
            self._run_kernel(gathered[:, None] + self._blocks.offsets, pieces)
            self._driver.wait(link, self._driver.record(gathering))
            self._copy(gathered, host, sizes, link)
            self._done = self._driver.record(link)
        else:
            self._copy(gathered, host, sizes, link)
            self._driver.wait(gathering, self._driver.record(link))
            self._run_kernel(pieces, gathered[:, None] + self._blocks.offsets)
            self._done = self._driver.record(gathering)

    def finish(self) -> None:
        """Wait for it, and bring saved bytes from staging into slots."""
        if self._done is not None:
            self._driver.synchronize(self._done)
            self._done = None
            if self._save:
                self._through_staging()
        self._give_staging_back()

    def abandon(self) -> None:
        """Wait for whatever of it is under way, be it started half."""
        # A GPU that is lost copies nothing any more.
        with contextlib.suppress(DeviceError):
            for stream in (self._stream.link, self._stream.gathering):
                self._driver.synchronize(self._driver.record(stream))
        self._done = None
        self._give_staging_back()

    def _give_staging_back(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            self._stream.give_back(self, staging)

    def _host_addresses(self) -> Addresses:
        """Where the link's copies end, or begin: slots, or staging for those not pinned."""
        addresses = np.array([_address(slot) for slot in self.slots], np.uint64)
        if any(self._unpinned):
            assert self._staging is not None
            nbytes = self._blocks.block_bytes
            self._on_host = self._staging.on_host(len(self.slots) * nbytes)
            staged = self._on_host + nbytes * np.arange(len(self.slots), dtype=np.uint64)
            addresses = np.where(self._unpinned, staged, addresses)
            if not self._save:
                self._through_staging()
        return addresses

    def _through_staging(self) -> None:
        """Copy slots that are not pinned to or from staging, by the processor."""
        nbytes = self._blocks.block_bytes
        indexes = [index for index, unpinned in enumerate(self._unpinned) if unpinned]

        def work(start: int, stop: int) -> None:
            for index in indexes[start:stop]:
                staged = _memory(self._on_host + index * nbytes, nbytes)
                if self._save:
                    copy.copy_bytes(self.slots[index], staged)
                else:
                    copy.copy_bytes(staged, self.slots[index])

        if indexes:
            copy.share(work, len(indexes), nbytes)

    def _gathering_memory(self) -> int | None:
        if not self._gathers:
            return None
        assert self._staging is not None
        try:
            return self._staging.on_gpu(len(self.slots) * self._blocks.block_bytes)
        except DeviceFull:
            # The engine's memory comes first. Copies take longer without.
            self._stream.device.gathers = False
            return None

    def _copy(self, on_gpu: Addresses, on_host: Addresses, sizes: Addresses, stream: Any) -> None:
        to, from_ = (on_host, on_gpu) if self._save else (on_gpu, on_host)
        self._driver.copy(_flat(to), _flat(from_), _flat(sizes), stream)

    def _run_kernel(self, to: Addresses, from_: Addresses) -> None:
        assert self._staging is not None
        _run_kernel(self._stream, self._staging, to, from_, self._blocks.sizes)


class _CopiesWithin:
    """Blocks from other memory of the GPU: neither the link nor the host has a part in it.
    `finish` may be repeated."""

    def __init__(
        self,
        stream: _GpuStream,
        blocks: GpuBlocks,
        block_ids: Sequence[int],
        addresses: Sequence[int],
    ) -> None:
        self._stream = stream
        self._staging: _Staging | None = None
        self._done: Any = None
        device, to = stream.device, blocks.addresses(block_ids)
        from_ = np.array(addresses, np.uint64)[:, None] + blocks.offsets
        try:
            if device.gathers and int(blocks.sizes.min()) < device.tuning.kernel_below:
                self._staging = stream.take_staging(self)
                _run_kernel(stream, self._staging, to, from_, blocks.sizes)
                self._done = stream.driver.record(stream.gathering)
            else:
                sizes = np.broadcast_to(blocks.sizes, from_.shape)
                stream.driver.copy(_flat(to), _flat(from_), _flat(sizes), stream.link)
                self._done = stream.driver.record(stream.link)
        except BaseException:
            self._abandon()
            raise

    def finish(self) -> list[int]:
        try:
            if self._done is not None:
                self._stream.driver.synchronize(self._done)
                self._done = None
        except BaseException:
            self._abandon()
            raise
        self._give_staging_back()
        return []

    def _abandon(self) -> None:
        # A GPU that is lost copies nothing any more.
        with contextlib.suppress(DeviceError):
            for stream in (self._stream.link, self._stream.gathering):
                self._stream.driver.synchronize(self._stream.driver.record(stream))
        self._done = None
        self._give_staging_back()

    def _give_staging_back(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            self._stream.give_back(self, staging)


def _run_kernel(
    stream: _GpuStream, staging: _Staging, to: Addresses, from_: Addresses, sizes: Addresses
) -> None:
    address = staging.table(to.size)
    table = np.frombuffer(_memory(address, to.size * RUN_BYTES), np.uint64).reshape(-1, 3)
    table[:, 0] = to.ravel()
    table[:, 1] = from_.ravel()
    table[:, 2] = np.broadcast_to(sizes, to.shape).ravel()
    stream.driver.run_kernel(address, to.size, stream.gathering)


def _flat(addresses: Addresses) -> Addresses:
    return np.ascontiguousarray(addresses, np.uint64).ravel()


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _address(view: memoryview) -> int:
    """Also of memory that may only be read."""
    array = np.frombuffer(view, np.uint8)
    return int(array.__array_interface__["data"][0])
