"""The breaker of a link: nothing more is sent to a device that does not answer.

It opens when something that was asked of the device has not come back for longer than anything
takes. When all that was stuck has ended it lets one batch through to try, and closes when that
ends well. Who asks meanwhile is refused at once, and computes. A device that is slow, however
slow, answers: to weigh that is others' business (`core.calls.choice`).
"""

from __future__ import annotations

import enum


class BreakerState(enum.IntEnum):
    CLOSED = 0
    TRYING = 1
    OPEN = 2


class Breaker:
    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self.opened = 0
        """Times it opened."""
        self._trying_ns = 0

    def look(self, now_ns: int, *, stuck: bool) -> bool:
        """True when it opens now."""
        if stuck and self.state is not BreakerState.OPEN:
            self.state = BreakerState.OPEN
            self.opened += 1
            return True
        if not stuck and self.state is BreakerState.OPEN:
            self.state = BreakerState.TRYING
            self._trying_ns = now_ns
        return False

    def answered(self, began_ns: int) -> None:
        """A batch has ended well."""
        if self.state is BreakerState.TRYING and began_ns >= self._trying_ns:
            self.state = BreakerState.CLOSED
