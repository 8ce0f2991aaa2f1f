"""Keeps the directory in step with the catalog, and makes it larger in time.

A table that fills up is replaced: a larger one is filled a few entries at a time
while the old one goes on being served, and changes meanwhile go to both. Readers
take notice by themselves (`local.directory`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable

from kvstore.clock import Clock
from kvstore.local.directory import (
    BEHIND_DRAM,
    IN_DRAM,
    MAX_LOAD,
    SUPERSEDED,
    DirectoryWriter,
)

MIN_SLOTS = 1 << 14
MAX_FIRST_SLOTS = 1 << 22
ASSUMED_BLOCK_BYTES = 256 << 10
"""For the first table's size. Memory of a table that is not used is not occupied."""
ENTRIES_A_STEP = 500
"""Copied to a larger table before other work gets its turn."""

Presence = Callable[[bytes], tuple[bool, bool]]
"""Whether a block, by its stored key, is in DRAM and behind it."""


class Listing:
    """`presence` tells the truth of this moment; `close` ends the tables."""

    def __init__(self, capacity_bytes: int, epoch: bytes, clock: Clock, presence: Presence) -> None:
        wanted = capacity_bytes / ASSUMED_BLOCK_BYTES / MAX_LOAD
        slots = MIN_SLOTS
        while slots < min(wanted, MAX_FIRST_SLOTS):
            slots *= 2
        self._epoch = epoch
        self._clock = clock
        self._presence = presence
        self._table = self._new_table(slots)
        self._next: DirectoryWriter | None = None

    def _new_table(self, slots: int) -> DirectoryWriter:
        return DirectoryWriter(slots, self._epoch, secrets.randbits(63), self._clock.now_ns())

    @property
    def fd(self) -> int:
        """The current table's memfd; it stays this object's."""
        return self._table.fd

    @property
    def unlisted(self) -> int:
        """Blocks that lookups miss because the table had no room for them."""
        return self._table.unlisted

    def change(self, changes: Iterable[tuple[bytes, bool, bool]]) -> None:
        """Blocks came to or went from a tier."""
        for stored_key, in_dram, behind in changes:
            info = IN_DRAM * in_dram | BEHIND_DRAM * behind
            for table in (self._table, self._next):
                if table is None:
                    continue
                if info:
                    table.put(stored_key, info)
                else:
                    table.remove(stored_key)

    def beat(self) -> None:
        """To be called several times a second."""
        self._table.beat(self._clock.now_ns())

    @property
    def needs_growth(self) -> bool:
        crowded = self._table.load > MAX_LOAD or self._table.unlisted > 0
        return crowded and self._next is None

    def grow(self, stored_keys: list[bytes]) -> Coroutine[None, None, None]:
        """Begin to replace the table by one of twice its size; the result, run to its
        end, finishes it. `stored_keys`: every block's."""
        self._next = self._new_table(self._table.slots * 2)
        return self._fill(self._next, stored_keys)

    async def _fill(self, table: DirectoryWriter, stored_keys: list[bytes]) -> None:
        try:
            for start in range(0, len(stored_keys), ENTRIES_A_STEP):
                for stored_key in stored_keys[start : start + ENTRIES_A_STEP]:
                    # As it is now, which may differ from when the list was made.
                    in_dram, behind = self._presence(stored_key)
                    if in_dram or behind:
                        table.put(stored_key, IN_DRAM * in_dram | BEHIND_DRAM * behind)
                await asyncio.sleep(0)
        except BaseException:
            self._next = None
            table.close()
            raise
        old, self._table, self._next = self._table, table, None
        self.beat()
        old.close(SUPERSEDED)

    def close(self) -> None:
        """Readers see at once that the server has gone."""
        self._table.close()
        if self._next is not None:
            self._next.close()
