"""Trials: which rule would save most, tried on a small tier of sampled blocks.

Every rule has a tier of its own, as much smaller as the sample is of all blocks, so
that it holds what the rule would hold (C. Waldspurger et al., "Cache modeling and
optimization using miniature simulations", USENIX ATC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import attrgetter

from kvstore.core.policies.worth.groups import Group, Mark
from kvstore.core.policies.worth.learning import Seen
from kvstore.core.policies.worth.shelves import Grade, Shelves


class Sampled:
    __slots__ = ("depth", "mark", "name")

    def __init__(self, name: bytes, depth: int) -> None:
        self.name = name
        self.depth = depth
        self.mark: Mark | None = None


class Trial:
    def __init__(self, grade: Grade) -> None:
        self.shelves = Shelves(_depth, grade)
        self._held: dict[bytes, Sampled] = {}
        self.saved = 0.0
        """What hits saved, lately."""

    def use(
        self, seen: Seen, names: Sequence[bytes], count: int, shared: bool, worth: float
    ) -> None:
        """Some of what was seen, no name twice. `worth`: what a hit is; the others as the
        observer knows them."""
        shelves = self.shelves
        for old, items in self._alike(seen, names):
            if old is not None:
                self.saved += worth * len(items)
                if old.since == shelves.moment.now:
                    continue
            group = shelves.group(count, seen.last, shared, seen.level, seen.until_ms)
            if old is None:
                shelves.enter(items, group)
                self._held.update((item.name, item) for item in items)
            else:
                shelves.move(items, old, group)

    def _alike(
        self, seen: Seen, names: Sequence[bytes]
    ) -> Iterator[tuple[Group | None, list[Sampled]]]:
        """What these stand for, by groups; None: it is not held."""
        held = self._held
        at = 0
        while at < len(names):
            item = held.get(names[at])
            if item is None or item.mark is None:
                begin, at = at, at + 1
                while at < len(names) and names[at] not in held:
                    at += 1
                yield None, [Sampled(name, seen.depths[name]) for name in names[begin:at]]
                continue
            mark = item.mark
            group = mark.group
            end = at + group.live
            if (
                group.items[0] is item
                and len(group.items) == group.live <= len(names) - at
                and list(map(_name, group.items)) == names[at:end]
            ):
                at = end
                yield group, group.items
                continue
            items = []
            while item is not None and item.mark is mark:
                items.append(item)
                at += 1
                item = held.get(names[at]) if at < len(names) else None
            yield group, items

    def keep(self, most: int) -> None:
        """Let go of what there is beyond so many."""
        beyond = self.shelves.size - most
        if beyond > 0:
            for item in list(islice(self.shelves, beyond)):
                self.shelves.leave(item)
                del self._held[item.name]

    def thin(self, kept: Callable[[bytes], bool]) -> None:
        """Forget those that are not `kept(name)`."""
        for name in [name for name in self._held if not kept(name)]:
            self.shelves.leave(self._held.pop(name))


_depth = attrgetter("depth")
_name = attrgetter("name")
