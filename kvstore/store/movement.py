"""Bytes that move between tiers, and what the NVMe tier is to keep, forget and sync.

All of it happens in threads. The planner hears of every end, whatever it is.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import NamedTuple

import xxhash

from kvstore.core.actions import Copy, Forget, Move
from kvstore.core.catalog import Block, Layout, Replica, never_confirmed
from kvstore.core.transfers import TransferClass
from kvstore.errors import CorruptBlock, TierError, TierFailed, TierFull
from kvstore.store.coded import CodedBlocks
from kvstore.store.complaints import Complaints
from kvstore.store.extents import Extents
from kvstore.store.loop import Loop
from kvstore.store.straight import PlaceGone, Went
from kvstore.store.vram import Gpus
from kvstore.tiers.base import BlockHeader, MemoryTier, StorageTier
from kvstore.types import Tier

log = logging.getLogger(__name__)

MAX_RUNNING = 4
"""Batches of copies between tiers at a time; the executor should have as many threads
and a few more for the tier's other work."""


class Movement:
    def __init__(
        self,
        loop: Loop,
        dram: MemoryTier,
        nvme: StorageTier | None,
        extents: Extents,
        gpus: Gpus,
    ) -> None:
        self.unsynced = False
        """Something was written to NVMe or forgotten there that is not durable yet."""
        self.moved_bytes = {tier: [0, 0] for tier in Tier}
        """Into each tier and out of it."""
        self._loop = loop
        self._dram = dram
        self._nvme = nvme
        self._coded = None if nvme is None else CodedBlocks(nvme)
        self._extents = extents
        self._gpus = gpus
        self._to_forget: list[Replica] = []
        self._latest_sync: asyncio.Task[None] | None = None
        self._next_sync: asyncio.Task[None] | None = None
        self._complaints = Complaints(log, loop.clock)
        loop.handle(Move, self._begin)
        loop.handle(Forget, self._forget)

    # Copies

    def _begin(self, move: Move) -> None:
        self._loop.spawn(self._make(move.copies))

    async def _make(self, copies: list[Copy]) -> None:
        """A batch of copies, each reported to the planner however it ends."""
        loop = self._loop
        began_ns = loop.clock.now_ns()
        failures: list[Exception | None] = [await self._lacking(copy) for copy in copies]
        there = [copy for copy, lacking in zip(copies, failures, strict=True) if lacking is None]
        ends = iter(await loop.in_thread(partial(self._move_all, there)))
        now_ns = loop.clock.now_ns()
        seconds = (now_ns - began_ns) / 1e9 / len(copies)
        for copy, lacking in zip(copies, failures, strict=True):
            failure, checksum, straight = next(ends) if lacking is None else _End(lacking)
            if straight is not None:
                self._gpus.read_ended(copy, straight)
            if failure is None:
                transfer_class = loop.planner.transfer_done(copy, now_ns, checksum)
                self._note_done(copy, transfer_class, seconds)
            else:
                self._failed(copy, failure, now_ns, there=lacking is None)
        loop.execute()

    async def _lacking(self, copy: Copy) -> TierError | None:
        """Why the extent that a copy goes to will never be there."""
        if copy.target.tier is Tier.VRAM:
            return None
        try:
            await self._extents.opened(copy.target.tier, [copy.target.address])
        except TierError as error:
            return error
        return None

    def _move_all(self, copies: list[Copy]) -> list[_End]:
        """Runs in a worker thread. How each ended."""
        ends: list[_End] = []
        for copy in copies:
            try:
                ends.append(self._move(copy))
            except Exception as error:  # noqa: BLE001
                # The outermost point of a background task: whoever waits for this copy
                # must hear of its end, even of one nobody foresaw.
                ends.append(_End(error))
        return ends

    def _failed(self, copy: Copy, failure: Exception, now_ns: int, *, there: bool) -> None:
        """`there`: the extent of its target is."""
        loop, source, target = self._loop, copy.source.tier, copy.target.tier
        corrupt = isinstance(failure, CorruptBlock)
        if isinstance(failure, PlaceGone):
            loop.planner.transfer_failed(copy, now_ns, source_corrupt=False, full=False)
            return
        if corrupt:
            if not never_confirmed(copy.source):
                loop.observer.corrupt(source.label)
        elif isinstance(failure, TierFailed):
            loop.tier_failed(failure, "read" if source is Tier.NVME else "write")
        elif not isinstance(failure, TierFull):
            loop.observer.io_error("copy", type(failure).__name__)
        labels = (source.label, target.label)
        self._complaints.warn("a copy from %s to %s failed: %s", *labels, failure)
        # Of an extent that never came the planner knows: there are others.
        full = there and isinstance(failure, TierFull)
        loop.planner.transfer_failed(copy, now_ns, source_corrupt=corrupt, full=full)

    def _move(self, copy: Copy) -> _End:
        """Both replicas stay where they are meanwhile, but for a target in a GPU's memory. May
        raise what an `_End` says."""
        if copy.target.tier is not Tier.VRAM:
            return _End(None, self._move_in_host(copy))
        went = self._gpus.read(copy, _header(copy.target.block))
        return _End(went.failure, straight=went)

    def _move_in_host(self, copy: Copy) -> int | None:
        """The checksum of what is in the target then, where a codec has made others of the
        bytes."""
        assert self._nvme is not None
        assert self._coded is not None
        block = copy.target.block
        layout = block.layout
        in_dram = copy.source if copy.source.tier is Tier.DRAM else copy.target
        slot = self._dram.view(in_dram.address, layout.dram_class.slot_bytes)
        if copy.target.tier is Tier.DRAM:
            stored = _header(block)
            if layout.spec.codec:
                return self._coded.read(copy.source.address, stored, layout.spec, slot)
            self._nvme.read(copy.source.address, stored, slot)
            return None
        # A client wrote this slot and said what its checksum is. What does not
        # agree must not become durable.
        if xxhash.xxh3_64_intdigest(slot[: layout.block_bytes]) != block.checksum:
            raise CorruptBlock("a block in DRAM is not what was committed")
        if layout.spec.codec:
            return self._coded.write(copy.target.address, _header(block), layout.spec, slot)
        self._nvme.write(copy.target.address, _header(block), slot)
        return None

    def _note_done(self, copy: Copy, transfer_class: TransferClass, seconds: float) -> None:
        source, target = copy.source.tier, copy.target.tier
        layout = copy.target.block.layout
        nbytes = layout.stored_bytes
        self.moved_bytes[source][1] += nbytes
        self.moved_bytes[target][0] += nbytes
        self.unsynced |= target is Tier.NVME
        self._loop.observer.transfer_done(
            source.label, target.label, transfer_class.label, nbytes, seconds
        )
        if layout.spec.codec:
            self._loop.observer.coded(layout.spec.codec, source.label, target.label)

    # What the NVMe tier is told

    def _forget(self, action: Forget) -> None:
        self._to_forget.append(action.replica)
        if len(self._to_forget) == 1:
            task = self._loop.spawn(self._forget_all())
            self._loop.slow_work.add(task)
            task.add_done_callback(self._loop.slow_work.discard)

    async def _forget_all(self) -> None:
        replicas, self._to_forget = self._to_forget, []
        assert self._nvme is not None
        nvme = self._nvme
        entries = [(replica.address, _header(replica.block)) for replica in replicas]

        def strike() -> None:
            for address, header in entries:
                nvme.forget(address, header)

        try:
            await self._loop.in_thread(strike)
        except TierFailed as error:
            self._loop.tier_failed(error, "forget")
        self.unsynced = True
        for replica in replicas:
            self._loop.planner.forgotten(replica)
        self._loop.execute()

    async def all_forgotten(self) -> None:
        """What is being forgotten now, is."""
        if self._loop.slow_work:
            await asyncio.wait(self._loop.slow_work.copy())

    async def remember(self, layout: Layout) -> None:
        """Keep a layout across restarts."""
        if self._nvme is None:
            return
        nvme, spec = self._nvme, layout.spec.fields()
        try:
            await self._loop.in_thread(
                partial(nvme.remember_layout, layout.tenant, layout.layout_id, spec)
            )
        except TierFull as error:
            log.warning("a layout cannot be kept across restarts: %s", error)
        except TierFailed as error:
            self._loop.tier_failed(error, "index")
        self.unsynced = True

    async def sync(self) -> None:
        """Make durable what the NVMe tier was told so far. One at a time, as a drive may hang
        and those who read from it need threads: all who ask meanwhile wait for the next one.
        It goes on without who is not there any more."""
        if self._nvme is None or not self._loop.planner.residency.nvme_on:
            return
        if self._next_sync is None:
            self._next_sync = self._loop.spawn(self._sync_after(self._nvme, self._latest_sync))
        await asyncio.shield(self._next_sync)

    async def _sync_after(self, nvme: StorageTier, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait((before,))
        self._latest_sync, self._next_sync = self._next_sync, None
        self.unsynced = False
        try:
            await self._loop.in_thread(nvme.sync)
        except TierFull as error:
            log.warning("the NVMe index is full: %s", error)
        except TierFailed as error:
            self._loop.tier_failed(error, "sync")


class _End(NamedTuple):
    """Of a copy: what went wrong, or else what `Movement._move_in_host` says. `straight`: how it
    went where it was to end in a GPU's memory."""

    failure: Exception | None
    checksum: int | None = None
    straight: Went | None = None


def _header(block: Block) -> BlockHeader:
    """What is said of a block behind DRAM."""
    layout = block.layout
    checksum = block.stored_checksum if layout.spec.codec else block.checksum
    return BlockHeader(
        block.stored_key,
        block.parent,
        layout.layout_id,
        layout.tenant,
        layout.stored_bytes,
        checksum or 0,
    )
