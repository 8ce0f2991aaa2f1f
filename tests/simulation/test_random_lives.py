"""The planner under everything that clients, tiers and time may do to it."""

from __future__ import annotations

import pytest

from tests.simulation.model import RandomLife

SEEDS = 300
STEPS = 400


@pytest.mark.parametrize("block", range(10))
def test_no_order_of_events_makes_it_lie_leak_or_lose_count(block: int) -> None:
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        life = RandomLife(seed)
        try:
            for _ in range(STEPS):
                life.step()
            life.wind_down()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
