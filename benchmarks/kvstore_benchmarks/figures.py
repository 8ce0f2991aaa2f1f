"""From samples to figures: medians, percentiles, and how they are written."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any


class Timer:
    """Seconds between entering and leaving `timed`."""

    def __init__(self) -> None:
        self.seconds = math.nan


@contextmanager
def timed() -> Iterator[Timer]:
    timer = Timer()
    start = time.perf_counter()
    try:
        yield timer
    finally:
        timer.seconds = time.perf_counter() - start


def median(samples: Sequence[float]) -> float:
    """NaN when there are none."""
    return statistics.median(samples) if samples else math.nan


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of the samples do not exceed."""
    if not samples:
        return math.nan
    rank = math.ceil(len(samples) * percent / 100)
    return sorted(samples)[max(rank, 1) - 1]


def quantiles(samples: Sequence[float], digits: int = 1) -> dict[str, float | None]:
    return {f"p{p}": finite(percentile(samples, p), digits) for p in (50, 99)}


def gbps(nbytes: int, seconds: float) -> float:
    """Gigabytes (10^9) a second."""
    return nbytes / seconds / 1e9


def ratio(value: float, bound: float) -> float:
    return value / bound if bound else math.nan


def finite(value: float, digits: int = 4) -> float | None:
    """`value` rounded, or None where there is none: JSON has no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def machine() -> dict[str, Any]:
    """What a reader needs to know of where the figures were taken."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def figure_text(value: float | None, of: float | None) -> str:
    """A figure and, in brackets, a ratio."""
    if value is None:
        return "-"
    return f"{value:.2f}" if of is None else f"{value:.2f} ({of:.2f}x)"


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness (Jain, Chiu, Hawe 1984): 1 where all have the same, 1/n
    where one has everything. NaN where nobody has anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else math.nan


def size_text(nbytes: int) -> str:
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift} {unit}"
    return f"{nbytes} B"


def seconds_text(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
