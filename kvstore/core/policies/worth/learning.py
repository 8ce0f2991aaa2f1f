"""What is learned of the blocks of a sample: how likely a use is, by traits and age.

The sample is watched whether its blocks are held or not, so what is let go early is
still learned about. The estimator is that of E. L. Kaplan, P. Meier, "Nonparametric
estimation from incomplete observations", JASA 53, 1958, with blocks that come under
observation late, at the age at which their traits changed. Figures of traits of which
little was seen are drawn towards those of what is alike, and these towards those of all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

from kvstore.core.policies.worth.ages import AGES, BUCKETS, bucket_of
from kvstore.core.policies.worth.groups import Group, Grouping, Traits, runs

KEPT = 0.98
"""Of what was counted, from one estimate to the next."""
PRIOR = 16.0
"""Blocks seen until the own figures count as much as those of what is alike."""


MOST_TRAITS = 4096
"""Of which it is remembered what they are known by."""


class Seen(NamedTuple):
    """Uses of blocks of the sample that this request used alike, the deepest first."""

    depths: dict[bytes, int]
    """In their chain, by name."""
    last: bool
    level: int
    until_ms: float


class Counts:
    """For each bucket of age: uses that came at it, and blocks that reached it unused
    (less those that came under observation only after it)."""

    __slots__ = ("reached", "uses")

    def __init__(self) -> None:
        self.uses = [0.0] * BUCKETS
        self.reached = [0.0] * BUCKETS

    def fade(self) -> None:
        self.uses = [count * KEPT for count in self.uses]
        self.reached = [count * KEPT for count in self.reached]

    def copy(self) -> Counts:
        copy = Counts.__new__(Counts)
        copy.uses = self.uses.copy()
        copy.reached = self.reached.copy()
        return copy

    def add(self, other: Counts) -> None:
        self.uses = [a + b for a, b in zip(self.uses, other.uses, strict=True)]
        self.reached = [a + b for a, b in zip(self.reached, other.reached, strict=True)]

    def hazard(self, prior: list[float], weight: float) -> list[float]:
        """The part that is used within each bucket of what comes to its begin."""
        hazard = [0.0] * BUCKETS
        alive = 0.0
        for bucket in range(BUCKETS - 1, -1, -1):
            alive = max(0.0, alive + self.reached[bucket])
            uses = self.uses[bucket] + weight * prior[bucket]
            hazard[bucket] = min(uses / (alive + weight), 0.999)
        return hazard


class Observer(Grouping):
    def __init__(self) -> None:
        super().__init__()
        # By the side of the default that their priority is on, so that a flood of what
        # matters little does not end the watch on what matters.
        self._watched: list[OrderedDict[bytes, Group]] = [OrderedDict() for _ in range(3)]
        self._counts: dict[Traits, Counts] = {}
        self._counts_of: dict[Traits, Counts] = {}
        """The same, by all traits."""

    def __len__(self) -> int:
        return sum(map(len, self._watched))

    def see(self, seen: Seen) -> Iterator[tuple[list[bytes], int, bool]]:
        """Uses; the names of those that were used alike before, how many uses there have been
        of each, and whether by more than one session."""
        watched = self._watched[_side(seen.level)]
        olds: list[Group | None] = [None] * len(seen.depths)
        for each in self._watched:
            if each:
                found = map(each.pop, seen.depths, repeat(None))
                olds = [old or new for old, new in zip(olds, found, strict=True)]
        for old, alike in runs(olds, list(seen.depths)):
            count, shared = 1, False
            if old is not None:
                count = old.count + 1
                shared = old.traits.shared or old.session != self.moment.session
                self._end(old, len(alike), used=True)
            group = self.group(count, seen.last, shared, seen.level, seen.until_ms)
            watched.update(dict.fromkeys(alike, group))
            group.live += len(alike)
            yield alike, count, shared

    def keep(self, most: int) -> None:
        """Watch so many on each side, those used last."""
        for watched in self._watched:
            while len(watched) > most:
                self._end(watched.popitem(last=False)[1], 1, used=False)

    def thin(self, kept: Callable[[bytes], bool]) -> None:
        """Forget those that are not `kept(name)`."""
        for watched in self._watched:
            for name in [name for name in watched if not kept(name)]:
                watched.pop(name).live -= 1

    def changed(self, group: Group, before: Traits) -> None:
        # As if they were watched no more, and others, as old, came to be watched.
        bucket = bucket_of(self.moment.now - group.since)
        if bucket:
            self._of(before).reached[bucket] += group.live
            self._of(group.traits).reached[bucket - 1] -= group.live

    def _end(self, group: Group, blocks: int, *, used: bool) -> None:
        group.live -= blocks
        counts = self._of(group.traits)
        bucket = bucket_of(self.moment.now - group.since)
        if used:
            counts.uses[bucket] += blocks
        counts.reached[bucket] += blocks

    def _of(self, traits: Traits) -> Counts:
        counts = self._counts_of.get(traits)
        if counts is None:
            counts = self._counts_of[traits] = self._counts.setdefault(known_by(traits), Counts())
        return counts

    def learn(self) -> Hazards:
        seen: dict[Traits, Counts] = {}
        for traits, counts in self._counts.items():
            counts.fade()
            seen[traits] = counts.copy()
        now = self.moment.now
        for watched in self._watched:
            for group in dict.fromkeys(watched.values()):
                traits = known_by(group.traits)
                if traits not in seen:
                    seen[traits] = Counts()
                seen[traits].reached[bucket_of(now - group.since)] += group.live
        return Hazards(seen)


class Hazards:
    """By traits and age: the part that is used within a bucket of what comes to it."""

    def __init__(self, seen: dict[Traits, Counts]) -> None:
        everything = Counts()
        alike: dict[Traits, Counts] = {}
        for traits, counts in seen.items():
            everything.add(counts)
            alike.setdefault(_alike(traits), Counts()).add(counts)
        self.oldest = max((b for b in range(BUCKETS) if everything.reached[b]), default=0)
        self._seen = seen
        self._all = everything.hazard([0.0] * BUCKETS, 1.0)
        self._alike = {t: c.hazard(self._all, PRIOR) for t, c in alike.items()}

    def of(self, traits: Traits) -> list[float]:
        alike = self._alike.get(_alike(traits), self._all)
        counts = self._seen.get(traits)
        return alike if counts is None else counts.hazard(alike, PRIOR)


@lru_cache(MOST_TRAITS)
def known_by(traits: Traits) -> Traits:
    """What is told apart: of priority, only which side of the default it is on. Where a
    session is named it is what that does that tells when its blocks are used again, all
    of them at once."""
    if traits.pace:
        return traits._replace(level=_side(traits.level), uses=0, last=False)
    return traits._replace(level=_side(traits.level))


def _side(level: int) -> int:
    return (level > 0) - (level < 0)


@lru_cache(MOST_TRAITS)
def _alike(traits: Traits) -> Traits:
    return traits._replace(kind=0, level=0, shared=False, pace=min(traits.pace, 1))


def densities(hazard: list[float], oldest: int, shortest: float) -> list[float]:
    """The most uses for the time held that can be had from each bucket of age on, by
    holding a block until it is used or until some later bucket, whichever is best, for
    `shortest` at least.
    Buckets above `oldest` have not been seen."""
    found = [0.0] * BUCKETS
    for bucket in range(oldest + 1):
        alive, time, best = 1.0, 0.0, 0.0
        begin = AGES[bucket]
        for later in range(bucket, oldest + 1):
            end = AGES[later + 1]
            used = alive * hazard[later]
            time += (end - AGES[later]) * (alive - used / 2)
            alive -= used
            if end - begin >= shortest or later == oldest:
                density = (1 - alive) / time
                if density > best:
                    best = density
        found[bucket] = best
    return found
