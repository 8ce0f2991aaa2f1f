"""Extents as room: a class gets one more, or one of another class's.

Each class (tenant and slot size) may grow at the cost of others until all have equal
shares of a tier's extents; beyond that it makes room among its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import islice

from kvstore.core.actions import CloseExtent, OpenExtent
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.pool import Pool
from kvstore.core.space import SpaceClass

EXTENTS_TRIED = 8
"""Extents looked at for one to take over from another class."""


class Room(ABC):
    """What room for a replica in DRAM and in NVMe have in common."""

    def __init__(self, holdings: Holdings, pool: Pool) -> None:
        self._holdings = holdings
        self._pool = pool

    def _grow(self, space_class: SpaceClass) -> bool:
        """One more extent for the class, if one is spare or empty."""
        space, tier, actions = self._pool.space, self._pool.tier, self._holdings.actions
        number = space.open_extent(space_class)
        if number is None:
            empty = space.empty_extent(space_class)
            if empty is None:
                return False
            space.close_extent(empty)
            actions.append(CloseExtent(tier, empty))
            number = space.open_extent(space_class)
            assert number is not None
        actions.append(OpenExtent(tier, number, space_class.slot_bytes))
        return True

    def _below_share(self, space_class: SpaceClass) -> bool:
        space = self._pool.space
        mine = space.extents_of(space_class)
        most = max((space.extents_of(c) for c in space.classes()), default=0)
        return most > mine + 1 or (mine == 0 and most > 0)

    def _take_over(self, space_class: SpaceClass) -> bool:
        """Empty an extent of the class that has most. False where there is none to be
        had, and where that is still to come."""
        space = self._pool.space
        donors = [
            c for c in space.classes() if c != space_class and space.may_replace(c, space_class)
        ]
        donor = max(donors, key=space.extents_of, default=None)
        if donor is None:
            return False
        tried: set[int] = set()
        for replica in list(islice(self._pool.candidates(donor), 64 * EXTENTS_TRIED)):
            number = space.extent_of(replica.address)
            if number in tried:
                continue
            if len(tried) == EXTENTS_TRIED:
                break
            tried.add(number)
            if self._empty(number):
                return True
            if self._emptying():
                break
        return False

    @abstractmethod
    def _empty(self, number: int) -> bool:
        """Drop all that is in an extent, or begin to. Nothing is done to one whose
        blocks are in use."""

    @abstractmethod
    def _emptying(self) -> bool:
        """Some extent will be empty by and by."""
