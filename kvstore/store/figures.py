"""What can be counted about the store, at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.core.planner import Planner
from kvstore.core.transfers import TransferClass
from kvstore.types import (
    EnduranceStats,
    LinkStats,
    StoreStats,
    Tier,
    TierStats,
    TransferStats,
    VramStats,
)


def store_stats(
    planner: Planner,
    moved_bytes: Mapping[Tier, Sequence[int]],
    uptime_seconds: float,
    tenant: str | None,
    nvme_off_because: str,
    vram: tuple[VramStats, ...],
) -> StoreStats:
    """`moved_bytes`: into each tier and out of it. `tenant_blocks` is for `tenant`."""
    counters, residency = planner.counters, planner.residency
    pools = [pool for pool in (residency.dram, residency.nvme) if pool is not None]
    return StoreStats(
        uptime_seconds=uptime_seconds,
        tiers=tuple(
            TierStats(
                tier=pool.tier,
                capacity_bytes=pool.space.capacity_bytes,
                used_bytes=pool.space.used_bytes,
                blocks=len(pool),
                evictions=pool.evictions,
                bytes_in=moved_bytes[pool.tier][0],
                bytes_out=moved_bytes[pool.tier][1],
                healthy=pool.tier is Tier.DRAM or residency.nvme_on,
                stalled=pool.tier is Tier.NVME and residency.stalled,
                stalls=residency.transfers.breaker.opened if pool.tier is Tier.NVME else 0,
                off_because=nvme_off_because if pool.tier is Tier.NVME else "",
            )
            for pool in pools
        ),
        sessions=planner.open_sessions,
        leases=planner.open_leases,
        reservations=planner.open_reservations,
        acquired_positions=counters.acquired_positions,
        acquired_hits=counters.acquired_hits,
        acquired_hits_dram=counters.acquired_hits_dram,
        committed_blocks=counters.committed_blocks,
        corrupt_blocks=residency.holdings.corrupt,
        mismatched_blocks=residency.holdings.mismatched,
        tenant_blocks=0 if tenant is None else planner.catalog.tenant_blocks(tenant),
        vram=vram,
    )


def transfer_stats(planner: Planner) -> TransferStats:
    counters, residency = planner.counters, planner.residency
    link, foreseen = residency.transfers, residency.holdings.foreseen
    endurance = residency.endurance
    return TransferStats(
        queued={each.label: link.depth(each) for each in TransferClass},
        refused=dict(counters.refused),
        missed_deadlines=counters.missed_deadlines,
        given_up=counters.given_up,
        prefetched_used_bytes=foreseen.used_bytes,
        prefetched_wasted_bytes=foreseen.wasted_bytes,
        prefetched_unused_bytes=foreseen.unused_bytes,
        links={
            tier: LinkStats(cost.predicted_ns / 1e9, cost.actual_ns / 1e9, cost.error_ns / 1e9)
            for tier, cost in link.costs.items()
        },
        endurance=EnduranceStats(
            endurance.bytes_per_day,
            endurance.written_bytes(),
            endurance.refused_blocks,
            endurance.refused_bytes,
        ),
    )
