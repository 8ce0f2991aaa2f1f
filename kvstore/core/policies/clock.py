"""CLOCK, or second chance: first in, first out, but what was used since the hand last
passed is passed over once more.

Source: F. J. Corbató, "A paging experiment with the Multics system", MIT Project MAC
MAC-M-384, 1968. O(1) an operation, amortised; `mark` is the use bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ring import Ring


class Clock(Ring, EvictionPolicy):
    remove = Ring.discard

    def insert(self, replica: Replica) -> None:
        replica.mark = False
        self.append(replica)

    def touch(self, replica: Replica) -> None:
        replica.mark = True

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            replica.mark = True

    def candidates(self) -> Iterator[Replica]:
        while (hand := self.oldest) is not None and hand.mark:
            hand.mark = False
            self.renew(hand)
        yield from (replica for replica in self if not replica.mark)
        yield from (replica for replica in self if replica.mark)
