"""S3-FIFO: three queues, first in, first out. Newcomers pass through a small one; what
is used there moves to the main one, the rest leaves and is remembered for a while.

Source: J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need
for cache eviction", SOSP 2023; a tenth of the room is small, nine tenths of it are
remembered, and two uses in the small queue make a block move. O(1) an operation,
amortised; `mark` is the number of uses, at most 3, less 4 in the small queue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ghosts import Ghosts
from kvstore.core.policies.ring import Ring

SMALL = 0.1
REMEMBERED = 0.9
MOST_USES = 3
TO_MOVE = 2
IN_SMALL = -(MOST_USES + 1)


class S3FIFO(EvictionPolicy):
    def __init__(self) -> None:
        self._small = Ring()
        self._main = Ring()
        self._gone = Ghosts()

    def insert(self, replica: Replica) -> None:
        if self._gone.take(replica.block.stored_key):
            replica.mark = 0
            self._main.append(replica)
        else:
            replica.mark = IN_SMALL
            self._small.append(replica)

    def touch(self, replica: Replica) -> None:
        if replica.mark not in (MOST_USES, IN_SMALL + MOST_USES):
            replica.mark += 1

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            if replica.mark not in (MOST_USES, IN_SMALL + MOST_USES):
                replica.mark += 1

    def remove(self, replica: Replica) -> None:
        room = len(self)
        if replica.mark >= 0:
            self._main.discard(replica)
        else:
            self._small.discard(replica)
            self._gone.add(replica.block.stored_key)
            self._gone.keep(int(room * REMEMBERED))

    def candidates(self) -> Iterator[Replica]:
        small, main = self._small, self._main
        limit = len(self) * SMALL
        while small and (len(small) > limit or not main):
            oldest = small.oldest
            assert oldest is not None
            if oldest.mark < IN_SMALL + TO_MOVE:
                return chain(small, main)
            small.discard(oldest)
            oldest.mark = 0
            main.append(oldest)
        while (hand := main.oldest) is not None and hand.mark:
            hand.mark -= 1
            main.renew(hand)
        return chain(main, small)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
