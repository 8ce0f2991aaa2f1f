"""What is handed over, and lands in a GPU's memory (docs/decisions/0018-handed-over-on-gpus.md).

Whoever writes a block's slot in DRAM writes the block on the GPU of who is to read it too, into a
place that it is granted, and says so in its commit. Of the memory it takes `LANDED_SHARE` at most:
the oldest goes for the newest, and what nobody came for in `LANDED_NS` goes. What more than one
come for is hot.

An extent may go while somebody writes into a place there: they write into memory that nobody
reads, and their commit finds the place gone. Whoever is late, or went without a word, may have
copies under way that nobody can wait for, so its places are never anybody else's: their extents
go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from kvstore.core.catalog import Layout, Replica
from kvstore.core.lifecycle import Event
from kvstore.core.places.shares import NO_PLACE, Mirror, Share, class_of

if TYPE_CHECKING:
    from kvstore.core.places.mirrors import Mirrors

HOT_USES = 2
"""A block that is asked for so often is worth a place by itself."""
LANDED_SHARE = 0.5
"""Of the memory there may be, for what was handed over and is not hot."""
LANDED_NS = 30_000_000_000


class Landings(Share):
    """Of one GPU."""

    def __init__(self, on: Mirrors) -> None:
        super().__init__(on)
        self.hits = 0
        """Blocks that were asked for while they were here."""
        self.nbytes = 0
        """That have landed."""
        self.no_room = 0
        self.no_share = 0
        """Places that were asked for and not granted."""
        self._granted: dict[Replica, Mirror] = {}
        # Places whose writers are late or gone.
        self._lost: set[Mirror] = set()

    def land(self, layout: Layout, slots: Sequence[Replica], now_ns: int) -> list[int]:
        """Places for blocks that are to be written into slots in DRAM, for whoever reads them
        here: an address for each slot, `NO_PLACE` where there is no room."""
        addresses = [self._grant(slot, now_ns) for slot in slots]
        if self._on.space.open_slots(layout.dram_class) < len(slots):
            self._on.too_small.add(layout.dram_class)
        return addresses

    def _grant(self, slot: Replica, now_ns: int) -> int:
        granted = self._granted.get(slot)
        if granted is None:
            granted = self._place_to_land(slot, now_ns)
            if granted is None:
                return NO_PLACE
            self._granted[slot] = granted
        return granted.address

    def _place_to_land(self, slot: Replica, now_ns: int) -> Mirror | None:
        on, space_class = self._on, class_of(slot.block)
        if on.is_opening(space_class):
            self.no_room += 1
            return None
        oldest = self.first(space_class)
        if self.held_bytes + space_class.slot_bytes > self._most_bytes:
            if oldest is None:
                self.no_share += 1
                return None
            on.evict(oldest)
        place = self.place(slot)
        if place is None and not on.may_grow(space_class, now_ns):
            shares = (on.straight, self, on.hot)
            leaves = next(filter(None, (share.first(space_class) for share in shares)), None)
            if leaves is not None:
                on.evict(leaves)
                place = self.place(slot)
        if place is None:
            self.no_room += 1
        return place

    @property
    def _most_bytes(self) -> float:
        return LANDED_SHARE * self._on.space.capacity_bytes

    @property
    def may_grow(self) -> bool:
        """It has not all that it may have."""
        return self.held_bytes < self._most_bytes

    def landed(self, slot: Replica, addresses: Collection[int], now_ns: int) -> None:
        """A slot in DRAM was committed. Its block is here too if its place, as it is now, is
        among those that have been written."""
        mirror = self._granted.pop(slot, None)
        if mirror is None:
            return
        if mirror.address not in addresses:
            self._take_back(mirror)
            return
        mirror.landed_ns = now_ns
        mirror.apply(Event.FILLED)
        self._on.found(mirror)
        self.nbytes += mirror.block.layout.block_bytes

    def not_written(self, slot: Replica, event: Event) -> None:
        """The writer of a slot in DRAM ended without a commit: it gave it up, or is late or gone
        (and may be writing still)."""
        mirror = self._granted.pop(slot, None)
        if mirror is None:
            return
        if event is Event.ABORT:
            self._take_back(mirror)
            return
        del self._on.of[slot]
        self.held_bytes -= mirror.space_class.slot_bytes
        self._lost.add(mirror)
        self._on.unsafe.add(self._on.space.extent_of(mirror.address))

    def _take_back(self, place: Mirror) -> None:
        """One that was granted, and is not any more."""
        place.apply(Event.FILL_FAILED)
        self._on.never_came(place)

    def used(self, mirror: Mirror) -> None:
        """What more than one read is worth its place by itself."""
        self.hits += 1
        if mirror.block.uses >= HOT_USES:
            self.pass_on(mirror, self._on.hot)

    def forget_old(self, now_ns: int) -> None:
        """What nobody came for."""
        for space_class in list(self._ready):
            oldest = self.first(space_class)
            while oldest is not None and oldest.landed_ns + LANDED_NS <= now_ns:
                self._on.drop(oldest)
                oldest = self.first(space_class)

    def coming(self) -> Iterable[Mirror]:
        return self._granted.values()

    def lost(self) -> Iterable[Mirror]:
        """Places that are never anybody else's."""
        return self._lost

    def extent_goes(self, mirror: Mirror) -> None:
        if mirror in self._lost:
            self._lost.discard(mirror)
            self._on.space.free(mirror.address)
        elif self._granted.pop(mirror.source, None) is mirror:
            self._take_back(mirror)
        else:
            self._on.drop(mirror)
