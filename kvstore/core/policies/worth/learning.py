"""What is learned of the blocks of a sample: how likely a use is, by traits and age.

The sample is watched whether its blocks are held or not, so what is let go early is
still learned about. The estimator is that of E. L. Kaplan, P. Meier, "Nonparametric
estimation from incomplete observations", JASA 53, 1958, with blocks that come under
observation late, at the age at which their traits changed. Figures of traits of which
little was seen are drawn towards those of what is alike, and these towards those of all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from kvstore.core.policies.worth.ages import AGES, BUCKETS, bucket_of
from kvstore.core.policies.worth.groups import Group, Grouping, Mark, Traits, side_of

KEPT = 0.98
"""Of what was counted, from one estimate to the next."""
PRIOR = 16.0
"""Blocks seen until the own figures count as much as those of what is alike."""


MOST_TRAITS = 4096
"""Of which it is remembered what they are known by."""

MOST_COUNTS = 1024
"""Of traits that are told apart, by and large: where there are so many, less than one block that
was seen is soon forgotten; where there are few, so is only what is next to nothing."""

COUNTED = 15
"""What it costs to go through the counts of some traits, by and large in microseconds; and so
many times that some of them were last used cost one."""
WAITING_A_COST = 10


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

    __slots__ = ("reached", "uses", "waiting")

    def __init__(self) -> None:
        self.uses = [0.0] * BUCKETS
        self.reached = [0.0] * BUCKETS
        self.waiting: dict[int, int] = {}
        """Blocks that are watched, by when they were used."""

    def wait(self, since: int, blocks: int) -> None:
        """So many more that were used then are watched."""
        waiting = self.waiting.get(since, 0) + blocks
        if waiting:
            self.waiting[since] = waiting
        else:
            del self.waiting[since]

    def at(self, now: int) -> Counts:
        """With those that are watched, as far as they have come."""
        counts = Counts()
        counts.uses = self.uses.copy()
        counts.reached = self.reached.copy()
        times = sorted(self.waiting)
        older = [0, *accumulate(map(self.waiting.__getitem__, times))]
        end, bucket = len(times), 0
        while end:
            begin = bisect_left(times, now - AGES[bucket + 1] + 1, hi=end)
            if bucket == BUCKETS - 1:
                begin = 0
            counts.reached[bucket] += older[end] - older[begin]
            end, bucket = begin, bucket + 1
        return counts

    def fade(self) -> None:
        self.uses = [count * KEPT for count in self.uses]
        self.reached = [count * KEPT for count in self.reached]

    def most(self) -> float:
        """Blocks that are counted at some age."""
        return max(max(self.reached), -min(self.reached))

    def add(self, other: Counts) -> None:
        self.uses = [a + b for a, b in zip(self.uses, other.uses, strict=True)]
        self.reached = [a + b for a, b in zip(self.reached, other.reached, strict=True)]

    def hazard(self, prior: list[float], weight: float, oldest: int) -> list[float]:
        """The part that is used within each bucket of what comes to its begin. Buckets above
        `oldest` have not been seen."""
        hazard = [0.0] * BUCKETS
        alive = 0.0
        for bucket in range(oldest, -1, -1):
            alive = max(0.0, alive + self.reached[bucket])
            uses = self.uses[bucket] + weight * prior[bucket]
            hazard[bucket] = min(uses / (alive + weight), 0.999)
        return hazard


class Observer(Grouping):
    """Its items are names."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[bytes, Mark] = {}
        """Of those that are watched."""
        # By the side of the default that their priority is on, so that a flood of what
        # matters little does not end the watch on what matters.
        self._groups: list[OrderedDict[Group, None]] = [OrderedDict() for _ in range(3)]
        """Of these, the latest one last."""
        self._sizes = [0] * 3
        """How many are watched."""
        self._counts: dict[Traits, Counts] = {}

    def __len__(self) -> int:
        return len(self._marks)

    def see(self, seen: Seen) -> Iterator[tuple[list[bytes], int, bool]]:
        """Uses; the names of those that were used alike before, how many uses there have been
        of each, and whether by more than one session."""
        for old, alike in self._alike(list(seen.depths)):
            count, shared, all_of_it = 1, False, False
            if old is not None:
                count = old.count + 1
                shared = old.traits.shared or old.session != self.moment.session
                self._count(old, len(alike), used=True)
                all_of_it = len(alike) == old.live
                self._less(old, len(alike))
            group = self.group(count, seen.last, shared, seen.level, seen.until_ms)
            if old is not None and all_of_it and not group.live and group is not old:
                group.take_all(old, alike.copy())
                old.items = []
            else:
                if old is group:
                    again = set(alike)
                    group.items = [name for name in group.items if name not in again]
                self._marks.update(dict.fromkeys(alike, group.marked()))
                group.items += alike
                if old is not None and old is not group:
                    self._gather(old)
            group.live += len(alike)
            self._of(group.traits).wait(group.since, len(alike))
            self._groups[group.side][group] = None
            self._sizes[group.side] += len(alike)
            yield alike, count, shared

    def _alike(self, names: list[bytes]) -> Iterator[tuple[Group | None, list[bytes]]]:
        """By the groups that they are in; None: they are not watched."""
        marks = self._marks
        at = 0
        while at < len(names):
            begin, mark = at, marks.get(names[at])
            group = None if mark is None else mark.group
            if (
                group is not None
                and len(group.items) == group.live
                and group.items[0] == names[at]
                and group.items == names[at : at + group.live]
            ):
                at += group.live
            else:
                at += 1
                while at < len(names) and marks.get(names[at]) is mark:
                    at += 1
            yield group, names[begin:at]

    def keep(self, most: int) -> None:
        """Watch so many on each side, those used last."""
        for groups, size in zip(self._groups, self._sizes, strict=True):
            beyond = size - most
            while beyond > 0:
                group = next(iter(groups))
                names = self._cut(group, beyond)
                for name in names:
                    del self._marks[name]
                self._count(group, len(names), used=False)
                self._less(group, len(names))
                self._gather(group)
                beyond -= len(names)

    def thin(self, kept: Callable[[bytes], bool]) -> None:
        """Forget those that are not `kept(name)`."""
        for name in [name for name in self._marks if not kept(name)]:
            group = self._marks.pop(name).group
            self._less(group, 1)
            if not group.live:
                self._gather(group)
        for groups in self._groups:
            for group in groups:
                group.items = list(self._names(group))

    def _cut(self, group: Group, most: int) -> list[bytes]:
        """So many of those that are in a group: its list begins with what follows them."""
        marks, mark, items = self._marks, group.mark, group.items
        found: list[bytes] = []
        end = 0
        while len(found) < most and end < len(items):
            name = items[end]
            end += 1
            if marks.get(name) is mark:
                found.append(name)
        del items[:end]
        return found

    def _names(self, group: Group) -> Iterator[bytes]:
        """Of a group, those that are still in it."""
        marks, mark = self._marks, group.mark
        return (name for name in group.items if marks.get(name) is mark)

    def _gather(self, group: Group) -> None:
        """Forget those that left it, now and then."""
        if not group.live:
            group.items = []
            group.mark = None
        elif 2 * group.live + 8 < len(group.items):
            group.items = list(self._names(group))

    def changed(self, group: Group, before: Traits) -> None:
        # As if they were watched no more, and others, as old, came to be watched.
        bucket = bucket_of(self.moment.now - group.since)
        left, into = self._of(before), self._of(group.traits)
        left.wait(group.since, -group.live)
        into.wait(group.since, group.live)
        if bucket:
            left.reached[bucket] += group.live
            into.reached[bucket - 1] -= group.live

    def _count(self, group: Group, blocks: int, *, used: bool) -> None:
        """Some of a group are used at its age, or are watched up to then."""
        counts = self._of(group.traits)
        bucket = bucket_of(self.moment.now - group.since)
        if used:
            counts.uses[bucket] += blocks
        counts.reached[bucket] += blocks

    def _less(self, group: Group, blocks: int) -> None:
        self._of(group.traits).wait(group.since, -blocks)
        group.live -= blocks
        self._sizes[group.side] -= blocks
        if not group.live:
            del self._groups[group.side][group]

    def _of(self, traits: Traits) -> Counts:
        name = known_by(traits)
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = Counts()
        return counts

    def learn(self) -> Generator[int, None, Hazards]:
        """Every step tells what it cost."""
        seen: dict[Traits, Counts] = {}
        for traits, counts in list(self._counts.items()):
            counts.fade()
            if counts.waiting or counts.most() * MOST_COUNTS > len(self._counts):
                seen[traits] = counts.at(self.moment.now)
            else:
                del self._counts[traits]
            yield COUNTED + len(counts.waiting) // WAITING_A_COST
        hazards = Hazards()
        yield from hazards.estimate(seen)
        return hazards


class Hazards:
    """By traits and age: the part that is used within a bucket of what comes to it."""

    def __init__(self) -> None:
        self.oldest = 0
        self._seen: dict[Traits, Counts] = {}
        self._all = [0.0] * BUCKETS
        self._alike: dict[Traits, list[float]] = {}

    def estimate(self, seen: dict[Traits, Counts]) -> Iterator[int]:
        """From what was seen; every step tells what it cost."""
        everything = Counts()
        alike: dict[Traits, Counts] = {}
        for traits, counts in seen.items():
            everything.add(counts)
            alike.setdefault(_alike(traits), Counts()).add(counts)
            yield COUNTED
        self.oldest = max((b for b in range(BUCKETS) if everything.reached[b]), default=0)
        self._seen = seen
        self._all = everything.hazard([0.0] * BUCKETS, 1.0, self.oldest)
        for traits, counts in alike.items():
            self._alike[traits] = counts.hazard(self._all, PRIOR, self.oldest)
            yield COUNTED

    def of(self, traits: Traits) -> list[float]:
        alike = self._alike.get(_alike(traits), self._all)
        counts = self._seen.get(traits)
        return alike if counts is None else counts.hazard(alike, PRIOR, self.oldest)


@lru_cache(MOST_TRAITS)
def known_by(traits: Traits) -> Traits:
    """What is told apart: of priority, only which side of the default it is on. Where a
    session is named it is what that does that tells when its blocks are used again, all
    of them at once."""
    if traits.pace:
        return traits._replace(level=side_of(traits.level), uses=0, last=False)
    return traits._replace(level=side_of(traits.level))


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
