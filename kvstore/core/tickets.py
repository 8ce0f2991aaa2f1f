"""Calls that may have to wait: what was asked, what is still missing, the answer.

A ticket is answered exactly once: at once, when what it waits for is settled, or
when its caller's patience ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.core.catalog import Block, Layout, Replica, is_ready
from kvstore.core.places.foreseen import Errand
from kvstore.core.policies import Use
from kvstore.core.sessions import Session
from kvstore.core.transfers import Wish
from kvstore.types import LeaseGrant, Refusal, SlotGrant

if TYPE_CHECKING:
    from kvstore.core.places.mirrors import Mirrors


@dataclass(eq=False, slots=True)
class ChainClaim:
    """One chain of an acquire and the prefix of it that is pinned so far.

    `columns[s][p]` is the replica of position p in layout s; all columns are equally
    long. `from_dram` counts the leading positions that were in DRAM when asked for; what was
    in a GPU's memory only ends them.
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
    missing: dict[Replica, int] = field(default_factory=dict)
    """Replicas still being filled, and the work that each is."""
    missing_ns: int = 0
    """That of all of them."""
    straight: dict[bytes, Mirrors] | None = None
    """By layout id, the GPU's memory that who asks can be given blocks in that are not in
    DRAM; None: no GPU's."""
    wait: bool = False
    at_work: bool = True
    """A chore sees to it: it pins more, or makes the answer."""
    waited: bool = False
    """Something may have happened to what is pinned since it was."""
    withdrawn: bool = False
    """The caller is gone."""
    compute_ns: float = 0.0
    """What a position costs who asks, where it computes what it is not given."""
    promised_ns: int = 0
    """By when all should be there."""
    doubts: int = 0
    """Times that it was not, and more was waited for."""
    believed_ns: int = 0
    """Until then it is, after the latest of them."""
    through_ns: int = 0
    """All is there once so much work has gone through the link since the start, and what
    goes before it of what came later than"""
    before_ns: int = 0
    """when so much had come that would (`Inflow.before`)."""
    why: Refusal | None = None
    """Why nothing more is waited for."""
    answer: list[LeaseGrant] | None = None

    def onto(self, layout: Layout) -> Mirrors | None:
        """The GPU's memory that blocks of a layout may be read into for who asks."""
        return None if self.straight is None else self.straight.get(layout.layout_id)

    def replica_of(self, block: Block) -> Replica | None:
        """What who asks can be given of a block, or will be: in DRAM wherever it is there, for
        that nobody takes away from who has a lease; in its GPU's memory what is there, and what
        comes there sooner."""
        if self.straight is None:
            return block.dram
        onto = self.straight.get(block.layout.layout_id)
        if onto is None or block.nvme is None or is_ready(block.dram):
            return block.dram
        mirror = onto.of.get(block.nvme)
        if mirror is None or (block.dram is not None and not is_ready(mirror)):
            return block.dram
        return mirror


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
