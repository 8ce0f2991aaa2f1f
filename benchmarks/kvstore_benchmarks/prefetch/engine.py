"""An engine that serves sessions from the store: a queue, places, prefill and decoding.

It has no cache of its own, so every request loads what is held of its prompt. While it
waits for a place its prompt is prefetched, and once it is answered the store is told what
its session does, as far as a `Mode` has it so.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvstore.core.catalog import Layout
from kvstore.core.sessions import Session
from kvstore.core.tickets import AcquireTicket, ReserveTicket
from kvstore.sim.events import Events
from kvstore.sim.shell import MS, Shell
from kvstore.types import ChainQuery, Reuse, Segment, SessionState
from kvstore_benchmarks.prefetch.sessions import Asked

PREFILL_TOKENS_PER_S = 20_000.0
DECODE_TOKENS_PER_S = 60.0
COPY_BYTES_PER_S = 25e9
"""From DRAM to the engine."""
PLACES = 16
"""Requests that are computed at a time."""
QUEUED_MS = 60_000
"""For how long what is queued is worth bringing up."""


class Mode(NamedTuple):
    """What the store is told. `tools_off`, `people_off`: by what factor, as a standard
    deviation of its logarithm, the caller errs when it says in how long a session is back that
    waits for a tool or a person; None: it does not say. `states`: whether it says that it
    waits at all."""

    queued: bool = False
    states: bool = False
    tools_off: float | None = None
    people_off: float | None = None


@dataclass(slots=True)
class Seen:
    """A value for each request: seconds until what is held was in DRAM, and from asking to
    the first token. Blocks by where they were found."""

    load_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    blocks: int = 0
    held: int = 0
    from_dram: int = 0
    denied: int = 0


class Engine:
    def __init__(
        self, shell: Shell, events: Events, session: Session, layout: Layout, mode: Mode, seed: int,
    ) -> None:  # fmt: skip
        self.seen = Seen()
        self._shell = shell
        self._planner = shell.planner
        self._events = events
        self._began_ns = events.now_ns
        self._session = session
        self._layout = layout
        self._mode = mode
        self._rng = random.Random(seed)
        self._free = PLACES
        self._queue: deque[tuple[Asked, int]] = deque()

    def serve(self, requests: Sequence[Asked]) -> None:
        for number, request in enumerate(requests):
            at_ns = self._began_ns + int(request.at_s * 1e9)
            self._events.at(at_ns, partial(self._come, request, number))
        self._events.run()

    @property
    def _now_s(self) -> float:
        return (self._events.now_ns - self._began_ns) / 1e9

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._events.at(self._events.now_ns + int(seconds * 1e9), call)

    def _come(self, request: Asked, number: int) -> None:
        if self._free:
            self._begin(request, number)
            return
        self._queue.append((request, number))
        if self._mode.queued and request.keys:
            self._planner.prefetch(
                self._session.tenant, [self._chain(request, number)],
                within_ns=QUEUED_MS * MS, now_ns=self._events.now_ns, session=self._session,
            )  # fmt: skip
            self._shell.execute()

    def _chain(self, request: Asked, number: int) -> ChainQuery:
        return ChainQuery([self._layout.layout_id], request.keys, _reuse(request, number))

    def _begin(self, request: Asked, number: int) -> None:
        self._free -= 1
        ticket = self._planner.acquire(
            self._session, [self._chain(request, number)], wait=True, now_ns=self._events.now_ns
        )
        loaded = partial(self._loaded, request, number, ticket, self._now_s)
        self._shell.wait(ticket, None, loaded)

    def _loaded(self, request: Asked, number: int, ticket: AcquireTicket, asked_s: float) -> None:
        assert ticket.answer is not None
        [grant] = ticket.answer
        seen, held = self.seen, grant.held
        seen.load_s.append(self._now_s - asked_s)
        seen.waited_s.append(asked_s - request.at_s)
        seen.blocks += len(request.keys)
        seen.held += held
        seen.from_dram += grant.from_dram
        copying_s = held * self._layout.block_bytes / COPY_BYTES_PER_S
        prefill_s = (request.tokens - held * self._layout.spec.block_tokens) / PREFILL_TOKENS_PER_S
        decoding_s = request.output_tokens / DECODE_TOKENS_PER_S
        if grant.lease_id:
            self._later(copying_s, partial(self._release, grant.lease_id))
        self._later(copying_s + prefill_s, partial(self._computed, request, number, held))
        self._later(copying_s + prefill_s + decoding_s, partial(self._ended, request))

    def _release(self, lease_id: int) -> None:
        self._planner.release(self._session, [lease_id])
        self._shell.execute()

    def _computed(self, request: Asked, number: int, held: int) -> None:
        self.seen.first_token_s.append(self._now_s - request.at_s)
        if held < len(request.keys):
            ticket = self._planner.reserve(
                self._session, self._layout.layout_id, len(request.keys) - held,
                wait=True, now_ns=self._events.now_ns,
            )  # fmt: skip
            self._shell.wait(ticket, None, partial(self._store, request, number, held, ticket))

    def _store(self, request: Asked, number: int, held: int, ticket: ReserveTicket) -> None:
        assert ticket.answer is not None
        slots = len(ticket.answer.addresses)
        self.seen.denied += len(request.keys) - held - slots
        if not slots:
            return
        first = ticket.answer.first_slot
        parent = request.keys[held - 1] if held else b""
        segment = Segment(
            parent, request.keys[held : held + slots], list(range(first, first + slots)),
            [0] * slots, _reuse(request, number),
        )  # fmt: skip
        self._planner.commit(
            self._session, self._layout.layout_id, [segment], reserve=0, now_ns=self._events.now_ns
        )
        self._shell.execute()

    def _ended(self, request: Asked) -> None:
        self._say(request)
        self._free += 1
        if self._queue:
            self._begin(*self._queue.popleft())

    def _say(self, request: Asked) -> None:
        mode = self._mode
        if not mode.states:
            return
        state, away_s = request.then, None
        if request.back_s is None:
            state = SessionState.ENDED
        else:
            away_s = request.back_s - self._now_s
        off = mode.tools_off if state is SessionState.WAITING else mode.people_off
        expected_ms = None
        if away_s is not None and off is not None:
            expected_ms = max(1.0, away_s * 1e3 * math.exp(self._rng.gauss(0, off)))
        if away_s is None or away_s > 0:
            self._planner.hint(self._session.tenant, _name(request), state, expected_ms)
            self._shell.execute()


def _reuse(request: Asked, number: int) -> Reuse:
    return Reuse(session=_name(request), request=number.to_bytes(8, "little"))


def _name(request: Asked) -> bytes:
    return b"session %d" % request.session
