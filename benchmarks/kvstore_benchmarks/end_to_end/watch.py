"""What the store says of itself while engines use it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from kvstore.types import StoreStats
from kvstore_benchmarks.closing import Closing

SETTLE_TIMEOUT_S = 60.0
_POLL_S = 0.01


class NotInTime(KVStoreError):
    """The store did not reach the state that the measurement waits for."""


class Hits(NamedTuple):
    """Blocks granted to engines since the last look, by the tier they came from."""

    dram: int
    nvme: int

    @property
    def tier(self) -> str:
        match (self.dram > 0, self.nvme > 0):
            case (True, True):
                return "DRAM and NVMe"
            case (True, False):
                return "DRAM"
            case (False, True):
                return "NVMe"
        return "none"


class Watch(Closing):
    """A client that only reads the server's counters. A context manager."""

    def __init__(self, endpoint: str) -> None:
        self._client = Client(endpoint, timeout_s=SETTLE_TIMEOUT_S)
        self._seen = self._client.stats()

    def close(self) -> None:
        self._client.close()

    def mark(self) -> None:
        """Count hits and commits from here on."""
        self._seen = self._client.stats()

    def hits(self) -> Hits:
        """Since the last mark."""
        now = self._client.stats()
        dram = now.acquired_hits_dram - self._seen.acquired_hits_dram
        return Hits(dram, now.acquired_hits - self._seen.acquired_hits - dram)

    def has_stalled(self) -> bool:
        """Whether a tier has not answered for a while, since the server's start."""
        return any(tier.stalls for tier in self._client.stats().tiers)

    def committed(self) -> int:
        """Blocks, since the last mark."""
        return self._committed(self._client.stats())

    def wait_stored(self, blocks: int, idle: Callable[[], None]) -> float:
        """Until `blocks` more are committed; the seconds it took. `idle` runs meanwhile."""
        return self._wait(self._committed, blocks, "blocks to be committed", idle)

    def flush(self, idle: Callable[[], None]) -> None:
        """Everything to NVMe, and out of DRAM: once nobody reads it any more."""
        self._wait(lambda stats: int(stats.leases == 0), 1, "moment without a lease", idle)
        self._client.flush(drop=True)

    def _committed(self, stats: StoreStats) -> int:
        return stats.committed_blocks - self._seen.committed_blocks

    def _wait(
        self,
        level: Callable[[StoreStats], int],
        wanted: int,
        what: str,
        idle: Callable[[], None],
    ) -> float:
        started = time.monotonic()
        while (reached := level(self._client.stats())) < wanted:
            if time.monotonic() > started + SETTLE_TIMEOUT_S:
                raise NotInTime(
                    f"waited {SETTLE_TIMEOUT_S:.0f} s for {wanted} {what}; there are {reached}"
                )
            idle()
            time.sleep(_POLL_S)
        return time.monotonic() - started
