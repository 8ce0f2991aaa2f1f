"""Virtual time: it passes only from one thing that is due to the next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

BEGIN_NS = 1_000_000_000


class Events:
    """What is to happen, in order of time; at the same time, in the order it was asked for."""

    def __init__(self) -> None:
        self.now_ns = BEGIN_NS
        self._due: list[tuple[int, int, bool, Callable[[], None]]] = []
        self._asked = 0
        # Of what is due, that somebody waits for.
        self._awaited = 0
        self._woken: Callable[[], None] | None = None

    @property
    def next_ns(self) -> int | None:
        """When the next thing is due."""
        return self._due[0][0] if self._due else None

    def at(self, time_ns: int, call: Callable[[], None], *, awaited: bool = True) -> None:
        """Not in the past. Not `awaited`: where nothing else is due, all is over."""
        self._asked += 1
        self._awaited += awaited
        heappush(self._due, (time_ns, self._asked, awaited, call))

    def rest(self, woken: Callable[[], None]) -> None:
        """`woken` before whatever is due next, at its time."""
        self._woken = woken

    def step(self, until_ns: int | None = None) -> bool:
        """What is due next, if it is by then; otherwise it is then, and False."""
        due = self._due
        if not due or (until_ns is not None and due[0][0] > until_ns):
            self.now_ns = self.now_ns if until_ns is None else max(self.now_ns, until_ns)
            return False
        self.now_ns, _, awaited, call = heappop(due)
        self._awaited -= awaited
        if self._woken is not None:
            woken, self._woken = self._woken, None
            woken()
        call()
        return True

    def run(self, until_ns: int | None = None) -> None:
        """All that is due until then, which it is afterwards; None: until nobody waits for
        anything."""
        while (until_ns is not None or self._awaited) and self.step(until_ns):
            pass
