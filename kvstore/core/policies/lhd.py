"""LHD, least hit density: evict what has the fewest hits to expect for the time it would
still take up room, by its age and by how it was used last.

Source: N. Beckmann, H. Chen, A. Cidon, "LHD: improving cache hit rate by maximizing hit
density", NSDI 2018. Ages are counted in uses, in buckets that grow by an eighth of an
octave, where the paper has equal ones. A victim is the least of a sample. O(1) an
operation; `mark` is [place, time of the last use, class].
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy

SAMPLE = 16
CLASSES = 12
BUCKETS = 8 * 32
FORGET = 0.9
"""What is left of the counts each time that densities are computed."""


class LHD(EvictionPolicy):
    def __init__(self) -> None:
        self._held: list[Replica] = []
        self._now = 0
        self._random = 0x2545F491
        self._hits = [[0.0] * BUCKETS for _ in range(CLASSES)]
        self._ends = [[0.0] * BUCKETS for _ in range(CLASSES)]
        # Before anything is known: the younger the better.
        self._density = [[1 / age for age in _AGES] for _ in range(CLASSES)]
        self._learn_at = 1 << 10

    def insert(self, replica: Replica) -> None:
        self._tick()
        replica.mark = [len(self._held), self._now, 0]
        self._held.append(replica)

    def touch(self, replica: Replica) -> None:
        self._tick()
        mark = replica.mark
        age = self._now - mark[1]
        self._hits[mark[2]][_bucket(age)] += 1
        mark[1] = self._now
        mark[2] = min(1 + age.bit_length() // 2, CLASSES - 1)

    def remove(self, replica: Replica) -> None:
        place, since, used = replica.mark
        self._ends[used][_bucket(self._now - since)] += 1
        last = self._held.pop()
        if last is not replica:
            self._held[place] = last
            last.mark[0] = place
        replica.mark = None

    def candidates(self) -> Iterator[Replica]:
        held = self._held
        if not held:
            return
        now, density = self._now, self._density
        least, victim = float("inf"), held[0]
        for _ in range(SAMPLE):
            replica = held[self._draw(len(held))]
            _, since, used = replica.mark
            score = density[used][_bucket(now - since)]
            if score < least:
                least, victim = score, replica
        yield victim
        yield from (replica for replica in held if replica is not victim)

    def __len__(self) -> int:
        return len(self._held)

    def _draw(self, limit: int) -> int:
        """Marsaglia's xorshift: the core may not draw real random numbers."""
        x = self._random
        x ^= (x << 13) & 0xFFFFFFFF
        x ^= x >> 17
        x ^= (x << 5) & 0xFFFFFFFF
        self._random = x
        return x % limit

    def _tick(self) -> None:
        self._now += 1
        if self._now >= self._learn_at:
            self._learn_at = self._now + max(1 << 10, len(self._held))
            for used in range(CLASSES):
                self._learn(used)

    def _learn(self, used: int) -> None:
        """Hits to come over time to be taken up, for each age, from the oldest down."""
        hits, ends, density = self._hits[used], self._ends[used], self._density[used]
        hits_after = events_after = time_after = 0.0
        older = _AGES[-1]
        for bucket in range(BUCKETS - 1, -1, -1):
            age = _AGES[bucket]
            time_after += events_after * (older - age)
            older = age
            hits_after += hits[bucket]
            events_after += hits[bucket] + ends[bucket]
            time_after += (hits[bucket] + ends[bucket]) * age / 16
            if events_after > 0.5:
                density[bucket] = hits_after / max(time_after, 1e-9)
            hits[bucket] *= FORGET
            ends[bucket] *= FORGET


def _bucket(age: int) -> int:
    if age < 8:
        return age
    shift = age.bit_length() - 4
    return min((shift << 3) + (age >> shift), BUCKETS - 1)


_AGES = [max(b, 1) if b < 16 else (8 + (b & 7)) << ((b >> 3) - 1) for b in range(BUCKETS)]
"""The least age of each bucket."""
