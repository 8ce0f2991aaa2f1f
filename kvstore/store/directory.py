"""The directory that local clients search, kept in step with the planner."""

from __future__ import annotations

import asyncio
import errno
import logging

from kvstore.core.actions import Publish
from kvstore.core.catalog import Catalog
from kvstore.listing import Listing
from kvstore.store.loop import Loop

log = logging.getLogger(__name__)

GROW_AGAIN_NS = 10_000_000_000
"""How long after the machine refused memory for a larger table it is asked again."""
LISTED_A_STEP = 1000
"""Blocks found at the start that go into the directory before others get their turn."""


class Directory:
    def __init__(self, loop: Loop, listing: Listing) -> None:
        self._loop = loop
        self._listing = listing
        self._grow_at_ns = 0
        loop.handle(Publish, self._publish)

    def _publish(self, action: Publish) -> None:
        self._listing.change(action.changes)
        if self._listing.needs_growth:
            self._grow()

    async def list_all(self, catalog: Catalog) -> None:
        """List what was found at the start, a part at a time: probes want answers."""
        part: list[tuple[bytes, bool, bool]] = []
        for block in catalog:
            part.append((block.stored_key, False, True))
            if len(part) >= LISTED_A_STEP:
                await self._list(part)
                part.clear()
        await self._list(part)

    async def _list(self, part: list[tuple[bytes, bool, bool]]) -> None:
        self._listing.change(part)
        if self._listing.needs_growth and (growing := self._grow()):
            await growing
        await asyncio.sleep(0)

    def _grow(self) -> asyncio.Task[None] | None:
        now_ns = self._loop.clock.now_ns()
        if now_ns < self._grow_at_ns:
            return None
        try:
            growing = self._listing.grow()
        except OSError as error:
            # Lookups miss what the table has no room for; nothing else suffers.
            self._grow_at_ns = now_ns + GROW_AGAIN_NS
            name = errno.errorcode.get(error.errno or 0, "OTHER")
            self._loop.observer.io_error("directory", name)
            log.error("the directory cannot grow: %s", error.strerror)
            return None
        return self._loop.spawn(growing)
