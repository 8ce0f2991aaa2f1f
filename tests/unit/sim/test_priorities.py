"""What matters keeps its hits, whatever else is asked for."""

from __future__ import annotations

import pytest

from kvstore.core.policies import POLICIES
from kvstore.sim.replay import Replay
from kvstore.sim.trace import Trace, merged
from tests.unit.sim.workloads import conversations


def hits(trace: Trace, priority: int) -> float:
    result = Replay(POLICIES["worth"](), trace, 1500).run(by_chain=True)
    tokens, found = result.by_priority[priority]
    return found / tokens


@pytest.mark.soak
def test_ten_times_as_much_of_low_priority_takes_a_twentieth_of_the_hits_at_most() -> None:
    high = conversations(1200, seed=11, priority=100)
    low = conversations(12_000, seed=12, priority=0)
    assert hits(merged([high, low]), 100) > 0.95 * hits(high, 100)
