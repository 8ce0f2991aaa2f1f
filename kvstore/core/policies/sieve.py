"""SIEVE: like CLOCK, but what the hand passes over stays where it is, and newcomers
come in behind it, so that they are looked at soon.

Source: Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than
LRU", NSDI 2024. O(1) an operation, amortised; `mark` is the use bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ring import Ring


class Sieve(Ring, EvictionPolicy):
    def __init__(self) -> None:
        super().__init__()
        self._hand: Replica | None = None

    def insert(self, replica: Replica) -> None:
        replica.mark = False
        self.append(replica)

    def touch(self, replica: Replica) -> None:
        replica.mark = True

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            replica.mark = True

    def remove(self, replica: Replica) -> None:
        if replica is self._hand:
            self._hand = self.newer(replica)
        self.discard(replica)

    def candidates(self) -> Iterator[Replica]:
        if not self:
            return
        hand = self._hand or self.oldest
        while hand is not None and hand.mark:
            hand.mark = False
            hand = self.newer(hand) or self.oldest
        self._hand = hand
        for used in (False, True):
            replica = hand
            while replica is not None:
                if replica.mark is used:
                    yield replica
                replica = self.newer(replica)
            for replica in self:
                if replica is hand:
                    break
                if replica.mark is used:
                    yield replica
