"""Reservations: slots that a client writes and then publishes.

A reserve grants at once what it can. Where it can grant nothing for want of space it
waits its turn, first come, first served. What is granted is WRITING until it is
committed, given up, or out of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from kvstore.core.actions import Answer
from kvstore.core.catalog import Block, Catalog, Layout, Replica
from kvstore.core.lifecycle import Event, State
from kvstore.core.limits import Counters, Limits
from kvstore.core.residency import Residency
from kvstore.core.sessions import Reservation, Session
from kvstore.core.space import SpaceClass
from kvstore.core.tickets import ReserveTicket
from kvstore.errors import (
    BadRequest,
    Conflict,
    ForeignReservation,
    ReservationExpired,
    TooMany,
    UnknownReservation,
)
from kvstore.types import ReservationGrant, ReserveOutcome, ReserveResult

MAX_WAITING = 1024
"""Reserves that may wait for space at a time."""
MAX_SETTLED = 256
"""Reservations without an open entry that a session keeps, to recognise repeats."""
MAX_ANCESTORS = 4096
"""Blocks before a new one that count as used with it. Bounds what a commit costs."""

_DENIED = ReserveResult(ReserveOutcome.DENIED)


class Reservations:
    def __init__(
        self,
        residency: Residency,
        limits: Limits,
        counters: Counters,
        ids: Iterator[int],
    ) -> None:
        self._residency = residency
        self._catalog: Catalog = residency.catalog
        self._limits = limits
        self._counters = counters
        self._ids = ids
        self._reservations: dict[int, Reservation] = {}
        self._waiting: deque[ReserveTicket] = deque()

    @property
    def open(self) -> int:
        """Reservations with an entry that is still to be written."""
        return sum(1 for r in self._reservations.values() if r.open)

    def reserve(
        self,
        session: Session,
        layout_id: bytes,
        entries: Sequence[tuple[bytes, bytes]],
        *,
        wait: bool,
        now_ns: int,
    ) -> ReserveTicket:
        """Slots for new blocks; `entries` are (key, parent's key or b"").

        Grants what it can. Only when it can grant nothing at all and something is
        refused for want of space does the ticket wait (with `wait`): a client that
        is granted a part should write that first, because what is reserved cannot
        make room. Raises `UnknownLayout`, `TooMany`.
        """
        layout = self._catalog.layout(session.tenant, layout_id)
        if sum(1 for r in session.reservations.values() if r.open) >= self._limits.max_reservations:
            raise TooMany(f"a session may hold {self._limits.max_reservations} reservations")
        stored = [
            (
                layout.name(key),
                layout.name(parent) if parent else b"",
            )
            for key, parent in entries
        ]
        ticket = ReserveTicket(session, layout, stored)
        if not self._try_reserve(ticket, now_ns, last=not wait):
            if len(self._waiting) >= MAX_WAITING:
                raise TooMany("too many calls are waiting for space")
            self._waiting.append(ticket)
            session.tickets.add(ticket)
        return ticket

    def _try_reserve(self, ticket: ReserveTicket, now_ns: int, *, last: bool) -> bool:
        """Answer the ticket if anything can be granted, nothing needs to be, or this
        is the `last` try."""
        granted: list[Replica | None] = []
        results: list[ReserveResult] = []
        denied = 0
        for stored_key, parent in ticket.entries:
            # All entries are of one class: where one found no room, none will.
            result, replica = self._reserve_one(ticket.layout, stored_key, parent, room=not denied)
            denied += result is _DENIED
            results.append(result)
            granted.append(replica)
        if denied and not last and not any(granted):
            return False
        self._counters.denied_blocks += denied
        expires_ns = now_ns + self._limits.reservation_ms * 1_000_000
        reservation_id = 0
        if any(granted):
            reservation_id = next(self._ids)
            reservation = Reservation(
                reservation_id, ticket.session, ticket.layout, granted, expires_ns
            )
            self._reservations[reservation_id] = reservation
            ticket.session.reservations[reservation_id] = reservation
        ticket.session.tickets.discard(ticket)
        ticket.answer = ReservationGrant(reservation_id, results, expires_ns)
        return True

    def _reserve_one(
        self, layout: Layout, stored_key: bytes, parent: bytes, *, room: bool
    ) -> tuple[ReserveResult, Replica | None]:
        block = self._catalog.get(stored_key)
        if block is not None:
            if not block.readable:
                return ReserveResult(ReserveOutcome.PENDING), None
            self._residency.touch(block)
            return ReserveResult(ReserveOutcome.PRESENT, 0, block.checksum or 0), None
        if not room:
            return _DENIED, None
        block = self._catalog.add(stored_key, parent, layout)
        replica = self._residency.place_for_write(block)
        if replica is None:
            self._catalog.remove(block)
            return _DENIED, None
        return ReserveResult(ReserveOutcome.GRANTED, replica.address), replica

    def get(self, session: Session, reservation_id: int) -> Reservation:
        """Raises `UnknownReservation`, `ForeignReservation`, `ReservationExpired`."""
        reservation = self._reservations.get(reservation_id)
        if reservation is None:
            raise UnknownReservation("no such reservation")
        if reservation.session is not session:
            raise ForeignReservation("the reservation belongs to another session")
        if reservation.expired:
            raise ReservationExpired("the reservation has timed out")
        return reservation

    def commit(
        self,
        session: Session,
        reservation_id: int,
        indices: Sequence[int],
        checksums: Sequence[int],
    ) -> None:
        """Publish written entries; all of them or, on an error, none.

        Raises what `get` raises, `BadRequest`, `Conflict`.
        """
        reservation = self.get(session, reservation_id)
        if len(indices) != len(checksums) or len(set(indices)) != len(indices):
            raise BadRequest("a commit needs one checksum for each index, each index once")
        fresh: list[tuple[int, Replica, int]] = []
        for index, checksum in zip(indices, checksums, strict=True):
            if not 0 <= index < len(reservation.entries):
                raise BadRequest(f"there is no entry {index} in the reservation")
            replica = reservation.entries[index]
            if replica is not None:
                fresh.append((index, replica, checksum))
            elif index not in reservation.committed:
                raise BadRequest(f"entry {index} was not granted")
            elif reservation.committed[index] != checksum:
                raise Conflict(f"entry {index} is committed with other bytes")
        # The last of the chain first, the root's side most recent.
        for index, replica, checksum in reversed(fresh):
            self._residency.publish(replica, checksum)
            reservation.entries[index] = None
            reservation.committed[index] = checksum
        self._counters.committed_blocks += len(fresh)
        if fresh:
            self._touch_ancestors(fresh[0][1].block)
        self._trim_settled(session)

    def _touch_ancestors(self, block: Block) -> None:
        # Bounded, because parents are what clients say they are, and could be a ring.
        for _ in range(MAX_ANCESTORS):
            parent = self._catalog.get(block.parent)
            if parent is None:
                return
            self._residency.touch(parent)
            block = parent

    def abort(self, session: Session, reservation_id: int) -> None:
        """Give back what is not committed. Unknown reservations are ignored."""
        reservation = self._reservations.get(reservation_id)
        if reservation is None:
            return
        if reservation.session is not session:
            raise ForeignReservation("the reservation belongs to another session")
        self.end(reservation, Event.ABORT)

    def end(self, reservation: Reservation, event: Event) -> None:
        for index, replica in enumerate(reservation.entries):
            if replica is not None:
                reservation.entries[index] = None
                self._residency.release_writer(replica, event)
        del self._reservations[reservation.reservation_id]
        del reservation.session.reservations[reservation.reservation_id]

    def _trim_settled(self, session: Session) -> None:
        if len(session.reservations) <= MAX_SETTLED:
            return
        settled = [r for r in session.reservations.values() if not r.open]
        for reservation in settled[: len(settled) - MAX_SETTLED]:
            self.end(reservation, Event.ABORT)

    # Getting on with what waits

    def retry(self, now_ns: int) -> None:
        """There may be room now: let those who wait have it, in order within a class."""
        full: set[SpaceClass] = set()
        for ticket in list(self._waiting):
            space_class = ticket.layout.dram_class
            if space_class in full:
                continue
            if self._try_reserve(ticket, now_ns, last=False):
                self._waiting.remove(ticket)
                self._residency.actions.append(Answer(ticket))
            else:
                full.add(space_class)

    def give_up(self, ticket: ReserveTicket, now_ns: int) -> None:
        """The caller waits no longer."""
        self._waiting.remove(ticket)
        if ticket.session.closed:
            ticket.answer = ReservationGrant(0, [_DENIED] * len(ticket.entries), 0)
        else:
            self._try_reserve(ticket, now_ns, last=True)

    def expire(self, now_ns: int) -> None:
        """End the reservations whose time is up."""
        for reservation in [x for x in self._reservations.values() if x.expires_ns < now_ns]:
            self._expire_one(reservation, now_ns)

    def _expire_one(self, reservation: Reservation, now_ns: int) -> None:
        if reservation.expired:
            # Remembered for as long again, to tell a late client what happened.
            forget_ns = reservation.expires_ns + self._limits.reservation_ms * 1_000_000
            if not reservation.open and forget_ns < now_ns:
                self.end(reservation, Event.ABORT)
            return
        if not reservation.open:
            self.end(reservation, Event.ABORT)
            return
        self._counters.expired_reservations += 1
        reservation.expired = True
        # A local client may be writing still; see lifecycle.
        event = Event.EXPIRE if reservation.session.local else Event.ABORT
        for index, replica in enumerate(reservation.entries):
            if replica is not None:
                self._residency.release_writer(replica, event)
                if replica.state is State.GONE:
                    reservation.entries[index] = None

    def add_wanted(self, wanted: dict[SpaceClass, int]) -> None:
        """Add the slots that waiting reserves lack, by class."""
        for ticket in self._waiting:
            space_class = ticket.layout.dram_class
            wanted[space_class] = wanted.get(space_class, 0) + len(ticket.entries)

    def writers(self) -> set[Replica]:
        """Every replica that is or may still be written; for integrity checks."""
        return {
            replica
            for reservation in self._reservations.values()
            for replica in reservation.entries
            if replica is not None
        }
