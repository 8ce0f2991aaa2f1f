"""What matters keeps its hits, whatever else is asked for."""

from __future__ import annotations

import pytest

from kvstore_benchmarks.policies.priorities import Classes, measure


@pytest.mark.soak
def test_ten_times_as_much_of_low_priority_takes_a_twentieth_of_the_hits_at_most() -> None:
    rows = measure(["worth"], [1500], [10], Classes(1200))
    assert [row["load"] for row in rows] == [0, 10]
    assert rows[1]["kept"] > 0.95
