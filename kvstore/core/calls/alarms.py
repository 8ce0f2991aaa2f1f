"""What is to be looked at once something that only grows has come so far."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Alarms(Generic[T]):
    """One each, at most."""

    def __init__(self) -> None:
        self._at: dict[T, int] = {}
        # Entries that are not what `_at` says are void.
        self._heap: list[tuple[int, int, T]] = []
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._at)

    def set(self, each: T, at: int) -> None:
        """In place of the one it had."""
        self._at[each] = at
        self._sequence += 1
        heappush(self._heap, (at, self._sequence, each))
        if len(self._heap) > 2 * len(self._at) + 16:
            self._heap = [entry for entry in self._heap if self._at.get(entry[2]) == entry[0]]
            heapify(self._heap)

    def drop(self, each: T) -> None:
        self._at.pop(each, None)
        if not self._at:
            self._heap.clear()

    def first(self) -> int | None:
        """Where the next one is set."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def rung(self, reached: int) -> Iterator[T]:
        """Those set for so far or less, first things first; each goes with that."""
        while (at := self.first()) is not None and at <= reached:
            each = heappop(self._heap)[2]
            self.drop(each)
            yield each
