"""The planner: events in, actions out.

Everything that the store decides is decided here, on one thread, without a clock
or a byte: the caller brings the time (nanoseconds, monotonic) and carries out the
actions (`core.actions`). The server and the simulator run this same code.

    clients' calls    -> register_layout lookup acquire renew release reserve commit
                         abort prefetch clear flush
    clients' lives    -> open_session close_session
    the tiers         -> transfer_done transfer_failed forgotten extent_failed tier_failed
    time              -> tick, give_up

A call that may have to wait returns a ticket. A ticket whose `answer` is set is
settled; any other gets an `Answer` action later, at the latest when the caller's
patience ends and the shell calls `give_up`.

Sessions, leases, reservations and tickets are kept here; which tier a block is in
and how it moves is `core.residency`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvstore.core.actions import Action, Answer, Copy, RememberLayout
from kvstore.core.catalog import Block, Catalog, Layout, Replica
from kvstore.core.lifecycle import Event, State
from kvstore.core.policies import POLICIES
from kvstore.core.residency import Residency, StoredBlock
from kvstore.core.sessions import Lease, Reservation, Session
from kvstore.core.space import Space, SpaceClass
from kvstore.core.tickets import AcquireTicket, ChainClaim, FlushTicket, ReserveTicket, Ticket
from kvstore.core.transfers import TransferClass
from kvstore.errors import (
    BadRequest,
    Conflict,
    ForeignLease,
    ForeignReservation,
    LeaseExpired,
    NoLowerTier,
    NoSession,
    ReservationExpired,
    TooMany,
    UnknownLayout,
    UnknownReservation,
)
from kvstore.types import (
    ChainPresence,
    ChainQuery,
    LayoutSpec,
    LeaseGrant,
    ReservationGrant,
    ReserveOutcome,
    ReserveResult,
    Tier,
)

SAVE_PAUSE_NS = 1_000_000_000
"""How long nothing is written to NVMe after it refused a write for want of space."""
MAX_WAITING = 1024
"""Reserves that may wait for space at a time."""
MAX_SETTLED = 256
"""Reservations without an open entry that a session keeps, to recognise repeats."""

MAX_CHAIN = 65536
"""Blocks a chain can have; beyond that its order in the policies is not kept."""

_DENIED = ReserveResult(ReserveOutcome.DENIED)


@dataclass(frozen=True, slots=True)
class Limits:
    lease_ms: int
    reservation_ms: int
    max_sessions: int
    max_leases: int
    """Leases a session."""
    max_reservations: int
    """Open reservations a session."""
    max_layouts: int
    """Layouts a tenant."""
    max_running: int
    """Transfers at a time."""


@dataclass(slots=True)
class Counters:
    """Since the start."""

    acquired_positions: int = 0
    acquired_hits: int = 0
    acquired_hits_dram: int = 0
    committed_blocks: int = 0
    denied_blocks: int = 0
    expired_leases: int = 0
    expired_reservations: int = 0


class Planner:
    def __init__(
        self,
        limits: Limits,
        *,
        tenant_key: Callable[[str], bytes],
        eviction: str,
        dram: Space,
        nvme: Space | None,
        nvme_slot_bytes: Callable[[int], int] | None,
    ) -> None:
        self.limits = limits
        self.counters = Counters()
        self.catalog = Catalog(tenant_key, limits.max_layouts, nvme_slot_bytes)
        self.residency = Residency(self.catalog, dram, nvme, POLICIES[eviction], limits.max_running)
        self._sessions: dict[bytes, Session] = {}
        self._leases: dict[int, Lease] = {}
        self._reservations: dict[int, Reservation] = {}
        self._last_id = 0
        self._filling: dict[Replica, list[AcquireTicket]] = {}
        self._waiting: deque[ReserveTicket] = deque()
        self._cramped: list[AcquireTicket] = []
        self._flushes: list[FlushTicket] = []
        self._resume_saving_ns = 0

    def take_actions(self) -> list[Action]:
        """What is to be done now, in order."""
        self._pump()
        actions = self.residency.actions
        self.residency.actions = []
        return actions

    # Sessions

    def open_session(self, session_id: bytes, tenant: str, *, local: bool) -> Session:
        """`session_id` is the caller's to choose, unguessable and new. Raises `TooMany`."""
        if len(self._sessions) >= self.limits.max_sessions:
            raise TooMany(f"the server has {self.limits.max_sessions} sessions")
        session = Session(session_id, tenant, local)
        self._sessions[session_id] = session
        return session

    def session(self, session_id: bytes) -> Session:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise NoSession("no such session; attach again") from None

    def close_session(self, session: Session) -> None:
        """The client is gone for certain: all it held is given back. Idempotent."""
        if session.closed:
            return
        session.closed = True
        del self._sessions[session.id]
        for ticket in list(session.tickets):
            self.give_up(ticket, 0)
        for lease in list(session.leases.values()):
            self._end_lease(lease)
        for reservation in list(session.reservations.values()):
            self._end_reservation(reservation, Event.WRITER_GONE)

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    @property
    def open_leases(self) -> int:
        return len(self._leases)

    @property
    def open_reservations(self) -> int:
        return sum(1 for r in self._reservations.values() if r.open)

    # Layouts and lookups

    def register_layout(self, tenant: str, spec: LayoutSpec) -> bytes:
        """Idempotent. Raises `BadRequest` when a block would not fit an extent."""
        extent_bytes = self.residency.dram.space.extent_bytes
        if spec.slot_bytes > extent_bytes:
            raise BadRequest(
                f"a block of {spec.block_bytes} bytes does not fit an extent of {extent_bytes}"
            )
        layout, new = self.catalog.register_layout(tenant, spec)
        if new:
            self.residency.actions.append(RememberLayout(layout))
        return layout.layout_id

    def lookup(self, tenant: str, chains: Sequence[ChainQuery]) -> list[ChainPresence]:
        answers = []
        for chain in chains:
            layouts = [self.catalog.layout(tenant, i) for i in chain.layout_ids]
            held = in_dram = 0
            for key in chain.keys:
                blocks = [self._readable(layout, key) for layout in layouts]
                if not blocks or not all(blocks):
                    break
                if in_dram == held and all(b and _ready(b.dram) for b in blocks):
                    in_dram += 1
                held += 1
            answers.append(ChainPresence(held, in_dram))
        return answers

    def _readable(self, layout: Layout, key: bytes) -> Block | None:
        block = self.catalog.find(layout, key)
        return block if block is not None and block.readable else None

    # Leases

    def acquire(
        self, session: Session, chains: Sequence[ChainQuery], *, wait: bool, now_ns: int
    ) -> AcquireTicket:
        """Pin the longest prefix of each chain. Without `wait`, only what is in DRAM.

        Raises `UnknownLayout`, `TooMany`; nothing is pinned then.
        """
        if len(session.leases) + len(chains) > self.limits.max_leases:
            raise TooMany(f"a session may hold {self.limits.max_leases} leases")
        layouts = [[self.catalog.layout(session.tenant, i) for i in c.layout_ids] for c in chains]
        claims = [
            ChainClaim(shards, chain.keys) for chain, shards in zip(chains, layouts, strict=True)
        ]
        ticket = AcquireTicket(session, claims, wait=wait)
        self._extend(ticket)
        if self._may_get_on(ticket):
            session.tickets.add(ticket)
            if any(claim.cramped for claim in claims):
                self._cramped.append(ticket)
        else:
            self._settle_acquire(ticket, now_ns)
        return ticket

    def _extend(self, ticket: AcquireTicket) -> None:
        """Pin what can be pinned now; see to it that the rest is brought up."""
        for claim in ticket.claims:
            while len(claim.positions) < len(claim.keys) and claim.layouts:
                position = self._claim_position(claim, ticket.wait)
                if position is None:
                    break
                filling = [replica for replica in position if replica.state is State.FILLING]
                if not filling and claim.from_dram == len(claim.positions):
                    claim.from_dram += 1
                claim.positions.append(position)
                for replica in filling:
                    if replica not in ticket.missing:
                        ticket.missing.add(replica)
                        self._filling.setdefault(replica, []).append(ticket)

    def _claim_position(self, claim: ChainClaim, wait: bool) -> list[Replica] | None:
        """One replica a layout, pinned, or None; `claim.cramped` says whether it is
        room that is lacking."""
        claim.cramped = False
        position: list[Replica] = []
        for layout in claim.layouts:
            replica = self._claim_block(claim, layout, claim.keys[len(claim.positions)], wait)
            if replica is None:
                for pinned in position:
                    self.residency.unpin(pinned)
                return None
            position.append(replica)
        return position

    def _may_get_on(self, ticket: AcquireTicket) -> bool:
        """The ticket has something to wait for."""
        if ticket.missing:
            return True
        return ticket.wait and any(c.cramped for c in ticket.claims) and self.residency.busy

    def _claim_block(
        self, claim: ChainClaim, layout: Layout, key: bytes, wait: bool
    ) -> Replica | None:
        """The block's DRAM replica, pinned, READY or (with `wait`) on its way."""
        block = self.catalog.find(layout, key)
        if block is None:
            return None
        replica = block.dram
        if replica is None and wait and _ready(block.nvme):
            replica = self.residency.bring_up(block, TransferClass.DEMAND)
            claim.cramped = replica is None
        if replica is None:
            return None
        if replica.state is State.FILLING and wait:
            self.residency.transfers.promote(replica)
        elif replica.state is not State.READY:
            return None
        self.residency.pin(replica)
        return replica

    def _settle_acquire(self, ticket: AcquireTicket, now_ns: int) -> None:
        """Turn what is READY now into leases, let go of the rest, and answer."""
        for replica in ticket.missing:
            waiting = self._filling[replica]
            waiting.remove(ticket)
            if not waiting:
                del self._filling[replica]
        ticket.missing.clear()
        if ticket in self._cramped:
            self._cramped.remove(ticket)
        ticket.session.tickets.discard(ticket)
        expires_ns = now_ns + self.limits.lease_ms * 1_000_000
        ticket.answer = [self._grant(ticket.session, claim, expires_ns) for claim in ticket.claims]

    def _grant(self, session: Session, claim: ChainClaim, expires_ns: int) -> LeaseGrant:
        held = 0
        if not session.closed:
            usable = takewhile(lambda position: all(map(_ready, position)), claim.positions)
            held = sum(1 for _ in usable)
        for position in claim.positions[held:]:
            for replica in position:
                if replica.state is not State.GONE:
                    self.residency.unpin(replica)
        from_dram = min(claim.from_dram, held)
        self.counters.acquired_positions += len(claim.keys)
        self.counters.acquired_hits += held
        self.counters.acquired_hits_dram += from_dram
        if not held:
            return LeaseGrant(0, 0, [], [], 0, 0)
        # The root last, so that it is the most recent (see policies.base).
        for position in reversed(claim.positions[:held]):
            for replica in position:
                self.residency.touch(replica.block)
        shards = range(len(claim.positions[0]))
        replicas = [claim.positions[p][s] for s in shards for p in range(held)]
        lease = Lease(self._new_id(), session, replicas, expires_ns)
        self._leases[lease.lease_id] = session.leases[lease.lease_id] = lease
        return LeaseGrant(
            lease.lease_id,
            held,
            [replica.address for replica in replicas],
            [replica.block.checksum or 0 for replica in replicas],
            expires_ns,
            from_dram,
        )

    def lease(self, session: Session, lease_id: int) -> Lease:
        """Raises `ForeignLease`, `LeaseExpired`."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseExpired("the lease has ended")
        if lease.session is not session:
            raise ForeignLease("the lease belongs to another session")
        return lease

    def renew(self, session: Session, lease_ids: Sequence[int], now_ns: int) -> int:
        """All or none. The new end, nanoseconds."""
        leases = [self.lease(session, lease_id) for lease_id in lease_ids]
        expires_ns = now_ns + self.limits.lease_ms * 1_000_000
        for lease in leases:
            lease.expires_ns = expires_ns
        return expires_ns

    def release(self, session: Session, lease_ids: Sequence[int]) -> None:
        """Ended leases are ignored. With a foreign one among them, none is released."""
        leases = {i: lease for i in lease_ids if (lease := self._leases.get(i)) is not None}
        if any(lease.session is not session for lease in leases.values()):
            raise ForeignLease("a lease belongs to another session")
        for lease in leases.values():
            self._end_lease(lease)

    def _end_lease(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        del lease.session.leases[lease.lease_id]
        for replica in lease.replicas:
            self.residency.unpin(replica)

    # Reservations

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
        layout = self.catalog.layout(session.tenant, layout_id)
        if sum(1 for r in session.reservations.values() if r.open) >= self.limits.max_reservations:
            raise TooMany(f"a session may hold {self.limits.max_reservations} reservations")
        stored = [
            (
                self.catalog.stored_key(layout, key),
                self.catalog.stored_key(layout, parent) if parent else b"",
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
        for stored_key, parent in ticket.entries:
            result, replica = self._reserve_one(ticket.layout, stored_key, parent)
            results.append(result)
            granted.append(replica)
        denied = results.count(_DENIED)
        if denied and not last and not any(granted):
            return False
        self.counters.denied_blocks += denied
        expires_ns = now_ns + self.limits.reservation_ms * 1_000_000
        reservation_id = 0
        if any(granted):
            reservation_id = self._new_id()
            reservation = Reservation(
                reservation_id, ticket.session, ticket.layout, granted, expires_ns
            )
            self._reservations[reservation_id] = reservation
            ticket.session.reservations[reservation_id] = reservation
        ticket.session.tickets.discard(ticket)
        ticket.answer = ReservationGrant(reservation_id, results, expires_ns)
        return True

    def _reserve_one(
        self, layout: Layout, stored_key: bytes, parent: bytes
    ) -> tuple[ReserveResult, Replica | None]:
        block = self.catalog.get(stored_key)
        if block is not None:
            if not block.readable:
                return ReserveResult(ReserveOutcome.PENDING), None
            self.residency.touch(block)
            return ReserveResult(ReserveOutcome.PRESENT, 0, block.checksum or 0), None
        block = self.catalog.add(stored_key, parent, layout)
        replica = self.residency.place_for_write(block)
        if replica is None:
            self.catalog.remove(block)
            return _DENIED, None
        return ReserveResult(ReserveOutcome.GRANTED, replica.address), replica

    def reservation(self, session: Session, reservation_id: int) -> Reservation:
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

        Raises what `reservation` raises, `BadRequest`, `Conflict`.
        """
        reservation = self.reservation(session, reservation_id)
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
            self.residency.publish(replica, checksum)
            reservation.entries[index] = None
            reservation.committed[index] = checksum
        self.counters.committed_blocks += len(fresh)
        if fresh:
            self._touch_ancestors(fresh[0][1].block)
        self._trim_settled(session)

    def _touch_ancestors(self, block: Block) -> None:
        # Bounded, because parents are what clients say they are, and could be a ring.
        for _ in range(MAX_CHAIN):
            parent = self.catalog.get(block.parent)
            if parent is None:
                return
            self.residency.touch(parent)
            block = parent

    def abort(self, session: Session, reservation_id: int) -> None:
        """Give back what is not committed. Unknown reservations are ignored."""
        reservation = self._reservations.get(reservation_id)
        if reservation is None:
            return
        if reservation.session is not session:
            raise ForeignReservation("the reservation belongs to another session")
        self._end_reservation(reservation, Event.ABORT)

    def _end_reservation(self, reservation: Reservation, event: Event) -> None:
        for index, replica in enumerate(reservation.entries):
            if replica is not None:
                reservation.entries[index] = None
                self.residency.release_writer(replica, event)
        del self._reservations[reservation.reservation_id]
        del reservation.session.reservations[reservation.reservation_id]

    def _trim_settled(self, session: Session) -> None:
        if len(session.reservations) <= MAX_SETTLED:
            return
        settled = [r for r in session.reservations.values() if not r.open]
        for reservation in settled[: len(settled) - MAX_SETTLED]:
            self._end_reservation(reservation, Event.ABORT)

    # Prefetch, clear, flush

    def prefetch(self, tenant: str, chains: Sequence[ChainQuery]) -> int:
        """Start bringing chains up, as far as there is room; the blocks started."""
        started = 0
        for chain in chains:
            layouts = [self.catalog.layout(tenant, i) for i in chain.layout_ids]
            for key in chain.keys:
                for layout in layouts:
                    block = self._readable(layout, key)
                    if block is None:
                        break
                    if block.dram is None:
                        if self.residency.bring_up(block, TransferClass.PREFETCH) is None:
                            return started
                        started += 1
                else:
                    continue
                break
        return started

    def clear(self, tenant: str) -> int:
        """Forget a tenant's blocks, but those being written right now."""
        blocks = [b for b in self.catalog if b.layout.tenant == tenant and b.readable]
        for block in blocks:
            self.residency.abandon(block)
        return len(blocks)

    def flush(self, tenant: str | None, *, drop: bool) -> FlushTicket:
        """Write what a tenant (None: everybody) has in DRAM only. Raises `NoLowerTier`."""
        if not self.residency.nvme_on:
            raise NoLowerTier("there is no tier behind DRAM, or it is switched off")
        ticket = FlushTicket(tenant, drop)
        ticket.queue.extend(self.residency.dirty_blocks(tenant))
        ticket.writing.update(
            block.nvme
            for block in self.catalog
            if block.nvme is not None
            and block.nvme.state is State.FILLING
            and tenant in (None, block.layout.tenant)
        )
        self._flushes.append(ticket)
        return ticket

    # What the shell reports

    def transfer_done(self, copy: Copy, now_ns: int) -> None:
        self.residency.filled(copy)
        self._target_settled(copy, now_ns, written=True)

    def transfer_failed(
        self, copy: Copy, now_ns: int, *, source_corrupt: bool = False, full: bool = False
    ) -> None:
        """`full`: the target tier had no room after all; it is left alone for a while."""
        if full:
            self.residency.save_paused = True
            self._resume_saving_ns = now_ns + SAVE_PAUSE_NS
        self.residency.fill_failed(copy, source_corrupt=source_corrupt)
        self._target_settled(copy, now_ns, written=False)

    def _target_settled(self, copy: Copy, now_ns: int, *, written: bool) -> None:
        for ticket in self._filling.pop(copy.target, ()):
            ticket.missing.discard(copy.target)
            if not self._may_get_on(ticket):
                self._answer_acquire(ticket, now_ns)
        self._retry_acquires(now_ns)
        self._retry_reserves(now_ns)
        for flush in self._flushes:
            if copy.target in flush.writing:
                flush.writing.remove(copy.target)
                flush.written += written

    def forgotten(self, replica: Replica) -> None:
        self.residency.forgotten(replica)

    def extent_failed(self, tier: Tier, extent: int) -> None:
        """An `OpenExtent` could not be carried out."""
        pool = self.residency.dram if tier is Tier.DRAM else self.residency.nvme
        assert pool is not None
        pool.space.fail_extent(extent)

    def tier_failed(self, now_ns: int) -> None:
        """The NVMe tier is to be used no more."""
        self.residency.switch_off_nvme()
        for ticket in {t for waiting in self._filling.values() for t in waiting}:
            self._answer_acquire(ticket, now_ns)

    # What is found at a start

    def restore(
        self,
        layouts: Iterable[tuple[str, LayoutSpec]],
        extents: Iterable[tuple[int, int]],
        blocks: Iterable[tuple[StoredBlock, int]],
    ) -> tuple[list[int], list[tuple[StoredBlock, int]]]:
        """Take over what an NVMe tier holds: layouts as (tenant, spec), extents as
        (number, slot bytes), blocks with their addresses. To be called before
        anything else. Returns the extents and the blocks that do not fit (the
        capacity is smaller now, the layout is not known), for the tier to drop."""
        nvme = self.residency.nvme
        assert nvme is not None
        for tenant, spec in layouts:
            self.catalog.register_layout(tenant, spec)
        refused_extents: list[int] = []
        for number, slot_bytes in extents:
            try:
                nvme.space.restore_extent(number, SpaceClass("", slot_bytes))
            except ValueError:
                refused_extents.append(number)
        refused_blocks = []
        for stored, address in _deepest_first(list(blocks)):
            try:
                layout = self.catalog.layout(stored.tenant, stored.layout_id)
                self.residency.restore(layout, stored, address)
            except (UnknownLayout, ValueError):
                refused_blocks.append((stored, address))
        return refused_extents, refused_blocks

    # Time

    def tick(self, now_ns: int) -> None:
        """To be called several times a second: ends what has run out of time."""
        for lease in [x for x in self._leases.values() if x.expires_ns < now_ns]:
            self.counters.expired_leases += 1
            self._end_lease(lease)
        for reservation in [x for x in self._reservations.values() if x.expires_ns < now_ns]:
            self._expire_reservation(reservation)
        if self.residency.save_paused and now_ns >= self._resume_saving_ns:
            self.residency.save_paused = False
        self._retry_acquires(now_ns)
        self._retry_reserves(now_ns)

    def _expire_reservation(self, reservation: Reservation) -> None:
        if reservation.expired:
            return
        if not reservation.open:
            self._end_reservation(reservation, Event.ABORT)
            return
        self.counters.expired_reservations += 1
        if not reservation.session.local:
            self._end_reservation(reservation, Event.ABORT)
            return
        # A local client may be writing still; see lifecycle.
        reservation.expired = True
        for replica in reservation.entries:
            if replica is not None:
                self.residency.release_writer(replica, Event.EXPIRE)

    def give_up(self, ticket: Ticket, now_ns: int) -> None:
        """The caller waits no longer: answer with what there is."""
        if ticket.answer is not None:
            return
        if isinstance(ticket, AcquireTicket):
            self._settle_acquire(ticket, now_ns)
        elif isinstance(ticket, ReserveTicket):
            self._waiting.remove(ticket)
            if ticket.session.closed:
                ticket.answer = ReservationGrant(0, [_DENIED] * len(ticket.entries), 0)
            else:
                self._try_reserve(ticket, now_ns, last=True)
        else:
            self._flushes.remove(ticket)
            ticket.answer = ticket.written

    # Getting on with what waits

    def _answer_acquire(self, ticket: AcquireTicket, now_ns: int) -> None:
        self._settle_acquire(ticket, now_ns)
        self.residency.actions.append(Answer(ticket))

    def _retry_acquires(self, now_ns: int) -> None:
        for ticket in list(self._cramped):
            self._extend(ticket)
            if not self._may_get_on(ticket):
                self._answer_acquire(ticket, now_ns)
            elif not any(claim.cramped for claim in ticket.claims):
                self._cramped.remove(ticket)

    def _retry_reserves(self, now_ns: int) -> None:
        for _ in range(len(self._waiting)):
            ticket = self._waiting[0]
            if not self._try_reserve(ticket, now_ns, last=False):
                break
            self._waiting.popleft()
            self.residency.actions.append(Answer(ticket))

    def _pump(self) -> None:
        self._continue_flushes()
        wanted: dict[SpaceClass, int] = {}
        for ticket in self._waiting:
            space_class = ticket.layout.dram_class
            wanted[space_class] = wanted.get(space_class, 0) + len(ticket.entries)
        for cramped in self._cramped:
            for claim in cramped.claims:
                for layout in claim.layouts:
                    lacking = len(claim.keys) - len(claim.positions)
                    wanted[layout.dram_class] = wanted.get(layout.dram_class, 0) + lacking
        self.residency.write_back(wanted)
        self.residency.actions.extend(self.residency.transfers.start())

    def _continue_flushes(self) -> None:
        for flush in list(self._flushes):
            stuck = False
            while flush.queue and len(flush.writing) < 2 * self.limits.max_running:
                block = flush.queue[0]
                if block.dram is not None and block.dram.state is State.READY and not block.nvme:
                    target = self.residency.save(block) if self.residency.nvme_on else None
                    if target is None:
                        stuck = not self.residency.can_save
                        break
                    flush.writing.add(target)
                elif block.nvme is not None and block.nvme.state is State.FILLING:
                    flush.writing.add(block.nvme)
                flush.queue.popleft()
            if not flush.writing and (stuck or not flush.queue):
                self._flushes.remove(flush)
                if flush.drop:
                    self.residency.drop_clean(flush.tenant)
                flush.answer = flush.written
                self.residency.actions.append(Answer(flush))

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def check_integrity(self) -> None:
        """Every count and link agrees; raises AssertionError. O(blocks)."""
        self.residency.check_integrity()
        pins: dict[Replica, int] = {}
        for lease in self._leases.values():
            for replica in lease.replicas:
                pins[replica] = pins.get(replica, 0) + 1
        for session in self._sessions.values():
            for ticket in session.tickets:
                if isinstance(ticket, AcquireTicket):
                    for claim in ticket.claims:
                        for position in claim.positions:
                            for replica in position:
                                pins[replica] = pins.get(replica, 0) + 1
        for copy in self.residency.transfers.copies():
            pins[copy.source] = pins.get(copy.source, 0) + 1
        pools = [p for p in (self.residency.dram, self.residency.nvme) if p is not None]
        for pool in pools:
            for replica in pool.replicas():
                if replica.pins != pins.pop(replica, 0):
                    raise AssertionError("a replica's pins are not what is held on it")
        if any(replica.state is not State.GONE for replica in pins):
            raise AssertionError("something holds a replica that is in no pool")
        writers = {
            replica
            for reservation in self._reservations.values()
            for replica in reservation.entries
            if replica is not None
        }
        written = {
            replica
            for replica in self.residency.dram.replicas()
            if replica.state in (State.WRITING, State.QUARANTINED)
        }
        if writers != written:
            raise AssertionError("reserved slots and reservations differ")


def _ready(replica: Replica | None) -> bool:
    return replica is not None and replica.state is State.READY


def _deepest_first(blocks: list[tuple[StoredBlock, int]]) -> list[tuple[StoredBlock, int]]:
    """Children before parents: the order in which they should be evicted."""
    parents = {stored.stored_key: stored.parent for stored, _ in blocks}
    depths: dict[bytes, int] = {b"": 0}
    for key in parents:
        path = []
        while key not in depths and key in parents:
            path.append(key)
            # Guards against a ring: a block on the path has a depth already.
            depths[key] = 0
            key = parents[key]
        base = depths.get(key, 0)
        for above, below in enumerate(reversed(path), start=1):
            depths[below] = base + above
    return sorted(blocks, key=lambda item: -depths[item[0].stored_key])
