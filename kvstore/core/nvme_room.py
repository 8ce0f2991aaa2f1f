"""Room in NVMe for a block that is to be written there.

Leaving NVMe takes time (its index is told), so a place is not made for the one who asks:
some are dropped, and who asks later finds the room.
"""

from __future__ import annotations

from kvstore.core.catalog import Block, Replica
from kvstore.core.holdings import Holdings
from kvstore.core.lifecycle import State
from kvstore.core.pool import Pool, Verdict
from kvstore.core.room import Room

EVICTION_BATCH = 16
"""Replicas dropped at a time."""


class NvmeRoom(Room):
    def __init__(self, holdings: Holdings, pool: Pool) -> None:
        super().__init__(holdings, pool)
        self._full = False

    @property
    def full(self) -> bool:
        """Nothing can leave, as far as is known."""
        return self._full

    def look_again(self) -> None:
        """Something that can leave may have come."""
        self._full = False

    def place(self, block: Block) -> Replica | None:
        """A replica that is FILLING; None where there is no room now."""
        space_class = block.layout.nvme_class
        if space_class is None:
            return None
        replica = self._pool.place(block, space_class, State.FILLING)
        if replica is None and self._grow(space_class):
            replica = self._pool.place(block, space_class, State.FILLING)
        if replica is not None:
            block.nvme = replica
        elif not self._emptying():
            if self._below_share(space_class):
                self._take_over(space_class)
            for _ in range(EVICTION_BATCH):
                victim = self._pool.coldest(space_class, _may_leave)
                if victim is None:
                    break
                self._drop(victim)
            self._full = not self._emptying()
        return replica

    def _empty(self, number: int) -> bool:
        residents = self._pool.space.residents_of(number)
        if all(r.state is State.READY and not r.pins for r in residents):
            for replica in residents:
                self._drop(replica)
        return False

    def _emptying(self) -> bool:
        return self._holdings.forgetting > 0

    def _drop(self, replica: Replica) -> None:
        self._pool.evictions += 1
        self._holdings.drop_from_nvme(replica)


def _may_leave(replica: Replica) -> Verdict:
    # What is in DRAM too would be dirty again and come back at once.
    if replica.pins or replica.block.dram is not None:
        return Verdict.IN_USE
    return Verdict.LAST if replica.block.children else Verdict.GO
