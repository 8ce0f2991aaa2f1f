"""Room in a GPU's memory: who is in it, and the extents that the store has of it.

Extents are taken while others have plenty to spare. When these leave less than is reserved for
them, extents are given back until it is free again, the one with the coldest mirror first. All
that is there goes with it, whoever uses it or is about to write it, but for what the store copies
there from DRAM (`written`), which is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kvstore.core.actions import Mirrored, Unmirrored
from kvstore.core.catalog import Replica
from kvstore.core.lifecycle import Event, State
from kvstore.core.places.shares import NO_PLACE, Mirror, Share
from kvstore.core.space import Space, SpaceClass

if TYPE_CHECKING:
    from kvstore.core.places.holdings import Holdings

SETTLES_NS = 500_000_000
"""From giving memory back until others have it: readers look at their own time."""
CALM_NS = 5_000_000_000
"""After pressure, until more memory is taken."""


class VramRoom:
    """Of one GPU."""

    shares: Sequence[Share]
    """What the memory is shared among; whose mirrors are cold for pressure first is first."""

    def __init__(self, holdings: Holdings, space: Space, reserve_bytes: int) -> None:
        self.space = space
        self.of: dict[Replica, Mirror] = {}
        """Of each replica, in DRAM or on NVMe, the mirror that it has or is to have."""
        self.written: set[Mirror] = set()
        """What the store copies here from DRAM."""
        self.too_small: set[SpaceClass] = set()
        """Classes in which somebody found no place."""
        self.unsafe: set[int] = set()
        """Extents that somebody may be writing into whom nobody can wait for."""
        self.evictions = 0
        self.given_back = 0
        """Extents, to pressure."""
        self._holdings = holdings
        self._reserve_bytes = reserve_bytes
        self._opening: SpaceClass | None = None
        # Of the GPU, when last looked.
        self._free_bytes: int | None = None
        self._settles_ns = self._calm_ns = 0

    @property
    def lacking(self) -> bool:
        """When last looked, others had left less than is reserved for them."""
        return self._free_bytes is not None and self._free_bytes < self._reserve_bytes

    # Mirrors

    def found(self, mirror: Mirror) -> None:
        """It is READY: from now on it may be found."""
        mirror.share.append(mirror)
        self._holdings.actions.append(Mirrored(mirror.on, mirror))

    def drop(self, mirror: Mirror) -> None:
        """Whoever looks for it finds none from now on. What is being written keeps its place
        until that has ended."""
        del self.of[mirror.source]
        if mirror.state is not State.READY:
            mirror.apply(Event.ABANDON)
            return
        mirror.share.discard(mirror)
        self._holdings.actions.append(Unmirrored(mirror.on, mirror))
        mirror.apply(Event.DROP)
        self._free(mirror)

    def evict(self, mirror: Mirror) -> None:
        """For another."""
        self.evictions += 1
        self.drop(mirror)

    def never_came(self, mirror: Mirror) -> None:
        """It is GONE, was never READY, and nobody writes there any more."""
        assert mirror.state is State.GONE
        if self.of.get(mirror.source) is mirror:
            del self.of[mirror.source]
        if mirror.address != NO_PLACE:
            self._free(mirror)

    def lose_place(self, mirror: Mirror) -> None:
        """Its extent goes, while it is being written there."""
        if mirror.state is State.FILLING:
            self.drop(mirror)
        self._free(mirror)
        mirror.address = NO_PLACE

    def _free(self, mirror: Mirror) -> None:
        mirror.share.held_bytes -= mirror.space_class.slot_bytes
        self.space.free(mirror.address)

    # Extents

    def is_opening(self, space_class: SpaceClass) -> bool:
        """Whatever is free in a class could be in an extent that may never be there."""
        return self._opening == space_class

    def may_grow(self, space_class: SpaceClass, now_ns: int) -> bool:
        """There is an extent to be had for the class, and others have so much to spare that it
        need not go back soon."""
        has_none = not self.space.extents_of(space_class)
        there_is = has_none or self.space.unopened_slots(space_class) > 0
        return there_is and self.has_spare(self.space.extent_bytes, now_ns)

    def has_spare(self, nbytes: int, now_ns: int) -> bool:
        """So much may be taken: others have twice that beside what is reserved for them."""
        free_bytes, needed = self._free_bytes, self._reserve_bytes + 2 * nbytes
        return free_bytes is not None and free_bytes >= needed and now_ns >= self._calm_ns

    def grow(self, space_class: SpaceClass, opens: list[int], closes: list[int]) -> None:
        """One more extent for a class, if one is spare; its first, of the class that has most."""
        extent = self.space.open_extent(space_class)
        if extent is None and not self.space.extents_of(space_class):
            coldest = self._coldest_extent()
            if coldest is not None:
                self._close(coldest)
                closes.append(coldest)
                extent = self.space.open_extent(space_class)
        if extent is not None:
            self._opening = space_class
            opens.append(extent)

    def opened(self) -> None:
        """The extent that was asked for is there."""
        self._opening = None

    def not_opened(self, extent: int, now_ns: int) -> None:
        """There was no memory for an extent after all, and its copies have ended badly: no more
        is taken for a while."""
        self._opening = None
        self._close(extent)
        self.had_no_memory(now_ns)

    def had_no_memory(self, now_ns: int) -> None:
        """There was less than it had looked like."""
        self._calm_ns = now_ns + CALM_NS

    def give_back(self, free_bytes: int, now_ns: int, *, nobody_reads: bool) -> list[int]:
        """Extents to close: those that nobody may be given, as many as others lack, and all
        that nobody reads."""
        self._free_bytes = free_bytes
        closed = [extent for extent in self.unsafe if not self._is_written(extent)]
        for extent in closed:
            self._close(extent)
        lacking = self._reserve_bytes - free_bytes
        if lacking > 0:
            self._calm_ns = now_ns + CALM_NS
        if nobody_reads:
            lacking = self.space.capacity_bytes
        elif now_ns < self._settles_ns:
            return closed
        given_back = 0
        while given_back * self.space.extent_bytes < lacking:
            coldest = self._coldest_extent()
            if coldest is None:
                break
            self._close(coldest)
            closed.append(coldest)
            given_back += 1
        if given_back:
            self.given_back += given_back
            self._settles_ns = now_ns + SETTLES_NS
        return closed

    def give_all_back(self) -> None:
        """Nothing is written here from DRAM any more, and nothing is to be."""
        self.unsafe.clear()
        self.too_small.clear()
        for resident in list(self.space.residents()):
            assert isinstance(resident, Mirror)
            resident.share.extent_goes(resident)
        for space_class in self.space.classes():
            for extent in self.space.empty_extents(space_class):
                self.space.close_extent(extent)

    def _close(self, extent: int) -> None:
        for resident in self.space.residents_of(extent):
            assert isinstance(resident, Mirror)
            resident.share.extent_goes(resident)
        self.unsafe.discard(extent)
        self.space.close_extent(extent)

    def _coldest_extent(self) -> int | None:
        """Of the class that has most; none that the store is copying into from DRAM."""
        for space_class in sorted(self.space.classes(), key=self.space.extents_of, reverse=True):
            for extent in self._extents_of(space_class):
                if not self._is_written(extent):
                    return extent
        return None

    def _is_written(self, extent: int) -> bool:
        return not self.written.isdisjoint(self.space.residents_of(extent))

    def _extents_of(self, space_class: SpaceClass) -> Iterator[int]:
        """Some of a class's extents: those nobody is in, then by the coldest of each share, then
        by what somebody uses, and those where something is still to come."""
        yield from self.space.empty_extents(space_class)
        for in_use in (False, True):
            for share in self.shares:
                for mirror in share.coldest(space_class, in_use=in_use):
                    yield self.space.extent_of(mirror.address)
        for share in self.shares:
            for mirror in list(share.coming()):
                if mirror.space_class == space_class and mirror.address != NO_PLACE:
                    yield self.space.extent_of(mirror.address)

    # For integrity checks

    def check_room(self) -> None:
        """Raises AssertionError."""
        self.space.check_integrity()
        listed = [mirror for share in self.shares for mirror in share.ready()]
        if {m for m in self.of.values() if m.state is State.READY} != set(listed):
            raise AssertionError("a mirror is wrongly listed")
        for share in self.shares:
            there = {m for m in share.coming() if m.address != NO_PLACE}
            there.update(share.ready())
            if any(mirror.share is not share for mirror in there):
                raise AssertionError("a mirror is in another share")
            if share.held_bytes != sum(mirror.space_class.slot_bytes for mirror in there):
                raise AssertionError("what a share holds is miscounted")
