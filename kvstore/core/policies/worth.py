"""Worth: evict what is least likely to be used again while it could still be held, as
learned for its class, weighed by its priority.

A class is a kind of request, the number of uses that a block has had, whether it ended
its prompt, and a level of priority. For each the likelihood of a use at each age is
estimated from a sample of all blocks, chosen by name and watched whether they are held
or not, so that what is let go early is still learned about (the estimator: E. L. Kaplan,
P. Meier, "Nonparametric estimation from incomplete observations", JASA 53, 1958; of a
class of which little was seen the figures are drawn towards those of all). The horizon
is the time for which a block stays after its last use, so it is short in a small tier
and long in a large one. Within a class the block used longest ago goes first, and within
a request the deepest, so an eviction looks at one replica a class.

A priority counts at most four times, or a quarter of, the default one. `mark` is (class,
time of the last use, uses).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import DEFAULT_PRIORITY, EvictionPolicy, Use
from kvstore.core.policies.ring import Ring

MOST_USES = 5
"""Uses told apart."""
MOST_KINDS = 8
"""Kinds of request told apart; the others are one."""
LEVELS = 4
"""Of priority, on either side of the default."""
WEIGHT = 4.0
"""Of the highest priority; of the lowest, its inverse."""

SAMPLE = 1 / 8
MOST_WATCHED = 8192
WATCHED_A_HELD = 8
"""How many times as many blocks as are held the sample is of, those that left included."""
LEARN_EVERY = 512
"""Uses in the sample between two estimates."""
SHORTEST = 2.0
"""The least time that a block is thought to be held for, in lives."""
KEPT = 0.99
"""Of what was counted, from one estimate to the next."""
PRIOR = 8.0
"""Blocks seen of a class until its own figures count as much as those of all."""

BUCKETS = 80
_MIX = 0x9E3779B97F4A7C15


class Class(NamedTuple):
    kind: int
    uses: int
    last: bool
    level: int


class Counts:
    """For each bucket of age: uses that came at it, and blocks that reached it unused."""

    def __init__(self) -> None:
        self.uses = [0.0] * BUCKETS
        self.reached = [0.0] * BUCKETS

    def end(self, age: int, used: bool) -> None:
        """A block was used again at this age, or is watched no more from then on."""
        bucket = _bucket(age)
        if used:
            self.uses[bucket] += 1
        self.reached[bucket] += 1

    def fade(self) -> None:
        self.uses = [count * KEPT for count in self.uses]
        self.reached = [count * KEPT for count in self.reached]

    def add(self, other: Counts) -> None:
        self.uses = [a + b for a, b in zip(self.uses, other.uses, strict=True)]
        self.reached = [a + b for a, b in zip(self.reached, other.reached, strict=True)]

    def hazard(self, prior: list[float], weight: float) -> list[float]:
        """The part that is used within each bucket of what comes to its begin."""
        hazard = [0.0] * BUCKETS
        alive = 0.0
        for bucket in range(BUCKETS - 1, -1, -1):
            alive += self.reached[bucket]
            uses = self.uses[bucket] + weight * prior[bucket]
            hazard[bucket] = min(uses / (alive + weight), 0.999)
        return hazard


class Worth(EvictionPolicy):
    by_chain = True

    def __init__(self) -> None:
        self._rings: dict[Class, Ring] = {}
        self._size = 0
        self._room = 0
        self._told = False
        self._now = 0
        self._life = 1.0
        """How long a block stays after its last use, lately."""
        self._kinds: dict[Hashable, int] = {}
        self._kind = 0
        self._level = 0
        self._last = False
        self._counts: dict[Class, Counts] = {}
        self._watched: OrderedDict[bytes, tuple[Class, int]] = OrderedDict()
        self._sample = int(SAMPLE * (1 << 32))
        self._until_learning = LEARN_EVERY
        self._worth: dict[Class, list[float]] = {}

    def use(self, use: Use) -> None:
        self._told = True
        self._now += 1
        kind = self._kinds.get(use.category)
        if kind is None:
            kind = len(self._kinds)
            if kind < MOST_KINDS:
                self._kinds[use.category] = kind
        self._kind = kind
        self._level = round((use.priority - DEFAULT_PRIORITY) * LEVELS / DEFAULT_PRIORITY)
        self._last = True

    def insert(self, replica: Replica) -> None:
        self._size += 1
        self._enter(replica, 1)

    def touch(self, replica: Replica) -> None:
        before, _, uses = replica.mark
        self._rings[before].discard(replica)
        self._enter(replica, min(uses + 1, MOST_USES))

    def remove(self, replica: Replica) -> None:
        self._room = max(self._size, self._room - self._room // 1024)
        self._size -= 1
        before, since, _ = replica.mark
        self._rings[before].discard(replica)
        replica.mark = None
        self._life += (self._now - since - self._life) / 1000

    def candidates(self) -> Iterator[Replica]:
        now, worth = self._now, self._worth
        fronts = [
            (worth[c][_bucket(now - oldest.mark[1])], number, oldest, ring, worth[c])
            for number, (c, ring) in enumerate(self._rings.items())
            if (oldest := ring.oldest) is not None
        ]
        heapify(fronts)
        while fronts:
            _, number, replica, ring, figures = fronts[0]
            following = ring.newer(replica)
            yield replica
            if following is None:
                heappop(fronts)
            else:
                score = figures[_bucket(now - following.mark[1])]
                heapreplace(fronts, (score, number, following, ring, figures))

    def __len__(self) -> int:
        return self._size

    def _enter(self, replica: Replica, uses: int) -> None:
        if not self._told:
            self._now += 1
        entered = Class(self._kind, uses, self._last, self._level)
        self._last = False
        ring = self._rings.get(entered)
        if ring is None:
            ring = self._rings[entered] = Ring()
            self._worth.setdefault(entered, _UNKNOWN)
        ring.append(replica)
        replica.mark = (entered, self._now, uses)
        stored_key = replica.block.stored_key
        if _spread(stored_key) < self._sample:
            self._watch(stored_key, entered)

    def _watch(self, stored_key: bytes, entered: Class) -> None:
        watched = self._watched.pop(stored_key, None)
        if watched is not None:
            self._end(*watched, used=True)
        self._watched[stored_key] = (entered, self._now)
        blocks = WATCHED_A_HELD * max(self._size, self._room, 64)
        while self._sample * blocks >> 32 > MOST_WATCHED:
            self._sample //= 2
            for key in [key for key in self._watched if _spread(key) >= self._sample]:
                del self._watched[key]
        while len(self._watched) > self._sample * blocks >> 32:
            self._end(*self._watched.popitem(last=False)[1], used=False)
        self._until_learning -= 1
        if not self._until_learning:
            self._until_learning = LEARN_EVERY
            self._learn()

    def _end(self, entered: Class, since: int, *, used: bool) -> None:
        counts = self._counts.get(entered)
        if counts is None:
            counts = self._counts[entered] = Counts()
        counts.end(self._now - since, used)

    def _learn(self) -> None:
        """Estimate anew what each class is worth at each age."""
        seen = {entered: Counts() for entered in self._rings}
        everything = Counts()
        for entered, counts in self._counts.items():
            counts.fade()
            seen.setdefault(entered, Counts()).add(counts)
        for entered, since in self._watched.values():
            seen.setdefault(entered, Counts()).end(self._now - since, used=False)
        for counts in seen.values():
            everything.add(counts)
        prior = everything.hazard([0.0] * BUCKETS, 1.0)
        oldest = max(b for b in range(BUCKETS) if everything.reached[b])
        for entered, counts in seen.items():
            weight = WEIGHT ** (entered.level / LEVELS)
            densities = _densities(counts.hazard(prior, PRIOR), oldest, self._life * SHORTEST)
            self._worth[entered] = [weight * density for density in densities]


def _densities(hazard: list[float], oldest: int, shortest: float) -> list[float]:
    """The most uses for the time held that can be had from each bucket of age on, by
    holding a block until it is used or until some later bucket, whichever is best, for
    `shortest` at least.
    Buckets above `oldest` have not been seen."""
    densities = [0.0] * BUCKETS
    for bucket in range(oldest + 1):
        alive, time, best = 1.0, 0.0, 0.0
        for later in range(bucket, oldest + 1):
            used = alive * hazard[later]
            time += (_AGES[later + 1] - _AGES[later]) * (alive - used / 2)
            alive -= used
            if _AGES[later + 1] - _AGES[bucket] >= shortest or later == oldest:
                best = max(best, (1 - alive) / time)
        densities[bucket] = best
    return densities


def _bucket(age: int) -> int:
    """Two an octave."""
    if age < 2:
        return age
    length = age.bit_length()
    return min(2 * length - 2 + (age >> (length - 2) & 1), BUCKETS - 1)


def _spread(stored_key: bytes) -> int:
    """32 bits of a name, mixed."""
    return (int.from_bytes(stored_key[-8:], "big") * _MIX >> 32) & 0xFFFFFFFF


_AGES = [b if b < 2 else (2 + (b & 1)) << (b // 2 - 1) for b in range(BUCKETS + 1)]
"""The least age of each bucket."""

_UNKNOWN = [WEIGHT + 1 / (1 + age) for age in _AGES]
"""Of what nothing is known yet the oldest goes first, after all else."""
