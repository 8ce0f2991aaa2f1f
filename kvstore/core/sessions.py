"""Clients' claims: sessions, and the leases and reservations that end with them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.core.catalog import Layout, Replica

if TYPE_CHECKING:
    from kvstore.core.tickets import AcquireTicket, PrefetchTicket, ReserveTicket


MOST_PREFETCHES = 256
"""The latest of a session, which end with it."""


@dataclass(eq=False, slots=True)
class Lease:
    """The right to read `replicas` (all pinned) until `expires_ns`."""

    lease_id: int
    session: Session
    replicas: list[Replica]
    expires_ns: int


@dataclass(eq=False, slots=True)
class Reservation:
    """The right to write into slots, all granted at once, until `expires_ns`.

    `slots`: those still open, by id. The reservation ends with the last of them.
    Once `expired` they cannot be committed any more; those left are kept because a
    local client may be writing still (see lifecycle).
    """

    session: Session
    layout: Layout
    slots: dict[int, Replica]
    expires_ns: int
    expired: bool = False


@dataclass(eq=False, slots=True)
class Session:
    """One client. `local`: it maps the arena, so it may write into a reserved slot
    for as long as it lives, whatever the server thinks of its reservation."""

    id: bytes
    tenant: str
    local: bool
    closed: bool = False
    leases: dict[int, Lease] = field(default_factory=dict)
    leased: int = 0
    """Blocks of all its leases together."""
    reservations: set[Reservation] = field(default_factory=set)
    slots: dict[int, Reservation] = field(default_factory=dict)
    """Every open slot, by id."""
    tickets: set[AcquireTicket | ReserveTicket] = field(default_factory=set)
    prefetches: deque[PrefetchTicket] = field(default_factory=lambda: deque(maxlen=MOST_PREFETCHES))
