"""Other orders of transfers, beside `kvstore.core.transfers.Link`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from typing import Any, Protocol

from kvstore.core.transfers import Batch, Transfer


class Queue(Protocol):
    """What a run needs of an order."""

    def push(self, transfer: Transfer) -> None: ...
    def start(self, now_ns: int) -> list[Batch]: ...
    def ended(self, target: Hashable, now_ns: int, *, well: bool) -> Transfer: ...


class Sorted:
    """Block by block, `depth` at a time, by a key; first come, first served among equals."""

    def __init__(self, depth: int, key: Callable[[Transfer], Any]) -> None:
        self._free = depth
        self._key = key
        self._heap: list[tuple[Any, int, Transfer]] = []
        self._running: dict[Hashable, Transfer] = {}
        self._sequence = 0

    def push(self, transfer: Transfer) -> None:
        self._sequence += 1
        heappush(self._heap, (self._key(transfer), self._sequence, transfer))

    def start(self, now_ns: int) -> list[Batch]:
        begun = []
        while self._heap and self._free:
            *_, transfer = heappop(self._heap)
            self._free -= 1
            self._running[transfer.target] = transfer
            begun.append(Batch([transfer], 1, now_ns, 0.0, 1))
        return begun

    def ended(self, target: Hashable, now_ns: int, *, well: bool) -> Transfer:
        self._free += 1
        return self._running.pop(target)


def fifo(depth: int) -> Sorted:
    return Sorted(depth, lambda transfer: 0)


def strict(depth: int) -> Sorted:
    """Class, then priority, whatever becomes of the others."""
    return Sorted(depth, lambda transfer: (transfer.transfer_class, -transfer.wish.priority))
