"""GreedyDual-Size-Frequency: uses times cost over size, on top of a level that rises to
the score of each block evicted, so that old glory fades.

Source: L. Cherkasova, "Improving WWW proxies performance with
Greedy-Dual-Size-Frequency caching policy", HP Labs HPL-98-69R1, 1998. Blocks of one
class are of one size; the cost is that of recomputing (`core.cost`). O(log n) an
operation.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.core.catalog import Replica
from kvstore.core.cost import REFERENCE
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.heap import Heap


class GDSF(EvictionPolicy):
    def __init__(self) -> None:
        self._heap = Heap()
        self._level = 0.0

    def insert(self, replica: Replica) -> None:
        self._heap.add(replica, self._level + _cost(replica), 1)

    def touch(self, replica: Replica) -> None:
        uses = replica.mark[1] + 1
        self._heap.change(replica, self._level + uses * _cost(replica), uses)

    def remove(self, replica: Replica) -> None:
        self._heap.discard(replica)

    def candidates(self) -> Iterator[Replica]:
        if self._heap:
            self._level = max(self._level, self._heap.least())
        return iter(self._heap)

    def __len__(self) -> int:
        return len(self._heap)


def _cost(replica: Replica) -> float:
    block = replica.block
    return REFERENCE.relative(block.depth * block.layout.spec.block_tokens)
