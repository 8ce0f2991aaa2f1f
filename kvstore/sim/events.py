"""Virtual time: it passes only from one thing that is due to the next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

BEGIN_NS = 1_000_000_000


class Events:
    """What is to happen, in order of time; at the same time, in the order it was asked for."""

    def __init__(self) -> None:
        self.now_ns = BEGIN_NS
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, time_ns: int, call: Callable[[], None]) -> None:
        """Not in the past."""
        self._asked += 1
        heappush(self._due, (time_ns, self._asked, call))

    def run(self, until_ns: int | None = None) -> None:
        """All that is due until then, which it is afterwards; None: until nothing is."""
        due = self._due
        while due and (until_ns is None or due[0][0] <= until_ns):
            self.now_ns, _, call = heappop(due)
            call()
        if until_ns is not None:
            self.now_ns = until_ns
