"""What the planner asks its shell to do. The shell executes them in this order.

The shell answers each copy of a `Move` with `transfer_done` or `transfer_failed`, and a
`Forget` with `forgotten`. Everything else needs no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.types import Tier

if TYPE_CHECKING:
    from kvstore.core.catalog import Layout, Replica
    from kvstore.core.places.mirrors import Mirrors
    from kvstore.core.places.shares import Mirror
    from kvstore.core.tickets import Ticket


@dataclass(frozen=True, slots=True)
class OpenExtent:
    """Make an extent usable before anything is addressed in it."""

    tier: Tier
    extent: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class CloseExtent:
    """An extent's memory or file is not needed any more."""

    tier: Tier
    extent: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A block's bytes are to go from `source` to `target`, a replica being filled.

    Both stay valid until the shell reports back.
    """

    source: Replica
    target: Replica


@dataclass(frozen=True, slots=True)
class Move:
    """Make these copies one after the other, all of them in one direction."""

    copies: list[Copy]


@dataclass(frozen=True, slots=True)
class Forget:
    """Strike a replica from its storage tier; its slot is free once reported."""

    replica: Replica


@dataclass(frozen=True, slots=True)
class Publish:
    """Blocks that came to or went from a tier: (stored key, in DRAM, behind DRAM)."""

    changes: list[tuple[bytes, bool, bool]]


@dataclass(frozen=True, slots=True)
class _OfMirror:
    on: Mirrors
    mirror: Mirror


class Mirrored(_OfMirror):
    """A GPU's memory has a copy of a block: its workers may be told, under the address that it
    is `listed_as`."""

    __slots__ = ()


class Unmirrored(_OfMirror):
    """It has it no more. Before anything else is done with the memory, or with the slot it is
    a copy of, its workers are to be told."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RememberLayout:
    layout: Layout


@dataclass(frozen=True, slots=True)
class Answer:
    """`ticket` has its answer: wake whoever waits for it."""

    ticket: Ticket


Action = (
    OpenExtent | CloseExtent | Move | Forget | Publish | Mirrored | Unmirrored | RememberLayout
    | Answer
)  # fmt: skip
