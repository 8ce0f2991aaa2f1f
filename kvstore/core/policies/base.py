"""The contract of an eviction policy.

A policy orders the replicas of one space class in one tier. It decides nothing
else: whether a replica may go now (pins, children, not yet saved) is the pool's
to judge, which walks `candidates` until one may.

The caller guarantees: `insert` for a replica that is READY and not yet held,
`touch` and `remove` only for one that is held. A replica is held by one policy at
a time, to which its `before`, `after` and `mark` belong. Within a chain it touches
the block nearest the root last, so that an order by recency puts children first.

A policy is not told its capacity: it is full whenever it is asked for candidates.
What it remembers of replicas that left is bounded by what it holds then.

`use`, `hint` and `miss` are knowledge that a policy may do without, so they have bodies (a type
checker takes a method without one for abstract): a caller that has none never calls them. Time
is what a policy is told in `use`, or else counted in calls.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import ClassVar, NamedTuple, Protocol

from kvstore.core.catalog import Replica
from kvstore.types import Retention, SessionState

PRIORITIES = range(101)
DEFAULT_PRIORITY = 50
FOR_GOOD = float("inf")


class Use(NamedTuple):
    """What is known of the request for whose sake replicas come in and are touched."""

    now_ms: float = 0.0
    """Monotonic."""
    category: Hashable = None
    """Requests of one category tend to be followed up alike."""
    session: Hashable = None
    """Whose next request is likely to use the same replicas; None when not known."""
    priority: int = DEFAULT_PRIORITY
    """0 to 100, of what no retention is for."""
    retention: tuple[Retention, ...] = ()
    """Where several name a token, the first holds."""
    request: Hashable = None
    """Several of these with one request are one use; None: each is one."""
    tenant: str = ""

    def priority_at(self, token: int) -> tuple[int, float]:
        """The priority of what begins at a token of the prompt, and until when it holds,
        as `now_ms`."""
        for part in self.retention:
            if part.first_token <= token < part.stop_token:
                until = FOR_GOOD if part.ttl_ms is None else self.now_ms + part.ttl_ms
                return part.priority, until
        return self.priority, FOR_GOOD


class EvictionPolicy(Protocol):
    by_chain: ClassVar[bool] = False
    """It orders the blocks of a chain by the order of their touches, and expects it
    as above; what has false here can also be fed the root first."""

    def use(self, use: Use) -> None:
        """The calls that follow, up to the next one of these, are for this request."""
        return

    def hint(
        self, session: Hashable, state: SessionState, expected_ms: float | None = None
    ) -> None:
        """What is known of a session that has made its latest request; `expected_ms`: in
        how long it is likely to make the next one. Of one that is not known nothing is."""
        return

    def miss(self, stored_key: bytes) -> None:
        """A block that is not held was asked for and is about to be inserted, once
        there is room. May be said more than once."""
        return

    def insert(self, replica: Replica) -> None:
        """A replica has come in; this counts as a use."""
        ...

    def insert_all(self, replicas: Iterable[Replica]) -> None:
        """`insert` for each, in this order."""
        insert = self.insert
        for replica in replicas:
            insert(replica)

    def touch(self, replica: Replica) -> None:
        """A replica was used."""
        ...

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        """`touch` for each, in this order."""
        touch = self.touch
        for replica in replicas:
            touch(replica)

    def remove(self, replica: Replica) -> None:
        """A replica has left."""
        ...

    def worth(self, replica: Replica) -> float:
        """How much a replica that is held is worth now, beside others that are: more is
        better. A policy that only knows an order says the same of all."""
        return 0.0

    def candidates(self) -> Iterator[Replica]:
        """Every replica held, the one to evict first coming first. The caller does not
        change the policy while it uses the iterator."""
        ...

    def __len__(self) -> int: ...


def token_of(replica: Replica) -> int:
    """The first token of its prompt that a replica is for, as far as that is known."""
    block = replica.block
    return block.depth * block.layout.spec.block_tokens
