"""Whether a link does at this moment what it did lately.

What was learned of a link (`core.links.learned`) is a median of many, which follows a link that
becomes slow only after half of them. Here the latest few are compared with what was
predicted for them, and with how long what runs has been at it: who waits hears of a drive
that became ten times slower before the first thing that it moves more slowly is over.
"""

from __future__ import annotations

from collections import deque

ENDS = 4
SLOW = 1.5
"""Less than that is noise."""


class Pulse:
    def __init__(self) -> None:
        # When things ended, and in how long what had to be moved for them should have been.
        self._ends: deque[tuple[int, float]] = deque()
        self._since_ns = 0

    def begin(self, now_ns: int) -> None:
        """The link was idle, or what it did before says nothing of what it does now."""
        self._ends.clear()
        self._since_ns = now_ns

    def ended(self, said_ns: float, now_ns: int) -> None:
        """Something has ended that should have kept the link busy for so long."""
        self._ends.append((now_ns, said_ns))
        if len(self._ends) > ENDS:
            self._since_ns = self._ends.popleft()[0]

    def slowness(self, running_ns: float, now_ns: int) -> float:
        """By what factor the link is slower than predicted at least, where all that runs
        should have been over after `running_ns`; 1.0 where it is not slow."""
        said_ns = running_ns + sum(said_ns for _, said_ns in self._ends)
        slowness = (now_ns - self._since_ns) / said_ns if said_ns else 1.0
        return slowness if slowness >= SLOW else 1.0

    def slow_ns(self, times: float, running_ns: float) -> float:
        """When `slowness` will be as much or more, if nothing ends until then."""
        said_ns = running_ns + sum(said_ns for _, said_ns in self._ends)
        return self._since_ns + max(times, SLOW) * said_ns

    @property
    def steady(self) -> float:
        """As `slowness`, of what has ended."""
        said_ns = sum(said_ns for _, said_ns in self._ends)
        slowness = (self._latest_ns - self._since_ns) / said_ns if said_ns else 1.0
        return slowness if slowness >= SLOW else 1.0

    def due_ns(self, running_ns: float) -> float:
        """When all that runs should be over, as slowly as what has ended."""
        return self._latest_ns + self.steady * running_ns

    @property
    def _latest_ns(self) -> int:
        return self._ends[-1][0] if self._ends else self._since_ns
