"""The breaker of a link: nothing more is sent to a device that does not answer.

It opens when something has been under way for longer than anything takes. When all that
was stuck has ended it lets one batch through to try, and closes when that ends well. Who
asks meanwhile is refused at once, and computes.
"""

from __future__ import annotations

import enum

STUCK_NS = 3_000_000_000


class BreakerState(enum.IntEnum):
    CLOSED = 0
    TRYING = 1
    OPEN = 2


class Breaker:
    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self.opened = 0
        """Times it opened."""

    def look(self, began_ns: int | None, now_ns: int) -> bool:
        """`began_ns`: when the oldest of what runs began. True when it opens now."""
        stuck = began_ns is not None and now_ns - began_ns >= STUCK_NS
        if stuck and self.state is not BreakerState.OPEN:
            self.state = BreakerState.OPEN
            self.opened += 1
            return True
        if not stuck and self.state is BreakerState.OPEN:
            self.state = BreakerState.TRYING
        return False

    def answered(self, began_ns: int, now_ns: int) -> None:
        """A batch has ended well."""
        if self.state is BreakerState.TRYING and now_ns - began_ns < STUCK_NS:
            self.state = BreakerState.CLOSED
