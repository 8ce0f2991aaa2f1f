"""Extents that come and go: memory of the DRAM tier, files of the NVMe tier.

Making one takes as long as the machine needs to find the room, so a thread does it. In
each tier one comes or goes after the other, so that their sum stays within the
capacity. Whoever is about to use one waits until it is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial

from kvstore.core.actions import CloseExtent, OpenExtent
from kvstore.errors import TierError, TierFailed
from kvstore.store.loop import Loop
from kvstore.tiers.base import MemoryTier, StorageTier
from kvstore.types import Tier

log = logging.getLogger(__name__)


class Extents:
    def __init__(self, loop: Loop, dram: MemoryTier, nvme: StorageTier | None) -> None:
        self._loop = loop
        self._dram = dram
        self._nvme = nvme
        self._work: dict[Tier, asyncio.Queue[OpenExtent | CloseExtent]] = {
            tier: asyncio.Queue() for tier in (Tier.DRAM, Tier.NVME)
        }
        # Those on their way, and those that will never come.
        self._lacking: dict[tuple[Tier, int], asyncio.Future[None]] = {}
        loop.handle(OpenExtent, self._open)
        loop.handle(CloseExtent, self._close)

    def there(self, tier: Tier, addresses: Iterable[int]) -> bool:
        """Whether the extents of these addresses, which the planner gave out, are there."""
        lacking = self._lacking
        if not lacking:
            return True
        nbytes = self._extent_bytes(tier)
        return not any((tier, address // nbytes) in lacking for address in addresses)

    async def opened(self, tier: Tier, addresses: Iterable[int]) -> None:
        """Once the extents of these addresses are there. Raises `TierError`."""
        if not self._lacking:
            return
        nbytes = self._extent_bytes(tier)
        for number in {address // nbytes for address in addresses}:
            lacking = self._lacking.get((tier, number))
            if lacking is not None:
                await asyncio.shield(lacking)

    def _extent_bytes(self, tier: Tier) -> int:
        if tier is Tier.DRAM:
            return self._dram.extent_bytes
        assert self._nvme is not None
        return self._nvme.extent_bytes

    def _open(self, action: OpenExtent) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lacking[action.tier, action.extent] = future
        self._work[action.tier].put_nowait(action)

    def _close(self, action: CloseExtent) -> None:
        self._work[action.tier].put_nowait(action)

    async def work(self, tier: Tier) -> None:
        """Do what is to be done in a tier, for as long as the store lives."""
        while True:
            action = await self._work[tier].get()
            failure: TierError | None = None
            try:
                await self._loop.in_thread(partial(self._do, action), tier)
            except TierError as error:
                failure = error
                if isinstance(error, TierFailed) and tier is Tier.NVME:
                    self._loop.tier_failed(error, "extent")
            if isinstance(action, OpenExtent):
                self._note(action, failure)
            self._loop.execute()

    def _do(self, action: OpenExtent | CloseExtent) -> None:
        """Runs in a worker thread."""
        if action.tier is Tier.DRAM:
            if isinstance(action, OpenExtent):
                self._dram.open_extent(action.extent)
            else:
                self._dram.close_extent(action.extent)
            return
        assert self._nvme is not None
        if isinstance(action, OpenExtent):
            self._nvme.open_extent(action.extent, action.slot_bytes)
        else:
            self._nvme.close_extent(action.extent)

    def _note(self, action: OpenExtent, failure: TierError | None) -> None:
        key = action.tier, action.extent
        if failure is None:
            self._lacking.pop(key).set_result(None)
            return
        log.error("the %s tier cannot grow, it stays at its size: %s", action.tier.label, failure)
        # Stays: slots of it may have been given out already.
        self._lacking[key].set_exception(failure)
        # Where nobody waits for it, nobody retrieves it.
        self._lacking[key].exception()
        self._loop.planner.extent_failed(action.tier, action.extent)
