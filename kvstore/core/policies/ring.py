"""A list of replicas, linked through the replicas themselves.

A ring through `before` and `after`, closed by a replica of nothing that stands between
the newest and the oldest: 16 bytes a replica, where an OrderedDict takes 150. Every
operation is O(1), a neighbouring run of any length moving as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvstore.core.catalog import Replica


class Ring:
    def __init__(self) -> None:
        self._end = end = Replica.__new__(Replica)  # Only its links are used.
        end.before = end.after = end
        self._size = 0

    def append(self, replica: Replica) -> None:
        """Make a replica that is in no ring the newest."""
        end = self._end
        latest = end.before
        replica.before = latest
        replica.after = end
        latest.after = end.before = replica
        self._size += 1

    def extend(self, replicas: Iterable[Replica]) -> None:
        """`append` for each, in this order."""
        latest = self._end.before
        for replica in replicas:
            latest.after = replica
            replica.before = latest
            latest = replica
            self._size += 1
        latest.after = self._end
        self._end.before = latest

    def discard(self, replica: Replica) -> None:
        """Take out a replica of this ring."""
        before, after = replica.before, replica.after
        before.after = after
        after.before = before
        replica.before = replica.after = None  # type: ignore[assignment]
        self._size -= 1

    def renew(self, replica: Replica) -> None:
        """Make a replica of this ring the newest."""
        self.renew_run(replica, replica)

    def renew_run(self, first: Replica, last: Replica) -> None:
        """Make what lies from `first` to `last` the newest."""
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

    def newer(self, replica: Replica) -> Replica | None:
        """The neighbour that came next; None for the newest."""
        after = replica.after
        return None if after is self._end else after

    @property
    def oldest(self) -> Replica | None:
        return self.newer(self._end)

    def pop(self) -> Replica:
        """Take out the oldest; there is one."""
        oldest = self._end.after
        self.discard(oldest)
        return oldest

    def __iter__(self) -> Iterator[Replica]:
        """Oldest first. The one last given may be taken out meanwhile, or moved."""
        end = self._end
        replica = end.after
        while replica is not end:
            after = replica.after
            yield replica
            replica = after

    def __len__(self) -> int:
        return self._size
