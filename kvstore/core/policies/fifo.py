"""First in, first out: uses change nothing.

Source: as for LRU (Belady 1966). O(1) an operation.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ring import Ring


class FIFO(Ring, EvictionPolicy):
    insert = Ring.append
    remove = Ring.discard
    candidates = Ring.__iter__

    def touch(self, replica: Replica) -> None:
        pass

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        pass
