"""Blocks that are read from a drive straight into a GPU's memory, by threads of the store's.

A drive writes into *slots* that nobody but this GPU's driver knows; from there a block goes to its
place in the arena, once its checksum was compared. So a drive that hangs keeps a thread and a
slot, and nothing of what readers see, nor the GPU's own thread.

What cannot be read straight comes by way of the host's memory, in the same transfer. Who read it
does not say that nothing is written into its slot any more: no slot is used after that, or given
back while the process lasts. After `FAILURES` nothing is read straight any more.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import mmap
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from kvstore.core.actions import Copy
from kvstore.core.places.mirrors import Mirrors
from kvstore.core.places.shares import NO_PLACE
from kvstore.device.vram import Straight
from kvstore.errors import DeviceError, DeviceLost, DeviceStuck, TierError
from kvstore.store.complaints import Complaints
from kvstore.store.loop import Loop
from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.tiers.vram import VramArena

log = logging.getLogger(__name__)

MOST_SLOT_BYTES = 16 << 20
"""Of a GPU's memory, for each read that is under way; larger blocks are not read straight."""
FAILURES = 3
"""Blocks that were there and could not be read straight, until that is given up."""
NOT_YET = "it is not known yet whether that is possible"


class PlaceGone(DeviceError):
    """The memory that a block was to be read into went back to the GPU."""


class Went(NamedTuple):
    """How a copy ended. `refused`: why it was not read straight, "" where it was. `failure`: why
    its block is not there."""

    refused: str
    failure: Exception | None


class Closed(enum.Enum):
    YES = enum.auto()
    NOT_YET = enum.auto()
    """A drive has not answered yet."""
    NEVER = enum.auto()
    """The GPU may write there for ever."""


class _Slot:
    """A slot on the GPU, and one in the host's memory once that was needed. `number`: None where
    there is none left."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number: int | None = number
        self._nbytes = nbytes
        self._host: memoryview | None = None

    def host(self, nbytes: int) -> memoryview:
        """Starts at a page."""
        if self._host is None:
            self._host = memoryview(mmap.mmap(-1, self._nbytes))
        return self._host[:nbytes]


class DriveToGpu:
    """Into one GPU's memory."""

    def __init__(
        self,
        loop: Loop,
        nvme: StorageTier,
        arena: VramArena,
        mirrors: Mirrors,
        *,
        slots: int,
        largest_block: int,
    ) -> None:
        """`slots`: reads at a time."""
        self.because = NOT_YET
        """Why nothing is read straight; "" where it is."""
        self.straight_blocks = 0
        self.bounced_blocks = 0
        self._loop = loop
        self._nvme = nvme
        self._arena = arena
        self._mirrors = mirrors
        self._slot_bytes = min(largest_block, MOST_SLOT_BYTES)
        self._slots = slots
        self._straight: Straight | None = None
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        self._stuck: list[_Slot] = []
        self._home: list[_Slot] = []
        self._spare: SimpleQueue[int] = SimpleQueue()
        self._left_alone = False
        self._failures = 0
        self._complaints = Complaints(log, loop.clock)

    # On the loop

    def begin(self, refused: str) -> None:
        """Once `open` has run. `refused`: why it failed, if it did."""
        self.because = refused
        if refused:
            self._loop.observer.straight_refused(self._mirrors.gpu, "unusable")
            log.warning("nothing is read straight into %s: %s", self._mirrors.gpu, refused)
            return
        self._mirrors.straight_bytes = self._slot_bytes
        log.info("drives are read straight into %s", self._mirrors.gpu)

    def ended(self, went: Went) -> None:
        """What `read` said of a copy."""
        gpu = self._mirrors.gpu
        if not went.refused:
            self.straight_blocks += went.failure is None
            return
        if went.failure is None:
            self.bounced_blocks += 1
        if self.because:
            return
        self._loop.observer.straight_refused(gpu, "failed")
        self._complaints.warn("a block was not read straight into %s: %s", gpu, went.refused)
        self._failures += 1
        if self._failures >= FAILURES:
            self._loop.observer.straight_refused(gpu, "off")
            log.error("nothing is read straight into %s any more: %s", gpu, went.refused)
            self.end(went.refused)

    def end(self, because: str) -> None:
        """Nothing is to be read straight from now on, but what is under way."""
        self.because = because
        self._mirrors.straight_bytes = 0

    # In threads

    def open(self) -> None:
        """May take seconds. Raises `DeviceError`, with why nothing can be read straight."""
        spare = FAILURES - 1
        self._straight = self._arena.vram.straight(self._slots + spare, self._slot_bytes)
        for number in range(self._slots):
            self._free.put(_Slot(number, self._slot_bytes))
        for number in range(spare):
            self._spare.put(self._slots + number)

    def close(self) -> Closed:
        """Read nothing any more, and give the slots back if nothing is under way in them."""
        with contextlib.suppress(Empty):
            while True:
                self._home.append(self._free.get_nowait())
        if self._straight is not None:
            away = self._slots - len(self._home)
            if away:
                return Closed.NEVER if away == len(self._stuck) else Closed.NOT_YET
            if not self._left_alone:
                self._straight.close()
            self._straight = None
        return Closed.YES

    def read(self, copy: Copy, header: BlockHeader) -> Went:
        """Make a copy from NVMe to a place in the arena."""
        try:
            if self._stuck:
                # Whoever waited for it too would keep the drive from others.
                raise Empty
            slot = self._free.get_nowait()
        except Empty:
            return Went("", PlaceGone("nothing is read into this GPU's memory any more"))
        refused = ""
        try:
            if copy.target.address == NO_PLACE:
                raise PlaceGone("its memory went back before it was read")
            refused = self._read_straight(copy, header, slot)
            if refused:
                self._read_by_way_of_host(copy, header, slot)
        except DeviceStuck as error:
            self._stuck.append(slot)
            return Went(refused, error)
        except (TierError, DeviceError) as error:
            self._free.put(slot)
            return Went(refused, error)
        except Exception as error:  # noqa: BLE001
            # A bug, here or in a library. It costs this block, and counts (`ended`): or what is
            # on NVMe would be a miss for ever.
            self._leave_alone(slot)
            self._free.put(slot)
            return Went(f"{type(error).__name__}: {error}", error)
        except BaseException:
            self._free.put(slot)
            raise
        self._free.put(slot)
        return Went(refused, None)

    def _read_straight(self, copy: Copy, header: BlockHeader, slot: _Slot) -> str:
        """Why that was not possible, or "". Raises `TierError`, and `DeviceError` where there is
        no other way either."""
        straight = self._straight
        assert straight is not None
        if self.because or slot.number is None:
            return self.because or "too many reads failed"
        try:
            fill = partial(straight.fill, slot.number)
            self._nvme.read_straight(copy.source.address, header, fill)
            there = self._arena.deliver(copy.target.address, straight, slot.number, header.length)
        except (DeviceLost, DeviceStuck):
            raise
        except DeviceError as error:
            self._leave_alone(slot)
            return str(error) or type(error).__name__
        _check(there)
        return ""

    def _leave_alone(self, slot: _Slot) -> None:
        """What is on the GPU."""
        self._left_alone = True
        try:
            slot.number = self._spare.get_nowait()
        except Empty:
            slot.number = None

    def _read_by_way_of_host(self, copy: Copy, header: BlockHeader, slot: _Slot) -> None:
        host = slot.host(header.length)
        self._nvme.read(copy.source.address, header, host)
        _check(self._arena.write_now(copy.target.address, host))


def _check(there: bool) -> None:
    if not there:
        raise PlaceGone("its memory went back while it was read")
