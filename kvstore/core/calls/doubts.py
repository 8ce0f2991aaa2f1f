"""Deciding again, for who waits, once what was predicted will not come about.

A load goes on for as long as what is left of it beats computing it, and ends in time. That
may change with every transfer that comes or ends and as time goes by while none does, but
nobody looks at all who wait each time. Who is looked at sets three alarms, each for what would
break the prediction by itself: the moment when it does if nothing ends until then, so much
work that goes first, and a link that has become slower by a part since everybody was looked
at. All that are due are looked at in the order in which it came out, a part at a time
(`core.chores`).

Two things are believed of a link that gets on badly. To compute is an alternative that is
always there, so for who can, the link is taken to be as slow as what runs on it has shown to
be. Who cannot compute loses what it is refused: a transfer that takes too long is expected to
take as long again, and what follows it as long as those before it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Protocol

from kvstore.core.calls.alarms import Alarms
from kvstore.core.calls.offers import doubtful_ns
from kvstore.core.chores import Chore, Chores
from kvstore.core.links.learned import Prediction
from kvstore.core.tickets import AcquireTicket
from kvstore.core.transfers import Drag, Link
from kvstore.types import Tier

LOOKED = 60
"""The cost of looking at one who waits."""
SLOWER = 1 + 1 / 16
"""A link that has become so many times slower, or less sure, is one to look at everybody for."""
SOONEST_NS = 500_000
"""Nobody is looked at sooner again because of the time."""


class Waiting(Protocol):
    """What is done about it (`core.calls.acquires`)."""

    def not_worth_it(self, ticket: AcquireTicket, now_ns: int) -> None: ...

    def shorten(
        self, ticket: AcquireTicket, now_ns: int, in_time: Callable[[int], bool]
    ) -> Chore: ...


class Doubts:
    def __init__(self, link: Link, chores: Chores, waiting: Waiting) -> None:
        self._link = link
        self._chores = chores
        self._waiting = waiting
        self._watched: dict[AcquireTicket, None] = {}
        self._by_time: Alarms[AcquireTicket] = Alarms()
        # By how much work went first, of those that the same goes before.
        self._by_work: dict[tuple[str, int], Alarms[AcquireTicket]] = {}
        self._due: dict[AcquireTicket, None] = {}
        self._looking = False
        self._now_ns = 0
        # What had come and gone when the link was looked at; how slow it was when everybody
        # was, and when it will be slower by a part if nothing ends.
        self._came_ns = self._done_ns = -1
        self._drag = Drag(inf, inf)
        self._slow_ns = inf

    def watch(self, ticket: AcquireTicket, now_ns: int) -> None:
        """It waits for something, or for something else than before."""
        if ticket.compute_ns or ticket.wish.deadline_ns is not None:
            self._now_ns = max(self._now_ns, now_ns)
            self._watched[ticket] = None
            self._done_ns = -1
            self._doubt([ticket])

    def forget(self, ticket: AcquireTicket) -> None:
        """It waits for nothing any more. Idempotent."""
        if ticket not in self._watched:
            return
        del self._watched[ticket]
        self._by_time.drop(ticket)
        group = (ticket.session.tenant, ticket.wish.priority)
        alarms = self._by_work.get(group)
        if alarms is not None:
            alarms.drop(ticket)
            if not alarms:
                del self._by_work[group]

    def go_on(self, now_ns: int) -> None:
        """To be called after all that may have happened, once what may start has."""
        self._now_ns = now_ns
        if not self._watched:
            return
        self._doubt(self._by_time.rung(now_ns))
        if self._link.done_ns != self._done_ns or now_ns >= self._slow_ns:
            self._done_ns = self._link.done_ns
            self._look_at_link(now_ns)
        if self._link.inflow.total_ns != self._came_ns:
            self._came_ns = self._link.inflow.total_ns
            for (tenant, priority), alarms in list(self._by_work.items()):
                before_ns = self._link.inflow.before(tenant, priority)
                self._doubt(alarms.rung(before_ns))

    def looks_ns(self) -> int | None:
        """When `go_on` has something to do, if nothing else happens; None: it has not."""
        if not self._watched:
            return None
        first_ns = self._by_time.first()
        looks_ns = min(self._slow_ns, inf if first_ns is None else first_ns)
        return None if looks_ns == inf else int(looks_ns) + 1

    def _look_at_link(self, now_ns: int) -> None:
        link, known = self._link, self._drag
        drag = link.drag(now_ns)
        if drag.worst > SLOWER * known.worst or drag.best > SLOWER * known.best:
            self._drag = known = drag
            self._doubt(self._watched)
        else:
            # It has become faster: that is what it is compared with.
            known = self._drag = Drag(
                min(known.worst, SLOWER * drag.worst), min(known.best, SLOWER * drag.best)
            )
        usual = drag.worst / link.slowness(now_ns)
        self._slow_ns = link.slow_ns(SLOWER * known.worst / usual) if usual else inf

    def _doubt(self, tickets: Iterable[AcquireTicket]) -> None:
        self._due.update(dict.fromkeys(tickets))
        if self._due and not self._looking:
            self._looking = True
            self._chores.add(self._look_at_due())

    def _look_at_due(self) -> Chore:
        while self._due:
            ticket = next(iter(self._due))
            del self._due[ticket]
            if ticket in self._watched and not ticket.at_work and ticket.missing:
                yield from self._look(ticket, self._now_ns)
            yield LOOKED
        self._looking = False

    def _look(self, ticket: AcquireTicket, now_ns: int) -> Chore:
        said, ahead_ns = self._said(ticket, now_ns)
        if not self._is_worth_it(ticket, said, now_ns):
            self._waiting.not_worth_it(ticket, now_ns)
        elif not self._is_in_time(ticket, said, now_ns):
            others_ns = ahead_ns - ticket.missing_ns

            def in_time(work_ns: int) -> bool:
                said = self._link.said(Tier.DRAM, others_ns + work_ns, work_ns)
                return self._is_in_time(ticket, said, now_ns)

            yield from self._waiting.shorten(ticket, now_ns, in_time)
        else:
            self._believe(ticket, said, now_ns)
            self._set_alarms(ticket, said, now_ns)
            return
        if self._chores:
            # What is given up is let go of before others are looked at: it may be what
            # they wait for.
            yield self._chores.part

    def _said(self, ticket: AcquireTicket, now_ns: int) -> tuple[Prediction, int]:
        """How long what is left takes as slowly as the link mostly is, and the work until it
        is there."""
        ahead_ns = self._ahead(ticket, now_ns)
        return self._link.said(Tier.DRAM, ahead_ns, ticket.missing_ns), ahead_ns

    def _ahead(self, ticket: AcquireTicket, now_ns: int) -> int:
        """Work until all that a ticket waits for is there. What came to the queue after it is
        behind it, but for what is more important or others', which have their shares."""
        link, tenant, priority = self._link, ticket.session.tenant, ticket.wish.priority
        passed_by_ns = link.inflow.before(tenant, priority) - ticket.before_ns
        left_ns = ticket.through_ns + passed_by_ns - link.done_ns
        ahead_ns = max(ticket.missing_ns, min(left_ns, link.queued_ahead(tenant, priority, 0)))
        waited_ns = now_ns - ticket.wish.asked_ns
        return int(ahead_ns + link.to_come(tenant, priority, now_ns, ahead_ns, waited_ns))

    def _is_worth_it(self, ticket: AcquireTicket, said: Prediction, now_ns: int) -> bool:
        if not ticket.compute_ns:
            return True
        doubts = max(0, ticket.doubts - (now_ns < ticket.believed_ns))
        return self._link.slowness(now_ns) * _worst_ns(said) < _worth_ns(ticket, doubts)

    def _believe(self, ticket: AcquireTicket, said: Prediction, now_ns: int) -> None:
        """Every time that it was wrong it has to be twice as good once what is said now should
        be over."""
        if ticket.compute_ns and now_ns >= ticket.promised_ns:
            slowness = self._link.slowness(now_ns)
            ticket.doubts += 1
            ticket.believed_ns = now_ns + int(slowness * said.ns)
            said = Prediction(slowness * said.ns, slowness * said.error_ns)
            ticket.promised_ns = now_ns + doubtful_ns(said)

    def _is_in_time(self, ticket: AcquireTicket, said: Prediction, now_ns: int) -> bool:
        return self._left_ns(ticket, now_ns) >= self._link.steady * _best_ns(said)

    def _left_ns(self, ticket: AcquireTicket, now_ns: int) -> float:
        """Until a deadline; less where what runs takes too long, which is expected to take as
        long again."""
        if ticket.wish.deadline_ns is None:
            return inf
        return ticket.wish.deadline_ns - now_ns - max(0.0, now_ns - self._link.due_ns)

    def _set_alarms(self, ticket: AcquireTicket, said: Prediction, now_ns: int) -> None:
        link, best_ns = self._link, _best_ns(said)
        looks_ns = room_ns = inf
        if ticket.compute_ns:
            worth_ns = _worth_ns(ticket, ticket.doubts)
            looks_ns = min(ticket.promised_ns, link.slow_ns(worth_ns / _worst_ns(said)))
            if now_ns < ticket.believed_ns:
                looks_ns = min(ticket.believed_ns, link.slow_ns(2 * worth_ns / _worst_ns(said)))
                worth_ns *= 2
            room_ns = worth_ns / link.slowness(now_ns) - _worst_ns(said)
        if ticket.wish.deadline_ns is not None:
            latest_ns = ticket.wish.deadline_ns - link.steady * best_ns
            if latest_ns > link.due_ns:
                latest_ns = (latest_ns + link.due_ns) / 2
            looks_ns = min(looks_ns, latest_ns)
            room_ns = min(room_ns, self._left_ns(ticket, now_ns) / link.steady - best_ns)
        if looks_ns < inf:
            self._by_time.set(ticket, max(int(looks_ns), now_ns + SOONEST_NS))
        group = (ticket.session.tenant, ticket.wish.priority)
        alarms = self._by_work.setdefault(group, Alarms())
        alarms.set(ticket, link.inflow.before(*group) + max(1, int(room_ns / link.pace)))


def _worst_ns(said: Prediction) -> float:
    """What is worth it even so is better than to compute."""
    return said.ns + said.error_ns


def _best_ns(said: Prediction) -> float:
    """What is too late even so is too late, as far as anybody can know."""
    return max(said.ns / 2, said.ns - said.error_ns)


def _worth_ns(ticket: AcquireTicket, doubts: int) -> float:
    """What loading may take at most: as long as computing it, or a part of that for who was
    promised it before."""
    layouts = max(len(claim.layouts) for claim in ticket.claims)
    return len(ticket.missing) / layouts * ticket.compute_ns / (1 << doubts)
