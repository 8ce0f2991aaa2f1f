"""Leases: prefixes of chains, pinned in DRAM for a client.

An acquire pins what is in DRAM, has the rest brought up, and is settled when all of
that has ended, well or badly: the longest prefix that is READY then becomes a lease.
A chain for which there is no room in DRAM yet is *cramped*: it goes on when room is
made, and is cut short where none can come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, takewhile

from kvstore.core.actions import Answer
from kvstore.core.catalog import Catalog, Layout, Replica, is_ready
from kvstore.core.lifecycle import State
from kvstore.core.limits import Counters, Limits
from kvstore.core.residency import Residency
from kvstore.core.sessions import Lease, Session
from kvstore.core.space import SpaceClass
from kvstore.core.tickets import AcquireTicket, ChainClaim
from kvstore.core.transfers import TransferClass
from kvstore.errors import ForeignLease, LeaseExpired, TooMany
from kvstore.types import ChainQuery, LeaseGrant

MAX_LEASED = 1 << 22
"""Blocks that the leases of one session may hold together, each as often as it is
leased. Bounds memory, and what the end of a session costs: some 0.2 s."""


class Leases:
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
        self._leases: dict[int, Lease] = {}
        self._filling: dict[Replica, list[AcquireTicket]] = {}
        self._cramped: list[AcquireTicket] = []

    def __len__(self) -> int:
        return len(self._leases)

    def acquire(
        self, session: Session, chains: Sequence[ChainQuery], *, wait: bool, now_ns: int
    ) -> AcquireTicket:
        """Pin the longest prefix of each chain. Without `wait`, only what is in DRAM.

        Raises `UnknownLayout`, `TooMany`; nothing is pinned then.
        """
        if len(session.leases) + len(chains) > self._limits.max_leases:
            raise TooMany(f"a session may hold {self._limits.max_leases} leases")
        wanted = sum(len(chain.keys) * len(chain.layout_ids) for chain in chains)
        if session.leased + wanted > MAX_LEASED:
            raise TooMany(f"a session may hold {MAX_LEASED} blocks")
        layouts = [[self._catalog.layout(session.tenant, i) for i in c.layout_ids] for c in chains]
        claims = [
            ChainClaim(shards, asked.keys, [[] for _ in shards])
            for asked, shards in zip(chains, layouts, strict=True)
        ]
        ticket = AcquireTicket(session, claims, wait=wait)
        for claim in claims:
            self._claim_ready(claim)
        self._extend(ticket)
        if self._may_get_on(ticket):
            ticket.waited = True
            session.tickets.add(ticket)
            if any(claim.cramped for claim in claims):
                self._cramped.append(ticket)
        else:
            self.settle(ticket, now_ns)
        return ticket

    def _claim_ready(self, claim: ChainClaim) -> None:
        """Pin the prefix that is in DRAM: the usual case, all of it in a few loops."""
        most = len(claim.keys)
        for number, layout in enumerate(claim.layouts):
            claim.columns[number] = self._catalog.run_in_dram(layout, claim.keys, most)
            most = len(claim.columns[number])
        for column in claim.columns:
            del column[most:]
            self._residency.pin_all(column)
        claim.from_dram = claim.claimed

    def _extend(self, ticket: AcquireTicket) -> None:
        """Pin what else can be pinned now; see to it that it is brought up."""
        for claim in ticket.claims:
            while claim.claimed < len(claim.keys) and claim.layouts:
                position = self._claim_position(claim, ticket.wait)
                if position is None:
                    break
                for column, replica in zip(claim.columns, position, strict=True):
                    column.append(replica)
                    if replica.state is State.FILLING and replica not in ticket.missing:
                        ticket.missing.add(replica)
                        self._filling.setdefault(replica, []).append(ticket)

    def _claim_position(self, claim: ChainClaim, wait: bool) -> list[Replica] | None:
        """One replica a layout, pinned, or None; `claim.cramped` says whether it is
        room that is lacking."""
        claim.cramped = False
        position: list[Replica] = []
        for layout in claim.layouts:
            replica = self._claim_block(claim, layout, claim.keys[claim.claimed], wait)
            if replica is None:
                for pinned in position:
                    self._residency.unpin(pinned)
                return None
            position.append(replica)
        return position

    def _may_get_on(self, ticket: AcquireTicket) -> bool:
        """The ticket has something to wait for."""
        if ticket.missing:
            return True
        return ticket.wait and any(c.cramped for c in ticket.claims) and self._residency.busy

    def _claim_block(
        self, claim: ChainClaim, layout: Layout, key: bytes, wait: bool
    ) -> Replica | None:
        """The block's DRAM replica, pinned, READY or (with `wait`) on its way."""
        block = self._catalog.find(layout, key)
        if block is None:
            return None
        replica = block.dram
        if replica is None and wait and is_ready(block.nvme):
            replica = self._residency.bring_up(block, TransferClass.DEMAND)
            claim.cramped = replica is None
        if replica is None:
            return None
        if replica.state is State.FILLING and wait:
            self._residency.transfers.promote(replica)
        elif replica.state is not State.READY:
            return None
        self._residency.pin(replica)
        return replica

    def settle(self, ticket: AcquireTicket, now_ns: int) -> None:
        """Turn what is READY now into leases, let go of the rest, and answer."""
        for replica in ticket.missing:
            waiting = self._filling[replica]
            waiting.remove(ticket)
            if not waiting:
                del self._filling[replica]
        late = list(ticket.missing)
        ticket.missing.clear()
        if ticket in self._cramped:
            self._cramped.remove(ticket)
        ticket.session.tickets.discard(ticket)
        expires_ns = now_ns + self._limits.lease_ms * 1_000_000
        ticket.answer = [self._grant(ticket, claim, expires_ns) for claim in ticket.claims]
        for replica in late:
            # Nobody waits for it any more: it must not go before what is waited for.
            if replica.state is State.FILLING and not replica.pins:
                self._residency.call_off(replica)

    def _grant(self, ticket: AcquireTicket, claim: ChainClaim, expires_ns: int) -> LeaseGrant:
        session, held = ticket.session, 0
        if not session.closed:
            held = claim.from_dram
            if ticket.waited or held < claim.claimed:
                held = min((_leading_ready(column) for column in claim.columns), default=0)
        for column in claim.columns:
            for replica in column[held:]:
                if replica.state is not State.GONE:
                    self._residency.unpin(replica)
            del column[held:]
        from_dram = min(claim.from_dram, held)
        self._counters.acquired_positions += len(claim.keys)
        self._counters.acquired_hits += held
        self._counters.acquired_hits_dram += from_dram
        if not held:
            return LeaseGrant(0, 0, [], [], 0, 0)
        for layout, column in zip(claim.layouts, claim.columns, strict=True):
            # The root last, so that it is the most recent (see policies.base).
            self._residency.touch_run(layout, column[::-1])
        replicas = claim.columns[0] if len(claim.columns) == 1 else list(chain(*claim.columns))
        lease = Lease(next(self._ids), session, replicas, expires_ns)
        self._leases[lease.lease_id] = session.leases[lease.lease_id] = lease
        session.leased += len(replicas)
        return LeaseGrant(
            lease.lease_id,
            held,
            [replica.address for replica in replicas],
            [replica.block.checksum or 0 for replica in replicas],
            expires_ns,
            from_dram,
        )

    def get(self, session: Session, lease_id: int) -> Lease:
        """Raises `ForeignLease`, `LeaseExpired`."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseExpired("the lease has ended")
        if lease.session is not session:
            raise ForeignLease("the lease belongs to another session")
        return lease

    def renew(self, session: Session, lease_ids: Sequence[int], now_ns: int) -> int:
        """All or none. The new end, nanoseconds."""
        leases = [self.get(session, lease_id) for lease_id in lease_ids]
        expires_ns = now_ns + self._limits.lease_ms * 1_000_000
        for lease in leases:
            lease.expires_ns = expires_ns
        return expires_ns

    def release(self, session: Session, lease_ids: Sequence[int]) -> None:
        """Ended leases are ignored. With a foreign one among them, none is released."""
        leases = {i: lease for i in lease_ids if (lease := self._leases.get(i)) is not None}
        if any(lease.session is not session for lease in leases.values()):
            raise ForeignLease("a lease belongs to another session")
        for lease in leases.values():
            self.end(lease)

    def end(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        del lease.session.leases[lease.lease_id]
        lease.session.leased -= len(lease.replicas)
        self._residency.unpin_all(lease.replicas)

    # Getting on with what waits

    def target_settled(self, target: Replica, now_ns: int) -> None:
        """A replica that was being filled is READY or gone."""
        for ticket in self._filling.pop(target, ()):
            ticket.missing.discard(target)
            if not self._may_get_on(ticket):
                self._answer(ticket, now_ns)

    def retry(self, now_ns: int) -> None:
        """There may be room now."""
        full: set[SpaceClass] = set()
        for ticket in list(self._cramped):
            classes = {layout.dram_class for claim in ticket.claims for layout in claim.layouts}
            if classes <= full:
                continue
            self._extend(ticket)
            if any(claim.cramped for claim in ticket.claims):
                full |= classes
            if not self._may_get_on(ticket):
                self._answer(ticket, now_ns)
            elif not any(claim.cramped for claim in ticket.claims):
                self._cramped.remove(ticket)

    def answer_all(self, now_ns: int) -> None:
        """Nothing more will come up: settle every ticket as things are."""
        for ticket in {t for waiting in self._filling.values() for t in waiting}:
            self._answer(ticket, now_ns)

    def expire(self, now_ns: int) -> None:
        """End the leases whose time is up."""
        for lease in [x for x in self._leases.values() if x.expires_ns < now_ns]:
            self._counters.expired_leases += 1
            self.end(lease)

    def add_wanted(self, wanted: dict[SpaceClass, int]) -> None:
        """Add the slots that cramped chains lack, by class."""
        for ticket in self._cramped:
            for claim in ticket.claims:
                for layout in claim.layouts:
                    lacking = len(claim.keys) - claim.claimed
                    wanted[layout.dram_class] = wanted.get(layout.dram_class, 0) + lacking

    def _answer(self, ticket: AcquireTicket, now_ns: int) -> None:
        self.settle(ticket, now_ns)
        self._residency.actions.append(Answer(ticket))

    def pins(self) -> Iterator[Replica]:
        """Every replica held by a lease, once a pin; for integrity checks."""
        for lease in self._leases.values():
            yield from lease.replicas


def _leading_ready(column: list[Replica]) -> int:
    return sum(1 for _ in takewhile(is_ready, column))
