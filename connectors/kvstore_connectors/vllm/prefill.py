"""How fast this engine prefills, so that the store brings up what beats that.

Measured from step to step: a step that computes many tokens is a prefill, whatever else
it does. Steps overlap where the engine schedules ahead; one then counts from the end of
the one before. Not every step's end is told (where the workers have nothing to say, it is
not), so each prefill has a number, which the workers send back.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

LEAST_TOKENS = 256
"""A step of fewer says more of what a step costs than of what a token does."""
REMEMBERED = 15
MOST_AHEAD = 8


class PrefillMeter:
    """Told of steps by the engine's thread; read by any."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._number = 0
        self.begun: deque[tuple[int, int, float]] = deque(maxlen=MOST_AHEAD)
        """Prefills under way: their numbers, tokens, and when they began. Without one the end
        of a step says nothing."""
        self._ended_s = 0.0
        self._latest: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def tokens_per_s(self) -> float:
        """The median of the latest; 0.0 before the first."""
        latest = list(self._latest)
        return statistics.median(latest) if latest else 0.0

    def begin(self, tokens: int) -> int:
        """A prefill of so many tokens, `LEAST_TOKENS` at least, is scheduled. Its number."""
        self._number += 1
        self.begun.append((self._number, tokens, self._now_s()))
        return self._number

    def end(self, number: int) -> None:
        """A step is over: the prefill of this number, or another (0)."""
        now_s = self._now_s()
        while self.begun and self.begun[0][0] <= number:
            begun, tokens, began_s = self.begun.popleft()
            taken_s = now_s - max(began_s, self._ended_s)
            if begun == number and taken_s > 0:
                self._latest.append(tokens / taken_s)
        self._ended_s = now_s
