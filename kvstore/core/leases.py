"""Leases: prefixes of chains, pinned in DRAM for a client.

An acquire pins what is in DRAM, has the rest brought up, and is settled when all of
that has ended, well or badly: the longest prefix that is READY then becomes a lease.
A chain for which there is no room in DRAM yet is *cramped*: it goes on when room is
made, and is cut short where none can come. How much is brought up at all is decided
when it is asked for (`core.choice`), and again when that takes longer than was predicted.

Pinning, settling and letting go take time for every block, so they are chores
(`core.chores`); most acquires are over with the first part. In between, what is pinned
stays as it is, but for one thing: it may come to be DOOMED, when somebody clears it or
finds it damaged. Then it is held back like anything else that is not READY, or, where
that happens after it was counted, leased all the same: pinned bytes are not touched, and
whoever reads them compares checksums.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import chain, islice, takewhile

from kvstore.core.actions import Answer
from kvstore.core.catalog import Catalog, Layout, Replica, is_ready
from kvstore.core.choice import choose, is_settled
from kvstore.core.chores import CHANGED, NAMED, SEEN, Chore, Chores
from kvstore.core.learned import Prediction, PrefillSpeeds
from kvstore.core.lifecycle import State
from kvstore.core.limits import Counters, Limits
from kvstore.core.residency import Residency
from kvstore.core.sessions import Lease, Session
from kvstore.core.space import SpaceClass
from kvstore.core.tickets import AcquireTicket, ChainClaim
from kvstore.core.transfers import BATCH_BLOCKS, BATCH_BYTES, TransferClass, Wish
from kvstore.core.uses import use_of
from kvstore.errors import ForeignLease, LeaseExpired, TooMany
from kvstore.types import NO_HINTS, ChainQuery, Hints, LeaseGrant, Refusal, Tier

MAX_LEASED = 1 << 22
"""Blocks that the leases of one session may hold together, each as often as it is
leased. Bounds memory."""

LOOKED_AHEAD = 64
"""Positions counted before looking whether to go on."""
PROBED_BYTES = 4 * BATCH_BYTES
PROBED_BLOCKS = BATCH_BLOCKS
"""What tells how fast NVMe is, where nobody waits for it: as many batches as run at a time."""
GRACE_NS = 5_000_000
"""A prediction is not wrong for so little."""
LOOKS = 8
SOONEST_NS = 2_000_000
"""How a load gets on is looked at after this part of the time that is left, but not sooner."""

_NOTHING = LeaseGrant(0, 0, [], [], 0, 0)


class Leases:
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
        self.prefill = PrefillSpeeds()
        self._fades = 0
        # In the order in which they end, but for the moments that granting one takes.
        self._leases: OrderedDict[int, Lease] = OrderedDict()
        self._tickets: set[AcquireTicket] = set()
        self._filling: dict[Replica, list[AcquireTicket]] = {}
        self._cramped: list[AcquireTicket] = []
        # Pins that nobody has a use for any more, to be taken off.
        self._letting_go: deque[list[Replica]] = deque()

    def __len__(self) -> int:
        return len(self._leases)

    def acquire(
        self,
        session: Session,
        chains: Sequence[ChainQuery],
        *,
        wait: bool,
        now_ns: int,
        deadline_ns: int | None = None,
        hints: Hints = NO_HINTS,
    ) -> AcquireTicket:
        """Pin the longest prefix of each chain. Without `wait`, only what is in DRAM;
        what has to be brought up is wanted by `deadline_ns`.

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
        ticket.compute_ns = self._compute_ns(layouts, hints.tokens_per_s)
        self._tickets.add(ticket)
        session.tickets.add(ticket)
        self._chores.add(self._claim(ticket, now_ns))
        ticket.waited = ticket.answer is None
        return ticket

    # Claiming

    def _claim(self, ticket: AcquireTicket, now_ns: int) -> Chore:
        """Pin all that can be pinned now."""
        for claim in ticket.claims:
            yield from self._claim_ready(claim)
            if ticket.wait:
                yield from self._choose(ticket, claim)
            yield from self._extend(ticket, claim)
        ticket.at_work = False
        if not self._may_get_on(ticket):
            ticket.at_work = True
            yield from self._settle(ticket, now_ns)
        elif any(claim.cramped for claim in ticket.claims):
            self._cramped.append(ticket)

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

    def _choose(self, ticket: AcquireTicket, claim: ChainClaim) -> Chore:
        """Decide how much of what lies behind DRAM to bring up."""
        wish, link = ticket.wish, self._residency.transfers
        ready = partial(link.ready, Tier.DRAM, ticket.session.tenant, wish.priority, wish.asked_ns)
        left_ns = None if wish.deadline_ns is None else wish.deadline_ns - wish.asked_ns
        works_ns = [0]
        for key in islice(claim.keys, claim.claimed, None):
            work_ns = self._work_ns(claim.layouts, key)
            yield NAMED * len(claim.layouts)
            if work_ns is None:
                break
            works_ns.append(works_ns[-1] + work_ns)
            look = len(works_ns) % LOOKED_AHEAD == 2
            if look and is_settled(works_ns, ready, left_ns, ticket.compute_ns):
                break
        if not works_ns[-1]:
            return
        if self._residency.stalled:
            self._refuse(claim, claim.claimed, Refusal.STALLED)
            return
        choice = choose(works_ns, ready, left_ns, ticket.compute_ns)
        if choice.refusal is not None:
            if not choice.positions:
                yield from self._probe(claim, wish.asked_ns)
            self._refuse(claim, claim.claimed + choice.positions, choice.refusal)
        if choice.positions:
            self._promise(ticket, works_ns[choice.positions], choice.prediction)

    def _promise(self, ticket: AcquireTicket, work_ns: int, said: Prediction) -> None:
        wish, link = ticket.wish, self._residency.transfers
        ahead_ns = link.ahead(ticket.session.tenant, wish.priority, wish.asked_ns, work_ns)
        ticket.through_ns = max(ticket.through_ns, link.done_ns + ahead_ns)
        if ticket.compute_ns:
            promised_ns = wish.asked_ns + _doubtful_ns(said)
            ticket.promised_ns = max(ticket.promised_ns, promised_ns)
            ticket.doubt_ns = wish.asked_ns + _look_ns(said.ns)

    def _probe(self, claim: ChainClaim, now_ns: int) -> Chore:
        """Nobody has measured for some time whether what is refused is as slow as it was:
        a few batches are brought up that nobody waits for."""
        link = self._residency.transfers
        if link.depth(TransferClass.DEMAND) or not link.costs[Tier.DRAM].unseen(now_ns):
            return
        wish, left = Wish(TransferClass.DEMAND, now_ns, priority=0), PROBED_BYTES
        for key in islice(claim.keys, claim.claimed, claim.claimed + PROBED_BLOCKS):
            block = self._catalog.find(claim.layouts[0], key)
            if left <= 0 or block is None or block.dram is not None or not is_ready(block.nvme):
                return
            if not isinstance(self._residency.bring_up(block, wish), Replica):
                return
            left -= block.layout.stored_bytes
            yield NAMED + CHANGED

    def _work_ns(self, layouts: list[Layout], key: bytes) -> int | None:
        """The work of bringing up a position; None where it is not held."""
        work_ns = 0
        for layout in layouts:
            block = self._catalog.find(layout, key)
            if block is None or not (block.readable or block.dram is not None):
                return None
            if block.dram is None:
                nominal = self._residency.transfers.costs[Tier.DRAM].nominal
                work_ns += nominal.work_ns(layout.stored_bytes)
            elif block.dram.state is State.FILLING:
                # What there is to do for it is queued already.
                work_ns += 1
        return work_ns

    def _refuse(self, claim: ChainClaim, most: int, why: Refusal) -> None:
        claim.most, claim.refusal = most, why
        self._counters.refused[why] += 1

    def _compute_ns(self, layouts: list[list[Layout]], tokens_per_s: float | None) -> float:
        """What a position costs who computes what it is not given; 0.0 where that is
        not known, and for who does not."""
        first = next((shards[0] for shards in layouts if shards), None)
        if tokens_per_s is None or first is None:
            return 0.0
        if tokens_per_s > 0:
            self.prefill.note(first.layout_id, tokens_per_s)
        speed = self.prefill.tokens_per_s(first.layout_id)
        return first.spec.block_tokens * 1e9 / speed if speed else 0.0

    def _extend(self, ticket: AcquireTicket, claim: ChainClaim) -> Chore:
        """Pin what else can be pinned; see to it that it is brought up."""
        while claim.claimed < claim.most and claim.layouts:
            position = self._claim_position(ticket, claim)
            if position is None:
                yield NAMED * len(claim.layouts)
                break
            cost = NAMED
            for column, replica in zip(claim.columns, position, strict=True):
                column.append(replica)
                if replica.state is State.FILLING and replica not in ticket.missing:
                    ticket.missing.add(replica)
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
        """The block's DRAM replica, pinned, READY or (for who waits) on its way."""
        block = self._catalog.find(layout, key)
        if block is None:
            return None
        replica = block.dram
        if replica is None and ticket.wait and is_ready(block.nvme):
            brought = self._residency.bring_up(block, ticket.wish)
            if isinstance(brought, Refusal):
                self._refuse(claim, claim.claimed, brought)
                return None
            replica = brought
            claim.cramped = replica is None
        if replica is None:
            return None
        if replica.state is State.FILLING and ticket.wait:
            if self._residency.stalled:
                self._refuse(claim, claim.claimed, Refusal.STALLED)
                return None
            self._residency.transfers.hurry(replica, ticket.wish)
        elif replica.state is not State.READY:
            return None
        self._holdings.pin(replica)
        self._holdings.asked_for((replica,))
        return replica

    # Settling

    def give_up(self, ticket: AcquireTicket, now_ns: int) -> None:
        """The caller waits for nothing more to be brought up: answer with what there is."""
        ticket.wait = False
        if not ticket.at_work and ticket.answer is None:
            self._begin_settling(ticket, now_ns)

    def out_of_time(self, ticket: AcquireTicket, now_ns: int) -> None:
        """The caller's patience has ended."""
        self._counters.missed_deadlines += bool(ticket.missing)
        self.give_up(ticket, now_ns)

    def doubt(self, ticket: AcquireTicket, now_ns: int) -> None:
        """Decide again whether the rest is worth waiting for. What has been brought up is
        leased in any case."""
        if ticket.answer is not None or ticket.at_work or not ticket.missing:
            ticket.doubt_ns = None
            return
        left = self._left(ticket, now_ns)
        # Every time that it was wrong it has to be twice as good to be believed again.
        least_ns = (1 << ticket.doubts) * (left.ns + left.error_ns)
        layouts = max(len(claim.layouts) for claim in ticket.claims)
        if least_ns < len(ticket.missing) / layouts * ticket.compute_ns:
            if now_ns >= ticket.promised_ns:
                ticket.doubts += 1
                ticket.promised_ns = now_ns + _doubtful_ns(left)
            ticket.doubt_ns = now_ns + _look_ns(left.ns)
            return
        self._counters.given_up += 1
        self.give_up(ticket, now_ns)

    def _left(self, ticket: AcquireTicket, now_ns: int) -> Prediction:
        """How long until all that a ticket waits for is there. What came to the queue after
        it is behind it, unless that turns out otherwise."""
        link, tenant = self._residency.transfers, ticket.session.tenant
        one = next(iter(ticket.missing)).block.layout.stored_bytes
        own_ns = len(ticket.missing) * link.costs[Tier.DRAM].nominal.work_ns(one)
        queued_ns = link.ahead(tenant, ticket.wish.priority, now_ns, 0)
        ahead_ns = max(own_ns, min(ticket.through_ns - link.done_ns, queued_ns))
        return link.through(Tier.DRAM, ahead_ns, own_ns, now_ns)

    def withdraw(self, ticket: AcquireTicket, now_ns: int) -> None:
        """The caller is gone: nobody would give back what it is granted."""
        ticket.withdrawn = True
        if ticket.answer is None:
            self.give_up(ticket, now_ns)
        else:
            self.release(ticket.session, [grant.lease_id for grant in ticket.answer])

    def end_session(self, session: Session) -> None:
        """The client is gone: all it holds and waits for."""
        for ticket in [t for t in session.tickets if isinstance(t, AcquireTicket)]:
            self.give_up(ticket, 0)
        for lease in list(session.leases.values()):
            self.end(lease)

    def _begin_settling(self, ticket: AcquireTicket, now_ns: int) -> None:
        ticket.at_work = True
        if ticket in self._cramped:
            self._cramped.remove(ticket)
        self._chores.add(self._settle(ticket, now_ns))

    def _settle(self, ticket: AcquireTicket, now_ns: int) -> Chore:
        """Turn what is READY now into leases, let go of the rest, and answer."""
        while ticket.missing:
            replica = ticket.missing.pop()
            waiting = self._filling[replica]
            waiting.remove(ticket)
            if not waiting:
                del self._filling[replica]
            yield SEEN
        grants = []
        expires_ns = now_ns + self._limits.lease_ms * 1_000_000
        for claim in ticket.claims:
            grants.append((yield from self._prepare(ticket, claim, expires_ns)))
        session = ticket.session
        self._tickets.remove(ticket)
        session.tickets.discard(ticket)
        if session.closed or ticket.withdrawn:
            for claim in ticket.claims:
                for column in claim.columns:
                    self._let_go(column)
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
        held = claim.from_dram
        if ticket.waited or held < claim.claimed:
            held = yield from self._leading_ready(claim)
        if held < claim.claimed:
            for column in claim.columns:
                self._let_go(column[held:])
                del column[held:]
        addresses: list[int] = []
        checksums: list[int] = []
        piece = self._chores.piece
        for layout, column in zip(claim.layouts, claim.columns, strict=True):
            for begin in range(0, held, piece):
                run = column[begin : begin + piece]
                addresses += [replica.address for replica in run]
                checksums += [replica.block.checksum or 0 for replica in run]
                yield NAMED + SEEN * len(run)
            # The root last, so that it is the most recent (see policies.base).
            for end in range(held, 0, -piece):
                run = column[max(0, end - piece) : end]
                run.reverse()
                if ticket.waited:
                    run = [replica for replica in run if is_ready(replica)]
                self._holdings.use(claim.use)
                self._holdings.touch_run(layout, run)
                yield NAMED + SEEN * len(run)
        from_dram = min(claim.from_dram, held)
        return LeaseGrant(0, held, addresses, checksums, expires_ns, from_dram, claim.refusal)

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
        lease = Lease(next(self._ids), session, replicas, grant.expires_ns)
        self._leases[lease.lease_id] = session.leases[lease.lease_id] = lease
        session.leased += len(replicas)
        return grant._replace(lease_id=lease.lease_id)

    # Leases that are held

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
            self._leases.move_to_end(lease.lease_id)
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
        self._let_go(lease.replicas)

    def expire(self, now_ns: int) -> None:
        """End the leases whose time is up."""
        if self._first_expired(now_ns) is not None:
            self._chores.add(self._expire(now_ns))

    def _first_expired(self, now_ns: int) -> Lease | None:
        lease = next(iter(self._leases.values()), None)
        return lease if lease is not None and lease.expires_ns < now_ns else None

    def _expire(self, now_ns: int) -> Chore:
        while (lease := self._first_expired(now_ns)) is not None:
            self._counters.expired_leases += 1
            self.end(lease)
            yield NAMED

    def _let_go(self, replicas: list[Replica]) -> None:
        """Take a pin off each, and each off the list, which is nobody else's any more."""
        self._letting_go.append(replicas)
        if len(self._letting_go) == 1:
            self._chores.add(self._take_pins_off())

    def _take_pins_off(self) -> Chore:
        piece = self._chores.piece
        while self._letting_go:
            replicas = self._letting_go[0]
            while replicas:
                part = replicas[-piece:]
                del replicas[-piece:]
                given_up = self._residency.unpin_all(part)
                yield SEEN * len(part) + CHANGED * given_up
            self._letting_go.popleft()

    # Getting on with what waits

    def target_settled(self, target: Replica, now_ns: int) -> None:
        """A replica that was being filled is READY or gone."""
        fades = self._residency.transfers.costs[Tier.DRAM].fades
        if self._fades != fades:
            self._fades = fades
            waiting = [ticket for ticket in self._tickets if ticket.doubt_ns is not None]
            for ticket in sorted(waiting, key=lambda ticket: ticket.wish.asked_ns):
                self.doubt(ticket, now_ns)
        for ticket in self._filling.pop(target, ()):
            ticket.missing.discard(target)
            if not ticket.at_work and not self._may_get_on(ticket):
                self._begin_settling(ticket, now_ns)

    def retry(self, now_ns: int) -> None:
        """There may be room now."""
        full: set[SpaceClass] = set()
        left = self._chores.part
        for ticket in list(self._cramped):
            classes = {layout.dram_class for claim in ticket.claims for layout in claim.layouts}
            if classes <= full:
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
            elif not any(claim.cramped for claim in ticket.claims):
                self._cramped.remove(ticket)

    def answer_all(self, now_ns: int) -> None:
        """Nothing more will come up: settle every ticket as things are."""
        waiting = {ticket for tickets in self._filling.values() for ticket in tickets}
        for ticket in waiting | set(self._cramped):
            self.give_up(ticket, now_ns)

    def add_wanted(self, wanted: dict[SpaceClass, int]) -> None:
        """Add the slots that cramped chains lack, by class."""
        for ticket in self._cramped:
            for claim in ticket.claims:
                for layout in claim.layouts:
                    lacking = len(claim.keys) - claim.claimed
                    wanted[layout.dram_class] = wanted.get(layout.dram_class, 0) + lacking

    def pins(self) -> Iterator[Replica]:
        """Every replica in use, once a pin; for integrity checks."""
        for lease in self._leases.values():
            yield from lease.replicas
        for ticket in self._tickets:
            for claim in ticket.claims:
                yield from chain.from_iterable(claim.columns)
        yield from chain.from_iterable(self._letting_go)


def _look_ns(left_ns: float) -> int:
    return max(SOONEST_NS, int(left_ns / LOOKS))


def _doubtful_ns(said: Prediction) -> int:
    """How long after a prediction it is taken for wrong."""
    return int(said.ns + 3 * said.error_ns) + GRACE_NS
