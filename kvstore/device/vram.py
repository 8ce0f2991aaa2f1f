"""Memory of a GPU that processes share: one makes it, others open it by a descriptor.

The server makes it (`tiers.vram`), workers open it and copy from it (`local.mirrors`). `cuda_vram`
is the real thing; `vram_stand_in` keeps it in host memory, for tests and machines without a GPU.

Lifetime. Memory lasts until its maker has freed it *and* whoever opened it has closed it, or has
ended. So nobody's copy ever reads memory that is gone; what it reads may be another's by then.

Errors. Everything raises `DeviceError`: `DeviceFull` where there is no such memory to be had,
`DeviceLost` once the GPU has failed this process. Everything may be called from any thread.

*Straight reads* end in memory that is the device's alone, and in what others have open only by a
copy within the GPU, once their checksum was compared. So memory is given back without waiting for
a drive, and nothing that nobody looked at is ever where readers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Opened(Protocol):
    """Memory that another process made."""

    @property
    def address(self) -> int:
        """What the device's own pointers are."""
        ...

    def close(self) -> None:
        """Nothing copies from it any more. Idempotent; never raises."""
        ...


class Made(Protocol):
    """Memory that this process made."""

    @property
    def descriptor(self) -> int:
        """To be handed to others; stays this object's."""
        ...

    @property
    def address(self) -> int:
        """What the device's own pointers are."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Start copying `data` there. It is the device's until `Vram.finish`. Of one thread at a
        time, as `Vram.finish` is."""
        ...

    def write_now(self, offset: int, data: memoryview) -> None:
        """Copy `data` there, and wait for that. Of several threads at a time, beside `write`
        too. Raises `DeviceStuck` where it may be under way for ever."""
        ...

    def free(self) -> None:
        """To this process it is gone. Idempotent; never raises."""
        ...


class StraightFile(Protocol):
    """A file that may be read straight, which stays its owner's."""

    @property
    def descriptor(self) -> int | None:
        """It was opened with O_DIRECT. None: of what cannot be read straight."""
        ...

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        """As `os.preadv`: what the stand-in reads by."""
        ...

    def before_close(self, call: Callable[[], None]) -> None:
        """`call` once, by who closes it, before the descriptor may be another file's. For what
        keeps something about the descriptor."""
        ...


class Straight(Protocol):
    """Reads of a drive that end in this GPU's memory, in slots that are nobody else's. Several
    threads at a time, each with a slot of its own."""

    def fill(self, slot: int, file: StraightFile, offset: int, nbytes: int) -> int:
        """Read `nbytes` at `offset`, a multiple of pages, into a slot; whole pages are read.
        Waited for. The XXH3-64 of the `nbytes`, as they are in the GPU's memory. Raises
        `DeviceError` where it was not read straight, which says nothing of the drive; OSError
        where the drive says no, as preadv does. The slot holds anything then."""
        ...

    def deliver(self, slot: int, to: Made, offset: int, nbytes: int) -> None:
        """Copy the first `nbytes` of a slot that was filled to memory of this GPU; waited for.
        The slot holds anything then. Raises `DeviceError`, `DeviceStuck` where it may be under
        way for ever."""
        ...

    def close(self) -> None:
        """After all that was begun with it, by any thread. Waits for the GPU. Idempotent. Raises
        `DeviceStuck` where that does not answer, and nothing else: its memory stays then."""
        ...


class Vram(Protocol):
    name: str
    """Which GPU it is: the same in every process."""
    granularity: int
    """Memory comes in multiples of so many bytes."""

    def free_bytes(self) -> int:
        """What nobody on the GPU has taken."""
        ...

    def make(self, nbytes: int) -> Made:
        """All of it is zero, whoever had it before."""
        ...

    def open(self, descriptor: int, nbytes: int) -> Opened:
        """Of a descriptor of `Made`, which stays the caller's. To be read."""
        ...

    def open_to_write(self, descriptor: int, nbytes: int, gpu: str) -> Opened:
        """Of memory of that GPU, this one or another: `DeviceError` where this one cannot reach
        that."""
        ...

    def finish(self) -> None:
        """Wait for all that `Made.write` has started. Once it has returned or raised, nothing
        of it is under way, unless it raised `DeviceStuck`."""
        ...

    def straight(self, slots: int, slot_bytes: int) -> Straight:
        """`slot_bytes`: of the largest block that is to be read, here made whole pages. May take
        seconds. Raises `DeviceFull` where there is no memory for it, any other `DeviceError`,
        with the reason, where drives are not read straight. Closed before this."""
        ...

    def straight_bytes(self, slots: int, slot_bytes: int) -> int:
        """Of this GPU's memory, what such a `straight` takes."""
        ...

    def close(self) -> None:
        """After all that it made and opened. Idempotent."""
        ...
