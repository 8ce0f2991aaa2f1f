"""A part of a GPU's memory, as extents that workers on that GPU open.

Everything in it is a copy of what DRAM holds too (docs/decisions/0015-vram-tier.md), so it is no
tier behind another: losing it loses nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from kvstore.device.vram import Made, Straight, Vram
from kvstore.device.vram_stand_in import PREFIX, StandInVram
from kvstore.errors import DeviceError, InternalError, NoDevice

log = logging.getLogger(__name__)


def open_all(gpus: Iterable[str]) -> tuple[list[Vram], dict[str, str]]:
    """Those that can be used, and why the others cannot."""
    opened: list[Vram] = []
    refused: dict[str, str] = {}
    for gpu in gpus:
        try:
            opened.append(open_vram(gpu))
        except DeviceError as error:
            log.error("the memory of GPU %s is not used: %s", gpu, error)
            refused[gpu] = str(error)
    return opened, refused


def open_vram(gpu: str) -> Vram:
    """Memory of the GPU of that number, or of the stand-in of that name. Raises `DeviceError`."""
    if gpu.startswith(PREFIX):
        return StandInVram(gpu)
    if not gpu.isdecimal():
        raise NoDevice(f"{gpu!r} is neither a GPU's number nor {PREFIX}FILE")
    from kvstore.device.cuda_vram import open_cuda_vram

    return open_cuda_vram(int(gpu))


class Place(Protocol):
    """Where a block is to lie."""

    @property
    def address(self) -> int:
        """Another before its extent is closed."""
        ...


class VramArena:
    """Takes the GPU's memory over. Every method but `extent_fd` may block, and raise
    `DeviceError`.

    Threads. `deliver` and `write_now` are any thread's at any time, also of extents that are
    being closed; what begins before is waited for by `close_extent`, what begins after finds no
    extent. So no memory is unmapped that a copy goes into; and as these wait for nothing but the
    GPU, neither does who closes. `extent_fd` is anybody's too. All else is one thread's at a time.
    """

    def __init__(self, vram: Vram, extent_bytes: int) -> None:
        """`extent_bytes`: a power of two; more where the GPU deals in larger pieces."""
        self.vram = vram
        self.extent_bytes = max(extent_bytes, vram.granularity)
        self._open: dict[int, Made] = {}
        self._copying: Counter[int] = Counter()
        """Copies that are waited for, by extent."""
        self._changed = threading.Condition()

    def free_bytes(self) -> int:
        """What nobody on the GPU has taken."""
        return self.vram.free_bytes()

    def open_extent(self, extent: int) -> None:
        """All of it is zero. Raises `DeviceFull`."""
        if extent in self._open:
            raise InternalError(f"extent {extent} is open already")
        made = self.vram.make(self.extent_bytes)
        with self._changed:
            self._open[extent] = made

    def close_extent(self, extent: int) -> None:
        """The memory is the GPU's again once every reader has closed it too."""
        with self._changed:
            closed = self._open.pop(extent, None)
            if closed is None:
                raise InternalError(f"extent {extent} is not open")
            self._changed.wait_for(lambda: extent not in self._copying)
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

    def deliver(self, place: Place, straight: Straight, slot: int, nbytes: int) -> bool:
        """Copy what was read straight into a slot of the arena; waited for. False where the
        extent is closed: the place is nobody's."""
        return self._copy(place, lambda made, at: straight.deliver(slot, made, at, nbytes))

    def write_now(self, place: Place, data: memoryview) -> bool:
        """`deliver`, of what is in the host's memory."""
        return self._copy(place, lambda made, at: made.write_now(at, data))

    def _copy(self, place: Place, copy: Callable[[Made, int], None]) -> bool:
        with self._changed:
            # Not before: its extent could be closed then, and another be open under its number.
            extent, offset = divmod(place.address, self.extent_bytes)
            made = self._open.get(extent)
            if made is None:
                return False
            self._copying[extent] += 1
        try:
            copy(made, offset)
        finally:
            with self._changed:
                self._copying[extent] -= 1
                if not self._copying[extent]:
                    del self._copying[extent]
                    self._changed.notify_all()
        return True

    def close_extents(self) -> None:
        """Those that are open. The GPU may be used on."""
        for extent in list(self._open):
            self.close_extent(extent)

    def close(self) -> None:
        self.close_extents()
        self.vram.close()
