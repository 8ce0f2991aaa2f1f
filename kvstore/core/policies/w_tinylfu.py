"""W-TinyLFU: newcomers pass through a small window ordered by recency; what leaves it
must have been seen more often than the block it would push out of the main part, a
segmented LRU.

Source: G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission
policy", ACM Transactions on Storage 13(4), 2017; a window of 1 %, a fifth of the main
part on probation. O(1) an operation, amortised; `mark` is the part a replica is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.frequency import Frequency
from kvstore.core.policies.ring import Ring

WINDOW = 0.01
PROTECTED = 0.8

NEW, PROBATION, SAFE = range(3)


class WTinyLFU(EvictionPolicy):
    def __init__(self) -> None:
        self._parts = (Ring(), Ring(), Ring())
        self._frequency = Frequency()
        self._full = False

    def insert(self, replica: Replica) -> None:
        self._frequency.add(replica.block.stored_key)
        window, probation, _ = self._parts
        replica.mark = NEW
        window.append(replica)
        if not self._full:
            self._frequency.grow(len(self))
            while len(window) > self._window_room:
                self._move(window.pop(), probation, PROBATION)

    def touch(self, replica: Replica) -> None:
        self._frequency.add(replica.block.stored_key)
        window, probation, safe = self._parts
        if replica.mark == NEW:
            window.renew(replica)
        elif replica.mark == SAFE:
            safe.renew(replica)
        else:
            probation.discard(replica)
            self._move(replica, safe, SAFE)
            if len(safe) > PROTECTED * (len(self) - len(window)):
                self._move(safe.pop(), probation, PROBATION)

    def remove(self, replica: Replica) -> None:
        self._parts[replica.mark].discard(replica)

    def candidates(self) -> Iterator[Replica]:
        self._full = True
        self._frequency.grow(len(self))
        window, probation, safe = self._parts
        newcomer, resident = window.oldest, probation.oldest or safe.oldest
        if newcomer is None or resident is None or len(window) <= self._window_room:
            return chain(probation, safe, window)
        seen = self._frequency.of
        if seen(newcomer.block.stored_key) <= seen(resident.block.stored_key):
            return chain(window, probation, safe)
        window.discard(newcomer)
        self._move(newcomer, probation, PROBATION)
        if resident.mark == SAFE:
            return chain(safe, window, probation)
        return chain(probation, window, safe)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def _window_room(self) -> int:
        return max(int(len(self) * WINDOW), 1)

    def _move(self, replica: Replica, part: Ring, mark: int) -> None:
        replica.mark = mark
        part.append(replica)
