"""Least recently used.

Source: L. A. Belady, "A study of replacement algorithms for virtual-storage
computers", IBM Systems Journal 5(2), 1966. O(1) an operation, and a run that was last
used together still lies together and moves as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ring import Ring


class LRU(Ring, EvictionPolicy):
    insert = Ring.append
    insert_all = Ring.extend
    touch = Ring.renew
    remove = Ring.discard
    candidates = Ring.__iter__

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        run = iter(replicas)
        first = last = next(run, self._end)
        for replica in run:
            if last.after is not replica:
                self.renew_run(first, last)
                first = replica
            last = replica
        if first is not self._end:
            self.renew_run(first, last)
