"""What clients say is damaged in memory: looked at before it is believed.

A client can have no good block dropped, and cannot keep the server busy for long. Of each
tenant one report is looked at at a time, others meanwhile are passed over; and after one
that named whole blocks, nothing for `PAUSES` times as long as it took to see that they are.
Whoever is given a damaged block next says so again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

import xxhash

from kvstore.core.catalog import Replica, never_confirmed
from kvstore.store.complaints import Complaints
from kvstore.store.loop import Loop
from kvstore.tiers.base import MemoryTier
from kvstore.types import Tier

log = logging.getLogger(__name__)

PAUSES = 9


class Suspicions:
    def __init__(self, loop: Loop, dram: MemoryTier) -> None:
        self._loop = loop
        self._dram = dram
        self._complaints = Complaints(log, loop.clock)
        self._looking: set[str] = set()
        # By tenant: until when it is not listened to.
        self._paused_ns: dict[str, int] = {}

    async def look(self, tenant: str, addresses: Sequence[int]) -> None:
        """Once what lies there has been compared, and dropped where it is damaged."""
        paused = self._loop.clock.now_ns() < self._paused_ns.get(tenant, 0)
        if paused or tenant in self._looking:
            return
        suspects = self._loop.planner.suspects(tenant, addresses)
        if suspects:
            self._looking.add(tenant)
            # A caller that leaves does not let go of what a thread is looking at.
            await asyncio.shield(self._loop.spawn(self._examine(tenant, suspects)))

    async def _examine(self, tenant: str, suspects: list[Replica]) -> None:
        loop = self._loop
        wasted_ns = 0
        try:
            for replica in suspects:
                # One at a time: memory that is made for others has its turn in between.
                damaged, took_ns = await loop.in_thread(partial(self._look, replica), Tier.DRAM)
                loop.planner.examined(replica, damaged=damaged)
                loop.execute()
                if damaged:
                    if not never_confirmed(replica):
                        loop.observer.corrupt(Tier.DRAM.label)
                    self._complaints.warn("a block in memory is not what was committed; dropped")
                else:
                    wasted_ns += took_ns
        finally:
            self._looking.remove(tenant)
        self._paused_ns[tenant] = loop.clock.now_ns() + PAUSES * wasted_ns

    def _look(self, replica: Replica) -> tuple[bool, int]:
        """Whether it is damaged, and how long it took to see. Runs in a thread, with the
        replica pinned."""
        clock, block = self._loop.clock, replica.block
        began_ns = clock.now_ns()
        view = self._dram.view(replica.address, block.layout.block_bytes)
        damaged = xxhash.xxh3_64_intdigest(view) != block.checksum
        return damaged, clock.now_ns() - began_ns
