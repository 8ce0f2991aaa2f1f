"""Asks the store for leases without ever making the scheduler wait.

The scheduler submits chains and looks at the tickets in later steps. A few threads
take whatever is waiting and ask for all of it in one call; there are several, so
that a chain which is being brought up from a slow tier does not hold up the ones
asked for after it. They also give leases back, which is never urgent.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from dataclasses import dataclass

from kvstore.errors import KVStoreError
from kvstore.types import ChainQuery, LeaseGrant
from kvstore_connectors.vllm.link import Attached, StoreLink, is_loss
from kvstore_connectors.vllm.threads import outlive

MAX_KEYS = 65536
"""Keys in one call, counted once for each shard: the server's limit."""

MAX_CHAINS = 1024
_THREADS = 3


class TicketState(enum.Enum):
    WAITING = enum.auto()
    SENT = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()


@dataclass(slots=True)
class Held:
    """A lease, and the client it was granted to."""

    grant: LeaseGrant
    attached: Attached


@dataclass(slots=True, eq=False)
class Ticket:
    """One chain asked for. `held` is set when `state` is ANSWERED.

    `sent_s` is 0 until a thread has taken the ticket to the server.
    """

    keys: list[bytes]
    asked_s: float
    sent_s: float = 0.0
    state: TicketState = TicketState.WAITING
    held: Held | None = None


class AcquireQueue:
    """Bounded by its caller: a ticket a request, and a lease a ticket."""

    def __init__(self, link: StoreLink, wait_ms: int, threads: int = _THREADS) -> None:
        self._link = link
        self._wait_ms = wait_ms
        self._condition = threading.Condition()
        self._asked: deque[Ticket] = deque()
        self._returned: deque[Held] = deque()
        self._answers = 0
        self._seen_answers = 0
        self._closing = False
        self.errors = 0
        """Calls that failed."""
        self._threads = [
            threading.Thread(
                target=outlive,
                args=(self._run, self._count_error),
                name=f"kvstore-acquire-{index}",
                daemon=True,
            )
            for index in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def peek(self, keys: list[bytes]) -> int | None:
        """How many blocks of the chain's front are held, as far as can be seen without
        asking; None where that takes a call. Microseconds, for the engine's thread."""
        attached = self._link.current
        if attached is None:
            return None
        presence = attached.client.peek([layout.id for layout in attached.layouts], keys)
        return None if presence is None else presence.held

    def submit(self, keys: list[bytes]) -> Ticket:
        """Ask for the longest held prefix of `keys`, all shards of it."""
        ticket = Ticket(keys, time.monotonic())
        with self._condition:
            self._asked.append(ticket)
            self._condition.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The answer is no longer wanted; a lease that it brings is given back."""
        with self._condition:
            held, ticket.held = ticket.held, None
            ticket.state = TicketState.CANCELLED
        if held is not None:
            self.release(held)

    def release(self, held: Held) -> None:
        """Give a lease back, soon."""
        if not held.grant.lease_id or held.attached.dropped:
            # Leases end with their session.
            return
        with self._condition:
            self._returned.append(held)
            self._condition.notify()

    def wait_answer(self, timeout_s: float) -> None:
        """Return once an answer has come since the last call, or after `timeout_s`."""
        with self._condition:
            self._condition.wait_for(lambda: self._answers != self._seen_answers, timeout_s)
            self._seen_answers = self._answers

    def close(self, timeout_s: float = 1.0) -> None:
        """Leases still out end with the session."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closing or self._asked or self._returned)
                if self._closing:
                    return
                tickets = self._take_asked()
                returned = [] if tickets else self._take_returned()
            answered = False
            try:
                if tickets:
                    self._acquire(tickets)
                else:
                    self._release(returned)
                answered = True
            finally:
                if not answered:
                    self._answer(tickets, None, None)

    def _count_error(self) -> None:
        with self._condition:
            self.errors += 1

    def _take_asked(self) -> list[Ticket]:
        budget = MAX_KEYS // max(1, len(self._link.specs))
        tickets: list[Ticket] = []
        while self._asked and len(tickets) < MAX_CHAINS:
            ticket = self._asked[0]
            if ticket.state is not TicketState.WAITING:
                self._asked.popleft()
                continue
            if tickets and len(ticket.keys) > budget:
                break
            budget -= len(ticket.keys)
            ticket.state = TicketState.SENT
            ticket.sent_s = time.monotonic()
            tickets.append(self._asked.popleft())
        return tickets

    def _take_returned(self) -> list[Held]:
        returned: list[Held] = []
        while self._returned and len(returned) < MAX_CHAINS:
            if returned and self._returned[0].attached is not returned[0].attached:
                break
            returned.append(self._returned.popleft())
        return returned

    def _acquire(self, tickets: list[Ticket]) -> None:
        with self._link.borrow() as attached:
            if attached is None:
                self._answer(tickets, None, None)
                return
            layout_ids = [spec.layout_id for spec in attached.specs]
            limit = MAX_KEYS // len(layout_ids)
            chains = [ChainQuery(layout_ids, ticket.keys[:limit]) for ticket in tickets]
            try:
                grants = attached.client.acquire_many(chains, self._wait_ms)
            except KVStoreError as error:
                self.errors += 1
                if is_loss(error):
                    self._link.failed(attached, error)
                self._answer(tickets, None, None)
                return
            if attached.client.epoch != attached.epoch:
                # Granted by a life of the server whose layouts nobody registered.
                self._answer(tickets, None, None)
                return
            self._answer(tickets, grants, attached)

    def _answer(
        self, tickets: list[Ticket], grants: list[LeaseGrant] | None, attached: Attached | None
    ) -> None:
        with self._condition:
            for index, ticket in enumerate(tickets):
                held = None
                if grants is not None and attached is not None:
                    held = Held(grants[index], attached)
                if ticket.state is TicketState.CANCELLED:
                    if held is not None and held.grant.lease_id:
                        self._returned.append(held)
                    continue
                ticket.held = held
                ticket.state = TicketState.FAILED if held is None else TicketState.ANSWERED
            self._answers += 1
            self._condition.notify_all()

    def _release(self, returned: list[Held]) -> None:
        if not returned:
            return
        with self._link.borrow() as attached:
            if attached is None or attached is not returned[0].attached:
                return
            try:
                attached.client.release([held.grant.lease_id for held in returned])
            except KVStoreError as error:
                self.errors += 1
                if is_loss(error):
                    self._link.failed(attached, error)
