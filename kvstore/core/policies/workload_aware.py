"""The workload-aware policy of "KVCache Cache in the Wild": evict what is least likely
to be used again while it could still be held, as learned for its category.

Source: J. Wang et al., "KVCache Cache in the Wild: Characterizing and Optimizing KVCache
Cache at a Large Cloud Provider", USENIX ATC 2025. A category is a kind of request and
a turn; the time to the next use is taken to be exponential within one, so the least
likely of a category is the one used longest ago, and an eviction looks at one replica a
category. Of equals the deepest goes first. Where the turn is not known it is the
number of uses that a replica has had. `mark` is (category, time of the last use, uses).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from math import exp

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy, Use
from kvstore.core.policies.ring import Ring

MOST_TURNS = 8
MOST_CATEGORIES = 64
"""Kinds of request told apart; the others are one."""
WINDOW = 5_000
"""Uses of a category that its figures are of, by and large."""


class Category:
    """The replicas whose last use was of one kind, and what came of such uses."""

    def __init__(self) -> None:
        self.ring = Ring()
        self.uses = 2.0
        self.reuses = 1.0
        self.wait = 0.0
        """Time from use to use, all of `reuses` together."""

    def used(self) -> None:
        self.uses += 1
        if self.uses > WINDOW:
            self.uses /= 2
            self.reuses /= 2
            self.wait /= 2

    def likelihood(self, idle: float, life: float) -> float:
        """Of a use between `idle` and `idle + life` after the last one."""
        mean = max(self.wait / self.reuses, 1e-6)
        reused = min(self.reuses / self.uses, 1.0)
        return reused * (exp(-idle / mean) - exp(-(idle + life) / mean))


Mark = tuple[Category, float, int]


class WorkloadAware(EvictionPolicy):
    by_chain = True

    def __init__(self) -> None:
        self._categories: dict[Hashable, Category] = {}
        self._kinds: set[Hashable] = set()
        self._kind: Hashable = None
        self._now = 0.0
        self._told = False
        self._life = 0.0
        """For how long a replica is held after its last use, lately."""
        self._size = 0
        # What left lately, oldest first: its next use is one that was missed.
        self._gone: OrderedDict[bytes, Mark] = OrderedDict()

    def use(self, use: Use) -> None:
        self._told = True
        self._now = use.now_ms
        if use.category not in self._kinds and len(self._kinds) < MOST_CATEGORIES:
            self._kinds.add(use.category)
        self._kind = use.category if use.category in self._kinds else None

    def insert(self, replica: Replica) -> None:
        self._size += 1
        left = self._gone.pop(replica.block.stored_key, None)
        if left is None:
            self._enter(replica, 1)
        else:
            self._used_again(replica, left)

    def touch(self, replica: Replica) -> None:
        replica.mark[0].ring.discard(replica)
        self._used_again(replica, replica.mark)

    def remove(self, replica: Replica) -> None:
        before, since, _ = replica.mark
        before.ring.discard(replica)
        self._gone[replica.block.stored_key] = replica.mark
        if len(self._gone) > self._size:
            self._gone.popitem(last=False)
        replica.mark = None
        self._size -= 1
        self._life += (self._now - since - self._life) / 100

    def candidates(self) -> Iterator[Replica]:
        fronts = [(c, oldest) for c in self._categories.values() if (oldest := c.ring.oldest)]
        fronts.sort(key=lambda front: self._likelihood(*front))
        for category, _ in fronts:
            yield from category.ring

    def __len__(self) -> int:
        return self._size

    def _likelihood(self, category: Category, oldest: Replica) -> tuple[float, int]:
        idle = self._now - oldest.mark[1]
        return category.likelihood(idle, max(self._life, 1e-6)), -oldest.block.depth

    def _used_again(self, replica: Replica, mark: Mark) -> None:
        before, since, uses = mark
        before.reuses += 1
        before.wait += self._now - since
        self._enter(replica, min(uses + 1, MOST_TURNS))

    def _enter(self, replica: Replica, uses: int) -> None:
        if not self._told:
            self._now += 1
        category = self._categories.setdefault((self._kind, uses), Category())
        category.used()
        category.ring.append(replica)
        replica.mark = (category, self._now, uses)
