"""An engine that serves sessions from the store: a queue, places, prefill and decoding.

It has no cache of its own, so every request loads what is held of its prompt. While it
waits for a place its prompt is prefetched, and once it is answered the store is told what
its session does, as far as a `Mode` has it so.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvstore.core.sessions import Session
from kvstore.core.tickets import AcquireTicket, ReserveTicket
from kvstore.types import ChainQuery, Reuse, Segment, SessionState
from kvstore_benchmarks.prefetch.sessions import Asked
from kvstore_benchmarks.prefetch.stack import Stack

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
        self, stack: Stack, session: Session, layout_id: bytes, block_bytes: int,
        block_tokens: int, mode: Mode, seed: int,
    ) -> None:  # fmt: skip
        self.seen = Seen()
        self._stack = stack
        self._session = session
        self._layout_id = layout_id
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._mode = mode
        self._rng = random.Random(seed)
        self._free = PLACES
        self._queue: deque[tuple[Asked, int]] = deque()

    def serve(self, requests: Sequence[Asked]) -> None:
        for number, request in enumerate(requests):
            self._stack.at(int(request.at_s * 1e9), partial(self._come, request, number))
        self._stack.run()

    def _come(self, request: Asked, number: int) -> None:
        if self._free:
            self._begin(request, number)
            return
        self._queue.append((request, number))
        if self._mode.queued and request.keys:
            self._stack.planner.prefetch(
                self._session.tenant, [self._chain(request, number)],
                within_ns=QUEUED_MS * 1_000_000, now_ns=self._stack.now_ns(), session=self._session,
            )  # fmt: skip

    def _chain(self, request: Asked, number: int) -> ChainQuery:
        return ChainQuery([self._layout_id], request.keys, _reuse(request, number))

    def _begin(self, request: Asked, number: int) -> None:
        self._free -= 1
        now_ns = self._stack.now_ns()
        ticket = self._stack.planner.acquire(
            self._session, [self._chain(request, number)], wait=True, now_ns=now_ns
        )
        self._stack.answered(ticket, partial(self._loaded, request, number, ticket, now_ns))

    def _loaded(self, request: Asked, number: int, ticket: AcquireTicket, asked_ns: int) -> None:
        assert ticket.answer is not None
        [grant] = ticket.answer
        stack, seen = self._stack, self.seen
        held = grant.held
        seen.load_s.append((stack.now_ns() - asked_ns) / 1e9)
        seen.waited_s.append(asked_ns / 1e9 - request.at_s)
        seen.blocks += len(request.keys)
        seen.held += held
        seen.from_dram += grant.from_dram
        copying_s = held * self._block_bytes / COPY_BYTES_PER_S
        prefill_s = (request.tokens - held * self._block_tokens) / PREFILL_TOKENS_PER_S
        decoding_s = request.output_tokens / DECODE_TOKENS_PER_S
        if grant.lease_id:
            stack.later(copying_s, partial(self._release, grant.lease_id))
        stack.later(copying_s + prefill_s, partial(self._computed, request, number, held))
        stack.later(copying_s + prefill_s + decoding_s, partial(self._ended, request))

    def _release(self, lease_id: int) -> None:
        self._stack.planner.release(self._session, [lease_id])

    def _computed(self, request: Asked, number: int, held: int) -> None:
        self.seen.first_token_s.append(self._stack.now_ns() / 1e9 - request.at_s)
        if held < len(request.keys):
            ticket = self._stack.planner.reserve(
                self._session, self._layout_id, len(request.keys) - held,
                wait=True, now_ns=self._stack.now_ns(),
            )  # fmt: skip
            self._stack.answered(ticket, partial(self._store, request, number, held, ticket))

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
        self._stack.planner.commit(
            self._session, self._layout_id, [segment], reserve=0, now_ns=self._stack.now_ns()
        )

    def _ended(self, request: Asked) -> None:
        self._say(request)
        self._free += 1
        if self._queue:
            self._begin(*self._queue.popleft())

    def _say(self, request: Asked) -> None:
        mode, stack = self._mode, self._stack
        if not mode.states:
            return
        state, away_s = request.then, None
        if request.back_s is None:
            state = SessionState.ENDED
        else:
            away_s = request.back_s - stack.now_ns() / 1e9
        off = mode.tools_off if state is SessionState.WAITING else mode.people_off
        expected_ms = None
        if away_s is not None and off is not None:
            expected_ms = max(1.0, away_s * 1e3 * math.exp(self._rng.gauss(0, off)))
        if away_s is None or away_s > 0:
            stack.planner.hint(self._session.tenant, _name(request), state, expected_ms)


def _reuse(request: Asked, number: int) -> Reuse:
    return Reuse(session=_name(request), request=number.to_bytes(8, "little"))


def _name(request: Asked) -> bytes:
    return b"session %d" % request.session
