"""How much may be written to NVMe, and which blocks that is spent on.

A drive lives for so many bytes. A budget of bytes a day is a bucket of tokens, a token a
byte: it fills evenly, holds what an hour brings, and so no 24 hours see more than the
budget. What the drive is given is taken out, and what it takes by itself (blocks appended
again to win room, notes) as it is told.

*What it is spent on.* A block is written if it is among the best of those weighed lately,
the part of them as large as the bucket is full: a full one has room for all, half a bucket
for the better half, and the last of it for the very best. So the bar finds its height by
itself, where what gets over it is what the budget can pay. A block is weighed by how often
it was asked for, and then by what its policy says that it is worth; what was never asked
for again is last. A block that would have to be written a second time, because the log
wins the room it lies in, is weighed in the same way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

HOUR_NS = 3_600_000_000_000
DAY_HOURS = 24
WEIGHED = 512
"""Compared with, the latest."""
FEW = 16
"""Fewer say nothing of which are the best."""
MOST_ASKED = 3
"""Times asked for that are told apart; above that it is the policy's word that counts."""


class Weight(NamedTuple):
    """What speaks for writing a block, the first thing most."""

    uses: int
    worth: float


class Endurance:
    def __init__(self, bytes_per_day: int) -> None:
        """0: there is no budget, and everything is worth it."""
        self.bytes_per_day = bytes_per_day
        self.refused_blocks = self.refused_bytes = 0
        """What left because it was not worth a write, or another one, since the start."""
        # A full bucket and what comes in a day are the budget.
        self._burst = bytes_per_day / (DAY_HOURS + 1)
        self._left = self._burst
        self._now_ns: int | None = None
        self._latest: deque[Weight] = deque()
        self._sorted: list[Weight] = []
        # Bytes written by hour, the oldest of a day first.
        self._hours: deque[tuple[int, int]] = deque()

    def pass_time(self, now_ns: int) -> None:
        """A clock that goes back is waited for."""
        passed_ns = 0 if self._now_ns is None else max(0, now_ns - self._now_ns)
        self._now_ns = max(now_ns, self._now_ns or now_ns)
        self._left = min(self._burst, self._left + self._burst * passed_ns / HOUR_NS)

    @property
    def left_bytes(self) -> float:
        """Of the bucket. Less than nothing where the drive took more than was foreseen."""
        return self._left

    def affords(self, nbytes: int) -> bool:
        """Whether so much can be written now, whatever it is. More than a whole bucket can
        where that is full."""
        return not self.bytes_per_day or self._left >= min(nbytes, self._burst)

    def is_worth(self, weight: Weight, nbytes: int) -> bool:
        """Whether a block should be written. It is remembered that it was weighed."""
        if not self.bytes_per_day:
            return True
        weight = weight._replace(uses=min(weight.uses, MOST_ASKED))
        self._remember(weight)
        better = len(self._sorted) - bisect_right(self._sorted, weight)
        full = self._left / self._burst
        among_the_best = len(self._sorted) < FEW or better <= full * len(self._sorted)
        return among_the_best and self.affords(nbytes)

    def refused(self, nbytes: int) -> None:
        """A block that was not worth it is gone."""
        self.refused_blocks += 1
        self.refused_bytes += nbytes

    def spend(self, nbytes: int) -> None:
        """So much is written."""
        self._left -= nbytes
        hour = (self._now_ns or 0) // HOUR_NS
        if self._hours and self._hours[-1][0] == hour:
            nbytes += self._hours.pop()[1]
        self._hours.append((hour, nbytes))
        self._forget_yesterday(hour)

    def take_back(self, nbytes: int) -> None:
        """So much was not written after all."""
        self._left = min(self._burst, self._left + nbytes)
        if self._hours:
            hour, written = self._hours.pop()
            self._hours.append((hour, max(0, written - nbytes)))

    def written_bytes(self) -> int:
        """In the latest 24 hours, by whole hours."""
        self._forget_yesterday((self._now_ns or 0) // HOUR_NS)
        return sum(nbytes for _, nbytes in self._hours)

    def _forget_yesterday(self, hour: int) -> None:
        while self._hours and self._hours[0][0] <= hour - DAY_HOURS:
            self._hours.popleft()

    def _remember(self, weight: Weight) -> None:
        if len(self._latest) == WEIGHED:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(weight)
        insort(self._sorted, weight)

    def state(self) -> dict[str, float]:
        """What outlives a restart."""
        return {"left": self._left} if self.bytes_per_day else {}

    def restore(self, state: Mapping[str, object]) -> None:
        """A server that is started again and again has no more to spend. What is not of a
        state is ignored."""
        left = state.get("left")
        if isinstance(left, float):
            self._left = min(self._burst, left)
