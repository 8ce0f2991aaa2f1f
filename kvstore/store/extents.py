"""Extents that come and go: memory of the DRAM tier, files of the NVMe tier.

On NVMe they are opened and closed one after the other, in a thread, so that their sum
stays within the capacity; copies wait for the extent they need.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from kvstore.core.actions import CloseExtent, OpenExtent
from kvstore.core.catalog import Replica
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
        self._work: asyncio.Queue[OpenExtent | CloseExtent] = asyncio.Queue()
        self._opening: dict[int, asyncio.Future[None]] = {}
        loop.handle(OpenExtent, self._open)
        loop.handle(CloseExtent, self._close)

    async def opened(self, target: Replica) -> None:
        """Once the extent is there that a replica is in. Raises `TierError`."""
        if target.tier is Tier.DRAM:
            return
        assert self._nvme is not None
        opening = self._opening.get(target.address // self._nvme.extent_bytes)
        if opening is not None:
            await asyncio.shield(opening)

    def _open(self, action: OpenExtent) -> None:
        if action.tier is Tier.NVME:
            self._opening[action.extent] = asyncio.get_running_loop().create_future()
            self._work.put_nowait(action)
            return
        try:
            self._dram.open_extent(action.extent)
        except TierError as error:
            log.error("no memory for the DRAM tier, it stays at its size: %s", error)
            self._loop.planner.extent_failed(Tier.DRAM, action.extent)

    def _close(self, action: CloseExtent) -> None:
        if action.tier is Tier.NVME:
            self._work.put_nowait(action)
        else:
            self._dram.close_extent(action.extent)

    async def work(self) -> None:
        """Do what is to be done on NVMe, for as long as the store lives."""
        while True:
            action = await self._work.get()
            assert self._nvme is not None
            nvme = self._nvme
            outcome: TierError | None = None
            try:
                if isinstance(action, OpenExtent):
                    await self._loop.in_thread(
                        partial(nvme.open_extent, action.extent, action.slot_bytes)
                    )
                else:
                    await self._loop.in_thread(partial(nvme.close_extent, action.extent))
            except TierError as error:
                outcome = error
                if isinstance(action, OpenExtent):
                    log.error("the NVMe tier cannot grow, it stays at its size: %s", error)
                    self._loop.planner.extent_failed(Tier.NVME, action.extent)
                if isinstance(error, TierFailed):
                    self._loop.tier_failed(error, "extent")
            if isinstance(action, OpenExtent):
                self._settle(action.extent, outcome)
            self._loop.execute()

    def _settle(self, extent: int, outcome: TierError | None) -> None:
        opening = self._opening[extent]
        if outcome is None:
            del self._opening[extent]
            opening.set_result(None)
        else:
            # It stays: copies into this extent may yet begin.
            opening.set_exception(outcome)
            # Where no copy waits for it, nobody retrieves it.
            opening.exception()
