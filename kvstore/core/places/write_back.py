"""Write-back: dirty blocks are written to NVMe ahead of need, so that dropping one from
DRAM is a table update.

A quarter of each class's slots is kept free, clean, or of what is not worth a write: that
is what can leave at once, and the rest is all that can be dirty, or kept for somebody who is
still to come. Coldest first are those
that would have left already if they were not dirty, and then those used longest ago. Where
NVMe has a budget (`core.places.endurance`), what is not worth its price is spared. Writing stops
where NVMe has no room, and for a while after it refused a write for want of it.
"""

from __future__ import annotations

from itertools import islice

from kvstore.core.actions import Copy
from kvstore.core.catalog import Block, Replica
from kvstore.core.lifecycle import State
from kvstore.core.places.endurance import Endurance, Weight
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.nvme_room import NvmeRoom, price_of
from kvstore.core.space import SpaceClass
from kvstore.core.transfers import Link, Transfer, TransferClass, Wish
from kvstore.types import Tier

DEPTH = 128
"""Copies to NVMe that may be queued at a time."""
PAUSE_NS = 1_000_000_000
"""How long nothing is written to NVMe after it refused a write for want of space."""

_AHEAD_OF_NEED = Wish(TransferClass.WRITE_BACK)


class WriteBack:
    def __init__(
        self,
        holdings: Holdings,
        room: NvmeRoom | None,
        transfers: Link,
        endurance: Endurance,
    ) -> None:
        self._holdings = holdings
        self._room = room
        self._transfers = transfers
        self._endurance = endurance
        # Dirty ones that would have left.
        self._leaving: dict[Replica, None] = {}
        self._spared = False
        self._paused = False
        self._resume_ns = 0
        # Copies to NVMe that have not ended, per DRAM class of their block.
        self._saving: dict[SpaceClass, int] = {}

    @property
    def possible(self) -> bool:
        """Dirty replicas can be written to NVMe, now or soon."""
        return (
            self._holdings.nvme_on
            and not self._paused
            and self._transfers.refusal(TransferClass.WRITE_BACK) is None
            and self._room is not None
            and not self._room.full
        )

    def refused(self, now_ns: int) -> None:
        """The NVMe tier had no room for a write after all."""
        self._paused = True
        self._resume_ns = now_ns + PAUSE_NS

    def tick(self, now_ns: int) -> None:
        self._endurance.pass_time(now_ns)
        if self._paused and now_ns >= self._resume_ns:
            self._paused = False
        self.look_again()

    def look_again(self) -> None:
        """NVMe may have got something that can leave."""
        if self._room is not None:
            self._room.look_again()

    def save(self, block: Block) -> Replica | None:
        """Start writing a dirty block to NVMe; None when there is no room there now, or
        nothing left to pay with."""
        source = block.dram
        assert source is not None and source.state is State.READY and block.nvme is None
        if self._room is None or not self._holdings.nvme_on:
            return None
        price = price_of(block)
        if not self._endurance.affords(price):
            return None
        if self._transfers.refusal(TransferClass.WRITE_BACK) is not None:
            return None
        # What is being written must not be taken for what may leave.
        self._holdings.pin(source)
        target = self._room.place(block)
        if target is None:
            self._holdings.unpin(source)
            return None
        self._endurance.spend(price)
        self._holdings.note_dirty(block)
        self._transfers.push(
            Transfer(
                target, block.layout.stored_bytes, Tier.NVME, block.layout.tenant, _AHEAD_OF_NEED,
                Copy(source, target),
            )
        )  # fmt: skip
        self._count(block, 1)
        return target

    def ended(self, target: Replica) -> None:
        """The writing of `target` has ended, well or badly."""
        if target.tier is Tier.NVME:
            self._count(target.block, -1)

    def called_off(self, target: Replica) -> None:
        """Before it began."""
        if target.tier is Tier.NVME:
            self._count(target.block, -1)
            self._endurance.take_back(price_of(target.block))

    def _count(self, block: Block, change: int) -> None:
        space_class = block.layout.dram_class
        self._saving[space_class] = self._saving.get(space_class, 0) + change

    def would_leave(self, replica: Replica) -> None:
        """A dirty replica would have left DRAM: it is written before others."""
        if len(self._leaving) < DEPTH:
            self._leaving[replica] = None

    def go_on(self, wanted: dict[SpaceClass, int]) -> bool:
        """Write dirty replicas, coldest first, until every class has a quarter of its
        slots, and at least those `wanted`, free or such that they can leave. Whether some
        can now that could not before."""
        if not self.possible:
            self._leaving.clear()
            return False
        holdings, space = self._holdings, self._holdings.dram.space
        leaving, self._leaving = self._leaving, {}
        self._spared = False
        for replica in leaving:
            if holdings.is_dirty(replica) and not self.write(replica):
                break
        for space_class in holdings.dirty_classes():
            dirty = holdings.dirty(space_class)
            goal = max(1, space.total_slots(space_class) // 4, wanted.get(space_class, 0))
            clean = holdings.dram.listed(space_class) - len(dirty) - holdings.kept(space_class)
            lacking = goal - space.free_slots(space_class) - clean
            room = DEPTH - self._transfers.depth(TransferClass.WRITE_BACK)
            for replica in list(islice(dirty, max(0, min(lacking, room)))):
                if not self.write(replica):
                    break
        return self._spared

    def write(self, replica: Replica) -> bool:
        """Start writing a dirty replica, or spare it where that is not worth it. False when
        there is no room on NVMe now."""
        block = replica.block
        weight = Weight(block.uses, self._holdings.worth(replica))
        if not self._endurance.is_worth(weight, price_of(block)):
            self._holdings.spare(replica)
            self._spared = True
            return True
        return self.save(block) is not None

    def leaves(self, replica: Replica) -> None:
        """A replica is dropped from DRAM."""
        block = replica.block
        if block.nvme is not None:
            # Without a replica in DRAM, the one on NVMe may leave.
            self.look_again()
        elif self._holdings.is_spared(replica):
            self._endurance.refused(price_of(block))

    def can_pay(self, block: Block) -> bool:
        """There is enough left of the budget to write it."""
        return self._endurance.affords(price_of(block))

    def any_clean(self, space_class: SpaceClass) -> bool:
        """Some replica of the class is clean, and not kept for anybody: spares the search
        where none is."""
        holdings = self._holdings
        unsaved = len(holdings.dirty(space_class)) + self._saving.get(space_class, 0)
        return holdings.dram.listed(space_class) > unsaved + holdings.kept(space_class)
