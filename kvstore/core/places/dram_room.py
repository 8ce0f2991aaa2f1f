"""Room in DRAM for a block that is to be written by a client, or brought up from NVMe.

Where nothing can be written to NVMe (there is none, it is off, or it is full of
blocks that cannot leave) dirty replicas are dropped as they are, and what is not wanted
there always is. A block with children does not leave while something else can.
"""

from __future__ import annotations

from functools import partial

from kvstore.core.catalog import Block, Replica
from kvstore.core.lifecycle import State
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.room import Room
from kvstore.core.places.shortlist import Verdict
from kvstore.core.places.write_back import WriteBack
from kvstore.core.space import SpaceClass


class DramRoom(Room):
    def __init__(self, holdings: Holdings, write_back: WriteBack) -> None:
        super().__init__(holdings, holdings.dram)
        self._write_back = write_back
        # An extent whose dirty blocks are being written, so that it can be emptied.
        self._number: int | None = None
        self._may_save = True

    def place(self, block: Block, state: State, *, evict: bool = True) -> Replica | None:
        """A replica in that state; None where there is no room now. Without `evict`
        nobody is dropped for it."""
        space_class = block.layout.dram_class
        if not self._pool.space.slots_per_extent(space_class.slot_bytes):
            return None
        while True:
            replica = self._pool.place(block, space_class, state)
            if replica is not None:
                block.dram = replica
                return replica
            if self._grow(space_class):
                continue
            if not evict:
                return None
            if self._below_share(space_class) and self._take_over(space_class):
                continue
            victim = None
            may_save = self._write_back.possible
            if may_save is not self._may_save:
                self._may_save = may_save
                self._pool.judge_anew()
            if not may_save or self._write_back.any_clean(space_class):
                victim = self._pool.coldest(space_class, partial(self._may_leave, may_save))
                self.write_next(space_class)
            if victim is None:
                return None
            self._drop(victim)

    def write_next(self, space_class: SpaceClass) -> None:
        """One that would have been dropped but for that it is dirty."""
        while (replica := self._pool.passed_over(space_class)) is not None:
            if self._holdings.is_dirty(replica):
                self._write_back.would_leave(replica)
                break

    def _take_over(self, space_class: SpaceClass) -> bool:
        if self._number is not None:
            number, self._number = self._number, None
            if self._pool.space.owner_of(number) is not None and self._empty(number):
                return True
            if self._number is not None:
                return False
        return super()._take_over(space_class)

    def _empty(self, number: int) -> bool:
        residents = self._pool.space.residents_of(number)
        saving = [r for r in residents if _being_saved(r)]
        if any(r.state is not State.READY or r.pins > (r in saving) for r in residents):
            return False
        dirty = [r for r in residents if self._holdings.is_dirty(r)]
        if saving or (dirty and self._write_back.possible):
            self._number = number
            for replica in dirty:
                if not self._write_back.write(replica):
                    break
            return False
        for replica in residents:
            self._drop(replica)
        return True

    def _emptying(self) -> bool:
        return self._number is not None

    def _drop(self, replica: Replica) -> None:
        self._pool.evictions += 1
        self._write_back.leaves(replica)
        self._holdings.drop_from_dram(replica)

    def _may_leave(self, may_save: bool, replica: Replica) -> Verdict:
        """`may_save`: what is dirty can be written to NVMe, now or soon."""
        saved = replica.block.nvme
        if saved is not None and saved.state is not State.READY:
            return Verdict.LATER
        if replica.pins:
            return Verdict.IN_USE
        if saved is not None:
            return Verdict.LAST if self._holdings.foreseen.is_kept(replica) else Verdict.GO
        if may_save and self._holdings.is_dirty(replica):
            return Verdict.LATER
        return Verdict.LAST if replica.block.children else Verdict.GO


def _being_saved(replica: Replica) -> bool:
    saved = replica.block.nvme
    return saved is not None and saved.state is State.FILLING
