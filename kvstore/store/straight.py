"""Blocks that are read from a drive straight into a GPU's memory, by threads of the store's.

A drive writes into *slots* (`store.slots`) that nobody but this GPU's driver knows; from there a
block goes to its place in the arena, once its checksum was compared. So a drive that hangs keeps a
thread and a slot, and nothing of what readers see, nor the GPU's own thread.

Slots are taken and given back as the planner says (`core.places.straight`), in a thread of their
own: it may take seconds, and waits for the GPU. Without slots blocks come up into DRAM, and those
that are on their way by the host's memory.

What cannot be read straight comes by way of the host's memory, in the same transfer. Who read it
does not say that nothing is written into its slot any more: no such slot is used after that, or
given back while the process lasts. After `FAILURES` nothing is read straight any more.
"""

from __future__ import annotations

import asyncio
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
from kvstore.store.slots import SHORT, Closed, GpuSlots, SlotsGone
from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.tiers.vram import VramArena

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_SLOT_BYTES = 16 << 20
"""Of a GPU's memory, for each read that is under way; larger blocks are not read straight."""
FAILURES = 3
"""Blocks that were there and could not be read straight, until that is given up."""
NOT_YET = "it is not known yet whether that is possible"
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
        gpu_failed: Callable[[DeviceLost | DeviceStuck], None],
    ) -> None:
        """`slots`: reads at a time. `reserve_bytes`: what others are to have left. `gpu_failed`:
        is called on the loop, where taking a slot or giving one back shows it."""
        self.because = NOT_YET
        """Why nothing is read straight; "" where it is."""
        self.straight_blocks = 0
        self.bounced_blocks = 0
        self._loop = loop
        self._nvme = nvme
        self._arena = arena
        self._mirrors = mirrors
        self._block_bytes = min(largest_block, MOST_SLOT_BYTES)
        self._slots = GpuSlots(
            arena.vram, slots, made_up_for=FAILURES - 1, block_bytes=self._block_bytes,
            reserve_bytes=reserve_bytes,
        )  # fmt: skip
        self._gpu_failed = gpu_failed
        self._thread = ThreadPoolExecutor(1, "kvstore-slots")
        self._failures = 0
        self._over = False
        """For good."""
        self._arranging = self._tried = False
        self._complaints = Complaints(log, loop.clock)
        self._in_host = _HostMemory(self._block_bytes)
        mirrors.straight_bytes = self._block_bytes
        mirrors.straight.slots_bytes = slots * self._slots.slot_bytes
        mirrors.straight.has_slots = False

    @property
    def held_bytes(self) -> int:
        """Of the GPU's memory, from any thread."""
        return self._slots.held_bytes

    # On the loop

    def look(self) -> None:
        """Have as many slots as the planner wants by now. To be called as often as it looks."""
        slots = self._mirrors.straight.slots
        wanted = slots is Slots.TAKEN and not self._over
        if not wanted:
            self._pause(SHORT if slots is Slots.SHORT else UNUSED)
        arranged = self._slots.want(wanted)
        if not (arranged and self._tried) and not self._arranging:
            self._arranging = self._tried = True
            self._loop.spawn(self._arrange_slots())
        elif wanted and arranged:
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
        # Where one is taken and given back before anybody reads, it is known whether that is
        # possible.
        arrange = partial(self._slots.arrange, try_one=self.because == NOT_YET)
        try:
            await self.in_thread(arrange)
        except (DeviceLost, DeviceStuck) as error:
            self._gpu_failed(error)
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
        self._slots.want(False)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """In the one that slots are taken and given back in."""
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await asyncio.shield(doing)

    # In the slots' thread

    def close(self) -> Closed:
        """Read nothing any more, and give slots back in which nothing is under way. Where the GPU
        is stuck, none."""
        try:
            return self._slots.close()
        except DeviceStuck as error:
            log.warning("the memory of %s was not given back: %s", self._mirrors.gpu, error)
            return self._slots.close()

    # In any thread

    def shut(self) -> Closed:
        """`close`, after the slots' thread has ended."""
        self._slots.want(False)
        self._thread.shutdown(wait=True)
        return self.close()

    def read(self, copy: Copy, header: BlockHeader) -> Went:
        """Make a copy from NVMe to a place in the arena."""
        try:
            with self._slots.in_use() as slot:
                return self._read(copy, header, slot)
        except SlotsGone as error:
            return Went("", PlaceGone(str(error)))

    def _read(self, copy: Copy, header: BlockHeader, slot: Straight | None) -> Went:
        refused, tried = "", slot is not None
        failure: Exception | None = None
        try:
            if copy.target.address == NO_PLACE:
                raise PlaceGone("its memory went back before it was read")
            if slot is None:
                refused = self.because or NO_SLOT
            elif refused := self._read_straight(copy, header, slot):
                self._slots.keep(slot)
                slot = None
            if refused:
                self._read_by_way_of_host(copy, header)
        except DeviceStuck as error:
            failure = error
            self._slots.stuck()
            if slot is not None:
                self._slots.keep(slot)
        except (TierError, DeviceError) as error:
            failure = error
            if slot is not None:
                self._slots.put_back(slot)
        except Exception as error:  # noqa: BLE001
            # A bug, here or in a library. It costs this block, and counts (`ended`): or what is
            # on NVMe would be a miss for ever.
            refused, failure, tried = f"{type(error).__name__}: {error}", error, True
            if slot is not None:
                self._slots.keep(slot)
        except BaseException:
            if slot is not None:
                self._slots.keep(slot)
            raise
        else:
            if slot is not None:
                self._slots.put_back(slot)
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

    def _read_by_way_of_host(self, copy: Copy, header: BlockHeader) -> None:
        pages = self._in_host.take()
        host = pages[: header.length]
        try:
            self._nvme.read(copy.source.address, header, host)
            _check(self._arena.write_now(copy.target, host))
        except (TierError, DeviceError) as error:
            self._in_host.put_back(pages, kept=isinstance(error, DeviceStuck))
            raise
        except BaseException:
            self._in_host.put_back(pages, kept=True)
            raise
        self._in_host.put_back(pages, kept=False)


class _HostMemory:
    """Of those reads that come by way of it, as much for each. Thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._idle: list[memoryview] = []
        self._kept: list[memoryview] = []

    def take(self) -> memoryview:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return memoryview(mmap.mmap(-1, self._nbytes))

    def put_back(self, pages: memoryview, *, kept: bool) -> None:
        """`kept`: somebody may be reading there for as long as the process lasts."""
        with self._lock:
            (self._kept if kept else self._idle).append(pages)


def _check(there: bool) -> None:
    if not there:
        raise PlaceGone("its memory went back while it was read")
