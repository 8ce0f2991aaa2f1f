"""Blocks in GPUs' memory: copied there, or written there by who hands them over, listed for the
workers on the GPU, given back.

A thread for each GPU does what its planner (`core.places.mirrors`) wants, and asks the driver
ten times a second how much memory others have left. A GPU that fails gives back what it has of
memory and is not used again; nothing else depends on it. What straight reads take beside
(`store.straight`) follows the same looks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import xxhash

from kvstore.core.actions import Copy, Mirrored, Unmirrored
from kvstore.core.catalog import Layout
from kvstore.core.places.mirrors import Mirrors, MirrorWork
from kvstore.core.places.shares import Mirror
from kvstore.core.sessions import Session
from kvstore.core.space import Space
from kvstore.device.mirrors import MirrorTable
from kvstore.errors import BadRequest, DeviceError, DeviceLost, DeviceStuck
from kvstore.store.loop import Loop
from kvstore.store.slots import Closed
from kvstore.store.straight import DriveToGpu, Went
from kvstore.tiers.base import BlockHeader, MemoryTier, StorageTier
from kvstore.tiers.vram import VramArena
from kvstore.types import MAX_READER_BYTES, VramStats

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 0.1
MOST_UNTOLD = 10
"""Looks one after the other that may not tell how much memory is free."""
FEWEST_ROWS, MOST_ROWS = 1 << 10, 1 << 18
USUAL_SLOT_BYTES = 64 << 10
"""Blocks are mostly larger. Of smaller ones there may be as many as the table has rows: readers
go through all of them whenever something has changed."""


class VramHandout(NamedTuple):
    """What a worker needs to read a GPU's mirrors. The descriptor stays the store's."""

    descriptor: int
    extent_bytes: int


class _Ends(NamedTuple):
    """How work ended. `opened`: the extents that it asked for are there. `copied`: those whose
    bytes are. `free_bytes`: of the GPU, None where that is not told."""

    opened: bool
    copied: set[Mirror]
    free_bytes: int | None


class Gpu:
    """One GPU's memory, as far as it is the store's."""

    def __init__(
        self,
        loop: Loop,
        dram: MemoryTier,
        arena: VramArena,
        capacity_bytes: int,
        reserve_bytes: int,
        first_extent: int,
        *,
        straight_from: StorageTier | None,
        reads: int,
    ) -> None:
        """`straight_from`: what is to be read straight; `reads`: so many at a time."""
        rows = max(FEWEST_ROWS, min(MOST_ROWS, capacity_bytes // USUAL_SLOT_BYTES))
        space = Space(capacity_bytes, arena.extent_bytes, max_slots=rows, first_extent=first_extent)
        self.name = arena.vram.name
        self.mirrors = Mirrors(loop.planner.holdings, space, reserve_bytes, self.name)
        self.on = True
        self._off_because = ""
        self._loop = loop
        self._dram = dram
        self._arena = arena
        self._table = MirrorTable(rows, max(1, space.max_extents))
        self._thread = ThreadPoolExecutor(1, "kvstore-vram")
        self._straight = (
            None
            if straight_from is None
            else DriveToGpu(
                loop, straight_from, arena, self.mirrors,
                slots=reads, largest_block=dram.extent_bytes, reserve_bytes=reserve_bytes,
                gpu_failed=self._failed,
            )
        )  # fmt: skip
        self._untold = 0
        loop.planner.holdings.mirrors.append(self.mirrors)

    async def work(self) -> None:
        """For as long as the GPU, and the store, last."""
        try:
            await self._work()
        except Exception as error:
            # A bug. Loads have no need of this GPU.
            self._loop.observer.io_error("vram", type(error).__name__)
            log.exception("the work on %s failed in an unforeseen way", self.name)
            self._switch_off(f"{type(error).__name__}: {error}")
        self.mirrors.lost()
        self._loop.execute()
        self._table.close_extents()
        await self._in_thread(self._close_extents)
        while True:
            closed = Closed.YES
            if self._straight is not None:
                closed = await self._straight.in_thread(self._straight.close)
            if closed is not Closed.NOT_YET:
                break
            await asyncio.sleep(LOOK_S)
        if closed is Closed.YES:
            await self._in_thread(self._close_arena)

    async def _work(self) -> None:
        """Until the GPU fails."""
        free_bytes: int | None = None
        while self.on:
            if self._straight is not None:
                self._straight.look()
            if self.mirrors.idle:
                await asyncio.sleep(LOOK_S)
                free_bytes = None
                continue
            if free_bytes is None:
                free_bytes = (await self._do(MirrorWork())).free_bytes
                if free_bytes is None:
                    await asyncio.sleep(LOOK_S)
                continue
            work = self.mirrors.work(free_bytes, self._loop.clock.now_ns())
            # What is gone is struck from the table before its memory is.
            self._loop.execute()
            for extent in work.closes:
                self._table.close_extent(extent)
            if not work:
                await asyncio.sleep(LOOK_S)
            ends = await self._do(work)
            free_bytes = ends.free_bytes
            self._settle(work, ends)
            self._loop.execute()

    def read(self, copy: Copy, header: BlockHeader) -> Went:
        """See `DriveToGpu`. Runs in threads of the store's."""
        assert self._straight is not None
        return self._straight.read(copy, header)

    def read_ended(self, went: Went) -> None:
        assert self._straight is not None
        self._straight.ended(went)
        if isinstance(went.failure, DeviceLost | DeviceStuck):
            self._failed(went.failure)

    def extent_fd(self, extent: int, tenant: str) -> int | None:
        """None for what is not open, or not the tenant's."""
        if self.mirrors.space.owner_of(extent) != tenant:
            return None
        return self._arena.extent_fd(extent)

    @property
    def handout(self) -> VramHandout:
        return VramHandout(self._table.fd, self._arena.extent_bytes)

    def listed(self, mirror: Mirror) -> None:
        checksum = mirror.block.checksum
        assert checksum is not None
        self._table.put(mirror.listed_as, mirror.address, checksum)

    def struck(self, mirror: Mirror) -> None:
        self._table.strike(mirror.listed_as)

    def stats(self) -> VramStats:
        mirrors, space, straight = self.mirrors, self.mirrors.space, self._straight
        held_bytes = (space.max_extents - space.spare_extents) * space.extent_bytes
        if straight is not None:
            held_bytes += straight.held_bytes
        return VramStats(
            gpu=self.name,
            capacity_bytes=space.capacity_bytes,
            held_bytes=held_bytes,
            used_bytes=space.used_bytes,
            blocks=len(mirrors),
            hits=mirrors.hits,
            copied_bytes=mirrors.copied_bytes,
            landed_bytes=mirrors.landings.nbytes,
            landed_hits=mirrors.landings.hits,
            no_room_to_land=mirrors.landings.no_room,
            no_share_to_land=mirrors.landings.no_share,
            evictions=mirrors.evictions,
            extents_given_back=mirrors.given_back,
            short=mirrors.short and held_bytes > 0,
            healthy=self.on,
            off_because=self._off_because,
            reads_straight=straight is not None and not straight.because,
            not_straight_because="" if straight is None else straight.because,
            straight_blocks=0 if straight is None else straight.straight_blocks,
            bounced_blocks=0 if straight is None else straight.bounced_blocks,
        )

    def close(self) -> None:
        """After the loop is closed, and its threads have ended, unless a drive hangs."""
        self._thread.shutdown(wait=True)
        self._table.close()
        self._close_extents()
        if self._straight is None or self._straight.shut() is Closed.YES:
            self._close_arena()

    def _close_extents(self) -> None:
        try:
            self._arena.close_extents()
        except DeviceError as error:
            log.warning("the memory of %s was not given back in order: %s", self.name, error)

    def _close_arena(self) -> None:
        """Nothing of it is used any more."""
        try:
            self._arena.close()
        except DeviceError as error:
            log.warning("%s was not closed in order: %s", self.name, error)

    def _failed(self, error: DeviceLost | DeviceStuck) -> None:
        if self.on:
            self._switch_off(str(error))

    def _switch_off(self, why: str) -> None:
        self.on = False
        self._off_because = why
        if self._straight is not None:
            self._straight.end(why)
        log.error("%s failed, the store goes on without: %s", self.name, why)
        self._loop.observer.tier_off("vram")

    async def _do(self, work: MirrorWork) -> _Ends:
        """In its thread, which `close` waits for. A GPU that fails copies nothing, ever."""
        try:
            return await self._in_thread(partial(self._carry_out, work))
        except DeviceError as error:
            if self.on:
                self._switch_off(str(error))
            return _Ends(opened=False, copied=set(), free_bytes=None)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await asyncio.shield(doing)

    def _carry_out(self, work: MirrorWork) -> _Ends:
        """Runs in the thread. Raises `DeviceError` where the GPU cannot be used any more."""
        arena, copied = self._arena, set(work.copies)
        for extent in work.closes:
            arena.close_extent(extent)
        opened = True
        try:
            for extent in work.opens:
                arena.open_extent(extent)
        except (DeviceLost, DeviceStuck):
            raise
        except DeviceError as error:
            opened = False
            log.warning("the memory of %s cannot grow now: %s", self.name, error)
            new = set(work.opens)
            copied = {m for m in copied if m.address // arena.extent_bytes not in new}
        try:
            try:
                copied = {mirror for mirror in copied if self._write(mirror)}
            finally:
                # What was started is written until then, whatever has failed.
                arena.finish()
        except (DeviceLost, DeviceStuck):
            raise
        except DeviceError as error:
            copied = set()
            log.warning("blocks were not copied to %s: %s", self.name, error)
        return _Ends(opened, copied, self._free_bytes())

    def _free_bytes(self) -> int | None:
        """None where the GPU does not tell now."""
        try:
            free_bytes = self._arena.free_bytes()
        except DeviceLost:
            raise
        except DeviceError:
            self._untold += 1
            if self._untold > MOST_UNTOLD:
                raise
            return None
        self._untold = 0
        return free_bytes

    def _write(self, mirror: Mirror) -> bool:
        """Start copying a block, unless it is damaged: whoever reads it from the GPU compares no
        checksum."""
        block = mirror.block
        view = self._dram.view(mirror.source.address, block.layout.block_bytes)
        if xxhash.xxh3_64_intdigest(view) != block.checksum:
            return False
        self._arena.write(mirror.address, view)
        return True

    def _settle(self, work: MirrorWork, ends: _Ends) -> None:
        if ends.opened:
            for extent in work.opens:
                self._table.open(extent)
                self.mirrors.opened()
        for mirror in work.copies:
            self.mirrors.ended(mirror, well=self.on and mirror in ends.copied)
        if not ends.opened:
            for extent in work.opens:
                self.mirrors.not_opened(extent, self._loop.clock.now_ns())


class Gpus:
    """Those that the store has memory of."""

    def __init__(self, loop: Loop, gpus: Sequence[Gpu], refused: Mapping[str, str]) -> None:
        """`refused`: others that it was to have memory of, and why it has none."""
        self._loop = loop
        self._refused = tuple(VramStats(gpu=gpu, off_because=why) for gpu, why in refused.items())
        self._gpus = gpus
        self._read: dict[Session, set[tuple[Gpu, Layout]]] = {}
        self._by_mirrors = {id(gpu.mirrors): gpu for gpu in gpus}
        loop.handle(Mirrored, lambda action: self._of(action.on).listed(action.mirror))
        loop.handle(Unmirrored, lambda action: self._of(action.on).struck(action.mirror))

    def start(self) -> None:
        for gpu in self._gpus:
            self._loop.spawn(gpu.work())

    def open(
        self, session: Session, name: str, layout_ids: Sequence[bytes], reader: bytes
    ) -> VramHandout:
        """The session's process reads blocks of these layouts on that GPU, until it ends, for
        who acquires as `reader`; of none, it writes there what lands (`Store.land`). Raises
        `BadRequest` where the store has no memory there, `UnknownLayout`."""
        if len(reader) > MAX_READER_BYTES:
            raise BadRequest(f"a reader's name has at most {MAX_READER_BYTES} bytes")
        gpu = self._find(name)
        catalog = self._loop.planner.catalog
        layouts = [catalog.layout(session.tenant, layout_id) for layout_id in layout_ids]
        read = self._read.setdefault(session, set())
        for layout in layouts:
            read.add((gpu, layout))
            gpu.mirrors.reads(layout, session, self._loop.clock.now_ns(), reader)
        return gpu.handout

    def session_ended(self, session: Session) -> None:
        for gpu, layout in self._read.pop(session, ()):
            gpu.mirrors.reads_no_more(layout, session)

    def extent_fd(self, session: Session, name: str, extent: int) -> VramHandout:
        gpu = self._find(name)
        descriptor = gpu.extent_fd(extent, session.tenant)
        if descriptor is None:
            raise BadRequest(f"there is no extent {extent} on {name}")
        return VramHandout(descriptor, gpu.handout.extent_bytes)

    def read(self, copy: Copy, header: BlockHeader) -> Went:
        """Make a copy from NVMe into a GPU's memory. Runs in threads of the store's."""
        return self._target(copy).read(copy, header)

    def read_ended(self, copy: Copy, went: Went) -> None:
        self._target(copy).read_ended(went)

    def stats(self) -> tuple[VramStats, ...]:
        return (*(gpu.stats() for gpu in self._gpus), *self._refused)

    def close(self) -> None:
        for gpu in self._gpus:
            gpu.close()

    def _find(self, name: str) -> Gpu:
        for gpu in self._gpus:
            if gpu.name == name and gpu.on:
                return gpu
        raise BadRequest(f"the server has no memory on {name}")

    def _of(self, mirrors: Mirrors) -> Gpu:
        return self._by_mirrors[id(mirrors)]

    def _target(self, copy: Copy) -> Gpu:
        assert isinstance(copy.target, Mirror)
        return self._of(copy.target.on)
