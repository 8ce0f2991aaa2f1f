"""What is read from NVMe straight into a GPU's memory (docs/decisions/0019-straight-reads.md).

A block that is on NVMe only, asked for by an engine whose worker reads on one GPU, is given a
place there instead of a slot in DRAM. It is a mirror like any other, but for what it is a copy of:
it comes after its replica on NVMe, and goes with it. A lease that names it keeps the order of
things, not the memory: pressure takes that at any moment, and who reads finds it gone.

A place of which the extent is given back meanwhile is nobody's; what is read into it ends badly.
Any other is nobody else's before the transfer into it has ended.

Of the memory it takes `STRAIGHT_SHARE` at most until it is asked for again, and what is not hot
takes `GUESTS_SHARE` at most, so that what is hot outlives a flood. What is leased makes no room
for others of its kind: who asks for much would lose the first of it to the last.

Drives write into slots beside that memory, which are there while blocks may be read straight for
somebody, and others have enough. They come and go as extents do (`core.places.vram_room`). Without
them blocks come up into DRAM; what was read straight before is found as ever.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvstore.core.catalog import Layout, Replica
from kvstore.core.lifecycle import State
from kvstore.core.places.shares import Mirror, Share, class_of
from kvstore.core.space import SpaceClass

if TYPE_CHECKING:
    from kvstore.core.places.mirrors import Mirrors

STRAIGHT_SHARE = 0.5
"""Of the memory there may be, for what was read straight and asked for once."""
GUESTS_SHARE = 0.75
"""Of it, for that and what was handed over together."""


class Slots(enum.Enum):
    """What is to be of the slots that drives write into."""

    UNUSED = enum.auto()
    """They are to go back: nobody reads there."""
    SHORT = enum.auto()
    """They are to go back, or not to be taken: others have not enough."""
    TAKEN = enum.auto()


class StraightReads(Share):
    """Of one GPU."""

    def __init__(self, on: Mirrors) -> None:
        super().__init__(on)
        self.slots = Slots.UNUSED
        self.slots_bytes = 0
        """The shell's: what they take of the GPU's memory together; 0: nothing."""
        self.has_slots = True
        """The shell's: they are there."""
        self._coming: set[Mirror] = set()

    def bring(self, source: Replica, now_ns: int) -> Mirror | None:
        """A place for what is READY on NVMe; None where there is no room, or it is not read
        straight here (any more)."""
        on, space_class = self._on, class_of(source.block)
        if not self.has_slots or not on.reads_straight(source.block.layout):
            return None
        if on.is_opening(space_class):
            return None
        if self._is_full(space_class):
            leaves = self.first(space_class)
            if leaves is None:
                return None
            on.evict(leaves)
        place = self.place(source)
        if place is None and not on.may_grow(space_class, now_ns):
            leaves = self.first(space_class) or on.hot.first(space_class)
            if leaves is not None:
                on.evict(leaves)
                place = self.place(source)
        if place is None:
            on.too_small.add(space_class)
        else:
            self._coming.add(place)
        return place

    def _is_full(self, space_class: SpaceClass) -> bool:
        capacity, held = self._on.space.capacity_bytes, self.held_bytes + space_class.slot_bytes
        guests = held + self._on.landings.held_bytes
        return held > STRAIGHT_SHARE * capacity or guests > GUESTS_SHARE * capacity

    @property
    def may_grow(self) -> bool:
        """It is used, and has not all that it may have."""
        most = STRAIGHT_SHARE * self._on.space.capacity_bytes
        return self.has_slots and self._on.straight_bytes > 0 and self.held_bytes < most

    # Slots

    @property
    def idle(self) -> bool:
        """There are to be no slots, and there is no need to look whether there may be."""
        return self.slots is Slots.UNUSED and not self._wants_slots

    @property
    def _wants_slots(self) -> bool:
        return self.slots_bytes > 0 and self._on.is_read_straight

    def look(self, now_ns: int) -> None:
        """What is to be of the slots, as others' memory is by now."""
        if not self._wants_slots:
            self.slots = Slots.UNUSED
        elif self.slots is Slots.TAKEN:
            self.slots = Slots.SHORT if self._on.lacking else Slots.TAKEN
        else:
            spare = self._on.has_spare(self.slots_bytes, now_ns)
            self.slots = Slots.TAKEN if spare else Slots.SHORT

    def not_taken(self, now_ns: int) -> None:
        """There was no memory for the slots after all: they are tried again after a while."""
        if self.slots is Slots.TAKEN:
            self.slots = Slots.SHORT
            self._on.had_no_memory(now_ns)

    # As of a pool (`core.places.pool`), what becomes of those that come

    def insert(self, replica: Replica, space_class: SpaceClass) -> None:
        """The replica became READY."""
        assert isinstance(replica, Mirror)
        self._coming.discard(replica)
        self._on.found(replica)

    def vacate(self, replica: Replica) -> None:
        """The replica is GONE, and was never READY."""
        assert isinstance(replica, Mirror)
        self._coming.discard(replica)
        self._on.never_came(replica)

    def used(self, mirror: Mirror) -> None:
        """What is asked for again is worth its place by itself."""
        self.pass_on(mirror, self._on.hot)

    def coming(self) -> Iterable[Mirror]:
        """Those that are being read, or wait for it; and those whose place is gone."""
        return self._coming

    def extent_goes(self, mirror: Mirror) -> None:
        if mirror.state is State.READY:
            self._on.drop(mirror)
        else:
            self._on.lose_place(mirror)


def whose_memory(all_mirrors: Iterable[Mirrors], layout: Layout, reader: bytes) -> Mirrors | None:
    """Where blocks of a layout are read under that name: None where that is not one GPU, and
    where they are not read straight."""
    named = [mirrors for mirrors in all_mirrors if mirrors.is_read_as(layout, reader)]
    return named[0] if len(named) == 1 and named[0].reads_straight(layout) else None
