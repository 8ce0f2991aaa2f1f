"""Least frequently used since it came in; among equals, what reached its count first.

Source: the counts of A. V. Aho, P. J. Denning, J. D. Ullman, "Principles of optimal
page replacement", JACM 18(1), 1971; in O(1) an operation after K. Shah, A. Mitra,
D. Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010.
`mark` is the number of uses.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ring import Ring


class LFU(EvictionPolicy):
    def __init__(self) -> None:
        self._size = 0
        self._rings: dict[int, Ring] = {}

    def insert(self, replica: Replica) -> None:
        self._size += 1
        self._add(replica, 1)

    def touch(self, replica: Replica) -> None:
        count = replica.mark
        self._take(replica)
        self._add(replica, count + 1)

    def remove(self, replica: Replica) -> None:
        self._size -= 1
        self._take(replica)

    def candidates(self) -> Iterator[Replica]:
        for count in sorted(self._rings):
            yield from self._rings[count]

    def __len__(self) -> int:
        return self._size

    def _add(self, replica: Replica, count: int) -> None:
        ring = self._rings.get(count)
        if ring is None:
            ring = self._rings[count] = Ring()
        ring.append(replica)
        replica.mark = count

    def _take(self, replica: Replica) -> None:
        ring = self._rings[replica.mark]
        ring.discard(replica)
        if not ring:
            del self._rings[replica.mark]
