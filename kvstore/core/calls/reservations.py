"""Reservations: slots that a client writes and then publishes.

Slots are reserved before it is known which blocks will go into them, so that a
client can have some at hand: then a store costs one call, a commit, which may
reserve the slots for the next store as well. Only the commit names the blocks. Two
clients that store the same block at once both write; the second finds it present.

A reserve grants at once what it can. Where it can grant nothing for want of space it
waits its turn, first come, first served. What is granted is WRITING until it is
committed, given up, or out of time.

A call names so many slots at most that all are seen to at once; a client that goes, or
runs out of time, may have had many more, which are given back in parts (`core.chores`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import filterfalse, islice, takewhile
from operator import attrgetter, itemgetter
from typing import NamedTuple

from kvstore.core.actions import Answer
from kvstore.core.catalog import Block, Catalog, Layout, Replica, is_ready
from kvstore.core.chores import CHANGED, Chore, Chores
from kvstore.core.lifecycle import Event
from kvstore.core.limits import Counters, Limits
from kvstore.core.places.residency import Residency
from kvstore.core.sessions import Reservation, Session
from kvstore.core.space import SpaceClass
from kvstore.core.tickets import ReserveTicket
from kvstore.core.uses import use_of
from kvstore.errors import BadRequest, ReservationExpired, TooMany
from kvstore.types import CommitAnswer, CommitOutcome, Landing, Segment, SlotGrant

MAX_WAITING = 1024
"""Reserves that may wait for space at a time."""
MOST_GPUS = 2
"""That a block lands on: each costs its writer a copy, and the call some time for each slot."""
MAX_ANCESTORS = 4096
"""Blocks before a new one that count as used with it."""
MAX_TOUCHED = 4 * MAX_ANCESTORS
"""The most of them for all segments of a commit. Bounds what a commit costs."""

_NO_SLOTS = SlotGrant(0, [], 0)


class Written(NamedTuple):
    """Places in GPUs' memory that a commit says are written, by GPU."""

    places: dict[str, set[int]]
    now_ns: int


class Reservations:
    def __init__(
        self,
        residency: Residency,
        chores: Chores,
        limits: Limits,
        counters: Counters,
        ids: Iterator[int],
    ) -> None:
        self._residency = residency
        self._holdings = residency.holdings
        self._catalog: Catalog = residency.catalog
        self._chores = chores
        self._limits = limits
        self._counters = counters
        self._ids = ids
        # Oldest first, and so the one to expire first.
        self._reservations: dict[Reservation, None] = {}
        self._waiting: deque[ReserveTicket] = deque()

    def __len__(self) -> int:
        """Reservations with a slot that is still open."""
        return len(self._reservations)

    # Reserving

    def reserve(
        self, session: Session, layout_id: bytes, count: int, *, wait: bool, now_ns: int
    ) -> ReserveTicket:
        """Slots for new blocks of a layout.

        Grants what it can. Only when it can grant nothing at all does the ticket wait
        (with `wait`): a client that is granted a part should write that first, because
        what is reserved cannot make room. Raises `UnknownLayout`, `TooMany`.
        """
        layout = self._catalog.layout(session.tenant, layout_id)
        if len(session.reservations) >= self._limits.max_reservations:
            raise TooMany(f"a session may hold {self._limits.max_reservations} reservations")
        ticket = ReserveTicket(session, layout, count)
        if not self._try_reserve(ticket, now_ns, last=not wait):
            if len(self._waiting) >= MAX_WAITING:
                raise TooMany("too many calls are waiting for space")
            self._waiting.append(ticket)
            session.tickets.add(ticket)
        return ticket

    def _try_reserve(self, ticket: ReserveTicket, now_ns: int, *, last: bool) -> bool:
        """Answer the ticket if a slot can be granted, or this is the `last` try."""
        replicas = self._place(ticket.layout, ticket.count)
        if ticket.count and not replicas and not last:
            return False
        self._counters.denied_blocks += ticket.count - len(replicas)
        ticket.session.tickets.discard(ticket)
        ticket.answer = self._grant(ticket.session, ticket.layout, replicas, now_ns)
        return True

    def _place(self, layout: Layout, count: int) -> list[Replica]:
        """Replicas of blocks that have no name yet, as many as there is room for."""
        replicas: list[Replica] = []
        while len(replicas) < count:
            replica = self._residency.place_for_write(Block(b"", b"", layout))
            if replica is None:
                break
            replicas.append(replica)
        return replicas

    def _grant(
        self, session: Session, layout: Layout, replicas: list[Replica], now_ns: int
    ) -> SlotGrant:
        if not replicas:
            return _NO_SLOTS
        expires_ns = now_ns + self._limits.reservation_ms * 1_000_000
        slots = dict(zip(islice(self._ids, len(replicas)), replicas, strict=True))
        reservation = Reservation(session, layout, slots, expires_ns)
        self._reservations[reservation] = None
        session.reservations.add(reservation)
        session.slots.update(dict.fromkeys(slots, reservation))
        return SlotGrant(next(iter(slots)), [r.address for r in replicas], expires_ns)

    def slot(self, session: Session, slot_id: int) -> Replica:
        """An open slot. Raises `ReservationExpired`."""
        reservation = session.slots.get(slot_id)
        if reservation is None or reservation.expired:
            raise ReservationExpired("no such slot is reserved (any more)")
        return reservation.slots[slot_id]

    def land(
        self,
        session: Session,
        layout_id: bytes,
        slot_ids: Sequence[int],
        not_on: Collection[str],
        now_ns: int,
    ) -> list[Landing]:
        """Places for what is to be written into open slots in the memory of GPUs where another
        session reads such blocks, `MOST_GPUS` of those that do so for longest, but for those in
        `not_on`. They end with the slots.

        Raises `UnknownLayout`, `BadRequest`, `ReservationExpired`.
        """
        layout = self._catalog.layout(session.tenant, layout_id)
        if not session.local:
            raise BadRequest("memory of a GPU is for processes of its host")
        slots = [self.slot(session, slot_id) for slot_id in slot_ids]
        if any(slot.block.layout is not layout for slot in slots):
            raise BadRequest("a slot is of another layout than the call")
        asked = [mirrors for mirrors in self._holdings.mirrors if mirrors.gpu not in not_on]
        since = [(mirrors.read_since(layout, session), mirrors) for mirrors in asked]
        read = sorted(((ns, at) for ns, at in since if ns is not None), key=itemgetter(0))
        return [
            Landing(at.gpu, at.landings.land(layout, slots, now_ns)) for _, at in read[:MOST_GPUS]
        ]

    # Committing

    def commit(
        self,
        session: Session,
        layout_id: bytes,
        segments: Sequence[Segment],
        reserve: int,
        now_ns: int,
        landed: Sequence[Landing] = (),
    ) -> CommitAnswer:
        """Publish written blocks; all slots named are closed. Then reserve as many of
        `reserve` further slots as there is room for. `landed`: places of theirs that have
        been written too.

        Raises `UnknownLayout`, `BadRequest`, and `ReservationExpired` for a block that
        is not there and whose slot is not open; nothing is changed then. So a commit
        may be repeated when its answer was lost.
        """
        layout = self._catalog.layout(session.tenant, layout_id)
        named = [[layout.name(key) for key in segment.keys] for segment in segments]
        self._check(session, layout, segments, named)
        outcomes: list[CommitOutcome] = []
        written = Written({each.gpu: set(each.addresses) for each in landed}, now_ns)
        for segment, names in zip(segments, named, strict=True):
            self._holdings.use(use_of(segment.reuse, session.tenant, now_ns))
            outcomes += self._commit_segment(session, layout, segment, names, written)
        self._touch_ancestors(layout, [layout.name(s.parent) for s in segments if s.parent])
        slots = _NO_SLOTS
        if reserve and len(session.reservations) < self._limits.max_reservations:
            slots = self._grant(session, layout, self._place(layout, reserve), now_ns)
        return CommitAnswer(outcomes, slots)

    def _check(
        self,
        session: Session,
        layout: Layout,
        segments: Sequence[Segment],
        named: list[list[bytes]],
    ) -> None:
        slots: list[int] = []
        for segment, names in zip(segments, named, strict=True):
            if not len(segment.keys) == len(segment.slots) == len(segment.checksums):
                raise BadRequest("a segment has a slot and a checksum for each of its keys")
            for slot_id, name in zip(segment.slots, names, strict=True):
                reservation = session.slots.get(slot_id)
                if reservation is not None and not reservation.expired:
                    slots.append(slot_id)
                    if reservation.layout is not layout:
                        raise BadRequest("a slot is of another layout than the commit")
                elif slot_id and not self._is_held(name):
                    raise ReservationExpired("no such slot is reserved (any more)")
        if len(set(slots)) != len(slots):
            raise BadRequest("a commit names each slot once")

    def _is_held(self, stored_key: bytes) -> bool:
        block = self._catalog.get(stored_key)
        return block is not None and block.readable

    def _commit_segment(
        self,
        session: Session,
        layout: Layout,
        segment: Segment,
        names: list[bytes],
        written: Written,
    ) -> list[CommitOutcome]:
        parent = layout.name(segment.parent) if segment.parent else b""
        parents = [parent, *names]
        outcomes = [CommitOutcome.ABSENT] * len(names)
        begins: int | None = None
        # The last of the chain first, the root's side most recent.
        for index in range(len(names) - 1, -1, -1):
            replica = self._close(session, segment.slots[index])
            if replica is not None:
                # Its policy is told before its parent is there.
                if begins is None:
                    before = self._catalog.get(parent)
                    begins = 0 if before is None else before.depth + 1
                replica.block.lie_at(begins + index)
            outcomes[index] = self._commit_one(
                replica, names[index], parents[index], segment.checksums[index], written
            )
        return outcomes

    def _close(self, session: Session, slot_id: int) -> Replica | None:
        """Take an open slot from its reservation. Of an expired one it stays there."""
        reservation = session.slots.get(slot_id)
        if reservation is None or reservation.expired:
            return None
        del session.slots[slot_id]
        replica = reservation.slots.pop(slot_id)
        if not reservation.slots:
            self._forget(reservation)
        return replica

    def _commit_one(
        self,
        replica: Replica | None,
        stored_key: bytes,
        parent: bytes,
        checksum: int,
        written: Written,
    ) -> CommitOutcome:
        block = self._catalog.get(stored_key)
        if block is not None and block.readable:
            self._holdings.stored_again(block)
            if replica is not None:
                self._residency.release_writer(replica, Event.ABORT)
            # Of what went through a codec nobody knows any more what it was.
            same = block.checksum == checksum or bool(block.layout.spec.codec)
            return CommitOutcome.PRESENT if same else CommitOutcome.CONFLICT
        if replica is None:
            return CommitOutcome.ABSENT
        if block is not None:
            # On its way up from a tier that has failed meanwhile: this one is here.
            self._residency.abandon(block)
        self._residency.publish(replica, stored_key, parent, checksum)
        for mirrors in self._holdings.mirrors:
            mirrors.landings.landed(replica, written.places.get(mirrors.gpu, ()), written.now_ns)
        self._counters.committed_blocks += 1
        return CommitOutcome.STORED

    def _touch_ancestors(self, layout: Layout, parents: Sequence[bytes]) -> None:
        """Blocks before those of a commit; `parents` has a stored key for each segment."""
        met: set[bytes] = set()
        runs: list[list[Replica]] = []
        for parent in parents:
            run: list[Replica] = []
            # Bounded, because parents are what clients say they are, and could be a ring.
            most = min(MAX_ANCESTORS, MAX_TOUCHED - len(met))
            for _ in range(most):
                block = self._catalog.get(parent)
                if block is None or parent in met:
                    break
                met.add(parent)
                if is_ready(block.dram):
                    run.append(block.dram)
                else:
                    self._holdings.touch(block)
                parent = block.parent
            runs.append(run)
        # A run ends at a root, or at a block of a run before it, which is to be the
        # more recent of the two.
        self._holdings.touch_run(layout, [each for run in reversed(runs) for each in run])

    # Ending

    def abort(self, session: Session, slot_ids: Sequence[int]) -> None:
        """Give slots back that nobody writes into any more. Those that are not open
        are ignored."""
        for slot_id in slot_ids:
            reservation = session.slots.pop(slot_id, None)
            if reservation is not None:
                self._residency.release_writer(reservation.slots.pop(slot_id), Event.ABORT)
                if not reservation.slots:
                    self._forget(reservation)

    def end_session(self, session: Session) -> None:
        """The client is gone: nobody writes into its slots any more."""
        for ticket in [t for t in session.tickets if isinstance(t, ReserveTicket)]:
            self.give_up(ticket, 0)
            self._residency.actions.append(Answer(ticket))
        if session.slots:
            self._chores.add(self._give_back(session))

    def _give_back(self, session: Session) -> Chore:
        while session.slots:
            slot_id, reservation = session.slots.popitem()
            self._residency.release_writer(reservation.slots.pop(slot_id), Event.WRITER_GONE)
            if not reservation.slots:
                self._forget(reservation)
            yield CHANGED

    def _forget(self, reservation: Reservation) -> None:
        del self._reservations[reservation]
        reservation.session.reservations.remove(reservation)

    def expire(self, now_ns: int) -> None:
        """End the reservations whose time is up."""
        if any(self._over(now_ns)):
            self._chores.add(self._expire(now_ns))

    def _over(self, now_ns: int) -> Iterator[Reservation]:
        """Whose time is up and who have not been told."""
        over = takewhile(lambda r: r.expires_ns < now_ns, self._reservations)
        return filterfalse(attrgetter("expired"), over)

    def _expire(self, now_ns: int) -> Chore:
        for reservation in list(self._over(now_ns)):
            if reservation in self._reservations and not reservation.expired:
                cost = CHANGED * len(reservation.slots)
                self._expire_one(reservation)
                yield cost

    def _expire_one(self, reservation: Reservation) -> None:
        self._counters.expired_reservations += 1
        reservation.expired = True
        # A local client may be writing still; see lifecycle.
        event = Event.EXPIRE if reservation.session.local else Event.ABORT
        for replica in reservation.slots.values():
            self._residency.release_writer(replica, event)
        if not reservation.session.local:
            for slot_id in reservation.slots:
                del reservation.session.slots[slot_id]
            self._forget(reservation)

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
            ticket.answer = _NO_SLOTS
        else:
            self._try_reserve(ticket, now_ns, last=True)

    def add_wanted(self, wanted: dict[SpaceClass, int]) -> None:
        """Add the slots that waiting reserves lack, by class."""
        for ticket in self._waiting:
            space_class = ticket.layout.dram_class
            wanted[space_class] = wanted.get(space_class, 0) + ticket.count

    def writers(self) -> set[Replica]:
        """Every replica that is or may still be written; for integrity checks."""
        for reservation in self._reservations:
            if not reservation.slots:
                raise AssertionError("a reservation without a slot is kept")
        return {
            replica
            for reservation in self._reservations
            for slot_id, replica in reservation.slots.items()
            if reservation.session.slots[slot_id] is reservation
        }
