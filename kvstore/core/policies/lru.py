"""Least recently used.

Source: L. A. Belady, "A study of replacement algorithms for virtual-storage
computers", IBM Systems Journal 5(2), 1966. O(1) an operation.

The order is a ring through the replicas themselves (`before`, `after`), closed by a
replica of nothing that stands between the most and the least recent: 16 bytes a
replica, where an OrderedDict takes 150. A run that was last used together still lies
together and moves as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvstore.core.catalog import Replica


class LRU:
    def __init__(self) -> None:
        self._end = end = Replica.__new__(Replica)  # Only its links are used.
        end.before = end.after = end
        self._size = 0

    def insert(self, replica: Replica) -> None:
        end = self._end
        latest = end.before
        replica.before = latest
        replica.after = end
        latest.after = end.before = replica
        self._size += 1

    def touch(self, replica: Replica) -> None:
        self._move(replica, replica)

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        run = iter(replicas)
        first = last = next(run, self._end)
        for replica in run:
            if last.after is not replica:
                self._move(first, last)
                first = replica
            last = replica
        if first is not self._end:
            self._move(first, last)

    def remove(self, replica: Replica) -> None:
        before, after = replica.before, replica.after
        before.after = after
        after.before = before
        replica.before = replica.after = None  # type: ignore[assignment]
        self._size -= 1

    def candidates(self) -> Iterator[Replica]:
        replica = self._end.after
        while replica is not self._end:
            yield replica
            replica = replica.after

    def __len__(self) -> int:
        return self._size

    def _move(self, first: Replica, last: Replica) -> None:
        """Make what lies from `first` to `last` the most recent."""
        end = self._end
        before, after = first.before, last.after
        if after is end:
            return
        before.after = after
        after.before = before
        latest = end.before
        latest.after = first
        first.before = latest
        last.after = end
        end.before = last
