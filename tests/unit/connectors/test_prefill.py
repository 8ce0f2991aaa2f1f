"""The engine's prefill is measured as it is, whatever else its steps do."""

from __future__ import annotations

import pytest

from kvstore_connectors.vllm.prefill import PrefillMeter


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
    number = meter.begin(tokens)
    clock.now_s += seconds
    meter.end(number)


def test_before_the_first_prefill_nothing_is_claimed(meter: PrefillMeter, clock: Clock) -> None:
    assert meter.tokens_per_s == 0.0
    clock.now_s += 0.01
    meter.end(0)
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
    number = meter.begin(1000)
    for _ in range(9):
        following = meter.begin(1000)
        clock.now_s += 0.1
        meter.end(number)
        number = following
    assert meter.tokens_per_s == pytest.approx(10_000)


def test_ends_that_are_not_told_do_not_shift_those_that_are(
    meter: PrefillMeter, clock: Clock
) -> None:
    """A prefill that is taken for the short step after it looks very fast, and then nothing
    is loaded that computing seems to beat."""
    for _ in range(9):
        # Of steps without work some ends are told, others not.
        number = meter.begin(1000)
        clock.now_s += 0.1
        meter.end(number)
        clock.now_s += 0.001
        meter.end(0)
        meter.end(0)
    lost = meter.begin(1000)
    clock.now_s += 0.001
    step(meter, clock, 1000, 0.1)
    meter.end(lost)
    assert meter.tokens_per_s == pytest.approx(10_000)
