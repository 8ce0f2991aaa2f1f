"""Blocks that are read from a drive straight into a GPU's memory, by threads of the store's.

A drive writes into *slots* that nobody but this GPU's driver knows; from there a block goes to its
place in the arena, once its checksum was compared. So a drive that hangs keeps a thread and a
slot, and nothing of what readers see, nor the GPU's own thread.

Slots are taken and given back as the planner says (`core.places.straight`), one by one, in a thread
of their own: it may take seconds, and waits for the GPU. One that is read into goes back when that
has ended. Without slots blocks come up into DRAM, and those that are on their way by the host's
memory.

What cannot be read straight comes by way of the host's memory, in the same transfer. Who read it
does not say that nothing is written into its slot any more: no such slot is used after that, or
given back while the process lasts. After `FAILURES` nothing is read straight any more.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

from kvstore.core.actions import Copy
from kvstore.core.places.mirrors import Mirrors
from kvstore.core.places.shares import NO_PLACE
from kvstore.core.places.straight import Slots
from kvstore.device.vram import Straight
from kvstore.errors import DeviceError, DeviceFull, DeviceLost, DeviceStuck, TierError
from kvstore.store.complaints import Complaints
from kvstore.store.loop import Loop
from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.tiers.vram import VramArena

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_SLOT_BYTES = 16 << 20
"""Of a GPU's memory, for each read that is under way; larger blocks are not read straight."""
FAILURES = 3
"""Blocks that were there and could not be read straight, until that is given up."""
NOT_YET = "it is not known yet whether that is possible"
SHORT = "others need the GPU's memory"
UNUSED = "nobody reads there"
NO_SLOT = "no slot was free"


class PlaceGone(DeviceError):
    """The memory that a block was to be read into went back to the GPU."""


class Went(NamedTuple):
    """How a copy ended. `refused`: why it was not read straight, "" where it was. `failure`: why
    its block is not there. `tried`: a slot was used."""

    refused: str
    failure: Exception | None
    tried: bool = True


class Closed(enum.Enum):
    YES = enum.auto()
    NOT_YET = enum.auto()
    """A drive has not answered yet."""
    NEVER = enum.auto()
    """The GPU may write there for ever."""


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
        reserve_bytes: int,
        gpu_stuck: Callable[[DeviceStuck], None],
    ) -> None:
        """`slots`: reads at a time. `reserve_bytes`: what others are to have left. `gpu_stuck`: is
        called on the loop, where giving a slot back shows that the GPU does not answer."""
        self.because = NOT_YET
        """Why nothing is read straight; "" where it is."""
        self.straight_blocks = 0
        self.bounced_blocks = 0
        self._loop = loop
        self._nvme = nvme
        self._arena = arena
        self._mirrors = mirrors
        self._most = slots
        self._block_bytes = min(largest_block, MOST_SLOT_BYTES)
        self._slot_bytes = arena.vram.straight_bytes(1, self._block_bytes)
        self._reserve_bytes = reserve_bytes
        self._gpu_stuck = gpu_stuck
        self._thread = ThreadPoolExecutor(1, "kvstore-slots")
        self._failures = 0
        self._over = False
        """For good."""
        self._arranging = self._tried = False
        self._complaints = Complaints(log, loop.clock)
        self._lock = threading.Lock()
        # Under the lock. A slot that is used is nowhere, but with who uses it.
        self._wanted = False
        self._closed = False
        self._stuck = False
        self._idle: list[Straight] = []
        self._usable = 0
        """Those, and those that are used."""
        self._there = 0
        """Those, and all that has not gone back."""
        self._kept: list[Straight | memoryview] = []
        """What somebody may be writing or reading, for as long as the process lasts."""
        self._reads = 0
        self._in_host: list[memoryview] = []
        """Idle memory of the host, of those reads that came by way of it."""
        mirrors.straight_bytes = self._block_bytes
        mirrors.straight.slots_bytes = slots * self._slot_bytes
        mirrors.straight.has_slots = False

    @property
    def held_bytes(self) -> int:
        """Of the GPU's memory, from any thread."""
        return self._there * self._slot_bytes

    # On the loop

    def look(self) -> None:
        """Have as many slots as the planner wants by now. To be called as often as it looks."""
        slots = self._mirrors.straight.slots
        wanted = slots is Slots.TAKEN and not self._over
        if not wanted:
            self._pause(SHORT if slots is Slots.SHORT else UNUSED)
        with self._lock:
            self._wanted = wanted
            differs = self._lacks_one if wanted else bool(self._idle)
        if (differs or not self._tried) and not self._arranging:
            self._arranging = self._tried = True
            self._loop.spawn(self._arrange_slots())
        elif wanted and not differs:
            self._resume()

    def _pause(self, because: str) -> None:
        if self._over or because == self.because or (because, self.because) == (UNUSED, NOT_YET):
            return
        self.because = because
        self._mirrors.straight.has_slots = False
        if because == SHORT:
            gpu = self._mirrors.gpu
            self._loop.observer.straight_refused(gpu, "memory")
            self._complaints.warn("nothing is read straight into %s now: %s", gpu, because)

    def _resume(self) -> None:
        if self.because:
            self.because = ""
            self._mirrors.straight.has_slots = True
            log.info("drives are read straight into %s", self._mirrors.gpu)

    async def _arrange_slots(self) -> None:
        try:
            await self.in_thread(self._arrange)
        except DeviceStuck as error:
            self._gpu_stuck(error)
        except DeviceFull as error:
            log.info("no slots for straight reads in %s now: %s", self._mirrors.gpu, error)
            self._mirrors.straight.not_taken(self._loop.clock.now_ns())
        except DeviceError as error:
            self._give_up(str(error), "unusable")
        except Exception as error:
            # A library that is not as it was thought to be. Nothing else depends on it.
            log.exception("slots in %s failed in an unforeseen way", self._mirrors.gpu)
            self._give_up(f"{type(error).__name__}: {error}", "unusable")
        else:
            self.because = UNUSED if self.because == NOT_YET else self.because
        finally:
            self._arranging = False

    def ended(self, went: Went) -> None:
        """What `read` said of a copy."""
        if not went.refused:
            self.straight_blocks += went.failure is None
            return
        if went.failure is None:
            self.bounced_blocks += 1
        if self._over:
            return
        gpu = self._mirrors.gpu
        self._complaints.warn("a block was not read straight into %s: %s", gpu, went.refused)
        if not went.tried:
            return
        self._loop.observer.straight_refused(gpu, "failed")
        self._failures += 1
        if self._failures >= FAILURES:
            self._give_up(went.refused, "off")

    def _give_up(self, because: str, reason: str) -> None:
        if self._over:
            return
        gpu = self._mirrors.gpu
        self._loop.observer.straight_refused(gpu, reason)
        level = logging.ERROR if reason == "off" else logging.WARNING
        log.log(level, "nothing is read straight into %s until a restart: %s", gpu, because)
        self.end(because)

    def end(self, because: str) -> None:
        """Nothing is to be read straight from now on, but what is under way."""
        self.because = because
        self._over = True
        self._mirrors.straight_bytes = 0
        self._mirrors.straight.has_slots = False
        with self._lock:
            self._wanted = False

    async def in_thread(self, work: Callable[[], T]) -> T:
        """In the one that slots are taken and given back in."""
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await asyncio.shield(doing)

    # In the slots' thread

    def _arrange(self) -> None:
        """Raises `DeviceFull` where there is no memory for slots now, `DeviceStuck` where the GPU
        does not answer, and any other `DeviceError` with why nothing can be read straight. The
        first time one is taken and given back, so that this is known before anybody reads."""
        first = self.because == NOT_YET
        while True:
            with self._lock:
                if not (first or (self._wanted and self._lacks_one)):
                    break
            first = False
            self._check_memory()
            slot = self._arena.vram.straight(1, self._block_bytes)
            with self._lock:
                self._idle.append(slot)
                self._usable += 1
                self._there += 1
        self._give_back()

    @property
    def _lacks_one(self) -> bool:
        """What failed is made up for as often as failures are borne."""
        return self._usable < self._most and self._there < self._most + FAILURES - 1

    def _check_memory(self) -> None:
        """The planner has looked before the first of them was taken."""
        try:
            free_bytes = self._arena.vram.free_bytes()
        except DeviceLost:
            raise
        except DeviceError as error:
            raise DeviceFull(str(error)) from error
        if free_bytes < self._reserve_bytes + 2 * self._slot_bytes:
            raise DeviceFull(SHORT)

    def _give_back(self) -> None:
        """Slots that are not wanted, but for those that are used. Raises `DeviceStuck`."""
        while True:
            with self._lock:
                if self._wanted or self._stuck or not self._idle:
                    return
                slot = self._idle.pop()
                self._usable -= 1
            try:
                slot.close()
            except DeviceStuck:
                with self._lock:
                    self._stuck = True
                    self._kept.append(slot)
                raise
            with self._lock:
                self._there -= 1

    def close(self) -> Closed:
        """Read nothing any more, and give slots back in which nothing is under way. Where the GPU
        is stuck, none: who gives memory back waits for all that it is at."""
        with self._lock:
            self._closed = True
            self._wanted = False
        try:
            self._give_back()
        except DeviceStuck as error:
            log.warning("the memory of %s was not given back: %s", self._mirrors.gpu, error)
        with self._lock:
            if self._reads:
                return Closed.NOT_YET
            return Closed.NEVER if self._stuck else Closed.YES

    # In any thread

    def shut(self) -> Closed:
        """`close`, after the slots' thread has ended."""
        with self._lock:
            self._wanted = False
        self._thread.shutdown(wait=True)
        return self.close()

    def read(self, copy: Copy, header: BlockHeader) -> Went:
        """Make a copy from NVMe to a place in the arena."""
        with self._lock:
            # Whoever waited for a stuck GPU too would keep the drive from others.
            if self._closed or self._stuck:
                return Went("", PlaceGone("nothing is read into this GPU's memory any more"))
            self._reads += 1
            slot = self._idle.pop() if self._wanted and self._idle else None
        try:
            return self._read(copy, header, slot)
        finally:
            with self._lock:
                self._reads -= 1

    def _read(self, copy: Copy, header: BlockHeader, slot: Straight | None) -> Went:
        refused, tried = "", slot is not None
        failure: Exception | None = None
        try:
            if copy.target.address == NO_PLACE:
                raise PlaceGone("its memory went back before it was read")
            if slot is None:
                refused = self.because or NO_SLOT
            elif refused := self._read_straight(copy, header, slot):
                self._keep(slot)
                slot = None
            if refused:
                self._read_by_way_of_host(copy, header)
        except DeviceStuck as error:
            failure = error
            with self._lock:
                self._stuck = True
            if slot is not None:
                self._keep(slot)
        except (TierError, DeviceError) as error:
            failure = error
            self._put_back(slot)
        except Exception as error:  # noqa: BLE001
            # A bug, here or in a library. It costs this block, and counts (`ended`): or what is
            # on NVMe would be a miss for ever.
            refused, failure, tried = f"{type(error).__name__}: {error}", error, True
            if slot is not None:
                self._keep(slot)
        except BaseException:
            if slot is not None:
                self._keep(slot)
            raise
        else:
            self._put_back(slot)
        return Went(refused, failure, tried)

    def _read_straight(self, copy: Copy, header: BlockHeader, slot: Straight) -> str:
        """Why that was not possible, or "". Raises `TierError`, and `DeviceError` where there is
        no other way either."""
        try:
            self._nvme.read_straight(copy.source.address, header, partial(slot.fill, 0))
            there = self._arena.deliver(copy.target, slot, 0, header.length)
        except (DeviceLost, DeviceStuck):
            raise
        except DeviceError as error:
            return str(error) or type(error).__name__
        _check(there)
        return ""

    def _put_back(self, slot: Straight | None) -> None:
        """Nothing is under way in it."""
        if slot is not None:
            with self._lock:
                self._idle.append(slot)

    def _keep(self, slot: Straight) -> None:
        """Something may be under way in it."""
        with self._lock:
            self._kept.append(slot)
            self._usable -= 1

    def _read_by_way_of_host(self, copy: Copy, header: BlockHeader) -> None:
        with self._lock:
            pages = self._in_host.pop() if self._in_host else None
        if pages is None:
            pages = memoryview(mmap.mmap(-1, self._block_bytes))
        host = pages[: header.length]
        try:
            self._nvme.read(copy.source.address, header, host)
            _check(self._arena.write_now(copy.target, host))
        except (TierError, DeviceError) as error:
            self._put_back_in_host(pages, kept=isinstance(error, DeviceStuck))
            raise
        except BaseException:
            self._put_back_in_host(pages, kept=True)
            raise
        self._put_back_in_host(pages, kept=False)

    def _put_back_in_host(self, pages: memoryview, *, kept: bool) -> None:
        with self._lock:
            (self._kept if kept else self._in_host).append(pages)


def _check(there: bool) -> None:
    if not there:
        raise PlaceGone("its memory went back while it was read")
