"""Batches of copies on a drive that is calculated (`kvstore.drive`), in virtual time.

The blocks of a batch go one after the other, each with its latency; what runs at the same
time shares the drive evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from kvstore.drive import Drive, Pace, Request
from kvstore.sim.events import Events
from kvstore.types import Tier

DEPTH = 1 << 20
"""More than ever run: how many do is the planner's to decide."""


class Batches:
    def __init__(self, events: Events, paces: Mapping[Tier, Pace]) -> None:
        """`paces`: by the tier that a batch goes into."""
        self._events = events
        self._paces = paces
        self._drive = Drive(DEPTH, events.now_ns)
        self._running: list[tuple[Request, Callable[[], None]]] = []
        self._began_ns = self._busy_ns = 0
        # What was to be looked at before something else began is not.
        self._watch_number = 0

    @property
    def busy_ns(self) -> int:
        """While the drive had something to do."""
        return self._busy_ns + (self._events.now_ns - self._began_ns if self._running else 0)

    def set_speed(self, speed: float) -> None:
        """From now on, of what the drive is named for; 0.0: it hangs."""
        self._drive.advance(self._events.now_ns)
        self._drive.speed = speed
        self._watch()

    def begin(self, into: Tier, blocks: int, nbytes: int, ended: Callable[[], None]) -> None:
        """So many blocks of so many bytes altogether; `ended`, once they are there."""
        pace, now_ns = self._paces[into], self._events.now_ns
        if not self._running:
            self._began_ns = now_ns
        self._drive.advance(now_ns)
        request = self._drive.begin(pace.latency_ns * blocks, pace.ns_a_byte * nbytes)
        self._running.append((request, ended))
        self._watch()

    def _watch(self) -> None:
        self._watch_number += 1
        next_ns = self._drive.next_ns()
        if next_ns < math.inf:
            look = partial(self._look, next_ns, self._watch_number)
            self._events.at(max(self._events.now_ns, int(next_ns)), look)

    def _look(self, at_ns: float, number: int) -> None:
        if number != self._watch_number:
            return
        # Told the time that it is for: that of events is rounded.
        self._drive.advance(at_ns)
        over = [ended for request, ended in self._running if request.over]
        if over:
            self._running = [each for each in self._running if not each[0].over]
            if not self._running:
                self._busy_ns += self._events.now_ns - self._began_ns
        self._watch()
        for ended in over:
            ended()
