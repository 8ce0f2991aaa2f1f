"""A link that becomes slow is found out before what it moves slowly is over; one that
stutters is not taken for one."""

from __future__ import annotations

import pytest

from kvstore.core.links.pulse import ENDS, Pulse

MS = 1_000_000


def steady(pulse: Pulse, each_ms: float, count: int, now_ns: int = 0) -> int:
    """Things that should take a millisecond each, one after the other."""
    for _ in range(count):
        now_ns += int(each_ms * MS)
        pulse.ended(MS, now_ns)
    return now_ns


def test_what_takes_as_long_as_it_should_is_not_slow() -> None:
    pulse = Pulse()
    pulse.begin(0)
    now_ns = steady(pulse, 1.0, 20)
    assert pulse.slowness(MS, now_ns) == 1.0
    assert pulse.slowness(MS, now_ns + MS) == 1.0


def test_what_runs_for_far_too_long_is_seen_before_it_ends() -> None:
    pulse = Pulse()
    pulse.begin(0)
    now_ns = steady(pulse, 1.0, 20)
    assert pulse.slowness(MS, now_ns + 10 * MS) == pytest.approx((10 + ENDS) / (1 + ENDS))
    assert pulse.slowness(MS, now_ns + 100 * MS) > 15


def test_one_that_is_late_among_others_that_are_not_is_nothing() -> None:
    pulse = Pulse()
    pulse.begin(0)
    now_ns = steady(pulse, 1.0, 20)
    now_ns = steady(pulse, 2.0, 1, now_ns)
    assert pulse.slowness(MS, now_ns) == 1.0


def test_a_pause_is_not_slow() -> None:
    pulse = Pulse()
    pulse.begin(0)
    steady(pulse, 1.0, 20)
    pulse.begin(5_000 * MS)
    assert pulse.slowness(MS, 5_001 * MS) == 1.0
