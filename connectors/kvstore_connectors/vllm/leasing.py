"""The way from a prompt to leases on its blocks, a step of the scheduler at a time.

    first look --> ticket (asked) --> held (leased) --> loading --> done
                     |                  |                 |
                     `-- too late       `-- not needed    `-- load failed
                         or nothing

Every way ends in `done`, with the lease given back. A preemption starts the way anew,
because the request is computed anew. Until an answer has come the request is skipped
(None), which costs the engine nothing while it has other work.

A new prompt, of which the store has nothing, is the usual case: a look at the store's
directory ends its way at once.

A request that vLLM has not come to in the step after it came waits behind others. What lies
behind the server's memory of its prompt is then prefetched.

A prompt that another vLLM is storing (`handover`) is offered whole, without a lease, as
soon as the first of it has come: the workers follow. Where windows or states are needed
too, or a load that fails would fail the request, it is leased like any other when all has
come.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from kvstore_connectors.vllm.acquire import SENT, WAITING, AcquireQueue, Ticket
from kvstore_connectors.vllm.groups import Bands
from kvstore_connectors.vllm.handover import ASK_EVERY_S, LOOK_EVERY_S
from kvstore_connectors.vllm.held import Held
from kvstore_connectors.vllm.hints import reuse_of, urgency_of
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.orders import StoreOrders
from kvstore_connectors.vllm.positions import Wanted
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.tracked import Tracked, keys_of

ANSWER_GRACE_S = 0.25
"""How much later than asked an answer may come before the server counts as hung."""

MIN_LEASE_LEFT_NS = 2_000_000_000
MAX_OUTSTANDING = 256
"""Requests with a ticket or an unused lease: bounds what waiting requests pin."""


class Leasing:
    """Called on the scheduler's thread only. What is found out of the store's content is
    told to `orders`.

    What most requests pass through is written out in few functions: after a step of the engine
    the first call of each costs microseconds.
    """

    def __init__(
        self,
        link: StoreLink,
        queue: AcquireQueue,
        bands: Bands,
        orders: StoreOrders,
        stats: ConnectorStats,
        patience_s: float,
        follows: bool,
    ) -> None:
        """`patience_s`: how long an answer may take. `follows`: whether a prompt may be
        offered of which not all has come."""
        self._link = link
        self._queue = queue
        self._bands = bands
        self._learned = [(band, band.rule.is_full) for band in bands.bands]
        self._block_sizes = {band.block_tokens for band in bands.bands}
        self._orders = orders
        self._stats = stats
        self._patience_s = patience_s
        # What fails of a load can be told block by block only where there is one group.
        self._can_follow = follows and len(bands.groups) == 1 and not bands.partial
        self._first_size = bands.full[0].block_tokens if bands.full else 0
        # How many hashes make a key there.
        self._first_hashes = self._first_size // bands.hash_tokens
        self.outstanding = 0
        """Requests with a ticket or an unused lease."""

    def match(self, tracked: Tracked, computed: int) -> int | None:
        """How many tokens beyond `computed` to load; None to ask again in a later step."""
        if tracked.preemptions != tracked.request.num_preemptions:
            self._restart(tracked)
        if tracked.done:
            return 0
        if computed >= tracked.loadable:
            return self.end(tracked)
        held = tracked.held
        if held is None:
            ticket = tracked.ticket
            if ticket is None:
                if tracked.coming is None and self._is_missed(tracked, computed):
                    tracked.done = True
                    return 0
                if self._ask(tracked, computed):
                    assert tracked.coming is not None
                    tracked.local_tokens = computed
                    return tracked.coming.tokens - computed
                return 0 if tracked.done else None
            if ticket.state is SENT or ticket.state is WAITING:
                now_s = time.monotonic()
                if now_s - ticket.asked_s <= self._patience_s and self._link.current is not None:
                    return None
                return self._give_up(tracked, ticket, now_s)
            held = self._take_answer(tracked, ticket)
            if held is None:
                return 0 if tracked.done else None
        left_ns = held.expires_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if held.attached.dropped or left_ns <= MIN_LEASE_LEFT_NS or computed < held.floor:
            # It waited too long in the queue to be safe, or vLLM has lost since what the
            # lease begins after. It may ask again.
            self._drop_lease(tracked)
            return None
        if held.tokens <= computed:
            return self.end(tracked)
        tracked.local_tokens = computed
        return held.tokens - computed

    def foresee(self, new: Sequence[Tracked]) -> None:
        """A step has been planned since these came: those that it did not come to will be
        asked about later."""
        for tracked in new:
            begun = tracked.done or tracked.ticket is not None or tracked.held is not None
            if not begun and tracked.coming is None and self._link.up:
                self._queue.foresee(partial(self._wanted, tracked, 0))

    def take(self, tracked: Tracked) -> Held | None:
        """What was offered is being loaded: its lease, which is the caller's to give back,
        or None for a prompt that is followed."""
        held, tracked.held = tracked.held, None
        tracked.done, tracked.coming = True, None
        if held is not None:
            self.outstanding -= 1
            if tracked.local_tokens > held.floor:
                self._count_unneeded(held, tracked.local_tokens)
        return held

    def end(self, tracked: Tracked) -> int:
        """Whatever the store was asked for this request is not wanted any more. 0."""
        tracked.done, tracked.coming = True, None
        ticket, tracked.ticket = tracked.ticket, None
        if ticket is not None:
            self.outstanding -= 1
            came = self._queue.cancel(ticket)
            if came is not None:
                self._count_unneeded(came, came.tokens)
        self._drop_lease(tracked)
        return 0

    def _restart(self, tracked: Tracked) -> None:
        self.end(tracked)
        tracked.preemptions = tracked.request.num_preemptions
        tracked.done = False

    def _drop_lease(self, tracked: Tracked) -> None:
        held, tracked.held = tracked.held, None
        if held is not None:
            self.outstanding -= 1
            self._count_unneeded(held, held.tokens)
            self._queue.release(held)

    def _count_unneeded(self, held: Held, tokens: int) -> None:
        """Of what was handed out, the part up to there."""
        if tokens > held.floor:
            # Where windows or states are missing the answer may be a position before it.
            self._stats.add(unneeded_blocks=(tokens - held.floor) // self._bands.alignment)

    def _ask(self, tracked: Tracked, computed: int) -> bool:
        """Whether to follow what is coming, instead of asking for leases."""
        if self._link.current is None:
            self._stats.add(detached=1)
            self.end(tracked)
            return False
        if self.outstanding >= MAX_OUTSTANDING:
            return False
        coming = tracked.coming
        if coming is not None:
            if time.monotonic() < coming.next_look_s:
                return False
            seen = self._queue.peek(self._wanted(tracked, computed))
            if seen is not None:
                if self._can_follow and computed < min(seen, coming.tokens):
                    coming.tokens = max(coming.tokens, seen)
                    return True
                if self._more_is_coming(tracked, seen, LOOK_EVERY_S):
                    return False
                if seen <= computed:
                    self.end(tracked)
                    return False
        tracked.ticket = self._queue.submit(partial(self._wanted, tracked, computed))
        self.outstanding += 1
        return False

    def _is_missed(self, tracked: Tracked, computed: int) -> bool:
        """The block that a load would begin with is not there, as far as can be seen. This
        is what every new prompt pays, out of cold caches: each call counts."""
        hashes = self._first_hashes
        if not hashes:
            return False
        of_blocks = tracked.request.block_hashes if tracked.adapter is None else tracked.hashes()
        key = of_blocks[(computed // self._first_size + 1) * hashes - 1]
        if self._queue.holds(key) is not False:
            return False
        counted, asked = self._stats.data, tracked.loadable // self._bands.alignment
        counted["asked_blocks"] = counted.get("asked_blocks", 0) + asked
        for known in self._orders.known:
            if key in known.young or key in known.old:
                # Evicted since we stored it, and who knows what else of the prompt.
                self._forget(self._wanted(tracked, computed))
                break
        return True

    def _forget(self, wanted: Wanted) -> None:
        """Nothing is known of this prompt. Blocks that are being stored now are forgotten
        too, which costs one question when they come up again."""
        for band in self._bands.bands:
            for member in band.members:
                self._orders.known[member].discard(wanted.keys[band.block_tokens])

    def _take_answer(self, tracked: Tracked, ticket: Ticket) -> Held | None:
        """What was granted, None where that is nothing yet, or nothing (`done`)."""
        tracked.ticket = None
        held = ticket.held
        if tracked.coming is not None:
            # Windows and states do not show in a look, and may come after all the rest.
            if self._more_is_coming(tracked, held.tokens if held else 0, ASK_EVERY_S):
                self.outstanding -= 1
                if held is not None:
                    self._count_unneeded(held, held.tokens)
                    self._queue.release(held)
                return None
            tracked.coming = None
        if held is not None:
            assert ticket.wanted is not None
            self._learn(ticket.wanted, held.full_tokens, held.tokens)
            tracked.junction = held.full_tokens
        if held is None or not held.tokens:
            self.outstanding -= 1
            tracked.done = True
            if held is not None:
                # It may hold blocks, but fewer than anything can begin after.
                self._queue.release(held)
            return None
        tracked.held = held
        return held

    def _give_up(self, tracked: Tracked, ticket: Ticket, now_s: float) -> int:
        """No answer has come in time, or there is nobody to answer. 0."""
        self._stats.add(acquire_timeouts=1)
        sent_s = ticket.sent_s
        self.end(tracked)
        if sent_s and now_s - sent_s > self._patience_s - ANSWER_GRACE_S / 2:
            # The server has seen the question, a moment after it was asked, and promised
            # an answer by now.
            self._link.suspect()
        return 0

    def _more_is_coming(self, tracked: Tracked, seen: int, pause_s: float) -> bool:
        """Whether to look or ask again in a later step."""
        coming = tracked.coming
        if coming is None:
            return False
        if coming.wait_on(seen, time.monotonic(), pause_s):
            return True
        if seen < coming.tokens:
            self._stats.add(handover_timeouts=1)
            tracked.coming = None
        return False

    def _wanted(self, tracked: Tracked, computed: int) -> Wanted:
        """In any thread."""
        limit, hash_tokens = tracked.loadable, self._bands.hash_tokens
        keys = {
            size: keys_of(tracked, hash_tokens, size, 0, limit // size)
            for size in self._block_sizes
        }
        size, rest = self._first_size, []
        if size:
            last = tracked.prompt_tokens // size
            rest = keys_of(tracked, hash_tokens, size, limit // size, last)
        request = tracked.request
        return Wanted(keys, limit, computed, reuse_of(request), urgency_of(request), rest)

    def _learn(self, wanted: Wanted, full_tokens: int, tokens: int) -> None:
        """The store holds full attention's blocks up to `full_tokens`, and what else is
        needed to resume at `tokens`."""
        counted, alignment = self._stats.data, self._bands.alignment
        asked, found = wanted.limit // alignment, tokens // alignment
        counted["asked_blocks"] = counted.get("asked_blocks", 0) + asked
        if found:
            counted["found_blocks"] = counted.get("found_blocks", 0) + found
        for band, is_full in self._learned:
            keys = wanted.keys[band.block_tokens]
            if is_full:
                first, last = 0, full_tokens // band.block_tokens
            else:
                first, last = band.span(tokens)
            for member in band.members:
                known = self._orders.known[member]
                young, old = known.young, known.old
                # What is known of full attention is a front of the prompt, mostly: so one key
                # tells. Windows and states lie anywhere, and something of those beyond is gone.
                if last < len(keys) and (not is_full or keys[last] in young or keys[last] in old):
                    # Evicted since we stored them. Those being stored now are forgotten
                    # too, which costs one question when they come up again.
                    known.discard(keys[last:])
                if first < last and not (keys[last - 1] in young or keys[last - 1] in old):
                    known.add(keys[first:last])
