"""Costs follow what is measured, and are not led astray."""

from __future__ import annotations

import random

import pytest

from kvstore.core.links.learned import (
    FEW,
    REMEMBERED,
    SAMPLED_NS,
    STALE_NS,
    LinkCost,
    PrefillSpeeds,
    Speed,
)

WORK = 1_000_000
LAYOUT = b"l" * 16


def test_costs_follow_a_link_that_slows_down_but_not_a_few_hiccups() -> None:
    cost = LinkCost(Speed(1e-4, 1e9))
    rng = random.Random(1)
    for step in range(200):
        taken = int(2 * WORK * rng.uniform(0.95, 1.05))
        cost.note(WORK, taken * (100 if step % 5 == 0 else 1), 0, 0)
    assert cost.turnaround(WORK).ns == pytest.approx(2 * WORK, rel=0.1)
    for _ in range(REMEMBERED // 2 + 1):
        cost.note(WORK, 20 * WORK, 0, 0)
    assert cost.turnaround(WORK).ns > 10 * WORK


def test_what_was_learned_long_ago_counts_for_little_once_somebody_measures() -> None:
    cost = LinkCost(Speed(1e-4, 1e9))
    for _ in range(REMEMBERED):
        cost.note(WORK, 20 * WORK, 0, 0)
        cost.note_pace(WORK, 20 * WORK)
    assert not cost.stale(STALE_NS - 1)
    assert cost.stale(STALE_NS)
    assert cost.turnaround(WORK).ns == cost.passing(WORK).ns == 20 * WORK
    for _ in range(FEW - 1):
        cost.note(WORK, 4 * WORK, 0, STALE_NS, beside=4)
    assert cost.turnaround(WORK).ns == 4 * WORK
    assert cost.passing(WORK).ns == WORK


def test_a_pace_of_a_moment_is_no_more_than_a_doubt() -> None:
    cost = LinkCost(Speed(1e-4, 1e9))
    for _ in range(REMEMBERED):
        cost.note_pace(WORK, SAMPLED_NS)
    usual = cost.passing(WORK)
    for _ in range(10):
        cost.note_pace(WORK // 100, SAMPLED_NS // 50)
    now = cost.passing(WORK)
    assert now.ns == usual.ns
    assert now.error_ns == pytest.approx(usual.ns), "it is twice as slow at this moment"
    for _ in range(REMEMBERED):
        cost.note_pace(WORK, 2 * SAMPLED_NS)
    assert cost.passing(WORK).ns == pytest.approx(2 * usual.ns)


def test_what_is_far_faster_than_was_said_is_believed_after_a_few() -> None:
    cost = LinkCost(Speed(1e-4, 1e9))
    for _ in range(REMEMBERED):
        cost.note(WORK, 10 * WORK, 10 * WORK, 0)
    for _ in range(2 * FEW):
        cost.note(WORK, WORK, 10 * WORK, 0)
    assert cost.turnaround(WORK).ns == WORK


def test_a_size_that_was_not_measured_costs_what_all_sizes_do() -> None:
    cost = LinkCost(Speed(1e-4, 1e9))
    for _ in range(FEW):
        cost.note(WORK, 3 * WORK, 0, 0)
    assert cost.turnaround(1000 * WORK).ns == pytest.approx(3000 * WORK)


def test_an_error_is_as_large_as_what_is_measured_varies() -> None:
    cost = LinkCost(Speed(1e-4, 1e9))
    for step in range(60):
        cost.note(WORK, WORK * (1 + step % 3), 0, 0)
    assert 0.3 * WORK < cost.turnaround(WORK).error_ns < 1.2 * WORK
    assert cost.turnaround(WORK).ns == 2 * WORK


def test_times_that_cannot_be_are_left_out() -> None:
    cost = LinkCost(Speed(0.0, 1e9))
    for taken in (0, -5):
        cost.note(WORK, taken, 0, 0)
    assert cost.turnaround(WORK).ns == WORK


def test_what_was_learned_outlives_a_restart_and_what_is_not_that_is_ignored() -> None:
    cost = LinkCost(Speed(0.0, 1e9))
    for _ in range(FEW):
        cost.note(WORK, 7 * WORK, 0, 0)
    for _ in range(2 * FEW):
        cost.note_pace(SAMPLED_NS, 5 * SAMPLED_NS)
    again = LinkCost(cost.nominal)
    nonsense = {"nonsense": 3.0, "6": float("nan"), "8": "x", "pace ": 2.0, "9" * 50: 1.0}
    again.restore(cost.state() | nonsense)
    assert again.turnaround(WORK).ns == pytest.approx(7 * WORK)
    assert again.passing(WORK).ns == pytest.approx(5 * WORK)
    assert again.state() == cost.state()


def test_prefill_is_what_most_tell() -> None:
    speeds = PrefillSpeeds()
    assert speeds.tokens_per_s(LAYOUT) == 0.0
    for told in (100.0, 110.0, 90.0, 1e6, float("nan"), -3.0, 105.0):
        speeds.note(LAYOUT, told)
    assert speeds.tokens_per_s(LAYOUT) == 105.0
    again = PrefillSpeeds()
    again.restore(speeds.state() | {"x": "y"})
    assert again.tokens_per_s(LAYOUT) == 105.0
