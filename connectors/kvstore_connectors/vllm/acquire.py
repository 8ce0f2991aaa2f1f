"""Asks the store for leases without ever making the scheduler wait.

The scheduler submits what it wants of a prompt and looks at the tickets in later steps.
A few threads take whatever is waiting and ask for all of it in one call; there are
several, so that a chain which is being brought up from a slow tier does not hold up the
ones asked for after it. What is more urgent than usual is asked for before the rest and
apart from it, and what is less so after it: the server brings up the blocks of a call as
one, as soon as the most urgent of them must be there. Leases are given back when there is
nothing to ask for.

The engine's thread takes no lock here, but to give something up: what it asks and gives
back it appends to deques, which threads take from. What of a prompt is wanted is found out
by a thread, too.

Where only full attention is stored, the store itself leases the longest prefix. Where
windows or states are needed too, a position is looked for first (`positions`), and all
that it needs is leased; what is gone by then sends the search to a shorter one.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from kvstore.errors import KVStoreError
from kvstore.types import NO_HINTS, ChainQuery, Hints, LeaseGrant
from kvstore_connectors.vllm.groups import Band, Bands
from kvstore_connectors.vllm.held import Held, held_of
from kvstore_connectors.vllm.link import Attached, StoreLink, Watch, is_loss
from kvstore_connectors.vllm.positions import (
    Query,
    Wanted,
    full_position,
    longest_position,
    queries,
)
from kvstore_connectors.vllm.prefill import PrefillMeter
from kvstore_connectors.vllm.threads import outlive

MAX_KEYS = 65536
"""Keys in one call, counted once for each layout: the server's limit. Longer chains are
asked for in parts."""

MAX_CHAINS = 1024
FORESEEN_MS = 60_000
"""For how long a prompt that waits to be asked for is worth prefetching."""
MAX_FORESEEN = 1024
_THREADS = 3
_TRIES = 3
"""Positions tried for one ticket."""


class TicketState(enum.Enum):
    WAITING = enum.auto()
    SENT = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()


WAITING, SENT = TicketState.WAITING, TicketState.SENT
"""Until an answer has come."""

Want = Callable[[], Wanted]
"""Tells what is wanted of a prompt, in any thread."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One prompt asked for. `held` is set when `state` is ANSWERED.

    `wanted` is None, and `sent_s` 0, until a thread has taken the ticket to the server.
    """

    want: Want
    asked_s: float
    sent_s: float = 0.0
    state: TicketState = WAITING
    held: Held | None = None
    wanted: Wanted | None = None


@dataclass(slots=True, eq=False)
class _Ask:
    """What is asked for one ticket in one round, and what was granted."""

    ticket: Ticket
    wanted: Wanted
    position: int
    full_tokens: int
    queries: list[Query]
    grants: list[LeaseGrant] = field(default_factory=list)


class AcquireQueue:
    """Bounded by its caller: a ticket a request, and a lease a ticket."""

    def __init__(
        self,
        link: StoreLink,
        bands: Bands,
        wait_ms: int,
        weighs: bool,
        reader: bytes = b"",
        threads: int = _THREADS,
    ) -> None:
        """`weighs`: what the engine computes sooner than it would come is not asked for.
        `reader`: see `reader_of`."""
        self._link = link
        self._bands = bands
        self._wait_ms = wait_ms
        self._weighs = weighs
        self._reader = reader
        self.prefill = PrefillMeter()
        """To be told of the engine's steps: what computing beats is not waited for."""
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        # Rung once for each thread that is to look for work; no Python runs in it.
        self._bell: SimpleQueue[None] = SimpleQueue()
        # Whether the first band of full attention has a block, and by whom that is told.
        self._watch: tuple[Attached | None, Watch] = (None, _sees_nothing)
        # Appended to without the lock, which is for who takes from them.
        self._asked: deque[Ticket] = deque()
        self._returned: deque[Held] = deque()
        self._foreseen: deque[Want] = deque(maxlen=MAX_FORESEEN)
        self._answers = 0
        self._seen_answers = 0
        self._closing = False
        self.news = False
        """Something was submitted or released since the last `wake`."""
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

    def peek(self, wanted: Wanted) -> int | None:
        """How far the prompt's front is held, as far as can be seen without asking, and
        not counting windows and states; None where that takes a call. Microseconds, for
        the engine's thread."""
        attached = self._link.current
        if attached is None:
            return None
        return full_position(self._bands, wanted, wanted.limit, self._look(attached))

    def holds(self, key: bytes) -> bool | None:
        """Whether full attention's first band has a block, as far as can be seen without
        asking; None where that takes a call. For the engine's thread."""
        attached = self._link.current
        if attached is None:
            return None
        whose, watch = self._watch
        if whose is not attached:
            watch = attached.client.watch(_layout_ids(attached, self._bands, self._bands.full[0]))
            self._watch = attached, watch
        return watch(key)

    def lacks(self, band: Band, key: bytes) -> bool:
        """Whether it can be seen without asking that a block of any band is not there. For the
        engine's thread; `holds` is quicker."""
        attached = self._link.current
        return attached is not None and self._look(attached)(band, (key,)) == 0

    def submit(self, want: Want) -> Ticket:
        """Ask, at the next `wake`, for leases on all that is needed to resume as late as
        possible."""
        ticket = Ticket(want, time.monotonic())
        self._asked.append(ticket)
        self.news = True
        return ticket

    def foresee(self, want: Want) -> None:
        """Have it brought up into the server's memory, from the next `wake` on, as far as
        there is time and room."""
        self._foreseen.append(want)
        self.news = True

    def cancel(self, ticket: Ticket) -> Held | None:
        """The answer is no longer wanted; a lease that it brings is given back, as is what
        it has brought already, which is returned."""
        with self._lock:
            held, ticket.held = ticket.held, None
            ticket.state = TicketState.CANCELLED
        if held is not None:
            self.release(held)
        return held

    def release(self, held: Held) -> None:
        """Give leases back, at the next `wake`."""
        if held.lease_ids and not held.attached.dropped:
            # Else they have ended with their session.
            self._returned.append(held)
            self.news = True

    def wake(self) -> None:
        """See to what was submitted and released. Waking a thread costs the engine's more
        than all the rest, so it is done once for many."""
        self.news = False
        self._bell.put(None)

    def wait_answer(self, timeout_s: float) -> None:
        """Return once an answer has come since the last call, or after `timeout_s`."""
        with self._news:
            self._news.wait_for(lambda: self._answers != self._seen_answers, timeout_s)
            self._seen_answers = self._answers

    def close(self, timeout_s: float = 1.0) -> None:
        """Leases still out end with the session."""
        self._closing = True
        for _ in self._threads:
            self._bell.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing:
            # Before the lock is taken, which the engine's thread may have to wait for.
            for ticket in list(self._asked):
                if ticket.wanted is None and ticket.state is WAITING:
                    self._find_out(ticket)
            with self._lock:
                tickets = self._take_asked()
                returned = [] if tickets else self._take_returned()
                foreseen = None
                if not tickets and not returned and self._foreseen:
                    foreseen = self._foreseen.popleft()
                more = self._has_work()
            if not tickets and not returned and foreseen is None:
                if not more:
                    self._bell.get()
                continue
            if more:
                self._bell.put(None)
            answered = False
            try:
                if tickets:
                    self._acquire(tickets)
                elif foreseen is not None:
                    self._prefetch(foreseen())
                else:
                    self._release(returned)
                answered = True
            finally:
                if not answered:
                    self._answer(tickets)

    def _find_out(self, ticket: Ticket) -> None:
        """What is wanted; where that cannot be told, the others are not to wait for it."""
        try:
            ticket.wanted = ticket.want()
        finally:
            if ticket.wanted is None:
                self._answer([ticket])

    def _has_work(self) -> bool:
        return bool(self._asked or self._returned or self._foreseen)

    def _count_error(self) -> None:
        with self._lock:
            self.errors += 1

    def _take_asked(self) -> list[Ticket]:
        """The most urgent that wait, as many as one call may ask for."""
        waiting: list[tuple[Ticket, Wanted]] = []
        left: list[Ticket] = []
        while self._asked:
            ticket = self._asked.popleft()
            if ticket.state is not WAITING:
                continue
            if ticket.wanted is None:
                # It has come this moment.
                left.append(ticket)
            else:
                waiting.append((ticket, ticket.wanted))
        kind = max((_kind(wanted) for _, wanted in waiting), default=0)
        budget = MAX_KEYS
        tickets: list[Ticket] = []
        for ticket, wanted in waiting:
            keys = len(self._link.specs) * max(map(len, wanted.keys.values()))
            if _kind(wanted) != kind or len(tickets) == MAX_CHAINS or (tickets and keys > budget):
                left.append(ticket)
                if _kind(wanted) == kind:
                    # What came after it is not asked for before it.
                    budget = -1
                continue
            budget -= keys
            ticket.state = SENT
            ticket.sent_s = time.monotonic()
            tickets.append(ticket)
        self._asked.extendleft(reversed(left))
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
                self._answer(tickets)
                return
            asks = [
                self._ask(attached, ticket, ticket.wanted, ticket.wanted.limit)
                for ticket in tickets
                if ticket.wanted is not None
            ]
            for _ in range(_TRIES):
                if not asks or not self._call(attached, asks):
                    break
                asks = [again for ask in asks if (again := self._take_up(attached, ask))]
            self._answer([ask.ticket for ask in asks])

    def _ask(self, attached: Attached, ticket: Ticket, wanted: Wanted, limit: int) -> _Ask:
        """What to ask for, to resume at the longest position up to `limit`."""
        position, full = self._position(attached, wanted, limit)
        columns = partial(_layout_ids, attached, self._bands)
        made = queries(self._bands, wanted, position, columns, MAX_KEYS)
        return _Ask(ticket, wanted, position, full, made)

    def _position(self, attached: Attached, wanted: Wanted, limit: int) -> tuple[int, int]:
        """Up to `limit`, how far to ask for, and how far full attention is held, as far as
        can be seen."""
        if self._bands.partial:
            look = self._look(attached)
            seen = full_position(self._bands, wanted, limit, look)
            if seen is not None:
                return longest_position(self._bands, wanted, seen, look), seen
        return limit, limit

    def _prefetch(self, wanted: Wanted) -> None:
        """Ask for what is held and not in the server's memory; where all of it is, nothing
        is asked."""
        with self._link.borrow() as attached:
            if attached is None:
                return
            columns = partial(_layout_ids, attached, self._bands)
            position, _ = self._position(attached, wanted, wanted.limit)
            chains: list[ChainQuery] = []
            for query in queries(self._bands, wanted, position, columns, MAX_KEYS):
                chain = query.chain
                seen = attached.client.peek(chain.layout_ids, chain.keys)
                if seen is not None and seen.in_dram < seen.held:
                    chains.append(chain._replace(keys=chain.keys[: seen.held]))
            try:
                for batch in _batches(chains):
                    attached.client.prefetch_many(batch, within_ms=FORESEEN_MS)
            except KVStoreError as error:
                self._count_error()
                if is_loss(error):
                    self._link.failed(attached, error)

    def _look(self, attached: Attached) -> Callable[[Band, Sequence[bytes]], int | None]:
        def look(band: Band, keys: Sequence[bytes]) -> int | None:
            seen = attached.client.peek(_layout_ids(attached, self._bands, band), keys)
            return None if seen is None else seen.held

        return look

    def _call(self, attached: Attached, asks: list[_Ask]) -> bool:
        """Get grants for all asks, with as few calls as the server allows. False when
        that did not work; nothing is leased then."""
        chains = [query.chain for ask in asks for query in ask.queries]
        grants: list[LeaseGrant] = []
        try:
            for batch in _batches(chains):
                grants += attached.client.acquire_many(
                    batch, self._wait_ms, self._hints(asks), reader=self._reader
                )
        except KVStoreError as error:
            self._count_error()
            self._let_go(attached, grants)
            if is_loss(error):
                self._link.failed(attached, error)
            return False
        if attached.client.epoch != attached.epoch:
            # Granted by a life of the server whose layouts nobody registered.
            return False
        granted = iter(grants)
        for ask in asks:
            ask.grants = [next(granted) for _ in ask.queries]
        return True

    def _hints(self, asks: list[_Ask]) -> Hints:
        """As urgent as the most urgent of them. The store weighs loading a chain against
        computing it, one by one. Where a prompt needs several, none of them is worth what it
        is weighed against."""
        weighed = self._weighs and len(self._bands.bands) == 1
        urgency = max(ask.wanted.urgency for ask in asks)
        return Hints(urgency, self.prefill.tokens_per_s if weighed else None)

    def _take_up(self, attached: Attached, ask: _Ask) -> _Ask | None:
        """Answer the ticket, unless another position is to be tried: then what to ask."""
        bands = self._bands
        held = held_of(
            bands,
            attached,
            ask.queries,
            ask.grants,
            floor=ask.wanted.floor,
            position=ask.position,
            full_tokens=ask.full_tokens,
        )
        whole = all(
            grant.held == len(query.chain.keys)
            for query, grant in zip(ask.queries, ask.grants, strict=True)
        )
        if whole or not bands.partial:
            held.rest = whole and self._has_rest(attached, ask.wanted)
            self._answer([ask.ticket], held)
            return None
        self._let_go(attached, ask.grants)
        # Where full attention is all there, it is a window or a state that is gone.
        short = held.tokens < ask.position
        limit = held.tokens - (0 if short else bands.alignment)
        again = self._ask(attached, ask.ticket, ask.wanted, limit)
        again.full_tokens = max(again.full_tokens, held.full_tokens)
        return again

    def _has_rest(self, attached: Attached, wanted: Wanted) -> bool:
        """Whether what is behind the loadable is there too, as far as can be seen."""
        if not wanted.rest:
            return True
        seen = self._look(attached)(self._bands.full[0], wanted.rest)
        return seen == len(wanted.rest)

    def _answer(self, tickets: list[Ticket], held: Held | None = None) -> None:
        """What came of tickets: `held`, which is of one of them, or nothing."""
        with self._news:
            for ticket in tickets:
                if ticket.state is TicketState.ANSWERED:
                    continue
                if ticket.state is TicketState.CANCELLED:
                    if held is not None and held.lease_ids:
                        self._returned.append(held)
                    continue
                ticket.held = held
                ticket.state = TicketState.FAILED if held is None else TicketState.ANSWERED
            self._answers += 1
            self._news.notify_all()

    def _release(self, returned: list[Held]) -> None:
        if not returned:
            return
        with self._link.borrow() as attached:
            if attached is not None and attached is returned[0].attached:
                self._end(attached, [lease for held in returned for lease in held.lease_ids])

    def _let_go(self, attached: Attached, grants: list[LeaseGrant]) -> None:
        self._end(attached, [grant.lease_id for grant in grants if grant.lease_id])

    def _end(self, attached: Attached, lease_ids: list[int]) -> None:
        if not lease_ids:
            return
        try:
            attached.client.release(lease_ids)
        except KVStoreError as error:
            self._count_error()
            if is_loss(error):
                self._link.failed(attached, error)


def _sees_nothing(key: bytes) -> bool | None:
    return None


def _kind(wanted: Wanted) -> int:
    """1 for what is more urgent than usual, 0, or -1."""
    urgency = wanted.urgency
    return (urgency > NO_HINTS.priority) - (urgency < NO_HINTS.priority)


def _layout_ids(attached: Attached, bands: Bands, band: Band) -> list[bytes]:
    """Of all shards of the band's first member, then of the next."""
    shards = len(attached.layouts) // len(bands.groups)
    return [
        layout.id
        for member in band.members
        for layout in attached.layouts[member * shards : (member + 1) * shards]
    ]


def _batches(chains: list[ChainQuery]) -> list[list[ChainQuery]]:
    """Chains in as few calls as the limits of the server allow, in order."""
    batches: list[list[ChainQuery]] = []
    room = 0
    for chain in chains:
        keys = len(chain.keys) * len(chain.layout_ids)
        if not batches or keys > room or len(batches[-1]) == MAX_CHAINS:
            batches.append([])
            room = MAX_KEYS
        batches[-1].append(chain)
        room -= keys
    return batches
