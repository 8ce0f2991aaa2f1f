"""A part of a GPU's memory, as extents that workers on that GPU open.

Everything in it is a copy of what DRAM holds too (docs/decisions/0015-vram-tier.md), so it is no
tier behind another: losing it loses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvstore.device.vram import Made, Vram
from kvstore.device.vram_stand_in import PREFIX, StandInVram
from kvstore.errors import DeviceError, InternalError, NoDevice

log = logging.getLogger(__name__)


def open_all(gpus: Iterable[str]) -> list[Vram]:
    """Those that can be used; of the others the log says why not."""
    opened: list[Vram] = []
    for gpu in gpus:
        try:
            opened.append(open_vram(gpu))
        except DeviceError as error:
            log.error("the memory of GPU %s is not used: %s", gpu, error)
    return opened


def open_vram(gpu: str) -> Vram:
    """Memory of the GPU of that number, or of the stand-in of that name. Raises `DeviceError`."""
    if gpu.startswith(PREFIX):
        return StandInVram(gpu)
    if not gpu.isdecimal():
        raise NoDevice(f"{gpu!r} is neither a GPU's number nor {PREFIX}FILE")
    from kvstore.device.cuda_vram import open_cuda_vram

    return open_cuda_vram(int(gpu))


class VramArena:
    """Takes the GPU's memory over. Every method but `extent_fd` may block, and raise
    `DeviceError`. Of one thread at a time, but for `extent_fd`."""

    def __init__(self, vram: Vram, extent_bytes: int) -> None:
        """`extent_bytes`: a power of two; more where the GPU deals in larger pieces."""
        self.vram = vram
        self.extent_bytes = max(extent_bytes, vram.granularity)
        self._open: dict[int, Made] = {}

    def free_bytes(self) -> int:
        """What nobody on the GPU has taken."""
        return self.vram.free_bytes()

    def open_extent(self, extent: int) -> None:
        """Contents are undefined. Raises `DeviceFull`."""
        if extent in self._open:
            raise InternalError(f"extent {extent} is open already")
        self._open[extent] = self.vram.make(self.extent_bytes)

    def close_extent(self, extent: int) -> None:
        """The memory is the GPU's again once every reader has closed it too."""
        closed = self._open.pop(extent, None)
        if closed is None:
            raise InternalError(f"extent {extent} is not open")
        closed.free()

    def extent_fd(self, extent: int) -> int | None:
        """The descriptor to hand to a reader, owned by the arena; None for what is not open."""
        held = self._open.get(extent)
        return None if held is None else held.descriptor

    def write(self, address: int, data: memoryview) -> None:
        """Start copying `data` into a slot. Neither is anybody else's until `finish`."""
        extent, offset = divmod(address, self.extent_bytes)
        self._open[extent].write(offset, data)

    def finish(self) -> None:
        """See `Vram`."""
        self.vram.finish()

    def close(self) -> None:
        for extent in list(self._open):
            self.close_extent(extent)
        self.vram.close()
