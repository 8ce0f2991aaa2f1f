"""Clients' claims: sessions, and the leases and reservations that end with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.core.catalog import Layout, Replica

if TYPE_CHECKING:
    from kvstore.core.tickets import AcquireTicket, ReserveTicket


@dataclass(eq=False, slots=True)
class Lease:
    """The right to read `replicas` (all pinned) until `expires_ns`."""

    lease_id: int
    session: Session
    replicas: list[Replica]
    expires_ns: int


@dataclass(eq=False, slots=True)
class Reservation:
    """The right to write the slots of `entries` until `expires_ns`.

    `entries` has an item for each entry asked for: its replica while it is being
    written, None where none was granted. `committed` remembers the checksums of
    those published, so that a repeated commit can be told from a conflicting one.
    """

    reservation_id: int
    session: Session
    layout: Layout
    entries: list[Replica | None]
    expires_ns: int
    committed: dict[int, int] = field(default_factory=dict)
    expired: bool = False

    @property
    def open(self) -> bool:
        return any(replica is not None for replica in self.entries)


@dataclass(eq=False, slots=True)
class Session:
    """One client. `local`: it maps the arena, so it may write into a reserved slot
    for as long as it lives, whatever the server thinks of its reservation."""

    id: bytes
    tenant: str
    local: bool
    closed: bool = False
    leases: dict[int, Lease] = field(default_factory=dict)
    reservations: dict[int, Reservation] = field(default_factory=dict)
    tickets: set[AcquireTicket | ReserveTicket] = field(default_factory=set)
