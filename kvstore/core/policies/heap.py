"""A heap of replicas by score, least first, whose scores change.

What changes is entered anew; its old entry is recognised by its number and dropped
when met. O(log n) an operation, amortised.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from kvstore.core.catalog import Replica

Entry = tuple[float, int, Replica]


class Heap:
    """`mark` of a replica held is (the number of its entry, whatever the owner keeps)."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._number = 0
        self._size = 0

    def add(self, replica: Replica, score: float, kept: float = 0.0) -> None:
        """A replica that is not held."""
        self._size += 1
        self._enter(replica, score, kept)

    def change(self, replica: Replica, score: float, kept: float = 0.0) -> None:
        self._enter(replica, score, kept)

    def discard(self, replica: Replica) -> None:
        self._size -= 1
        replica.mark = None

    def least(self) -> float:
        """The least score of all; there is one."""
        self._drop_stale()
        return self._entries[0][0]

    def __iter__(self) -> Iterator[Replica]:
        """Least first. The k-th is found in O(log k) after the one before."""
        self._drop_stale()
        entries = self._entries
        if not entries:
            return
        yield entries[0][2]
        front = [(entries[0][:2], 0)]
        while front:
            _, place = heappop(front)
            if place and _valid(entries[place]):
                yield entries[place][2]
            for below in (2 * place + 1, 2 * place + 2):
                if below < len(entries):
                    heappush(front, (entries[below][:2], below))

    def __len__(self) -> int:
        return self._size

    def _enter(self, replica: Replica, score: float, kept: float) -> None:
        self._number += 1
        replica.mark = (self._number, kept)
        heappush(self._entries, (score, self._number, replica))
        if len(self._entries) > 2 * self._size + 64:
            self._entries = [entry for entry in self._entries if _valid(entry)]
            heapify(self._entries)

    def _drop_stale(self) -> None:
        while self._entries and not _valid(self._entries[0]):
            heappop(self._entries)


def _valid(entry: Entry) -> bool:
    mark = entry[2].mark
    return type(mark) is tuple and mark[0] == entry[1]
