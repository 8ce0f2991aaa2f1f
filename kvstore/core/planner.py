"""The planner: events in, actions out.

Everything that the store decides is decided here, on one thread, without a clock
or a byte: the caller brings the time (nanoseconds, monotonic) and carries out the
actions (`core.actions`). The server and the simulator run this same code.

    clients' calls    -> register_layout lookup acquire renew release reserve land commit
                         abort prefetch hint clear flush
    clients' lives    -> open_session close_session
    the tiers         -> transfer_done transfer_failed forgotten extent_failed tier_failed
                         not_worth_moving worn
    damage in memory  -> suspects examined
    time              -> tick, give_up, and `take_actions` when `looks_ns` says
    time to spare     -> chores.go_on, for as long as there are any

A call that may have to wait returns a ticket. A ticket whose `answer` is set is
settled; any other gets an `Answer` action later, at the latest when the caller's
patience ends and the shell calls `give_up`.

The planner itself keeps sessions and passes events on: what clients hold and wait for is known
in `core.calls`, which tier a block is in and how it moves in `core.places`, what will be wanted
soon in `core.foresight`, what waits for a link in `core.transfers` and `core.links`. What takes
longer the more blocks there are (a clear, a flush, the end of a tier) is a chore, done in parts
(`core.chores`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count

from kvstore.core.actions import Action, Copy, Move, Publish, RememberLayout
from kvstore.core.calls.acquires import Acquires
from kvstore.core.calls.clears import Clears
from kvstore.core.calls.flushes import Flushes
from kvstore.core.calls.leases import Leases
from kvstore.core.calls.reservations import Reservations
from kvstore.core.calls.suspects import Suspects
from kvstore.core.catalog import Block, Catalog, Replica, is_ready
from kvstore.core.chores import Chores
from kvstore.core.foresight.prefetches import Prefetches
from kvstore.core.lifecycle import State
from kvstore.core.limits import Counters, Limits
from kvstore.core.places import recovery
from kvstore.core.places.endurance import Endurance
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.recovery import StoredBlocks
from kvstore.core.places.residency import Residency
from kvstore.core.places.write_back import DEPTH
from kvstore.core.policies import POLICIES
from kvstore.core.sessions import Lease, Session
from kvstore.core.space import Space, SpaceClass
from kvstore.core.tickets import (
    AcquireTicket,
    ClearTicket,
    FlushTicket,
    PrefetchTicket,
    ReserveTicket,
    Ticket,
)
from kvstore.core.transfers import TransferClass
from kvstore.core.uses import session_of
from kvstore.errors import BadRequest, NoSession, TooMany
from kvstore.types import (
    NO_HINTS,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    Hints,
    Landing,
    LayoutSpec,
    Refusal,
    Segment,
    SessionState,
    Tier,
)


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
        first_id: int = 1,
        weight: Callable[[str], float] = lambda tenant: 1.0,
        nvme_bytes_per_day: int = 0,
    ) -> None:
        """`first_id`: where the ids of leases and slots begin. One that differs
        from life to life of a server keeps ids of an earlier one from fitting.
        `weight`: a tenant's share of what moves between tiers, for what it is to
        those of others. `nvme_bytes_per_day`: that may be written there; 0: any."""
        self.limits = limits
        self.counters = Counters()
        self.catalog = Catalog(tenant_key, limits.max_layouts, nvme_slot_bytes)
        self.holdings = Holdings(self.catalog, dram, nvme, POLICIES[eviction])
        self.residency = Residency(
            self.holdings,
            limits.max_running,
            weight,
            Endurance(nvme_bytes_per_day),
            limits.prefetch_share,
        )
        ids = count(first_id)
        self.chores = Chores()
        self.leases = Leases(self.residency, self.chores, limits, self.counters, ids)
        self.acquires = Acquires(self.residency, self.leases, self.chores, limits, self.counters)
        self.reservations = Reservations(self.residency, self.chores, limits, self.counters, ids)
        self.prefetches = Prefetches(self.residency, self.chores)
        self.clears = Clears(self.residency, self.chores)
        self.flushes = Flushes(self.residency, self.chores, max_writing=DEPTH)
        self._suspects = Suspects(self.holdings)
        self._sessions: dict[bytes, Session] = {}

    def take_actions(self, now_ns: int) -> list[Action]:
        """What is to be done now, in order."""
        self.chores.next_turn()
        self.flushes.go_on()
        wanted: dict[SpaceClass, int] = {}
        self.reservations.add_wanted(wanted)
        self.acquires.add_wanted(wanted)
        if self.residency.write_back.go_on(wanted):
            self._retry(now_ns)
        holdings = self.holdings
        for batch in self.residency.transfers.start(now_ns):
            holdings.actions.append(Move([t.copy for t in batch.transfers if t.copy is not None]))
        self.acquires.doubts.go_on(now_ns)
        if holdings.changed:
            changed, holdings.changed = holdings.changed, set()
            holdings.actions.append(Publish([(key, *self.presence(key)) for key in changed]))
        actions = holdings.actions.copy()
        holdings.actions.clear()
        return actions

    def looks_ns(self) -> int | None:
        """When `take_actions` is to be called even if nothing happens until then."""
        return self.acquires.doubts.looks_ns()

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
        self.acquires.end_session(session)
        self.leases.end_session(session)
        self.prefetches.end_session(session)
        self.reservations.end_session(session)

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    @property
    def open_leases(self) -> int:
        return len(self.leases)

    @property
    def open_reservations(self) -> int:
        return len(self.reservations)

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
            self.holdings.actions.append(RememberLayout(layout))
        return layout.layout_id

    def lookup(self, tenant: str, chain: ChainQuery) -> ChainPresence:
        """How much of a chain all its layouts hold, by binary search: where a block was
        lost in the middle it may be more or less. Raises `UnknownLayout`."""
        held = in_dram = len(chain.keys) if chain.layout_ids else 0
        for layout in [self.catalog.layout(tenant, i) for i in chain.layout_ids]:
            find = partial(self.catalog.find, layout)
            held = bisect_left(chain.keys, True, 0, held, key=lambda k: _absent(find(k)))
            in_dram = min(in_dram, held)
            in_dram = bisect_left(chain.keys, True, 0, in_dram, key=lambda k: _not_in_dram(find(k)))
        return ChainPresence(held, in_dram)

    def presence(self, stored_key: bytes) -> tuple[bool, bool]:
        """Whether a block can be read from DRAM, and from behind it."""
        block = self.catalog.get(stored_key)
        if block is None:
            return False, False
        return is_ready(block.dram), is_ready(block.nvme)

    # Leases and reservations

    def acquire(
        self,
        session: Session,
        chains: Sequence[ChainQuery],
        *,
        wait: bool,
        now_ns: int,
        deadline_ns: int | None = None,
        hints: Hints = NO_HINTS,
        reader: bytes = b"",
    ) -> AcquireTicket:
        ticket = self.acquires.acquire(
            session, chains, wait=wait, now_ns=now_ns, deadline_ns=deadline_ns, hints=hints,
            reader=reader,
        )  # fmt: skip
        self.prefetches.asked(session.tenant, chains, now_ns)
        return ticket

    def lease(self, session: Session, lease_id: int) -> Lease:
        return self.leases.get(session, lease_id)

    def renew(self, session: Session, lease_ids: Sequence[int], now_ns: int) -> int:
        return self.leases.renew(session, lease_ids, now_ns)

    def release(self, session: Session, lease_ids: Sequence[int]) -> None:
        self.leases.release(session, lease_ids)

    def reserve(
        self,
        session: Session,
        layout_id: bytes,
        count: int,
        *,
        wait: bool,
        now_ns: int,
    ) -> ReserveTicket:
        return self.reservations.reserve(session, layout_id, count, wait=wait, now_ns=now_ns)

    def land(
        self,
        session: Session,
        layout_id: bytes,
        slot_ids: Sequence[int],
        *,
        not_on: Collection[str],
        now_ns: int,
    ) -> list[Landing]:
        return self.reservations.land(session, layout_id, slot_ids, not_on, now_ns)

    def slot(self, session: Session, slot_id: int) -> Replica:
        return self.reservations.slot(session, slot_id)

    def commit(
        self,
        session: Session,
        layout_id: bytes,
        segments: Sequence[Segment],
        *,
        reserve: int,
        now_ns: int,
        landed: Sequence[Landing] = (),
    ) -> CommitAnswer:
        answer = self.reservations.commit(session, layout_id, segments, reserve, now_ns, landed)
        self.prefetches.stored(session.tenant, layout_id, segments, now_ns)
        return answer

    def abort(self, session: Session, slot_ids: Sequence[int]) -> None:
        self.reservations.abort(session, slot_ids)

    def hint(
        self, tenant: str, session: bytes, state: SessionState, expected_ms: float | None
    ) -> None:
        """What a session does next, as its caller says."""
        self.holdings.hint(session_of(tenant, session), state, expected_ms)
        self.prefetches.hint(tenant, session, state, expected_ms)

    # Prefetch, clear, flush

    def prefetch(
        self, tenant: str, chains: Sequence[ChainQuery], *, within_ns: int = 0, now_ns: int,
        session: Session | None = None,
    ) -> PrefetchTicket:  # fmt: skip
        return self.prefetches.prefetch(
            tenant, chains, within_ns=within_ns, now_ns=now_ns, session=session
        )

    def clear(self, tenant: str) -> ClearTicket:
        return self.clears.clear(tenant)

    def flush(self, tenant: str | None, *, drop: bool) -> FlushTicket:
        return self.flushes.flush(tenant, drop=drop)

    # What the shell reports

    def transfer_done(self, copy: Copy, now_ns: int, checksum: int | None = None) -> TransferClass:
        """What it was for, as far as that was known when it started. `checksum`: of the bytes
        that are in the target now, where a codec has made others of them."""
        if checksum is not None:
            block = copy.target.block
            if copy.target.tier is Tier.NVME:
                block.stored_checksum = checksum
            else:
                block.checksum = checksum
        # Both ways compare on the way.
        copy.source.confirmed = copy.target.confirmed = True
        transfer_class = self.residency.filled(copy, now_ns)
        self._target_settled(copy, now_ns, written=True)
        return transfer_class

    def transfer_failed(
        self, copy: Copy, now_ns: int, *, source_corrupt: bool = False, full: bool = False
    ) -> None:
        """`full`: the target tier had no room after all; it is left alone for a while."""
        if full:
            self.residency.write_back.refused(now_ns)
        self.residency.fill_failed(copy, now_ns, source_corrupt=source_corrupt)
        self._target_settled(copy, now_ns, written=False)

    def _target_settled(self, copy: Copy, now_ns: int, *, written: bool) -> None:
        self.acquires.target_settled(copy.target, now_ns)
        self.flushes.target_settled(copy.target, written=written)
        self._retry(now_ns)

    def _retry(self, now_ns: int) -> None:
        self.acquires.retry(now_ns)
        self.reservations.retry(now_ns)

    def forgotten(self, replica: Replica) -> None:
        self.residency.forgotten(replica)

    def suspects(self, tenant: str, addresses: Iterable[int]) -> list[Replica]:
        """A client says that what it copied from there was damaged: what is to be looked
        at, each to be followed by `examined`."""
        return self._suspects.take(tenant, addresses)

    def examined(self, replica: Replica, *, damaged: bool) -> None:
        self._suspects.settle(replica, damaged=damaged)

    def not_worth_moving(self, addresses: Iterable[int]) -> list[int]:
        """The NVMe tier would have to write these blocks again, to win room. Those that
        are not worth it are dropped, and are the answer."""
        return self.residency.drop_unworthy(addresses)

    def worn(self, nbytes: int) -> None:
        """So much was written to NVMe beside what was asked for."""
        self.residency.endurance.spend(nbytes)

    def extent_failed(self, tier: Tier, extent: int) -> None:
        """An `OpenExtent` could not be carried out."""
        pool = self.residency.dram if tier is Tier.DRAM else self.residency.nvme
        assert pool is not None
        pool.space.fail_extent(extent)

    def tier_failed(self, now_ns: int) -> None:
        """The NVMe tier is to be used no more."""
        self.chores.add(self.residency.switch_off_nvme())
        self.acquires.answer_all(now_ns)

    # What was learned

    def learned(self) -> dict[str, dict[str, float]]:
        """What links and prefills cost here, to be told to a planner on this machine."""
        costs = self.residency.transfers.costs
        return {
            "read": costs[Tier.DRAM].state(),
            "write": costs[Tier.NVME].state(),
            "prefill": self.acquires.offers.prefill.state(),
            "endurance": self.residency.endurance.state(),
        }

    def restore_learned(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Before anything is asked. What is not of a state is ignored."""
        costs = self.residency.transfers.costs
        costs[Tier.DRAM].restore(state.get("read", {}))
        costs[Tier.NVME].restore(state.get("write", {}))
        self.acquires.offers.prefill.restore(state.get("prefill", {}))
        self.residency.endurance.restore(state.get("endurance", {}))

    # What is found at a start

    def restore(
        self,
        layouts: Iterable[tuple[str, LayoutSpec]],
        extents: Iterable[tuple[int, int]],
        blocks: Iterable[StoredBlocks],
    ) -> tuple[list[int], list[tuple[StoredBlocks, int]]]:
        """See `core.places.recovery`. What was found is in the catalog, and is not published."""
        return recovery.restore(self.holdings, layouts, extents, blocks)

    # Time

    def tick(self, now_ns: int, *, stuck: bool = False) -> None:
        """To be called several times a second: ends what has run out of time. `stuck`: NVMe
        does not answer (`StorageTier.overdue`)."""
        if self.residency.look_at_link(now_ns, stuck=stuck):
            self.acquires.answer_all(now_ns, Refusal.STALLED)
        self.prefetches.tick(now_ns)
        self.leases.expire(now_ns)
        self.reservations.expire(now_ns)
        self.residency.write_back.tick(now_ns)
        self._retry(now_ns)

    def give_up(self, ticket: Ticket, now_ns: int) -> None:
        """The caller waits no longer: answer with what there is, now or (an acquire, which
        may have much to tell) soon."""
        if ticket.answer is not None:
            return
        if isinstance(ticket, AcquireTicket):
            self.acquires.out_of_time(ticket, now_ns)
        elif isinstance(ticket, ReserveTicket):
            self.reservations.give_up(ticket, now_ns)
        elif isinstance(ticket, FlushTicket):
            self.flushes.give_up(ticket)
        elif isinstance(ticket, PrefetchTicket):
            self.prefetches.give_up(ticket)
        else:
            self.clears.give_up(ticket)

    def withdraw(self, ticket: Ticket, now_ns: int) -> None:
        """The caller is gone: as `give_up`, and what it is granted goes back."""
        if isinstance(ticket, AcquireTicket):
            self.acquires.withdraw(ticket, now_ns)
            return
        self.give_up(ticket, now_ns)
        if isinstance(ticket, ReserveTicket):
            assert ticket.answer is not None
            first, count = ticket.answer.first_slot, len(ticket.answer.addresses)
            self.reservations.abort(ticket.session, range(first, first + count))

    def check_integrity(self) -> None:
        """Every count and link agrees; raises AssertionError. O(blocks)."""
        self.holdings.check_integrity()
        pins: dict[Replica, int] = {}
        for replica in self._pinned():
            pins[replica] = pins.get(replica, 0) + 1
        for pool in (self.residency.dram, self.residency.nvme):
            for replica in () if pool is None else pool.replicas():
                if replica.pins != pins.pop(replica, 0):
                    raise AssertionError("a replica's pins are not what is held on it")
        for mirrors in self.holdings.mirrors:
            for mirror in mirrors.replicas():
                if mirror.pins != pins.pop(mirror, 0):
                    raise AssertionError("a mirror's pins are not what is held on it")
        if any(replica.state is not State.GONE for replica in pins):
            raise AssertionError("something holds a replica that is in no pool")
        written = {
            replica
            for replica in self.residency.dram.replicas()
            if replica.state in (State.WRITING, State.QUARANTINED)
        }
        if self.reservations.writers() != written:
            raise AssertionError("reserved slots and reservations differ")

    def _pinned(self) -> Iterator[Replica]:
        """Every replica in use, once a use."""
        yield from self.acquires.pins()
        yield from self.leases.pins()
        for transfer in self.residency.transfers:
            if transfer.copy is not None:
                yield transfer.copy.source
        for mirrors in self.holdings.mirrors:
            yield from mirrors.pins()


def _absent(block: Block | None) -> bool:
    return block is None or not block.readable


def _not_in_dram(block: Block | None) -> bool:
    return block is None or not is_ready(block.dram)
