"""Bytes that move between tiers, and what the NVMe tier is to keep, forget and sync.

All of it happens in threads. The planner hears of every end, whatever it is.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from functools import partial

import xxhash

from kvstore.core.actions import Copy, Forget
from kvstore.core.catalog import Layout, Replica
from kvstore.core.transfers import TransferClass
from kvstore.errors import CorruptBlock, TierFailed, TierFull
from kvstore.store.extents import Extents
from kvstore.store.loop import Loop
from kvstore.tiers.base import BlockHeader, MemoryTier, StorageTier
from kvstore.types import Tier

log = logging.getLogger(__name__)

MAX_RUNNING = 4
"""Copies between tiers at a time; the executor should have as many threads and
a few more for the tier's other work."""
WARNING_EVERY_NS = 1_000_000_000


class Movement:
    def __init__(
        self, loop: Loop, dram: MemoryTier, nvme: StorageTier | None, extents: Extents
    ) -> None:
        self.unsynced = False
        """Something was written to NVMe or forgotten there that is not durable yet."""
        self.moved_bytes = {tier: [0, 0] for tier in Tier}
        """Into each tier and out of it."""
        self._loop = loop
        self._dram = dram
        self._nvme = nvme
        self._extents = extents
        self._to_forget: list[Replica] = []
        self._failed_copies = 0
        self._next_warning_ns = 0
        loop.handle(Copy, self._begin)
        loop.handle(Forget, self._forget)

    # Copies

    def _begin(self, copy: Copy) -> None:
        self._loop.spawn(self._copy(copy))

    async def _copy(self, copy: Copy) -> None:
        """One copy between tiers, reported to the planner however it ends."""
        loop = self._loop
        began_ns = loop.clock.now_ns()
        source = copy.source.tier
        corrupt = full = False
        failure: Exception | None = None
        there = False
        try:
            await self._extents.opened(copy.target.tier, [copy.target.address])
            there = True
            await loop.in_thread(partial(self._move, copy))
        except CorruptBlock as error:
            failure, corrupt = error, True
            loop.observer.corrupt(source.label)
        except TierFull as error:
            # Of an extent that never came the planner knows: there are others.
            failure, full = error, there
        except TierFailed as error:
            failure = error
            loop.tier_failed(error, "read" if source is Tier.NVME else "write")
        except Exception as error:  # noqa: BLE001
            # The outermost point of a background task: whoever waits for this copy
            # must hear of its end, even of one nobody foresaw.
            failure = error
            loop.observer.io_error("copy", type(error).__name__)
        now_ns = loop.clock.now_ns()
        if failure is None:
            transfer_class = loop.planner.transfer_done(copy, now_ns)
            self._note_done(copy, transfer_class, (now_ns - began_ns) / 1e9)
        else:
            self._note_failure(copy, failure, now_ns)
            loop.planner.transfer_failed(copy, now_ns, source_corrupt=corrupt, full=full)
        loop.execute()

    def _move(self, copy: Copy) -> None:
        """Runs in a worker thread. Both replicas stay where they are meanwhile."""
        assert self._nvme is not None
        block = copy.target.block
        layout = block.layout
        header = _header(copy.target)
        in_dram = copy.source if copy.source.tier is Tier.DRAM else copy.target
        slot = self._dram.view(in_dram.address, layout.dram_class.slot_bytes)
        if copy.target.tier is Tier.DRAM:
            self._nvme.read(copy.source.address, header, slot)
            return
        # A client wrote this slot and said what its checksum is. What does not
        # agree must not become durable.
        if xxhash.xxh3_64_intdigest(slot[: header.length]) != header.checksum:
            raise CorruptBlock("a block in DRAM is not what was committed")
        self._nvme.write(copy.target.address, header, slot)

    def _note_done(self, copy: Copy, transfer_class: TransferClass, seconds: float) -> None:
        source, target = copy.source.tier, copy.target.tier
        nbytes = copy.target.block.layout.block_bytes
        self.moved_bytes[source][1] += nbytes
        self.moved_bytes[target][0] += nbytes
        self.unsynced |= target is Tier.NVME
        self._loop.observer.transfer_done(
            source.label, target.label, transfer_class.label, nbytes, seconds
        )

    def _note_failure(self, copy: Copy, failure: Exception, now_ns: int) -> None:
        self._failed_copies += 1
        if now_ns >= self._next_warning_ns:
            # A client that commits wrong checksums could fill the disk with these.
            self._next_warning_ns = now_ns + WARNING_EVERY_NS
            text = "a copy from %s to %s failed (%d so far): %s"
            source, target = copy.source.tier.label, copy.target.tier.label
            log.warning(text, source, target, self._failed_copies, failure)

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
        entries = [(replica.address, _header(replica)) for replica in replicas]

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
        nvme, spec = self._nvme, asdict(layout.spec)
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
        """Make durable what the NVMe tier was told so far."""
        if self._nvme is None or not self._loop.planner.residency.nvme_on:
            return
        self.unsynced = False
        try:
            await self._loop.in_thread(self._nvme.sync)
        except TierFull as error:
            log.warning("the NVMe index is full: %s", error)
        except TierFailed as error:
            self._loop.tier_failed(error, "sync")


def _header(replica: Replica) -> BlockHeader:
    block = replica.block
    layout = block.layout
    return BlockHeader(
        block.stored_key,
        block.parent,
        layout.layout_id,
        layout.tenant,
        layout.block_bytes,
        block.checksum or 0,
    )
