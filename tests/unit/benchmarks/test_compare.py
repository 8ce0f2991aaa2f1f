"""The demo's check can fail: damage, other lengths and other tokens all show."""

from __future__ import annotations

import math

from kvstore_benchmarks.end_to_end.child import Answer
from kvstore_benchmarks.end_to_end.compare import difference


def answer(*steps: dict[str, float]) -> Answer:
    return Answer(first_token_s=0.1, cached_tokens=0, logprobs=steps)


def test_equal_answers_do_not_differ() -> None:
    assert difference(answer({"1": -0.5, "2": -2.0}), answer({"2": -2.0, "1": -0.5})) == 0


def test_a_small_difference_in_a_late_step_is_found() -> None:
    left = answer({"1": -0.5}, {"1": -0.5})
    right = answer({"1": -0.5}, {"1": -0.5001})
    assert 0 < difference(left, right) < 0.001


def test_other_likely_tokens_are_never_close() -> None:
    assert difference(answer({"1": -0.5}), answer({"2": -0.5})) == math.inf


def test_answers_of_another_length_are_never_close() -> None:
    assert difference(answer({"1": -0.5}), answer({"1": -0.5}, {"1": -0.5})) == math.inf


def test_two_empty_answers_prove_nothing() -> None:
    assert difference(answer(), answer()) == math.inf
