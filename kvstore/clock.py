"""Time as a dependency: the core is told the time, everyone else is given a clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_ns(self) -> int:
        """Nanoseconds on the host's monotonic clock. Comparable between all
        processes of one host, which leases rely on."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC, the same for every process of the host."""

    # Without a frame of its own, because every lookup asks for the time.
    now_ns = staticmethod(time.monotonic_ns)


class ManualClock:
    """A clock that moves when told, for tests and simulation."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance_ms(self, milliseconds: float) -> None:
        if milliseconds < 0:
            raise ValueError("time does not run backwards")
        self._now_ns += int(milliseconds * 1_000_000)
