"""Trials: which rule would save most, tried on a small tier of sampled blocks.

Every rule has a tier of its own, as much smaller as the sample is of all blocks, so
that it holds what the rule would hold (C. Waldspurger et al., "Cache modeling and
optimization using miniature simulations", USENIX ATC 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from kvstore.core.policies.worth.groups import Group
from kvstore.core.policies.worth.shelves import Grade, Shelves


class Seen(NamedTuple):
    """A use of a block of the sample."""

    name: bytes
    depth: int
    last: bool
    level: int
    until_ms: float


class Sampled:
    __slots__ = ("depth", "mark", "name")

    def __init__(self, seen: Seen) -> None:
        self.name = seen.name
        self.depth = seen.depth
        self.mark: Group | None = None


class Trial:
    def __init__(self, grade: Grade) -> None:
        self.shelves = Shelves(_depth, grade)
        self._held: dict[bytes, Sampled] = {}
        self.saved = 0.0
        """What hits saved, lately."""

    def use(self, seen: Seen, count: int, shared: bool, worth: float) -> None:
        """`worth`: what a hit is; the others as the observer knows them."""
        shelves = self.shelves
        item = self._held.get(seen.name)
        old = None
        if item is None:
            item = self._held[seen.name] = Sampled(seen)
        else:
            self.saved += worth
            old = item.mark
            assert old is not None
            if old.since == shelves.moment.now:
                return
        group = shelves.group(count, seen.last, shared, seen.level, seen.until_ms)
        if old is None:
            shelves.enter(item, group)
        else:
            shelves.move([item], old, group)

    def keep(self, most: int) -> None:
        """Let go of what there is beyond so many."""
        for item in list(islice(self.shelves, max(0, self.shelves.size - most))):
            self.shelves.leave(item)
            del self._held[item.name]

    def thin(self, kept: Callable[[bytes], bool]) -> None:
        """Forget those that are not `kept(name)`."""
        for name in [name for name in self._held if not kept(name)]:
            self.shelves.leave(self._held.pop(name))


def _depth(item: Sampled) -> int:
    return item.depth
