"""Memory of a GPU that processes share: one makes it, others open it by a descriptor.

The server makes it (`tiers.vram`), workers open it and copy from it (`local.mirrors`). `cuda_vram`
is the real thing; `vram_stand_in` keeps it in host memory, for tests and machines without a GPU.

Lifetime. Memory lasts until its maker has freed it *and* whoever opened it has closed it, or has
ended. So nobody's copy ever reads memory that is gone; what it reads may be another's by then.

Errors. Everything raises `DeviceError`: `DeviceFull` where there is no such memory to be had,
`DeviceLost` once the GPU has failed this process. Everything may be called from any thread.
"""

from __future__ import annotations

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

    def write(self, offset: int, data: memoryview) -> None:
        """Start copying `data` there. It is the device's until `Vram.finish`."""
        ...

    def free(self) -> None:
        """To this process it is gone. Idempotent; never raises."""
        ...


class Vram(Protocol):
    name: str
    """Which GPU it is: the same in every process."""
    granularity: int
    """Memory comes in multiples of so many bytes."""

    def free_bytes(self) -> int:
        """What nobody on the GPU has taken."""
        ...

    def make(self, nbytes: int) -> Made: ...

    def open(self, descriptor: int, nbytes: int) -> Opened:
        """Of a descriptor of `Made`, which stays the caller's."""
        ...

    def finish(self) -> None:
        """Wait for all that `Made.write` has started. Once it has returned or raised, nothing
        of it is under way."""
        ...

    def close(self) -> None:
        """After all that it made and opened. Idempotent."""
        ...
