"""The calls of one GPU's driver that copies on it are made of; `cuda` has the real ones."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]


class Driver(Protocol):
    """Streams are those of CUDA: what is put into one runs in order, streams run side by side.
    No call waits but `synchronize`, `drain`, `register` and those that make and give back memory.
    All raise `DeviceError`, memory that is not to be had `DeviceFull`, and may be called from any
    thread.
    """

    has_kernel: bool

    def enter(self) -> None:
        """Have the calling thread speak to this GPU, which libraries beside CUDA's take for
        granted, until it speaks to another."""

    def new_stream(self) -> Any: ...

    def record(self, stream: Any) -> Any:
        """An event at the stream's end."""

    def record_engine(self) -> Any:
        """An event at the end of the stream that the engine's thread launches into."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is put into the stream from now on begins after the event."""

    def synchronize(self, event: Any) -> None:
        """Return when the event is past; others may run meanwhile."""

    def drain(self, stream: Any) -> None:
        """Return when all that was put into the stream is over. Needs nothing of the GPU's to
        do so, as an event does."""

    def is_over(self, stream: Any) -> bool:
        """Whether all that was put into the stream is."""

    def copy(self, to: Addresses, from_: Addresses, sizes: Addresses, stream: Any) -> None:
        """Copies by the copy engines, in any order. Host memory must be pinned. The arrays
        are read before this returns."""

    def run_kernel(self, table: int, count: int, stream: Any) -> None:
        """`kernels.SOURCE` on `count` runs, which are read from pinned memory at `table`."""

    def can_code(self) -> bool:
        """Whether `run_coding` can be used. May block for seconds when first asked, to compile
        what it runs."""

    def run_coding(self, kernel: str, kind: int, table: int, count: int, stream: Any) -> None:
        """`coding_kernels.SOURCE` on `count` runs of groups, which are read from pinned memory
        at `table`."""

    def can_checksum(self) -> bool:
        """Whether `run_checksum` can be used. May block as `can_code`."""

    def run_checksum(self, from_: int, nbytes: int, sums: int, to: int, stream: Any) -> None:
        """`checksum_kernel.SOURCE`: of more than `SHORT` bytes of the GPU's memory at a multiple
        of 16, by way of `sums`, into pinned memory."""

    def allocate(self, nbytes: int) -> int:
        """Memory of the GPU."""

    def free(self, address: int) -> None: ...

    def allocate_host(self, nbytes: int) -> int:
        """Pinned memory of the host."""

    def free_host(self, address: int) -> None: ...

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of the host."""

    def unregister(self, address: int) -> None: ...
