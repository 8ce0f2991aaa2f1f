"""By how much sessions are later than was said, or how long they are away where nothing was.

What is kept is how often each ratio of the two was seen, an octave in four parts, and how often
nobody came. Old ones fade.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple

PARTS = 4
"""Of an octave."""
LOWEST, HIGHEST = -8 * PARTS, 18 * PARTS
"""A 256th, and 72 hours where nothing was said and ratios are seconds."""
FADES = 0.995
ENOUGH = 16.0
"""Fewer tell nothing."""
EARLY = 0.05
"""The part of sessions that may be back before their blocks are."""
LATE = 0.75
"""Once so many are back, the others are not waited for any more."""


class Wait(NamedTuple):
    """For who is still away: until `end` nearly all have come, after `mean` of waiting for
    each. Ratios to the time that was said."""

    end: float
    mean: float


class Delays:
    def __init__(self, *, told: bool) -> None:
        """`told`: somebody says how long it takes, and is believed, more or less."""
        self._seen = [0.0] * (HIGHEST - LOWEST)
        self._never = 0.0
        if told:
            for part in range(-2, 2):
                self._seen[part - LOWEST] = ENOUGH / 4
        self._sums: list[float] | None = None

    def note(self, ratio: float | None) -> None:
        """One more was seen; None: it did not come back."""
        self._seen = [FADES * count for count in self._seen]
        self._never *= FADES
        self._sums = None
        if ratio is None:
            self._never += 1.0
        else:
            self._seen[_index(ratio)] += 1.0

    def wait(self, begin: float, sure: float) -> Wait | None:
        """From `begin` on, until the part `sure` of those that are still away then is back;
        None where so many never are."""
        sums, before = self._cumulated(), self._before(begin)
        away = self._total() - before
        goal = before + sure * away
        if away <= 0 or goal > sums[-1]:
            return None
        first = _index(begin)
        last = max(first, bisect_left(sums, goal))
        waited = (before - goal) * begin
        for index in range(first, last + 1):
            below = before if index == first else sums[index - 1]
            above = min(goal, sums[index])
            waited += (above - below) * max(begin, _edge(index + LOWEST + 1))
        end = max(begin, _edge(last + LOWEST + 1))
        waited += (away - (goal - before)) * (end - begin)
        return Wait(end, waited / away)

    def begin(self, patience: float, lead: float, sure: float) -> float | None:
        """From when on to hold what a session will use, so that few come before it is
        there, when it takes `lead` to come; None where it would have to be held for longer
        than `patience` on average, or less than `sure` of them would find it. All are ratios
        to the time that was said."""
        total = self._total()
        if total < ENOUGH:
            return None
        sums = self._cumulated()
        first = bisect_left(sums, EARLY * total)
        for index in range(first, len(sums)):
            if sums[index] > LATE * total and index > first:
                return None
            begin = max(0.0, _edge(index + LOWEST) - lead)
            wait = self.wait(begin, sure)
            if wait is not None and wait.mean <= patience:
                return begin
        return None

    def _total(self) -> float:
        return self._cumulated()[-1] + self._never

    def _before(self, ratio: float) -> float:
        """How many were back by then, evenly within a part."""
        if ratio <= 0:
            return 0.0
        sums, exact = self._cumulated(), PARTS * math.log2(ratio) - LOWEST
        index = math.floor(exact)
        if index < 0:
            return 0.0
        if index >= len(sums):
            return sums[-1]
        below = sums[index] - self._seen[index]
        return below + (exact - index) * self._seen[index]

    def _cumulated(self) -> list[float]:
        if self._sums is None:
            self._sums = list(accumulate(self._seen))
        return self._sums


def _part(ratio: float) -> int:
    return math.floor(PARTS * math.log2(ratio)) if ratio > 0 else LOWEST


def _index(ratio: float) -> int:
    """Of the part that it is in."""
    return min(max(_part(ratio), LOWEST), HIGHEST - 1) - LOWEST


def _edge(part: int) -> float:
    """Where a part begins."""
    return float(2.0 ** (part / PARTS))
