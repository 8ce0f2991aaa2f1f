"""The engine's prefill is measured as it is, whatever else its steps do."""

from __future__ import annotations

import pytest

from kvstore_connectors.vllm.prefill import LEAST_TOKENS, PrefillMeter


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> PrefillMeter:
    return PrefillMeter(clock)


def step(meter: PrefillMeter, clock: Clock, tokens: int, seconds: float) -> None:
    meter.begin(tokens)
    clock.now_s += seconds
    meter.end()


def test_before_the_first_prefill_nothing_is_claimed(meter: PrefillMeter, clock: Clock) -> None:
    assert meter.tokens_per_s == 0.0
    step(meter, clock, LEAST_TOKENS - 1, 0.01)
    assert meter.tokens_per_s == 0.0, "a decode is no prefill"


def test_one_slow_step_does_not_make_a_slow_engine(meter: PrefillMeter, clock: Clock) -> None:
    for number in range(9):
        step(meter, clock, 1000, 5.0 if number == 3 else 0.1)
    assert meter.tokens_per_s == pytest.approx(10_000)


def test_time_without_steps_is_not_counted(meter: PrefillMeter, clock: Clock) -> None:
    for _ in range(3):
        clock.now_s += 60
        step(meter, clock, 1000, 0.1)
    assert meter.tokens_per_s == pytest.approx(10_000)


def test_steps_that_overlap_are_counted_once(meter: PrefillMeter, clock: Clock) -> None:
    meter.begin(1000)
    for _ in range(9):
        meter.begin(1000)
        clock.now_s += 0.1
        meter.end()
    assert meter.tokens_per_s == pytest.approx(10_000)


def test_ends_of_steps_that_nobody_began_are_ignored(meter: PrefillMeter, clock: Clock) -> None:
    meter.end()
    meter.begin(0)
    meter.end()
    assert meter.tokens_per_s == 0.0
