from __future__ import annotations

import math

from kvstore_benchmarks.figures import (
    finite,
    gbps,
    median,
    percentile,
    ratio,
    seconds_text,
    size_text,
)


def test_no_samples_give_no_figure_rather_than_a_zero() -> None:
    assert math.isnan(median([]))
    assert math.isnan(percentile([], 99))
    assert finite(math.nan) is None
    assert seconds_text(math.nan) == "-"


def test_a_percentile_is_a_sample_that_was_taken() -> None:
    samples = [float(value) for value in range(100, 0, -1)]
    assert percentile(samples, 50) == 50
    assert percentile(samples, 99) == 99
    assert percentile([7.0], 99) == 7.0


def test_a_bound_of_zero_gives_no_ratio() -> None:
    assert math.isnan(ratio(1.0, 0.0))
    assert ratio(1.0, 2.0) == 0.5


def test_units_are_written_as_they_are_meant() -> None:
    assert gbps(2_000_000_000, 2.0) == 1.0
    assert size_text(64 << 10) == "64 KiB"
    assert size_text(4 << 20) == "4 MiB"
    assert seconds_text(0.0934) == "93 ms"
    assert seconds_text(1.684) == "1.68 s"
