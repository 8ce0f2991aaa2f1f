"""Least recently used within a priority, the lowest priority first; a priority may hold
for a while only and is the default one after that.

Source: the retention priorities of TensorRT-LLM's KV cache (NVIDIA, "KV cache reuse
optimizations in TensorRT-LLM", 2025: `KvCacheRetentionConfig`). O(log n) an operation;
`mark` is (level, until when).
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain, count

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import (
    DEFAULT_PRIORITY,
    FOR_GOOD,
    PRIORITIES,
    EvictionPolicy,
    Use,
    token_of,
)
from kvstore.core.policies.ring import Ring


class PriorityLRU(EvictionPolicy):
    def __init__(self) -> None:
        self._levels = [Ring() for _ in PRIORITIES]
        self._size = 0
        self._use = Use()
        # (until when, a number, replica); stale where its mark says otherwise.
        self._ends: list[tuple[float, int, Replica]] = []
        self._numbers = count()

    def use(self, use: Use) -> None:
        self._use = use
        while self._ends and self._ends[0][0] <= use.now_ms:
            until, _, replica = heappop(self._ends)
            if replica.mark is not None and replica.mark[1] == until:
                self._levels[replica.mark[0]].discard(replica)
                self._enter(replica, DEFAULT_PRIORITY, FOR_GOOD)

    def insert(self, replica: Replica) -> None:
        self._size += 1
        self._enter(replica, *self._use.priority_at(token_of(replica)))

    def touch(self, replica: Replica) -> None:
        self._levels[replica.mark[0]].discard(replica)
        self._enter(replica, *self._use.priority_at(token_of(replica)))

    def remove(self, replica: Replica) -> None:
        self._size -= 1
        self._levels[replica.mark[0]].discard(replica)
        replica.mark = None

    def worth(self, replica: Replica) -> float:
        level: int = replica.mark[0]
        return level

    def candidates(self) -> Iterator[Replica]:
        return chain.from_iterable(self._levels)

    def __len__(self) -> int:
        return self._size

    def _enter(self, replica: Replica, priority: int, until: float) -> None:
        self._levels[priority].append(replica)
        replica.mark = (priority, until)
        if until != FOR_GOOD:
            heappush(self._ends, (until, next(self._numbers), replica))
