"""Prefetches: what somebody will want soon is brought up before.

Who knows says so (a call names chains, of a request that still waits in an engine's queue,
say), or it is foreseen (`core.foresight.returns`): a session will be back. What is there of it is
kept, for it is as good as used; what is not comes up in time that nobody else wants, and
takes slots that are free or hold what is on NVMe too and was used longest ago. There it is
kept until its time is over. No more than a part of a tenant's DRAM holds what has not been
used yet: what does not fit now is tried again until its time is over, what was asked for
first coming first. What nobody wants any more (the caller has gone, its session is over, or
back with something else) is called off, and not kept any longer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import zip_longest

from kvstore.core.actions import Answer
from kvstore.core.catalog import Block, Layout, Replica, is_ready
from kvstore.core.chores import CHANGED, NAMED, SEEN, Chore, Chores
from kvstore.core.foresight.returns import Known, Returns
from kvstore.core.places.foreseen import ASKED, Errand, Reason
from kvstore.core.places.residency import Residency
from kvstore.core.sessions import Session
from kvstore.core.tickets import PrefetchTicket
from kvstore.core.transfers import TransferClass, Wish
from kvstore.core.uses import session_of, use_of
from kvstore.types import NO_REUSE, ChainQuery, Refusal, Segment, SessionState

MOST_WAITING = 1024
"""Prefetches that wait for room."""
KEPT_NS = 60_000_000_000
"""For who does not say by when it is wanted."""
CLAIMING_NS = 1_000_000_000
"""Who is back takes what was kept for it within this time."""


class Prefetches:
    def __init__(self, residency: Residency, chores: Chores) -> None:
        self._residency = residency
        self._catalog = residency.catalog
        self._chores = chores
        self._returns = Returns(residency)
        self._reasons: dict[str, Reason] = {}
        self._now_ns = 0
        self._behind = residency.nvme is not None
        self._waiting: list[PrefetchTicket] = []
        # Of prefetches that nobody wants any more: what is queued may be called off.
        self._ended: list[Wish] = []
        # What was brought up for them is kept.
        self._keeping: list[Errand] = []

    # Asked for

    def prefetch(
        self,
        tenant: str,
        chains: Sequence[ChainQuery],
        *,
        within_ns: int,
        now_ns: int,
        session: Session | None = None,
    ) -> PrefetchTicket:
        """Answered with the number of blocks that are on their way because of it, once
        it has seen to all that there is room for now. What has not begun `within_ns` from
        now, or when `session` ends, does not begin any more. 0: there is no such time, but
        what there is no room for now is not tried again. Raises `UnknownLayout`."""
        layouts = [[self._catalog.layout(tenant, i) for i in chain.layout_ids] for chain in chains]
        reuse = chains[0].reuse if chains else NO_REUSE
        deadline_ns = now_ns + within_ns if within_ns else None
        wish = Wish(TransferClass.PREFETCH, now_ns, reuse.priority, deadline_ns)
        errand = Errand(
            self._reasons.setdefault(tenant, Reason(ASKED)),
            now_ns + KEPT_NS if deadline_ns is None else deadline_ns,
        )
        ticket = PrefetchTicket(wish, use_of(reuse, tenant, now_ns), errand)
        if session is not None:
            session.prefetches.append(ticket)
        named = (
            ([layout.name(key) for layout in shards] for key in chain.keys)
            for shards, chain in zip(layouts, chains, strict=True)
        )
        if within_ns < 0:
            self.give_up(ticket)
        else:
            self._chores.add(self._see_to(ticket, named))
        return ticket

    def give_up(self, ticket: PrefetchTicket) -> None:
        """The caller waits no longer: what has not begun does not begin."""
        ticket.errand.over = True
        ticket.answer = ticket.started

    def end_session(self, session: Session) -> None:
        """The client is gone."""
        for ticket in session.prefetches:
            self._end(ticket)
        session.prefetches.clear()

    # Foreseen

    def asked(self, tenant: str, chains: Sequence[ChainQuery], now_ns: int) -> None:
        """Chains are acquired."""
        if self._behind and any(chain.reuse.session for chain in chains):
            self._are_back(self._returns.asked(tenant, chains, now_ns))

    def stored(
        self, tenant: str, layout_id: bytes, segments: Sequence[Segment], now_ns: int
    ) -> None:
        """Segments are committed."""
        if self._behind and any(segment.reuse.session for segment in segments):
            self._are_back(self._returns.stored(tenant, layout_id, segments, now_ns))

    def hint(
        self, tenant: str, session: bytes, state: SessionState, expected_ms: float | None
    ) -> None:
        """What a session does next, as its caller says."""
        ended = self._returns.hint(session_of(tenant, session), state, expected_ms, self._now_ns)
        if ended is not None:
            self._are_back([ended])

    def _are_back(self, sessions: Iterable[Known]) -> None:
        """What they want of what was to come up they wait for themselves."""
        for known in sessions:
            if known.job is not None:
                self._end(known.job)

    def next_ns(self) -> int | None:
        """When there is something to do next because time has passed; None: not before
        something happens."""
        dues = [errand.until_ns for errand in self._keeping]
        if (due_ns := self._returns.next_ns()) is not None:
            dues.append(due_ns)
        return min(dues, default=None)

    def tick(self, now_ns: int) -> None:
        self._now_ns = now_ns
        self._residency.holdings.stays.tick(now_ns)
        self._residency.call_off_prefetches(now_ns, self._ended)
        self._ended.clear()
        self._let_go(now_ns)
        waiting, self._waiting = self._waiting, []
        waiting.sort(key=lambda ticket: ticket.wish.due_ns)
        for ticket in waiting:
            if ticket.wish.deadline_ns is None or ticket.wish.deadline_ns > now_ns:
                self._chores.add(self._bring_up(ticket))
        for known, until_ns in self._returns.due(now_ns):
            if known.job is not None:
                self._end(known.job)
            wish = Wish(TransferClass.PREFETCH, now_ns, known.use.priority, until_ns)
            use = known.use._replace(now_ms=now_ns / 1e6)
            known.job = PrefetchTicket(wish, use, Errand(known.reason, until_ns), answer=0)
            self._chores.add(self._bring_back(known, known.job))

    def _end(self, ticket: PrefetchTicket) -> None:
        errand = ticket.errand
        errand.over = True
        errand.until_ns = min(errand.until_ns, self._now_ns + CLAIMING_NS)
        if ticket.started:
            self._ended.append(ticket.wish)

    def _let_go(self, now_ns: int) -> None:
        """Of what nobody came for."""
        over = [errand for errand in self._keeping if errand.until_ns <= now_ns]
        if over:
            self._keeping = [errand for errand in self._keeping if errand.until_ns > now_ns]
            self._chores.add(self._residency.let_go(over))

    # How

    def _bring_back(self, known: Known, ticket: PrefetchTicket) -> Chore:
        """Bring up what a session used: what is there of its chains, up to the root."""
        chains: list[list[bytes]] = []
        for waypoints in known.waypoints.values():
            # Parents are what clients say they are, and could be a ring.
            names: dict[bytes, None] = {}
            block = self._returns.deepest(waypoints)
            while block is not None and block.stored_key not in names:
                if ticket.errand.over:
                    return
                names[block.stored_key] = None
                block = self._catalog.get(block.parent)
                yield NAMED
            chains.append(list(names)[::-1])
        named = ([name for name in names if name] for names in zip_longest(*chains))
        yield from self._see_to(ticket, [named])

    def _see_to(self, ticket: PrefetchTicket, chains: Iterable[Iterator[Sequence[bytes]]]) -> Chore:
        """Keep what is there of chains, and bring up the rest. They come as the stored
        keys of each position, root first."""
        for chain in chains:
            yield from self._look_at(ticket, chain)
        yield from self._bring_up(ticket)

    def _look_at(self, ticket: PrefetchTicket, chain: Iterator[Sequence[bytes]]) -> Chore:
        there: dict[Layout, list[Replica]] = {}
        for names in chain:
            if ticket.errand.over:
                return
            blocks = self._readable(names)
            for block in blocks:
                if is_ready(block.dram):
                    there.setdefault(block.layout, []).append(block.dram)
                elif block.dram is None:
                    ticket.lacking.append(block.stored_key)
            yield NAMED * len(names)
            if len(blocks) < len(names):
                break
        for layout, replicas in there.items():
            yield from self._keep(ticket, layout, replicas)

    def _readable(self, names: Sequence[bytes]) -> list[Block]:
        """Of the blocks of a position, those up to the first layout that has none."""
        blocks: list[Block] = []
        for block in map(self._catalog.get, names):
            if block is None or not block.readable:
                break
            blocks.append(block)
        return blocks

    def _keep(
        self, ticket: PrefetchTicket, layout: Layout, replicas: list[Replica]
    ) -> Generator[int, None, None]:
        """They are as good as used, the root last (see policies.base)."""
        piece = self._chores.piece
        for end in range(len(replicas), 0, -piece):
            run = [r for r in reversed(replicas[max(0, end - piece) : end]) if is_ready(r)]
            self._residency.holdings.use(ticket.use)
            self._residency.holdings.touch_run(layout, run)
            yield SEEN * len(run)

    def _bring_up(self, ticket: PrefetchTicket) -> Chore:
        lacking = ticket.lacking
        while lacking and not ticket.errand.over:
            block = self._catalog.get(lacking[0])
            if block is None or block.dram is not None or not is_ready(block.nvme):
                lacking.popleft()
                yield NAMED
                continue
            brought = self._residency.foresee(block, ticket.wish, ticket.errand)
            if brought is None and ticket.wish.deadline_ns is not None:
                if len(self._waiting) < MOST_WAITING:
                    self._waiting.append(ticket)
                break
            if brought is None or isinstance(brought, Refusal):
                break
            lacking.popleft()
            if not ticket.started:
                self._keeping.append(ticket.errand)
            ticket.started += 1
            yield CHANGED
        if ticket.answer is None:
            ticket.answer = ticket.started
            self._residency.actions.append(Answer(ticket))
