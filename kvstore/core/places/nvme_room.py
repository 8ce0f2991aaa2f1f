"""Room in NVMe for a block that is to be written there.

Leaving NVMe takes time (its index is told), so a place is not made for the one who asks:
some are dropped, and who asks later finds the room. Who writes a log has to write some
blocks again, to win room; those that are not worth it are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.core.catalog import Block, Replica, is_ready
from kvstore.core.lifecycle import State
from kvstore.core.places.endurance import Endurance, Weight
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.pool import Pool
from kvstore.core.places.room import Room
from kvstore.core.places.shortlist import Verdict

EVICTION_BATCH = 16
"""Replicas dropped at a time."""


class NvmeRoom(Room):
    def __init__(self, holdings: Holdings, pool: Pool, endurance: Endurance) -> None:
        super().__init__(holdings, pool)
        self._endurance = endurance
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

    def drop_unworthy(self, addresses: Iterable[int]) -> list[int]:
        """Of blocks that would have to be written again, drop those that are not worth it:
        where they are. What stays has to be asked for again to be worth it the next time."""
        space = self._pool.space
        there = (a for a in addresses if space.owner_of(space.extent_of(a)) is not None)
        found = [r for a in there if is_ready(r := space.at(a))]
        dropped: list[int] = []
        for replica in sorted(found, key=lambda r: r.block.depth, reverse=True):
            block = replica.block
            weight = Weight(block.uses, self._holdings.worth(replica))
            may_leave = _may_leave(replica) is Verdict.GO
            if may_leave and not self._endurance.is_worth(weight, price_of(block)):
                self._endurance.refused(price_of(block))
                dropped.append(replica.address)
                self._drop(replica)
            else:
                block.uses //= 2
        return dropped

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


def price_of(block: Block) -> int:
    """What it costs the drive."""
    assert block.layout.nvme_class is not None
    return block.layout.nvme_class.slot_bytes
