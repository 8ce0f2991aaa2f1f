"""Which tier a block is in, and how it gets from one to the other.

The rules:

* Clients write into DRAM and read from DRAM; the NVMe tier behind it is inclusive
  (a block that is brought up stays there).
* A DRAM replica that is also on NVMe is *clean* and may be dropped by a table
  update; any other is *dirty* and is written before it is dropped. Writing runs
  ahead: a quarter of each class's slots is kept free or clean.
* Where nothing can be written to NVMe (there is none, it is off, or it is full of
  blocks that cannot leave) dirty replicas are dropped as they are, children before
  parents.
* A block leaves the catalog with its last replica. A block with children does not
  leave while something else can.
* Each class (tenant and slot size) may grow at the cost of others until all have
  equal shares of a tier's extents; beyond that it makes room among its own.

Methods that need room return None or False where there is none now; room comes
when transfers end, so the planner asks again then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from kvstore.core.actions import Action, CloseExtent, Copy, Forget, OpenExtent
from kvstore.core.catalog import Block, Catalog, Layout, Replica, is_ready
from kvstore.core.chores import CHANGED, Chore
from kvstore.core.lifecycle import Event, State
from kvstore.core.policies import EvictionPolicy
from kvstore.core.pool import Pool, Verdict
from kvstore.core.space import Space, SpaceClass
from kvstore.core.transfers import TransferClass, TransferQueue
from kvstore.types import Tier

WRITE_BACK_DEPTH = 32
"""Copies to NVMe that may be queued at a time."""
NVME_EVICTION_BATCH = 16
"""Replicas dropped from NVMe at a time when it is full."""
EXTENTS_TRIED = 8
"""Extents looked at for one to take over from another class."""


class StoredBlock(Protocol):
    """What a storage tier tells of a block it holds (`tiers.base.BlockHeader`)."""

    @property
    def stored_key(self) -> bytes: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def layout_id(self) -> bytes: ...
    @property
    def tenant(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def checksum(self) -> int: ...


class Residency:
    def __init__(
        self,
        catalog: Catalog,
        dram: Space,
        nvme: Space | None,
        make_policy: Callable[[], EvictionPolicy],
        max_running: int,
    ) -> None:
        self.catalog = catalog
        self.dram = Pool(Tier.DRAM, dram, make_policy)
        self.nvme = None if nvme is None else Pool(Tier.NVME, nvme, make_policy)
        self.transfers = TransferQueue(max_running)
        self.actions: list[Action] = []
        self.changed: set[bytes] = set()
        """Stored keys of blocks that came to or went from a tier since the planner
        last told the shell."""
        self.corrupt = 0
        self.nvme_on = nvme is not None
        self.save_paused = False
        """Set by the planner for a while after the NVMe tier refused a write."""
        self.forgetting = 0
        self._nvme_full = False
        self._emptying: int | None = None
        # Coldest first, per class; what write-back takes from.
        self._dirty: dict[SpaceClass, OrderedDict[Replica, None]] = {}
        # Copies to NVMe that have not ended, per DRAM class of their block.
        self._saving: dict[SpaceClass, int] = {}

    @property
    def can_save(self) -> bool:
        """Dirty replicas can be written to NVMe, now or soon."""
        return self.nvme_on and not self.save_paused and not self._nvme_full

    @property
    def busy(self) -> bool:
        """Something is under way that may make room when it ends."""
        return len(self.transfers) > 0 or self.forgetting > 0

    def touch(self, block: Block) -> None:
        """The block was used."""
        if block.dram is not None and block.dram.state is State.READY:
            self.dram.touch(block.dram, block.layout.dram_class)
            dirty = self._dirty.get(block.layout.dram_class)
            if dirty is not None and block.dram in dirty:
                dirty.move_to_end(block.dram)
        if block.nvme is not None and block.nvme.state is State.READY:
            assert self.nvme is not None and block.layout.nvme_class is not None
            self.nvme.touch(block.nvme, block.layout.nvme_class)

    def touch_run(self, layout: Layout, replicas: list[Replica]) -> None:
        """Blocks of one layout that are READY in DRAM were used, the last one last."""
        self.dram.touch_run(replicas, layout.dram_class)
        dirty = self._dirty.get(layout.dram_class)
        if dirty:
            for replica in replicas:
                if replica in dirty:
                    dirty.move_to_end(replica)
        if self.nvme is not None and layout.nvme_class is not None:
            ready = State.READY
            saved = [n for r in replicas if (n := r.block.nvme) is not None and n.state is ready]
            self.nvme.touch_run(saved, layout.nvme_class)

    def pin(self, replica: Replica) -> None:
        replica.pins += 1

    def pin_all(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            replica.pins += 1

    def unpin(self, replica: Replica) -> None:
        assert replica.pins > 0
        replica.pins -= 1
        if not replica.pins and replica.state is State.DOOMED:
            self._discard(replica)

    def unpin_all(self, replicas: Iterable[Replica]) -> int:
        """Let go of replicas in DRAM. What nobody reads any more and was only kept, or
        was to be filled, for them is given up; returns how many those are."""
        ready, given_up = State.READY, 0
        for replica in replicas:
            replica.pins -= 1
            if replica.state is ready or replica.pins:
                continue
            if replica.state is State.DOOMED:
                self._discard(replica)
                given_up += 1
            elif replica.state is State.FILLING:
                self.call_off(replica)
                given_up += 1
        return given_up

    # Coming in

    def place_for_write(self, block: Block) -> Replica | None:
        """A DRAM slot for a client to write into; None when there is no room now.

        The block is not in the catalog, and has no name, before it is published."""
        return self._place_in_dram(block, State.WRITING)

    def publish(self, replica: Replica, stored_key: bytes, parent: bytes, checksum: int) -> None:
        """A client has written the slot: the block can be read from here on, under a
        name that the caller guarantees to be free."""
        replica.apply(Event.COMMIT)
        block = replica.block
        block.stored_key = stored_key
        block.parent = parent
        block.checksum = checksum
        self.catalog.enter(block)
        self._listed(replica)

    def bring_up(self, block: Block, transfer_class: TransferClass) -> Replica | None:
        """Start filling a DRAM replica from NVMe, where the block is READY; None
        when there is no room in DRAM now."""
        source = block.nvme
        assert source is not None and source.state is State.READY and block.dram is None
        self.pin(source)
        # What is only wished for takes what is free, and pushes nobody out.
        evict = transfer_class is TransferClass.DEMAND
        target = self._place_in_dram(block, State.FILLING, evict=evict)
        if target is None:
            self.unpin(source)
            return None
        self.transfers.push(Copy(source, target), transfer_class)
        return target

    def save(self, block: Block) -> Replica | None:
        """Start writing a dirty block to NVMe; None when there is no room there now."""
        source = block.dram
        assert source is not None and source.state is State.READY and block.nvme is None
        self.pin(source)
        target = self._place_in_nvme(block)
        if target is None:
            self.unpin(source)
            return None
        self._note_dirty(block)
        self.transfers.push(Copy(source, target), TransferClass.WRITE_BACK)
        self._count_saving(block, 1)
        return target

    def restore(self, layout: Layout, stored: StoredBlock, address: int) -> None:
        """A block found on NVMe at the start. Raises ValueError when it cannot be
        there: a name or slot taken twice, another length than its layout's, a slot
        of another size. Found by nobody until `finish_restore`."""
        assert self.nvme is not None
        if self.catalog.get(stored.stored_key) is not None:
            raise ValueError("a block is stored twice")
        if stored.length != layout.block_bytes:
            raise ValueError("a block has not its layout's length")
        parent = self.catalog.get(stored.parent)
        # Its parent's own name where that is known: see `Catalog.adopt`. A copy that is
        # let go of later leaves a hole, which costs as much as the copy.
        named = stored.parent if parent is None else parent.stored_key
        block = Block(stored.stored_key, named, layout)
        block.checksum = stored.checksum
        block.nvme = self.nvme.restore(block, address, layout.nvme_class)
        self.catalog.file(block)

    def finish_restore(self) -> None:
        """All that was found is here: put it in the order in which it should leave,
        children before parents, and otherwise by age as far as addresses tell it.

        Tells nobody what came (`changed`): it may be millions, and is everything."""
        assert self.nvme is not None
        self.nvme.space.finish_restore()
        parents_first: list[Replica] = []
        for replica in self.nvme.space.residents(backwards=True):
            path: list[Replica] = []
            # Ends at a block that has its place already, which also ends a ring.
            following: Replica | None = replica
            while following is not None and following.state is State.FILLING:
                following.apply(Event.FILLED)
                path.append(following)
                parent = self.catalog.adopt(following.block)
                following = None if parent is None else parent.nvme
            path.reverse()
            parents_first += path
        for replica in reversed(parents_first):
            self.nvme.insert(replica, self._class(replica))

    def filled(self, copy: Copy) -> None:
        """A copy has ended well."""
        self._end_copy(copy)
        copy.target.apply(Event.FILLED)
        if copy.target.state is State.READY:
            self._listed(copy.target)
        elif not copy.target.pins:
            self._discard(copy.target)
        self.unpin(copy.source)

    def fill_failed(self, copy: Copy, *, source_corrupt: bool) -> None:
        """A copy has ended badly. With `source_corrupt`, because its source is not
        what was once put there: then the block is not there any more."""
        self._end_copy(copy)
        self._unplace(copy.target)
        if source_corrupt:
            self._damaged(copy.source)
        self.unpin(copy.source)

    # Going out

    def write_back(self, wanted: dict[SpaceClass, int]) -> None:
        """Write dirty replicas ahead, coldest first, until every class has a quarter
        of its slots, and at least those `wanted`, free or clean."""
        if not self.can_save:
            return
        for space_class, dirty in list(self._dirty.items()):
            space = self.dram.space
            goal = max(1, space.total_slots(space_class) // 4, wanted.get(space_class, 0))
            listed = self.dram.listed(space_class)
            lacking = goal - space.free_slots(space_class) - (listed - len(dirty))
            room = WRITE_BACK_DEPTH - self.transfers.depth(TransferClass.WRITE_BACK)
            for replica in list(islice(dirty, max(0, min(lacking, room)))):
                if self.save(replica.block) is None:
                    return

    def look_again(self) -> None:
        """NVMe may have got something that can leave. To be called now and then."""
        self._nvme_full = False

    def drop_if_clean(self, replica: Replica) -> bool:
        """Drop a DRAM replica if it is also on NVMe and not in use."""
        if is_ready(replica) and not replica.pins and is_ready(replica.block.nvme):
            self._drop_from_dram(replica)
            return True
        return False

    def abandon(self, block: Block) -> None:
        """Forget a block in every tier. What is in use or on its way goes when that
        ends; nobody finds it meanwhile. Not for a block that is being written."""
        self.catalog.remove(block)
        for replica in (block.dram, block.nvme):
            if replica is None:
                continue
            if replica.state is State.READY:
                self._unlisted(replica)
                replica.apply(Event.DOOM)
                if not replica.pins:
                    self._discard(replica)
            elif replica.state is State.FILLING:
                self._stop_filling(replica)
        block.dram = block.nvme = None

    def call_off(self, target: Replica) -> None:
        """Do not fill `target` after all, unless that has begun already."""
        if self._cancel(target):
            self._not_filled(target)

    def release_writer(self, replica: Replica, event: Event) -> None:
        """The writer of a reserved slot gave up (ABORT), went (WRITER_GONE) or ran
        out of time (EXPIRE). The slot is free at once, unless it may still be written."""
        replica.apply(event)
        if replica.state is State.GONE:
            # Apart, so that they are freed at once and not by a garbage collection.
            replica.block.dram = None
            self.dram.vacate(replica)

    def forgotten(self, replica: Replica) -> None:
        """The NVMe tier has struck a replica."""
        self.forgetting -= 1
        self._nvme_full = False
        if replica.state is State.LEAVING:
            replica.apply(Event.LEFT)
            self._pool(replica).vacate(replica)

    def switch_off_nvme(self) -> Chore:
        """The tier failed. Nothing goes there any more; what is only there goes from
        the catalog, and until then is not found by who tries to read it."""
        if not self.nvme_on:
            return
        self.nvme_on = False
        self._dirty.clear()
        assert self.nvme is not None
        for replica in self.nvme.space.residents():
            block = replica.block
            if replica.state is State.READY:
                self._unlisted(replica)
                replica.apply(Event.DAMAGE)
                block.nvme = None
                self._left_a_tier(block)
            elif replica.state is State.FILLING:
                block.nvme = None
                self._stop_filling(replica)
            yield CHANGED

    # Room

    def _place_in_dram(self, block: Block, state: State, *, evict: bool = True) -> Replica | None:
        space_class = block.layout.dram_class
        if not self.dram.space.slots_per_extent(space_class.slot_bytes):
            return None
        while True:
            replica = self.dram.place(block, space_class, state)
            if replica is not None:
                block.dram = replica
                return replica
            if self._grow(self.dram, space_class):
                continue
            if not evict:
                return None
            if self._below_share(self.dram, space_class) and self._empty_one(
                self.dram, space_class
            ):
                continue
            victim = None
            if not self.can_save or self._has_clean(space_class):
                victim = self.dram.coldest(space_class, self._may_leave_dram)
            if victim is None:
                return None
            self.dram.evictions += 1
            self._drop_from_dram(victim)

    def _place_in_nvme(self, block: Block) -> Replica | None:
        space_class = block.layout.nvme_class
        if not self.nvme_on or self.nvme is None or space_class is None:
            return None
        replica = self.nvme.place(block, space_class, State.FILLING)
        if replica is None and self._grow(self.nvme, space_class):
            replica = self.nvme.place(block, space_class, State.FILLING)
        if replica is not None:
            block.nvme = replica
        elif not self.forgetting:
            if self._below_share(self.nvme, space_class):
                self._empty_one(self.nvme, space_class)
            for _ in range(NVME_EVICTION_BATCH):
                victim = self.nvme.coldest(space_class, self._may_leave_nvme)
                if victim is None:
                    break
                self.nvme.evictions += 1
                self._drop_from_nvme(victim)
            self._nvme_full = not self.forgetting
        return replica

    def _has_clean(self, space_class: SpaceClass) -> bool:
        """Some replica of the class is clean: spares the search where none is."""
        dirty = len(self._dirty.get(space_class, ()))
        return self.dram.listed(space_class) > dirty + self._saving.get(space_class, 0)

    def _grow(self, pool: Pool, space_class: SpaceClass) -> bool:
        """One more extent for the class, if one is spare or empty."""
        space = pool.space
        number = space.open_extent(space_class)
        if number is None:
            empty = space.empty_extent(space_class)
            if empty is None:
                return False
            space.close_extent(empty)
            self.actions.append(CloseExtent(pool.tier, empty))
            number = space.open_extent(space_class)
            assert number is not None
        self.actions.append(OpenExtent(pool.tier, number, space_class.slot_bytes))
        return True

    def _below_share(self, pool: Pool, space_class: SpaceClass) -> bool:
        mine = pool.space.extents_of(space_class)
        most = max((pool.space.extents_of(c) for c in pool.space.classes()), default=0)
        return most > mine + 1 or (mine == 0 and most > 0)

    def _empty_one(self, pool: Pool, space_class: SpaceClass) -> bool:
        """Empty an extent of the class that has most. False if that is still to
        come: in DRAM what is dirty there is first written, on NVMe leaving takes
        time."""
        space = pool.space
        if pool is self.dram and self._emptying is not None:
            number, self._emptying = self._emptying, None
            if space.owner_of(number) is not None and self._empty(pool, number):
                return True
            if self._emptying is not None:
                return False
        donors = [
            c for c in space.classes() if c != space_class and space.may_replace(c, space_class)
        ]
        donor = max(donors, key=space.extents_of, default=None)
        if donor is None:
            return False
        tried: set[int] = set()
        for replica in list(islice(pool.candidates(donor), 64 * EXTENTS_TRIED)):
            number = space.extent_of(replica.address)
            if number in tried:
                continue
            if len(tried) == EXTENTS_TRIED:
                break
            tried.add(number)
            if self._empty(pool, number):
                return True
            if self._emptying is not None or self.forgetting:
                break
        return False

    def _empty(self, pool: Pool, number: int) -> bool:
        """Drop all that is in an extent, or begin to. Nothing is done to one whose
        blocks are in use."""
        residents = pool.space.residents_of(number)
        saving = [r for r in residents if pool is self.dram and self._being_saved(r)]
        if any(r.state is not State.READY or r.pins > (r in saving) for r in residents):
            return False
        if pool is self.nvme:
            for replica in residents:
                pool.evictions += 1
                self._drop_from_nvme(replica)
            return False
        dirty = [r for r in residents if r.block.nvme is None]
        if saving or (dirty and self.can_save):
            self._emptying = number
            for replica in dirty:
                if self.save(replica.block) is None:
                    break
            return False
        for replica in residents:
            pool.evictions += 1
            self._drop_from_dram(replica)
        return True

    def _being_saved(self, replica: Replica) -> bool:
        target = replica.block.nvme
        return target is not None and target.state is State.FILLING

    def _may_leave_dram(self, replica: Replica) -> Verdict:
        saved = replica.block.nvme
        if saved is not None and saved.state is not State.READY:
            return Verdict.LATER
        if replica.pins:
            return Verdict.IN_USE
        if saved is not None:
            return Verdict.GO
        if self.can_save:
            return Verdict.LATER
        return Verdict.LAST if replica.block.children else Verdict.GO

    def _may_leave_nvme(self, replica: Replica) -> Verdict:
        # What is in DRAM too would be dirty again and come back at once.
        if replica.pins or replica.block.dram is not None:
            return Verdict.IN_USE
        return Verdict.LAST if replica.block.children else Verdict.GO

    # One replica's steps; each keeps pools, policies, catalog and dirty lists agreed

    def _listed(self, replica: Replica) -> None:
        """It became READY."""
        self.changed.add(replica.block.stored_key)
        self._pool(replica).insert(replica, self._class(replica))
        self._note_dirty(replica.block)

    def _unlisted(self, replica: Replica) -> None:
        """It is about to stop being READY."""
        self.changed.add(replica.block.stored_key)
        self._pool(replica).withdraw(replica, self._class(replica))
        if replica.tier is Tier.DRAM:
            dirty = self._dirty.get(replica.block.layout.dram_class)
            if dirty is not None and replica in dirty:
                del dirty[replica]

    def _note_dirty(self, block: Block) -> None:
        """Bring the block's place in the dirty list up to date."""
        replica = block.dram
        if not self.nvme_on or replica is None or replica.state is not State.READY:
            return
        dirty = self._dirty.setdefault(block.layout.dram_class, OrderedDict())
        if block.nvme is None and replica not in dirty:
            dirty[replica] = None
        elif block.nvme is not None and replica in dirty:
            del dirty[replica]

    def _drop_from_dram(self, replica: Replica) -> None:
        self._unlisted(replica)
        if replica.block.nvme is not None:
            self._nvme_full = False
        replica.apply(Event.DROP)
        replica.block.dram = None
        self.dram.vacate(replica)
        self._left_a_tier(replica.block)

    def _drop_from_nvme(self, replica: Replica) -> None:
        self._unlisted(replica)
        replica.apply(Event.LEAVE)
        replica.block.nvme = None
        self._strike(replica)
        self._note_dirty(replica.block)
        self._left_a_tier(replica.block)

    def _unplace(self, target: Replica) -> None:
        """Filling it failed."""
        abandoned = target.state is State.ABANDONED
        target.apply(Event.FILL_FAILED)
        self._pool(target).vacate(target)
        if not abandoned:
            self._not_filled(target)

    def _not_filled(self, target: Replica) -> None:
        """A replica that its block counted on will not come."""
        block = target.block
        if target.tier is Tier.DRAM:
            block.dram = None
        else:
            block.nvme = None
            self._note_dirty(block)
        self._left_a_tier(block)

    def _stop_filling(self, replica: Replica) -> None:
        """Nobody will find what is being filled. A copy that somebody waits for, or
        that has started, ends by itself."""
        if replica.pins or not self._cancel(replica):
            replica.apply(Event.ABANDON)

    def _cancel(self, target: Replica) -> bool:
        """Take back a copy that has not started, and the slot it was to fill."""
        copy = self.transfers.cancel(target)
        if copy is None:
            return False
        target.apply(Event.FILL_FAILED)
        self._pool(target).vacate(target)
        if target.tier is Tier.NVME:
            self._count_saving(target.block, -1)
        self.unpin(copy.source)
        return True

    def _end_copy(self, copy: Copy) -> None:
        self.transfers.finish(copy.target)
        if copy.target.tier is Tier.NVME:
            self._count_saving(copy.target.block, -1)

    def _count_saving(self, block: Block, change: int) -> None:
        space_class = block.layout.dram_class
        self._saving[space_class] = self._saving.get(space_class, 0) + change

    def _damaged(self, replica: Replica) -> None:
        """Its bytes are not what was committed: nobody may find it again."""
        self.corrupt += 1
        found = replica.state is State.READY
        if found:
            self._unlisted(replica)
        if replica.tier is Tier.DRAM:
            # Memory that a client scribbled over is not bad memory: it is reused.
            if found:
                replica.apply(Event.DOOM)
                replica.block.dram = None
        elif found or replica.state is State.DOOMED:
            replica.apply(Event.DAMAGE)
            self._strike(replica)
        if found:
            if replica.tier is Tier.NVME:
                replica.block.nvme = None
                self._note_dirty(replica.block)
            self._left_a_tier(replica.block)

    def _left_a_tier(self, block: Block) -> None:
        if block.dram is None and block.nvme is None and self.catalog.contains(block):
            self.catalog.remove(block)

    def _discard(self, replica: Replica) -> None:
        """A DOOMED replica that nobody uses any more."""
        if replica.tier is Tier.DRAM:
            replica.apply(Event.UNPINNED)
            self.dram.vacate(replica)
        else:
            replica.apply(Event.LEAVE)
            self._strike(replica)

    def _strike(self, replica: Replica) -> None:
        self.forgetting += 1
        self.actions.append(Forget(replica))

    def _pool(self, replica: Replica) -> Pool:
        if replica.tier is Tier.DRAM:
            return self.dram
        assert self.nvme is not None
        return self.nvme

    def _class(self, replica: Replica) -> SpaceClass:
        if replica.tier is Tier.DRAM:
            return replica.block.layout.dram_class
        assert replica.block.layout.nvme_class is not None
        return replica.block.layout.nvme_class

    def check_integrity(self) -> None:
        """Everything that is kept twice agrees; raises AssertionError."""
        self.catalog.check_integrity()
        self.dram.check_integrity(self._class)
        if self.nvme is not None:
            self.nvme.check_integrity(self._class)
        for block in self.catalog:
            for replica in (block.dram, block.nvme):
                if replica is not None and (
                    replica.block is not block
                    or self._pool(replica).space.at(replica.address) is not replica
                ):
                    raise AssertionError("a block names a replica that is not its own")
        if self.nvme_on:
            should = {
                block.dram
                for block in self.catalog
                if block.dram is not None and block.dram.state is State.READY and block.nvme is None
            }
            listed = {r for dirty in self._dirty.values() for r in dirty}
            if should != listed:
                raise AssertionError("the dirty list is not what is dirty")
