"""What is done ten times a second: time for the planner, a sign of life, now and then a sync."""

from __future__ import annotations

import asyncio
import logging

from kvstore.core.links.breaker import BreakerState
from kvstore.listing import Listing
from kvstore.store.loop import Loop
from kvstore.store.movement import Movement
from kvstore.store.wear import Wear
from kvstore.tiers.base import StorageTier

log = logging.getLogger(__name__)

TICK_S = 0.1
SYNC_S = 2.0
"""How much of what was written to NVMe a crash may cost, at most, in time."""


class Upkeep:
    def __init__(
        self,
        loop: Loop,
        nvme: StorageTier | None,
        movement: Movement,
        listing: Listing,
        wear: Wear | None,
    ) -> None:
        self.ticked_ns = loop.clock.now_ns()
        """When it last came round."""
        self._loop = loop
        self._nvme = nvme
        self._movement = movement
        self._listing = listing
        self._wear = wear
        self._stalled = False

    async def work(self) -> None:
        """For as long as the store lives."""
        loop = self._loop
        synced_at = asyncio.get_running_loop().time()
        syncing: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(TICK_S)
            if self._wear is not None:
                self._wear.tell()
            stuck = self._nvme is not None and self._nvme.overdue()
            loop.planner.tick(loop.clock.now_ns(), stuck=stuck)
            self._tell_of_stalls()
            loop.execute()
            self.ticked_ns = loop.clock.now_ns()
            self._listing.beat()
            now = asyncio.get_running_loop().time()
            due = now - synced_at >= SYNC_S and (syncing is None or syncing.done())
            if self._movement.unsynced and due:
                synced_at = now
                syncing = loop.spawn(self._movement.sync())

    def _tell_of_stalls(self) -> None:
        state = self._loop.planner.residency.transfers.breaker.state
        if state is BreakerState.OPEN and not self._stalled:
            self._stalled = True
            log.warning("the NVMe tier does not answer: nothing is asked of it until it does")
        elif state is BreakerState.CLOSED and self._stalled:
            self._stalled = False
            log.warning("the NVMe tier answers again")
