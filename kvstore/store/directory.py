"""The directory that local clients search, kept in step with the planner."""

from __future__ import annotations

import errno
import logging

from kvstore.core.actions import Publish
from kvstore.core.catalog import Catalog
from kvstore.listing import Listing
from kvstore.store.loop import Loop

log = logging.getLogger(__name__)

GROW_AGAIN_NS = 10_000_000_000
"""How long after the machine refused memory for a larger table it is asked again."""


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
        """List what was found at the start, all of it behind DRAM. In a thread: nobody else
        uses the table yet, and probes want answers."""
        try:
            await self._loop.in_thread(lambda: self._listing.begin(catalog.names()))
        except OSError as error:
            self._no_memory(error)

    def _grow(self) -> None:
        now_ns = self._loop.clock.now_ns()
        if now_ns < self._grow_at_ns:
            return
        try:
            growing = self._listing.grow()
        except OSError as error:
            self._grow_at_ns = now_ns + GROW_AGAIN_NS
            self._no_memory(error)
            return
        self._loop.spawn(growing)

    def _no_memory(self, error: OSError) -> None:
        """Lookups miss what the table has no room for; nothing else suffers."""
        name = errno.errorcode.get(error.errno or 0, "OTHER")
        self._loop.observer.io_error("directory", name)
        log.error("the directory cannot grow: %s", error.strerror)
