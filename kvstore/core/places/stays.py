"""How long what comes into DRAM stays there, as seen of a few."""

from __future__ import annotations

from collections import deque

from kvstore.core.catalog import Replica

EVERY_NS = 250_000_000
"""Between two that are watched."""
WATCHED = 64
REMEMBERED = 32
FOR_GOOD = 1 << 62


class Stays:
    def __init__(self) -> None:
        self._watched: dict[Replica, int] = {}
        self._latest: deque[int] = deque(maxlen=REMEMBERED)
        self._now_ns = self._next_ns = 0

    def tick(self, now_ns: int) -> None:
        """Times are as exact as this is often called."""
        self._now_ns = now_ns

    def came(self, replica: Replica) -> None:
        """A replica has come into DRAM."""
        if self._now_ns < self._next_ns:
            return
        self._next_ns = self._now_ns + EVERY_NS
        self._watched[replica] = self._now_ns
        if len(self._watched) > WATCHED:
            # It has stayed for so long at least.
            self.goes(next(iter(self._watched)))

    def goes(self, replica: Replica) -> None:
        """It is about to leave."""
        since_ns = self._watched.pop(replica, None)
        if since_ns is not None:
            self._latest.append(self._now_ns - since_ns)

    @property
    def stay_ns(self) -> int:
        """Three of four stay longer. Those that are used meanwhile stay anyway."""
        if not self._latest:
            return FOR_GOOD
        return sorted(self._latest)[len(self._latest) // 4]
