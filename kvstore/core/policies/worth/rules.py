"""Rules: how much a block is worth by its traits and age, as grades. Grades are logarithms,
so that a priority is added.

`learned` is what the hazards say; the others need no learning, and rule where that is
better: `recent` is LRU; under `again` what was used once leaves before what was used again.
"""

from __future__ import annotations

from functools import cache
from math import log2

from kvstore.core.policies.worth.ages import AGES, BUCKETS
from kvstore.core.policies.worth.groups import PINNED, Traits
from kvstore.core.policies.worth.learning import Hazards, densities, known_by
from kvstore.core.policies.worth.shelves import GRADES, Grade

LEVELS = 4
"""Of priority, on either side of the default."""
OCTAVES = 1.0
"""That a level weighs."""
SHORTEST = 2.0
"""The least time that a block is thought to be held for, in lives."""

AGAIN = 12
"""Octaves of age that a second use weighs, where that rules."""

STEPS = 16
"""Grades an octave."""
_LEAST = -40

ESTIMATED = 60
"""What it costs, by and large in microseconds, to find the grades of what is known alike."""
SHIFTED = 6
"""And those of some of it, by their priority."""


def graded(values: list[float]) -> list[int]:
    return [int((log2(v) - _LEAST) * STEPS) if v > 2.0**_LEAST else 0 for v in values]


_RECENT = graded([1 / (1 + age) for age in AGES[:BUCKETS]])


def recent(traits: Traits) -> list[int]:
    return _recent(_priority(traits))


def again(traits: Traits) -> list[int]:
    uses = 0 if traits.uses < 2 else AGAIN + traits.uses
    return _recent(_priority(traits) + STEPS * uses)


@cache
def _recent(by: int) -> list[int]:
    return _shifted(_RECENT, by)


class Learned:
    """The most uses for the time held that can be had, see `densities`."""

    def __init__(self, hazards: Hazards, life: float) -> None:
        """`life`: how long blocks stay after their last use, lately."""
        self._hazards = hazards
        self._life = life
        self._unshifted: dict[Traits, list[int]] = {}
        self._grades: dict[Traits, list[int]] = {}

    def __call__(self, traits: Traits) -> list[int]:
        grades = self._grades.get(traits)
        if grades is None:
            grades = _shifted(self._learned(known_by(traits)), _priority(traits))
            self._grades[traits] = grades
        return grades

    def cost(self, traits: Traits) -> int:
        """Of asking for grades, by and large in microseconds."""
        if traits in self._grades:
            return 1
        return SHIFTED if known_by(traits) in self._unshifted else ESTIMATED

    def _learned(self, name: Traits) -> list[int]:
        grades = self._unshifted.get(name)
        if grades is None:
            hazards = self._hazards
            dense = densities(hazards.of(name), hazards.oldest, SHORTEST * self._life)
            grades = self._unshifted[name] = graded(dense)
        return grades


def _priority(traits: Traits) -> int:
    level = LEVELS if traits.fate == PINNED else traits.level
    return round(level * OCTAVES * STEPS)


def _shifted(grades: list[int], by: int) -> list[int]:
    return [min(max(grade + by, 0), GRADES - 1) for grade in grades] if by else grades


UNLEARNED: tuple[Grade, ...] = (recent, recent, again)
"""The rules that are tried, as they are before anything is learned: the first one will be
`Learned`."""
