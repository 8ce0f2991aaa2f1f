"""Every replica there is: its slot, its place in the eviction order, its block's place in
the catalog and among what is dirty. Each method is one step of one replica (or of many
alike) and leaves all of these agreed. Which step to take is decided elsewhere.

A DRAM replica that is also on NVMe is *clean* and may be dropped by a table update; any
other is *dirty* while there is an NVMe tier to write it to, unless that is not *wanted*:
a model's output that nobody has asked for, or what is not worth a write (`core.places.endurance`).
That leaves as it is, unless somebody asks for it before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from kvstore.core.actions import Action, Forget
from kvstore.core.catalog import (
    MOST_USES,
    UNUSED_OUTPUT,
    Block,
    Catalog,
    Layout,
    Replica,
    is_ready,
    never_confirmed,
)
from kvstore.core.lifecycle import Event, State
from kvstore.core.places.foreseen import Foreseen
from kvstore.core.places.mirrors import Mirrors
from kvstore.core.places.pool import Pool
from kvstore.core.places.promotion import DramOrder
from kvstore.core.places.shares import Mirror
from kvstore.core.places.stays import Stays
from kvstore.core.policies import MakePolicy, Use
from kvstore.core.space import Space, SpaceClass
from kvstore.types import OUTPUT, SessionState, Tier


class Home(Protocol):
    """Where a replica that is being filled has its slot: a pool, or a GPU's memory."""

    def insert(self, replica: Replica, space_class: SpaceClass) -> None: ...
    def vacate(self, replica: Replica) -> None: ...


class Holdings:
    def __init__(
        self,
        catalog: Catalog,
        dram: Space,
        nvme: Space | None,
        make_policy: MakePolicy,
    ) -> None:
        self.catalog = catalog
        self.foreseen = Foreseen()
        self._orders: dict[SpaceClass, DramOrder] = {}
        order = partial(_dram_order, make_policy, dram, self.foreseen, self._orders)
        self.dram = Pool(Tier.DRAM, dram, order)
        self.nvme = None if nvme is None else Pool(Tier.NVME, nvme, lambda _: make_policy())
        self.actions: list[Action] = []
        """What the shell is to do, in order; taken out by the planner."""
        self.changed: set[bytes] = set()
        """Stored keys of blocks that came to or went from a tier since the planner
        last told the shell."""
        self.corrupt = 0
        """Blocks that were what was committed, and then were not."""
        self.mismatched = 0
        """Blocks that were not when the server looked for the first time."""
        self.stays = Stays()
        self.mirrors: list[Mirrors] = []
        """Of each GPU that has some."""
        self.nvme_on = nvme is not None
        self.forgetting = 0
        """Replicas that the NVMe tier is striking."""
        # Coldest first, per class of DRAM.
        self._dirty: dict[SpaceClass, OrderedDict[Replica, None]] = {}
        self._spared: set[Replica] = set()
        self._stores_output = False

    def use(self, use: Use) -> None:
        """What comes and is touched from now on is for this request."""
        self._stores_output = use.category == OUTPUT
        self.dram.use(use)
        if self.nvme is not None:
            self.nvme.use(use)

    def hint(self, session: Hashable, state: SessionState, expected_ms: float | None) -> None:
        """See the policies'."""
        self.dram.hint(session, state, expected_ms)
        if self.nvme is not None:
            self.nvme.hint(session, state, expected_ms)

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
        self._touch_saved(layout, replicas)

    def touch_read(self, layout: Layout, replicas: list[Replica]) -> None:
        """As `touch_run`, of blocks some of which are in a GPU's memory only, or were."""
        self.touch_run(layout, [r for r in replicas if not isinstance(r, Mirror)])
        self._touch_saved(layout, [r for r in replicas if isinstance(r, Mirror)])

    def _touch_saved(self, layout: Layout, replicas: Sequence[Replica]) -> None:
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
            self.discard(replica)

    # Coming and going

    def stored(self, replica: Replica) -> None:
        """A client has written it, and it became READY."""
        if self._stores_output:
            replica.block.uses = UNUSED_OUTPUT
        self.came(replica)

    def stored_again(self, block: Block) -> None:
        """A client has it too."""
        if not self._stores_output:
            block.uses = min(block.uses + 1, MOST_USES)
            self._want(block)
        self.touch(block)

    def came(self, replica: Replica) -> None:
        """It became READY."""
        self.changed.add(replica.block.stored_key)
        block = replica.block
        self.home_of(replica).insert(replica, self.class_of(replica))
        self.note_dirty(block)
        if replica.tier is Tier.NVME and is_ready(block.dram):
            self.dram.may_leave(block.dram, block.layout.dram_class)

    def asked_for(self, replicas: Iterable[Replica]) -> None:
        """Somebody reads replicas in DRAM."""
        self._count_uses(replicas)
        for mirrors in self.mirrors:
            mirrors.asked_for(replicas)
        if self._spared:
            for replica in self._spared.intersection(replicas):
                self._want(replica.block)
        for replica in self.foreseen.asked_for(replicas):
            self.let_go(replica)

    def asked_for_straight(self, mirror: Mirror) -> None:
        """Somebody reads what is in a GPU's memory and not in DRAM, or will be."""
        self._count_uses((mirror,))
        mirror.on.use(mirror)

    def _count_uses(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            block = replica.block
            if block.uses < MOST_USES:
                block.uses += 1
                if not block.uses:
                    self._want(block)

    def _want(self, block: Block) -> None:
        """It is worth a write after all, perhaps."""
        if block.dram is not None:
            self._spared.discard(block.dram)
            self.note_dirty(block)

    def goes(self, replica: Replica) -> None:
        """It is about to stop being READY."""
        self.foreseen.goes(replica)
        self.stays.goes(replica)
        self.changed.add(replica.block.stored_key)
        self.pool_of(replica).withdraw(replica, self.class_of(replica))
        for mirrors in self.mirrors:
            mirrors.goes(replica)
        if replica.tier is Tier.DRAM:
            self._spared.discard(replica)
            dirty = self._dirty.get(replica.block.layout.dram_class)
            if dirty is not None and replica in dirty:
                del dirty[replica]

    def drop_from_dram(self, replica: Replica) -> None:
        self.goes(replica)
        replica.apply(Event.DROP)
        replica.block.dram = None
        self.dram.vacate(replica)
        self.left_a_tier(replica.block)

    def drop_from_nvme(self, replica: Replica) -> None:
        self.goes(replica)
        replica.apply(Event.LEAVE)
        replica.block.nvme = None
        self._strike(replica)
        self.note_dirty(replica.block)
        self.left_a_tier(replica.block)

    def damaged(self, replica: Replica) -> None:
        """Its bytes are not what was committed: nobody may find it again."""
        if never_confirmed(replica):
            self.mismatched += 1
        else:
            self.corrupt += 1
        found = replica.state is State.READY
        if found:
            self.goes(replica)
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
                self.note_dirty(replica.block)
            self.left_a_tier(replica.block)

    def discard(self, replica: Replica) -> None:
        """A DOOMED replica that nobody uses any more."""
        if replica.tier is Tier.NVME:
            replica.apply(Event.LEAVE)
            self._strike(replica)
        else:
            replica.apply(Event.UNPINNED)
            self.home_of(replica).vacate(replica)

    def forgotten(self, replica: Replica) -> None:
        """The NVMe tier has struck a replica."""
        self.forgetting -= 1
        if replica.state is State.LEAVING:
            replica.apply(Event.LEFT)
            self.pool_of(replica).vacate(replica)

    def left_a_tier(self, block: Block) -> None:
        if block.dram is None and block.nvme is None and self.catalog.contains(block):
            self.catalog.remove(block)

    def _strike(self, replica: Replica) -> None:
        self.forgetting += 1
        self.actions.append(Forget(replica))

    # What is kept for somebody who is still to come

    def kept(self, space_class: SpaceClass) -> int:
        """Replicas of a class of DRAM that leave last."""
        order = self._orders.get(space_class)
        return 0 if order is None else order.kept

    def let_go(self, replica: Replica) -> None:
        """Whom it was kept for has come, or is not expected any more: it leaves first, unless
        it is used."""
        self._orders[replica.block.layout.dram_class].let_go(replica)

    # What is dirty

    def note_dirty(self, block: Block) -> None:
        """Bring the block's place in the dirty list up to date."""
        replica = block.dram
        if not self.nvme_on or replica is None or replica.state is not State.READY:
            return
        dirty = self._dirty.setdefault(block.layout.dram_class, OrderedDict())
        if block.nvme is not None:
            self._spared.discard(replica)
            dirty.pop(replica, None)
        elif replica not in dirty and replica not in self._spared and block.uses >= 0:
            dirty[replica] = None

    def spare(self, replica: Replica) -> None:
        """A dirty replica is not worth a write, as long as nobody asks for it."""
        space_class = replica.block.layout.dram_class
        del self._dirty[space_class][replica]
        self._spared.add(replica)
        self.dram.may_leave(replica, space_class)

    def is_spared(self, replica: Replica) -> bool:
        return replica in self._spared

    def is_dirty(self, replica: Replica) -> bool:
        return replica in self._dirty.get(replica.block.layout.dram_class, ())

    def dirty(self, space_class: SpaceClass) -> Mapping[Replica, None]:
        """The dirty replicas of a class of DRAM, coldest first."""
        return self._dirty.get(space_class, {})

    def dirty_classes(self) -> list[SpaceClass]:
        return list(self._dirty)

    def nothing_is_dirty(self) -> None:
        """There is nowhere to write it to any more."""
        self._dirty.clear()
        self._spared.clear()

    def worth(self, replica: Replica) -> float:
        """What its policy says that it is worth."""
        return self.pool_of(replica).worth(replica, self.class_of(replica))

    # Whose is what

    def home_of(self, replica: Replica) -> Home:
        return replica.on.straight if isinstance(replica, Mirror) else self.pool_of(replica)

    def pool_of(self, replica: Replica) -> Pool:
        """Of a replica in DRAM or on NVMe."""
        if replica.tier is Tier.DRAM:
            return self.dram
        assert self.nvme is not None
        return self.nvme

    def class_of(self, replica: Replica) -> SpaceClass:
        if replica.tier is not Tier.NVME:
            return replica.block.layout.dram_class
        assert replica.block.layout.nvme_class is not None
        return replica.block.layout.nvme_class

    def check_integrity(self) -> None:
        """Everything that is kept twice agrees; raises AssertionError."""
        self.catalog.check_integrity()
        self.dram.check_integrity(self.class_of)
        if self.nvme is not None:
            self.nvme.check_integrity(self.class_of)
        for block in self.catalog:
            for replica in (block.dram, block.nvme):
                if replica is not None and (
                    replica.block is not block
                    or self.pool_of(replica).space.at(replica.address) is not replica
                ):
                    raise AssertionError("a block names a replica that is not its own")
        if self.nvme_on:
            should = {
                block.dram
                for block in self.catalog
                if block.dram is not None and block.dram.state is State.READY
                and block.nvme is None and block.uses >= 0
            }  # fmt: skip
            listed = {r for dirty in self._dirty.values() for r in dirty}
            if should != listed | self._spared or listed & self._spared:
                raise AssertionError("the dirty list is not what is dirty")
        for mirrors in self.mirrors:
            mirrors.check_integrity()
        self.foreseen.check_integrity()


def _dram_order(
    make_policy: MakePolicy,
    space: Space,
    foreseen: Foreseen,
    orders: dict[SpaceClass, DramOrder],
    space_class: SpaceClass,
) -> DramOrder:
    order = orders[space_class] = DramOrder(
        make_policy,
        has_room=lambda: space.free_slots(space_class) > 0,
        is_kept=foreseen.is_kept,
    )
    return order
