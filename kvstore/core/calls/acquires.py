"""Acquires: from what a client asks for to what it is leased.

An acquire pins what is in DRAM, has the rest brought up, and is settled when all of
that has ended, well or badly: the longest prefix that is READY then becomes a lease
(`core.calls.leases`). A chain for which there is no room in DRAM yet is *cramped*: it goes on when
room is made, and is cut short where none can come. How much is brought up at all is decided
when it is asked for (`core.calls.offers`), and again when what was predicted does not come about
(`core.calls.doubts`).

Pinning and settling take time for every block, so they are chores (`core.chores`); most
acquires are over with the first part. What is found DOOMED in between is held back like
anything else that is not READY, or, where that happens after it was counted, leased all the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, takewhile

from kvstore.core.actions import Answer
from kvstore.core.calls.doubts import Doubts
from kvstore.core.calls.leases import Leases
from kvstore.core.calls.offers import Offers
from kvstore.core.catalog import Catalog, Layout, Replica, is_ready
from kvstore.core.chores import CHANGED, NAMED, SEEN, Chore, Chores
from kvstore.core.lifecycle import State
from kvstore.core.limits import Counters, Limits
from kvstore.core.places.mirrors import Mirrors
from kvstore.core.places.residency import Residency
from kvstore.core.places.shares import Mirror
from kvstore.core.places.straight import whose_memory
from kvstore.core.sessions import Session
from kvstore.core.space import SpaceClass
from kvstore.core.tickets import AcquireTicket, ChainClaim
from kvstore.core.transfers import TransferClass, Wish
from kvstore.core.uses import use_of
from kvstore.errors import TooMany
from kvstore.types import NO_HINTS, ChainQuery, Hints, LeaseGrant, Refusal, Tier

MAX_LEASED = 1 << 22
"""Blocks that the leases of one session may hold together, each as often as it is
leased. Bounds memory."""

_NOTHING = LeaseGrant(0, 0, [], [], 0, 0)


class Acquires:
    def __init__(
        self,
        residency: Residency,
        leases: Leases,
        chores: Chores,
        limits: Limits,
        counters: Counters,
    ) -> None:
        self._residency = residency
        self._holdings = residency.holdings
        self._catalog: Catalog = residency.catalog
        self._leases = leases
        self._chores = chores
        self._limits = limits
        self._counters = counters
        self.offers = Offers(residency, counters)
        self.doubts = Doubts(residency.transfers, chores, self)
        self._tickets: dict[AcquireTicket, None] = {}
        self._filling: dict[Replica, list[AcquireTicket]] = {}
        self._cramped: list[AcquireTicket] = []

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
        """Pin the longest prefix of each chain. Without `wait`, only what is there to be read;
        what has to be brought up is wanted by `deadline_ns`. `reader`: under this name who asks
        reads on a GPU, so that what is in its memory only is there to be read too.

        Raises `UnknownLayout`, `TooMany`; nothing is pinned then.
        """
        if len(session.leases) + len(chains) > self._limits.max_leases:
            raise TooMany(f"a session may hold {self._limits.max_leases} leases")
        wanted = sum(len(chain.keys) * len(chain.layout_ids) for chain in chains)
        if session.leased + wanted > MAX_LEASED:
            raise TooMany(f"a session may hold {MAX_LEASED} blocks")
        layouts = [[self._catalog.layout(session.tenant, i) for i in c.layout_ids] for c in chains]
        claims = [
            ChainClaim(
                shards,
                asked.keys,
                [[] for _ in shards],
                len(asked.keys),
                use_of(asked.reuse, session.tenant, now_ns),
            )
            for asked, shards in zip(chains, layouts, strict=True)
        ]
        wish = Wish(TransferClass.DEMAND, now_ns, hints.priority, deadline_ns)
        ticket = AcquireTicket(session, claims, wish, wait=wait)
        if reader and session.local:
            ticket.straight = self._straight(layouts, reader)
        ticket.compute_ns = self.offers.compute_ns(layouts, hints.tokens_per_s)
        self._tickets[ticket] = None
        session.tickets.add(ticket)
        self._chores.add(self._claim(ticket, now_ns))
        ticket.waited = ticket.answer is None
        return ticket

    def _straight(self, layouts: list[list[Layout]], reader: bytes) -> dict[bytes, Mirrors] | None:
        gpus = self._holdings.mirrors
        found = {
            layout.layout_id: onto
            for layout in chain.from_iterable(layouts)
            if (onto := whose_memory(gpus, layout, reader)) is not None
        }
        return found or None

    # Claiming

    def _claim(self, ticket: AcquireTicket, now_ns: int) -> Chore:
        """Pin all that can be pinned now."""
        for claim in ticket.claims:
            yield from self._claim_ready(claim)
            if ticket.wait:
                yield from self.offers.choose(ticket, claim)
            yield from self._extend(ticket, claim)
        ticket.at_work = False
        if not self._may_get_on(ticket):
            ticket.at_work = True
            yield from self._settle(ticket, now_ns)
            return
        if any(claim.cramped for claim in ticket.claims):
            self._cramped.append(ticket)
        self.doubts.watch(ticket, now_ns)

    def _claim_ready(self, claim: ChainClaim) -> Chore:
        """Pin the prefix that is in DRAM: the usual case, many in a few loops."""
        piece = max(1, self._chores.piece // len(claim.layouts)) if claim.layouts else 0
        most = piece
        while most == piece and (keys := claim.keys[claim.claimed : claim.claimed + piece]):
            runs = []
            most = len(keys)
            for layout in claim.layouts:
                runs.append(self._catalog.run_in_dram(layout, keys, most))
                most = len(runs[-1])
                if not most:
                    break
            else:
                for column, run in zip(claim.columns, runs, strict=True):
                    del run[most:]
                    self._holdings.pin_all(run)
                    self._holdings.asked_for(run)
                    column += run
                claim.from_dram = claim.claimed
            yield NAMED * (most + 1) * len(runs)

    def _extend(self, ticket: AcquireTicket, claim: ChainClaim) -> Chore:
        """Pin what else can be pinned; see to it that it is brought up."""
        nominal = self._residency.transfers.costs[Tier.DRAM].nominal
        while claim.claimed < claim.most and claim.layouts:
            position = self._claim_position(ticket, claim)
            if position is None:
                yield NAMED * len(claim.layouts)
                break
            cost = NAMED
            for column, replica in zip(claim.columns, position, strict=True):
                column.append(replica)
                if replica.state is State.FILLING and replica not in ticket.missing:
                    ticket.missing[replica] = nominal.work_ns(replica.block.layout.stored_bytes)
                    ticket.missing_ns += ticket.missing[replica]
                    self._filling.setdefault(replica, []).append(ticket)
                    cost = CHANGED
            yield cost * len(position)

    def _claim_position(self, ticket: AcquireTicket, claim: ChainClaim) -> list[Replica] | None:
        """One replica a layout, pinned, or None; `claim` says whether it is room that is
        lacking, or a transfer that was refused."""
        claim.cramped = False
        position: list[Replica] = []
        for layout in claim.layouts:
            replica = self._claim_block(ticket, claim, layout, claim.keys[claim.claimed])
            if replica is None:
                for pinned in position:
                    self._holdings.unpin(pinned)
                return None
            position.append(replica)
        return position

    def _may_get_on(self, ticket: AcquireTicket) -> bool:
        """The ticket has something to wait for."""
        if not ticket.wait:
            return False
        if ticket.missing:
            return True
        return any(c.cramped for c in ticket.claims) and self._residency.busy

    def _claim_block(
        self, ticket: AcquireTicket, claim: ChainClaim, layout: Layout, key: bytes
    ) -> Replica | None:
        """The block's replica that can be read, pinned, READY or (for who waits) on its way."""
        block = self._catalog.find(layout, key)
        if block is None:
            return None
        replica = ticket.replica_of(block)
        if replica is None and ticket.wait and is_ready(block.nvme):
            brought = self._residency.bring_up(block, ticket.wish, ticket.onto(layout))
            if isinstance(brought, Refusal):
                self.offers.refuse(claim, claim.claimed, brought)
                return None
            replica = brought
            claim.cramped = replica is None
        if replica is None:
            return None
        if replica.state is State.FILLING and ticket.wait:
            if self._residency.stalled:
                self.offers.refuse(claim, claim.claimed, Refusal.STALLED)
                return None
            self._residency.transfers.hurry(replica, ticket.wish)
        elif replica.state is not State.READY:
            return None
        self._holdings.pin(replica)
        if isinstance(replica, Mirror):
            self._holdings.asked_for_straight(replica)
        else:
            self._holdings.asked_for((replica,))
        return replica

    # Settling

    def give_up(self, ticket: AcquireTicket, now_ns: int, why: Refusal | None = None) -> None:
        """Nothing more is waited for: answer with what there is. `why` it is not more."""
        ticket.wait = False
        ticket.why = why
        if not ticket.at_work and ticket.answer is None:
            self._begin_settling(ticket, now_ns)

    def out_of_time(self, ticket: AcquireTicket, now_ns: int) -> None:
        """The caller's patience has ended."""
        self._counters.missed_deadlines += bool(ticket.missing)
        self.give_up(ticket, now_ns, Refusal.LATE)

    def not_worth_it(self, ticket: AcquireTicket, now_ns: int) -> None:
        """To compute the rest takes less long than to wait for it. What has been brought up
        is leased in any case."""
        self._counters.given_up += 1
        self.give_up(ticket, now_ns, Refusal.RECOMPUTE)

    def shorten(self, ticket: AcquireTicket, now_ns: int, in_time: Callable[[int], bool]) -> Chore:
        """Bring up no more than what is there in time: so much of what is missing, nanoseconds
        of work, in order."""
        ticket.at_work = True
        kept: set[Replica] = set()
        work_ns, is_over = 0, False
        for claim in ticket.claims:
            most = claim.claimed
            for position in range(claim.claimed):
                coming = [
                    column[position]
                    for column in claim.columns
                    if column[position] in ticket.missing and column[position] not in kept
                ]
                work_ns += sum(ticket.missing[replica] for replica in coming)
                is_over = is_over or (bool(coming) and not in_time(work_ns))
                if is_over and coming:
                    most = position
                    break
                kept.update(coming)
                yield SEEN * len(claim.columns)
            if most < claim.claimed:
                self._cut(claim, most)
        for replica in [replica for replica in ticket.missing if replica not in kept]:
            if replica in ticket.missing:
                self._lacks_no_more(ticket, replica)
            yield SEEN
        ticket.at_work = False
        if self._may_get_on(ticket):
            self.doubts.watch(ticket, now_ns)
        else:
            self._counters.given_up += 1
            self._begin_settling(ticket, now_ns)

    def _cut(self, claim: ChainClaim, most: int) -> None:
        for column in claim.columns:
            self._leases.let_go(column[most:])
            del column[most:]
        claim.cramped = False
        if claim.refusal is None:
            self.offers.refuse(claim, most, Refusal.LATE)
        claim.most = most

    def _lacks_no_more(self, ticket: AcquireTicket, replica: Replica) -> None:
        ticket.missing_ns -= ticket.missing.pop(replica)
        waiting = self._filling[replica]
        waiting.remove(ticket)
        if not waiting:
            del self._filling[replica]

    def withdraw(self, ticket: AcquireTicket, now_ns: int) -> None:
        """The caller is gone: nobody would give back what it is granted."""
        ticket.withdrawn = True
        if ticket.answer is None:
            self.give_up(ticket, now_ns)
        else:
            self._leases.release(ticket.session, [grant.lease_id for grant in ticket.answer])

    def end_session(self, session: Session) -> None:
        """The client is gone: all it waits for."""
        for ticket in [t for t in self._tickets if t.session is session]:
            self.give_up(ticket, 0)

    def _begin_settling(self, ticket: AcquireTicket, now_ns: int) -> None:
        ticket.at_work = True
        if ticket in self._cramped:
            self._cramped.remove(ticket)
        self._chores.add(self._settle(ticket, now_ns))

    def _settle(self, ticket: AcquireTicket, now_ns: int) -> Chore:
        """Turn what is READY now into leases, let go of the rest, and answer."""
        self.doubts.forget(ticket)
        while ticket.missing:
            self._lacks_no_more(ticket, next(reversed(ticket.missing)))
            yield SEEN
        grants = []
        expires_ns = self._leases.ends_ns(now_ns)
        for claim in ticket.claims:
            grants.append((yield from self._prepare(ticket, claim, expires_ns)))
        session = ticket.session
        del self._tickets[ticket]
        session.tickets.discard(ticket)
        if session.closed or ticket.withdrawn:
            for claim in ticket.claims:
                for column in claim.columns:
                    self._leases.let_go(column)
            ticket.answer = [_NOTHING] * len(grants)
        else:
            pairs = zip(ticket.claims, grants, strict=True)
            ticket.answer = [self._grant(session, claim, grant) for claim, grant in pairs]
        if ticket.waited:
            self._residency.actions.append(Answer(ticket))

    def _prepare(
        self, ticket: AcquireTicket, claim: ChainClaim, expires_ns: int
    ) -> Generator[int, None, LeaseGrant]:
        """The grant of a chain, without its number. Leaves it in the claim what it is for."""
        held, refusal = claim.from_dram, claim.refusal
        if ticket.waited or held < claim.claimed:
            held = yield from self._leading_ready(claim)
        if held < claim.claimed:
            refusal = ticket.why or refusal
            for column in claim.columns:
                self._leases.let_go(column[held:])
                del column[held:]
        addresses: list[int] = []
        checksums: list[int] = []
        piece = self._chores.piece
        for layout, column in zip(claim.layouts, claim.columns, strict=True):
            for begin in range(0, held, piece):
                run = column[begin : begin + piece]
                addresses += _addresses(run, mixed=ticket.straight is not None)
                checksums += [replica.block.checksum or 0 for replica in run]
                yield NAMED + SEEN * len(run)
            # The root last, so that it is the most recent (see policies.base).
            for end in range(held, 0, -piece):
                run = column[max(0, end - piece) : end]
                run.reverse()
                if ticket.waited:
                    run = [replica for replica in run if is_ready(replica)]
                self._holdings.use(claim.use)
                if ticket.straight is None:
                    self._holdings.touch_run(layout, run)
                else:
                    self._holdings.touch_read(layout, run)
                yield NAMED + SEEN * len(run)
        from_dram = min(claim.from_dram, held)
        return LeaseGrant(0, held, addresses, checksums, expires_ns, from_dram, refusal)

    def _leading_ready(self, claim: ChainClaim) -> Generator[int, None, int]:
        """How many positions are READY in all layouts."""
        held, piece = claim.claimed, self._chores.piece
        for column in claim.columns:
            for begin in range(0, held, piece):
                run = column[begin : min(begin + piece, held)]
                yield SEEN * len(run)
                ready = sum(1 for _ in takewhile(is_ready, run))
                if ready < len(run):
                    held = begin + ready
                    break
        return held

    def _grant(self, session: Session, claim: ChainClaim, grant: LeaseGrant) -> LeaseGrant:
        self._counters.acquired_positions += len(claim.keys)
        self._counters.acquired_hits += grant.held
        self._counters.acquired_hits_dram += grant.from_dram
        if not grant.held:
            return _NOTHING._replace(refusal=grant.refusal)
        replicas = claim.columns[0] if len(claim.columns) == 1 else list(chain(*claim.columns))
        lease = self._leases.grant(session, replicas, grant.expires_ns)
        return grant._replace(lease_id=lease.lease_id)

    # Getting on with what waits

    def target_settled(self, target: Replica, now_ns: int) -> None:
        """A replica that was being filled is READY or gone."""
        for ticket in self._filling.pop(target, ()):
            ticket.missing_ns -= ticket.missing.pop(target)
            if not ticket.at_work and not self._may_get_on(ticket):
                self._begin_settling(ticket, now_ns)

    def retry(self, now_ns: int) -> None:
        """There may be room now."""
        full: set[SpaceClass] = set()
        left = self._chores.part
        for ticket in list(self._cramped):
            classes = {layout.dram_class for claim in ticket.claims for layout in claim.layouts}
            if classes <= full or ticket.at_work:
                continue
            for cost in chain.from_iterable(self._extend(ticket, c) for c in ticket.claims):
                left -= cost
                if left <= 0:
                    # Room for so many: the next transfer that ends goes on from here.
                    return
            if any(claim.cramped for claim in ticket.claims):
                full |= classes
            if not self._may_get_on(ticket):
                self._begin_settling(ticket, now_ns)
                continue
            if not any(claim.cramped for claim in ticket.claims):
                self._cramped.remove(ticket)
            self.doubts.watch(ticket, now_ns)

    def answer_all(self, now_ns: int, why: Refusal | None = None) -> None:
        """Nothing more will come up: settle every ticket that waits as things are, in the
        order in which they were asked. `why` it does not."""
        for ticket in list(self._tickets):
            if ticket.missing or any(claim.cramped for claim in ticket.claims):
                self.give_up(ticket, now_ns, why)

    def add_wanted(self, wanted: dict[SpaceClass, int]) -> None:
        """Add the slots that cramped chains lack, by class."""
        for ticket in self._cramped:
            for claim in ticket.claims:
                for layout in claim.layouts:
                    lacking = len(claim.keys) - claim.claimed
                    wanted[layout.dram_class] = wanted.get(layout.dram_class, 0) + lacking

    def pins(self) -> Iterator[Replica]:
        """Every replica in use here, once a pin; for integrity checks."""
        for ticket in self._tickets:
            for claim in ticket.claims:
                yield from chain.from_iterable(claim.columns)


def _addresses(replicas: list[Replica], *, mixed: bool) -> list[int]:
    """`mixed`: some may be in a GPU's memory only."""
    if not mixed:
        return [replica.address for replica in replicas]
    return [r.listed_as if isinstance(r, Mirror) else r.address for r in replicas]
