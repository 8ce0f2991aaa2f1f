"""How long drives live, and what it costs that they do not live for ever.

Everything that is computed anew is written. Drives that are worn out before they are paid off
cost what their life is short of.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.plan.sizes import GB, HOURS_A_YEAR, Point, Sizing

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Wear:
    """`drives`: as many as the size takes, and no fewer than there are. `bytes_a_day`: that
    are written to all of them. `years`: until they have been written as often as they are
    warranted for."""

    drives: int
    bytes_a_day: float
    drive_writes_a_day: float
    years: float
    hour: float
    """What they cost, in the price's currency: the price of so many GB over the years in which
    they are paid off, or all drives' price over their life, if that is more."""


def wear_of(sizing: Sizing, point: Point, write_amplification: float) -> Wear:
    """Of the NVMe of `point`, which has some."""
    engine, demand, prices = sizing.engine, sizing.demand, sizing.prices
    ssd = engine.ssd
    drives = max(engine.ssds, int(-(-point.nvme_gb // ssd.capacity_gb)))
    computed = demand.requests_per_s * demand.prompt_tokens * (1 - point.token_hits)
    a_day = computed * engine.kv_bytes * DAY_S * write_amplification
    years = ssd.endurance_bytes * drives / (a_day * 365) if a_day else float("inf")
    worn_hour = drives * ssd.capacity_gb * prices.nvme_gb / (years * HOURS_A_YEAR)
    return Wear(
        drives=drives,
        bytes_a_day=a_day,
        drive_writes_a_day=a_day / (drives * ssd.capacity_gb * GB),
        years=years,
        hour=max(prices.an_hour(point.nvme_gb, prices.nvme_gb), worn_hour),
    )
