"""2Q: newcomers pass through a short queue; what comes back soon after leaving it goes
to the main list, ordered by recency.

Source: T. Johnson, D. Shasha, "2Q: a low overhead high performance buffer management
replacement algorithm", VLDB 1994, the full version, with its Kin = 1/4 and Kout = 1/2
of the capacity. O(1) an operation; `mark` tells whether a replica is in the main list.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ghosts import Ghosts
from kvstore.core.policies.ring import Ring

PASSING = 1 / 4
REMEMBERED = 1 / 2


class TwoQ(EvictionPolicy):
    def __init__(self) -> None:
        self._passing = Ring()
        self._main = Ring()
        self._gone = Ghosts()

    def insert(self, replica: Replica) -> None:
        replica.mark = self._gone.take(replica.block.stored_key)
        (self._main if replica.mark else self._passing).append(replica)

    def touch(self, replica: Replica) -> None:
        if replica.mark:
            self._main.renew(replica)

    def remove(self, replica: Replica) -> None:
        if replica.mark:
            self._main.discard(replica)
        else:
            room = len(self)
            self._passing.discard(replica)
            self._gone.add(replica.block.stored_key)
            self._gone.keep(int(room * REMEMBERED))

    def candidates(self) -> Iterator[Replica]:
        if len(self._passing) > len(self) * PASSING:
            return chain(self._passing, self._main)
        return chain(self._main, self._passing)

    def __len__(self) -> int:
        return len(self._passing) + len(self._main)
