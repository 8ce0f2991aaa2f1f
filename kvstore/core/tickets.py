"""Calls that may have to wait: what was asked, what is still missing, the answer.

A ticket is answered exactly once: at once, when what it waits for is settled, or
when its caller's patience ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.core.catalog import Layout, Replica
from kvstore.core.foreseen import Errand
from kvstore.core.policies import Use
from kvstore.core.sessions import Session
from kvstore.core.transfers import Wish
from kvstore.types import LeaseGrant, Refusal, SlotGrant


@dataclass(eq=False, slots=True)
class ChainClaim:
    """One chain of an acquire and the prefix of it that is pinned so far.

    `columns[s][p]` is the replica of position p in layout s; all columns are equally
    long. `from_dram` counts the leading positions that were in DRAM when asked for.
    `cramped`: the next position is held, but there was no room in DRAM to bring it up.
    `most`: positions it may have; `refusal`: why not all. `use`: what policies are told.
    """

    layouts: list[Layout]
    keys: Sequence[bytes]
    columns: list[list[Replica]]
    most: int
    use: Use
    from_dram: int = 0
    cramped: bool = False
    refusal: Refusal | None = None

    @property
    def claimed(self) -> int:
        """Positions pinned."""
        return len(self.columns[0]) if self.columns else 0


@dataclass(eq=False, slots=True)
class AcquireTicket:
    session: Session
    claims: list[ChainClaim]
    wish: Wish
    missing: set[Replica] = field(default_factory=set)
    """Replicas still being filled."""
    wait: bool = False
    at_work: bool = True
    """A chore sees to it: it pins more, or makes the answer."""
    waited: bool = False
    """Something may have happened to what is pinned since it was."""
    withdrawn: bool = False
    """The caller is gone."""
    compute_ns: float = 0.0
    """What a position costs who asks, where it computes what it is not given."""
    doubt_ns: int | None = None
    """When to look how it gets on, and to decide again."""
    promised_ns: int = 0
    """By when all should be there."""
    doubts: int = 0
    """Times that it was not, and more was waited for."""
    through_ns: int = 0
    """All is there once so much work has gone through the link since the start."""
    answer: list[LeaseGrant] | None = None


@dataclass(eq=False, slots=True)
class ReserveTicket:
    """`count` slots of a layout."""

    session: Session
    layout: Layout
    count: int
    answer: SlotGrant | None = None


@dataclass(eq=False, slots=True)
class FlushTicket:
    """`queue`: what is still to be written, by its place in DRAM; all of it once
    `searched`. `writing`: what is on its way to NVMe."""

    tenant: str | None
    drop: bool
    searched: bool = False
    queue: deque[Replica] = field(default_factory=deque)
    writing: set[Replica] = field(default_factory=set)
    written: int = 0
    answer: int | None = None


@dataclass(eq=False, slots=True)
class ClearTicket:
    tenant: str
    forgotten: int = 0
    answer: int | None = None


@dataclass(eq=False, slots=True)
class PrefetchTicket:
    """The answer: blocks that are being brought up for it. `lacking`: stored keys of those
    that still are to be, in order."""

    wish: Wish
    use: Use
    errand: Errand
    lacking: deque[bytes] = field(default_factory=deque)
    started: int = 0
    answer: int | None = None


Ticket = AcquireTicket | ReserveTicket | FlushTicket | ClearTicket | PrefetchTicket
