"""Blocks in GPUs' memory: copied there, listed for the workers on the GPU, given back.

A thread for each GPU does what its planner (`core.mirrors`) wants, and asks the driver ten times
a second how much memory others have left. A GPU that fails is not used again; nothing else
depends on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import xxhash

from kvstore.core.actions import Mirrored, Unmirrored
from kvstore.core.catalog import Layout
from kvstore.core.mirrors import Mirror, Mirrors, MirrorWork
from kvstore.core.sessions import Session
from kvstore.core.space import Space
from kvstore.device.mirrors import MirrorTable
from kvstore.errors import BadRequest, DeviceError, DeviceLost
from kvstore.store.loop import Loop
from kvstore.tiers.base import MemoryTier
from kvstore.tiers.vram import VramArena
from kvstore.types import VramStats

log = logging.getLogger(__name__)

LOOK_S = 0.1
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
    bytes are. `free_bytes`: of the GPU."""

    opened: bool
    copied: set[Mirror]
    free_bytes: int


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
    ) -> None:
        rows = max(FEWEST_ROWS, min(MOST_ROWS, capacity_bytes // USUAL_SLOT_BYTES))
        space = Space(capacity_bytes, arena.extent_bytes, max_slots=rows, first_extent=first_extent)
        self.name = arena.vram.name
        self.mirrors = Mirrors(loop.planner.holdings, space, reserve_bytes)
        self.on = True
        self._loop = loop
        self._dram = dram
        self._arena = arena
        self._table = MirrorTable(rows, max(1, space.max_extents))
        self._thread = ThreadPoolExecutor(1, "kvstore-vram")
        loop.planner.holdings.mirrors.append(self.mirrors)

    async def work(self) -> None:
        """For as long as the GPU, and the store, last."""
        free_bytes: int | None = None
        while self.on:
            if self.mirrors.idle:
                await asyncio.sleep(LOOK_S)
                free_bytes = None
                continue
            if free_bytes is None:
                free_bytes = (await self._do(MirrorWork())).free_bytes
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
        self.mirrors.lost()
        self._loop.execute()

    def extent_fd(self, extent: int, tenant: str) -> int | None:
        """None for what is not open, or not the tenant's."""
        if self.mirrors.space.owner_of(extent) != tenant:
            return None
        return self._arena.extent_fd(extent)

    @property
    def handout(self) -> VramHandout:
        return VramHandout(self._table.fd, self._arena.extent_bytes)

    def listed(self, mirror: Mirror) -> None:
        self._table.put(mirror.source.address, mirror.address)

    def struck(self, mirror: Mirror) -> None:
        self._table.strike(mirror.source.address)

    def stats(self) -> VramStats:
        space = self.mirrors.space
        return VramStats(
            gpu=self.name,
            capacity_bytes=space.capacity_bytes,
            held_bytes=(space.max_extents - space.spare_extents) * space.extent_bytes,
            used_bytes=space.used_bytes,
            blocks=len(self.mirrors),
            copied_bytes=self.mirrors.copied_bytes,
            evictions=self.mirrors.evictions,
            extents_given_back=self.mirrors.given_back,
            healthy=self.on,
        )

    def close(self) -> None:
        """After the loop is closed."""
        self._thread.shutdown(wait=True)
        self._table.close()
        try:
            self._arena.close()
        except DeviceError as error:
            log.warning("the memory of %s was not given back in order: %s", self.name, error)

    async def _do(self, work: MirrorWork) -> _Ends:
        """In the thread, which `close` waits for. A GPU that fails copies nothing, ever."""
        running = asyncio.get_running_loop()
        doing = running.run_in_executor(self._thread, partial(self._carry_out, work))
        try:
            return await asyncio.shield(doing)
        except DeviceError as error:
            self.on = False
            log.error("%s failed, the store goes on without: %s", self.name, error)
            self._loop.observer.tier_off("vram")
            return _Ends(opened=False, copied=set(), free_bytes=0)

    def _carry_out(self, work: MirrorWork) -> _Ends:
        """Runs in the thread. Raises `DeviceError` where the GPU cannot be used any more."""
        arena, copied = self._arena, set(work.copies)
        for extent in work.closes:
            arena.close_extent(extent)
        opened = True
        try:
            for extent in work.opens:
                arena.open_extent(extent)
        except DeviceLost:
            raise
        except DeviceError as error:
            opened = False
            log.warning("the memory of %s cannot grow now: %s", self.name, error)
            new = set(work.opens)
            copied = {m for m in copied if m.address // arena.extent_bytes not in new}
        try:
            for mirror in list(copied):
                if not self._write(mirror):
                    copied.discard(mirror)
            arena.finish()
        except DeviceLost:
            raise
        except DeviceError as error:
            copied = set()
            log.warning("blocks were not copied to %s: %s", self.name, error)
        return _Ends(opened, copied, arena.free_bytes())

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
        for mirror in work.copies:
            self.mirrors.ended(mirror, well=self.on and mirror in ends.copied)
        if not ends.opened:
            for extent in work.opens:
                self.mirrors.not_opened(extent, self._loop.clock.now_ns())


class Gpus:
    """Those that the store has memory of."""

    def __init__(self, loop: Loop, gpus: Sequence[Gpu]) -> None:
        self._loop = loop
        self._gpus = gpus
        self._read: dict[Session, set[tuple[Gpu, Layout]]] = {}
        by_mirrors = {id(gpu.mirrors): gpu for gpu in gpus}
        loop.handle(Mirrored, lambda action: by_mirrors[id(action.on)].listed(action.mirror))
        loop.handle(Unmirrored, lambda action: by_mirrors[id(action.on)].struck(action.mirror))

    def start(self) -> None:
        for gpu in self._gpus:
            self._loop.spawn(gpu.work())

    def open(self, session: Session, name: str, layout_ids: Sequence[bytes]) -> VramHandout:
        """The session's process reads blocks of these layouts on that GPU, until it ends. Raises
        `BadRequest` where the store has no memory there, `UnknownLayout`."""
        gpu = self._find(name)
        catalog = self._loop.planner.catalog
        layouts = [catalog.layout(session.tenant, layout_id) for layout_id in layout_ids]
        read = self._read.setdefault(session, set())
        for layout in layouts:
            if (gpu, layout) not in read:
                read.add((gpu, layout))
                gpu.mirrors.reads(layout)
        return gpu.handout

    def session_ended(self, session: Session) -> None:
        for gpu, layout in self._read.pop(session, ()):
            gpu.mirrors.reads_no_more(layout)

    def extent_fd(self, session: Session, name: str, extent: int) -> VramHandout:
        gpu = self._find(name)
        descriptor = gpu.extent_fd(extent, session.tenant)
        if descriptor is None:
            raise BadRequest(f"there is no extent {extent} on {name}")
        return VramHandout(descriptor, gpu.handout.extent_bytes)

    def stats(self) -> tuple[VramStats, ...]:
        return tuple(gpu.stats() for gpu in self._gpus)

    def close(self) -> None:
        for gpu in self._gpus:
            gpu.close()

    def _find(self, name: str) -> Gpu:
        for gpu in self._gpus:
            if gpu.name == name and gpu.on:
                return gpu
        raise BadRequest(f"the server has no memory on {name}")
