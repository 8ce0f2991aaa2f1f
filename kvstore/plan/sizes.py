"""What each further gigabyte of a tier brings, and where that stops being worth it.

The knee of a curve is where it lies farthest above the straight line between its ends
(V. Satopaa et al., "Finding a 'kneedle' in a haystack", ICDCSW 2011).

What DRAM holds is loaded from there. What only NVMe holds is loaded from there where
that is faster than computing it, and is of no use otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvstore.plan.demand import Demand
from kvstore.plan.machine import Engine

GB = 1e9
HOURS_A_YEAR = 24 * 365
STEPS, GROWTH = 12, 1.5


@dataclass(frozen=True, slots=True)
class Prices:
    """`years`: over which memory and drives are paid off."""

    gpu_hour: float
    dram_gb: float
    nvme_gb: float
    years: float

    def an_hour(self, gb: float, price_gb: float) -> float:
        return gb * price_gb / (self.years * HOURS_A_YEAR)


@dataclass(frozen=True, slots=True)
class Point:
    """Tiers of these sizes, and what they bring beside no store."""

    dram_gb: float
    nvme_gb: float
    token_hits: float
    hits_dram: float
    saved: float
    """Share of prefill time."""
    gpus_saved: float
    first_token_ms: float
    """Mean, of prefill and loads without any queue."""


Size = Callable[[Point], float]


def dram_of(point: Point) -> float:
    return point.dram_gb


def nvme_of(point: Point) -> float:
    return point.nvme_gb


@dataclass(frozen=True, slots=True)
class Step:
    """From the point before to `point`."""

    point: Point
    gpus_a_tb: float
    """Saved by each further 1000 GB."""
    worth_hour: float
    cost_hour: float

    @property
    def pays(self) -> bool:
        return self.worth_hour >= self.cost_hour


@dataclass(frozen=True, slots=True)
class Sizing:
    """`utilisation`: how busy a GPU may be kept without requests queueing too long."""

    engine: Engine
    demand: Demand
    prices: Prices
    utilisation: float = 0.7

    def point(self, dram_gb: float, nvme_gb: float = 0.0) -> Point:
        engine, demand = self.engine, self.demand
        by_dram = demand.held(dram_gb * GB / engine.kv_bytes)
        by_both = demand.held(max(dram_gb, nvme_gb) * GB / engine.kv_bytes)
        if not self.nvme_helps(dram_gb, nvme_gb):
            by_both = by_dram
        prompt = demand.prompt_tokens
        load_ms = engine.load_ms(by_dram.token_hits * prompt, engine.dram_gbps)
        further = (by_both.token_hits - by_dram.token_hits) * prompt
        load_ms += engine.load_ms(further, engine.nvme_gbps)
        return Point(
            dram_gb=dram_gb,
            nvme_gb=nvme_gb,
            token_hits=by_both.token_hits,
            hits_dram=by_dram.token_hits,
            saved=by_both.saved,
            gpus_saved=self.gpus(by_both.saved * demand.prefill_ms),
            first_token_ms=(1 - by_both.saved) * demand.prefill_ms + load_ms,
        )

    def nvme_helps(self, dram_gb: float, nvme_gb: float) -> bool:
        """What NVMe holds beyond DRAM is loaded faster than it is computed."""
        engine, demand = self.engine, self.demand
        by_dram = demand.held(dram_gb * GB / engine.kv_bytes)
        by_both = demand.held(max(dram_gb, nvme_gb) * GB / engine.kv_bytes)
        tokens = (by_both.token_hits - by_dram.token_hits) * demand.prompt_tokens
        computed_ms = (by_both.saved - by_dram.saved) * demand.prefill_ms
        return engine.load_ms(tokens, engine.nvme_gbps) < computed_ms

    def gpus(self, ms_a_request: float) -> float:
        """GPUs that do nothing else, for so much of an engine's time a request."""
        busy = self.demand.requests_per_s * ms_a_request / 1e3
        return busy * self.engine.gpus / self.utilisation

    @property
    def most_gb(self) -> float:
        """The size from which on nothing is gained."""
        return self.demand.all_tokens * self.engine.kv_bytes / GB

    def dram_steps(self) -> list[Step]:
        """DRAM alone, from nothing to all that is of use; none where nothing is."""
        if not self.most_gb:
            return []
        points = [self.point(gb) for gb in _sizes(0.0, self.most_gb)]
        return self._steps(points, self.prices.dram_gb, dram_of)

    def nvme_steps(self, dram_gb: float) -> list[Step]:
        """NVMe behind so much DRAM, which it holds too."""
        if dram_gb >= self.most_gb:
            return []
        points = [self.point(dram_gb, gb) for gb in _sizes(dram_gb, self.most_gb)]
        return self._steps(points, self.prices.nvme_gb, nvme_of)

    def _steps(self, points: Sequence[Point], price_gb: float, size: Size) -> list[Step]:
        steps = []
        for before, point in pairwise(points):
            gb = size(point) - size(before)
            gained = point.gpus_saved - before.gpus_saved
            steps.append(
                Step(
                    point=point,
                    gpus_a_tb=1e3 * gained / gb,
                    worth_hour=gained * self.prices.gpu_hour,
                    cost_hour=self.prices.an_hour(gb, price_gb),
                )
            )
        return steps


def knee(sizes: Sequence[float], gains: Sequence[float]) -> float:
    """The size at the knee, the curve beginning at the first pair; 0 where nothing is
    gained."""
    if not sizes or max(gains) <= gains[0]:
        return 0.0
    first, width = sizes[0], sizes[-1] - sizes[0]
    least, height = gains[0], max(gains) - gains[0]
    above = [
        (gain - least) / height - (size - first) / width
        for size, gain in zip(sizes, gains, strict=True)
    ]
    return sizes[above.index(max(above))]


def pays_up_to(steps: Sequence[Step], size: Size) -> float:
    """The largest size whose last step still pays for itself; 0 for none."""
    return max((size(step.point) for step in steps if step.pays), default=0.0)


def _sizes(least: float, most: float) -> list[float]:
    """From `least` to `most` in steps that grow: small sizes differ more."""
    return [
        least + (most - least) * (GROWTH**step - 1) / (GROWTH**STEPS - 1)
        for step in range(STEPS + 1)
    ]
