"""The contract of an eviction policy.

A policy orders the replicas of one space class in one tier. It decides nothing
else: whether a replica may go now (pins, children, not yet saved) is the pool's
to judge, which walks `candidates` until one may.

The caller guarantees: `insert` for a replica that is READY and not yet held,
`touch` and `remove` only for one that is held. A replica is held by one policy at
a time, to which its `before` and `after` belong. Within a chain it touches the
block nearest the root last, so that an order by recency puts children first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kvstore.core.catalog import Replica


class EvictionPolicy(Protocol):
    def insert(self, replica: Replica) -> None:
        """A replica has come in; this counts as a use."""
        ...

    def touch(self, replica: Replica) -> None:
        """A replica was used."""
        ...

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        """`touch` for each, in this order."""
        ...

    def remove(self, replica: Replica) -> None:
        """A replica has left."""
        ...

    def candidates(self) -> Iterator[Replica]:
        """Every replica held, the one to evict first coming first. The policy is
        not changed while the iterator is in use."""
        ...

    def __len__(self) -> int: ...
