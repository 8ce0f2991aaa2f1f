"""Least recently used.

Source: L. A. Belady, "A study of replacement algorithms for virtual-storage
computers", IBM Systems Journal 5(2), 1966. O(1) an operation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from kvstore.core.catalog import Replica


class LRU:
    def __init__(self) -> None:
        self._order: OrderedDict[Replica, None] = OrderedDict()

    def insert(self, replica: Replica) -> None:
        self._order[replica] = None

    def touch(self, replica: Replica) -> None:
        self._order.move_to_end(replica)

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        move_to_end = self._order.move_to_end
        for replica in replicas:
            move_to_end(replica)

    def remove(self, replica: Replica) -> None:
        del self._order[replica]

    def candidates(self) -> Iterator[Replica]:
        return iter(self._order)

    def __contains__(self, replica: object) -> bool:
        return replica in self._order

    def __len__(self) -> int:
        return len(self._order)
