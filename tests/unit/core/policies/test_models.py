"""Each policy decides as its paper says, on traces of several kinds."""

from __future__ import annotations

import random

import pytest

from kvstore.core.policies import POLICIES
from tests.unit.core.policies.harness import Cache
from tests.unit.core.policies.naive import MODELS


def accesses(kind: str, seed: int) -> list[int]:
    draw = random.Random(seed)
    if kind == "skewed":
        return [int(draw.paretovariate(0.7)) % 200 for _ in range(3000)]
    if kind == "loops":
        return [n % draw.choice((23, 31, 47)) for n in range(3000)]
    if kind == "drift":
        return [int(n / 40 + draw.expovariate(1 / 12)) for n in range(3000)]
    return [draw.randrange(60) for _ in range(3000)]


@pytest.mark.parametrize("kind", ["skewed", "loops", "drift", "even"])
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_decides_as_its_paper_says(name: str, kind: str) -> None:
    for room in (1, 2, 7, 30):
        cache, model = Cache(POLICIES[name](), room), MODELS[name](room)
        for step, number in enumerate(accesses(kind, seed=room)):
            assert cache.access(number) == model(number), (room, step)
