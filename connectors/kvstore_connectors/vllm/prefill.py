"""How fast this engine prefills, so that the store brings up what beats that.

Measured from step to step: a step that computes many tokens is a prefill, whatever else
it does. Steps overlap where the engine schedules ahead; a step then counts from the end of
the one before.
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
        self.tokens_per_s = 0.0
        """The median of the latest; 0.0 before the first."""
        self._now_s = now_s
        self._begun: deque[tuple[int, float]] = deque(maxlen=MOST_AHEAD)
        self._ended_s = 0.0
        self._latest: deque[float] = deque(maxlen=REMEMBERED)

    def begin(self, tokens: int) -> None:
        """A step of so many tokens is scheduled."""
        self._begun.append((tokens, self._now_s()))

    def end(self) -> None:
        """The oldest step that has begun is over."""
        if not self._begun:
            return
        tokens, began_s = self._begun.popleft()
        now_s = self._now_s()
        taken_s = now_s - max(began_s, self._ended_s)
        self._ended_s = now_s
        if tokens >= LEAST_TOKENS and taken_s > 0:
            self._latest.append(tokens / taken_s)
            self.tokens_per_s = statistics.median(self._latest)
