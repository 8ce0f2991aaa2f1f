"""Keeps the directory in step with what the store does, and makes it larger in time.

A table that fills up is replaced: a larger one is filled a few pages at a time while
the old one goes on being served. Readers take notice by themselves
(`local.directory`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence

import numpy as np

from kvstore.clock import Clock
from kvstore.local.directory import (
    BEHIND_DRAM,
    MAX_LOAD,
    PAGE_WORDS,
    SUPERSEDED,
    DirectoryWriter,
    numbers_of,
)

MIN_SLOTS = 1 << 14
MAX_FIRST_SLOTS = 1 << 22
ASSUMED_BLOCK_BYTES = 256 << 10
"""For the first table's size. Memory of a table that is not used is not occupied."""
PAGES_A_STEP = 32
"""Copied to a larger table before other work gets its turn: about 600 blocks."""


class Listing:
    """The tables; `close` ends them.

    `capacity_bytes`: of all tiers together. `epoch`: 8 bytes, the server's.
    """

    def __init__(self, capacity_bytes: int, epoch: bytes, clock: Clock) -> None:
        wanted = capacity_bytes / ASSUMED_BLOCK_BYTES / MAX_LOAD
        slots = MIN_SLOTS
        while slots < min(wanted, MAX_FIRST_SLOTS):
            slots *= 2
        self._epoch = epoch
        self._clock = clock
        self._table = DirectoryWriter(slots, epoch, clock.now_ns())
        self._next: DirectoryWriter | None = None
        self._copied = 0

    @property
    def fd(self) -> int:
        """The current table's memfd; it stays this object's."""
        return self._table.fd

    @property
    def unlisted(self) -> int:
        """How often the current table had no room for a block; lookups miss it then."""
        return self._table.unlisted

    def begin(self, names: Iterable[Iterable[bytes]]) -> None:
        """List blocks that are behind DRAM, told of in parts, in a table that is large
        enough; before anything else is listed. Raises OSError when there is no memory for
        it: then as many are listed as there is room for."""
        numbers = np.concatenate([numbers_of(b"".join(part)).copy() for part in names])
        old = self._table
        slots = old.slots
        while len(numbers) > MAX_LOAD * slots:
            slots *= 2
        if slots == old.slots:
            old.fill(numbers, BEHIND_DRAM)
            return
        try:
            table = DirectoryWriter(slots, self._epoch, self._clock.now_ns())
        except OSError:
            old.fill(numbers, BEHIND_DRAM)
            raise
        table.fill(numbers, BEHIND_DRAM)
        self._table = table
        old.close(SUPERSEDED)

    def change(self, changes: Sequence[tuple[bytes, bool, bool]]) -> None:
        """Blocks came to or went from a tier: (stored key, in DRAM, behind DRAM)."""
        table = self._table
        table.change(changes)
        if self._next is not None:
            # The rest will be copied as it is then.
            self._next.change([each for each in changes if table.home(each[0]) < self._copied])

    def beat(self) -> None:
        """To be called several times a second."""
        self._table.beat(self._clock.now_ns())

    @property
    def needs_growth(self) -> bool:
        """Only for its load, which takes as many blocks: that a page is full can be
        brought about with a few blocks made for it, as often as one likes."""
        return self._next is None and self._table.load > MAX_LOAD

    def grow(self) -> Coroutine[None, None, None]:
        """Begin to replace the table by one of twice its size; the result, run to its
        end, finishes it. Raises OSError when there is no memory for it."""
        self._next = DirectoryWriter(self._table.slots * 2, self._epoch, self._clock.now_ns())
        self._copied = 0
        return self._fill(self._next)

    async def _fill(self, table: DirectoryWriter) -> None:
        old = self._table
        try:
            for first in range(0, old.slots // PAGE_WORDS, PAGES_A_STEP):
                table.take_pages(old, first, PAGES_A_STEP)
                self._copied = (first + PAGES_A_STEP) * PAGE_WORDS
                await asyncio.sleep(0)
        except BaseException:
            if self._next is table:
                self._next = None
                table.close()
            raise
        self._table, self._next = table, None
        self.beat()
        old.close(SUPERSEDED)

    def close(self) -> None:
        """Readers see at once that the server has gone."""
        self._table.close()
        if self._next is not None:
            self._next.close()
            self._next = None
