"""Engines that serve requests out of the tiers, in virtual time.

Requests wait in one line, in the order in which they come. As many as there are engines
are got ready ahead of them: the first in line acquires what is held of its prompt, waits
for what comes from NVMe, and copies it to a GPU. It is computed as soon as an engine is
free, in the order of getting ready; its first token is there when that is over. Then what
was computed is stored (`sim.saving`).
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush

from kvstore.core.catalog import Layout
from kvstore.core.sessions import Session
from kvstore.core.tickets import AcquireTicket
from kvstore.sim.events import Events
from kvstore.sim.machine import Machine
from kvstore.sim.replay import Result
from kvstore.sim.saving import Job, Saver
from kvstore.sim.shell import MS, Shell
from kvstore.sim.trace import Request, Trace
from kvstore.types import KEY_BYTES, ChainQuery, Hints, Reuse, Tier

METERED_TOKENS = 256
METERED = 15
"""Prompts of which so many tokens are computed say how fast an engine is; what is told is
the median of the latest so many."""


@dataclass(slots=True)
class Seen:
    """What was seen of a run. Times are milliseconds; `first_token_ms` is by priority."""

    found: Result = field(default_factory=Result)
    blocks_from: dict[Tier, int] = field(
        default_factory=lambda: dict.fromkeys((Tier.DRAM, Tier.NVME), 0)
    )
    """As the server counts them: what was in DRAM when it was asked for, up to the first
    block that was not, and what else was leased."""
    first_token_ms: dict[int, list[float]] = field(default_factory=dict)
    waited_ms: float = 0.0
    loaded_ms: float = 0.0
    computed_ms: float = 0.0


@dataclass(eq=False, slots=True)
class _Prompt:
    """`held`: blocks leased, from its begin on."""

    request: Request
    keys: list[bytes]
    reuse: Reuse
    came_ns: int
    admitted_ns: int = 0
    loaded_ns: int = 0
    begun_ns: int = 0
    held: int = 0
    lease_id: int = 0


class Serving:
    def __init__(
        self,
        shell: Shell,
        events: Events,
        trace: Trace,
        machine: Machine,
        layout: Layout,
        session: Session,
        *,
        hints: bool,
    ) -> None:
        """`hints`: it is told which session a request is of, and what that does next."""
        self.seen = Seen()
        self._shell = shell
        self._planner = shell.planner
        self._events = events
        self._machine = machine
        self._layout = layout
        self._session = session
        self._hints = hints
        self._block_tokens = trace.block_tokens
        self._keys = [number.to_bytes(KEY_BYTES, "big") for number in range(trace.blocks)]
        self._copy_ns = layout.block_bytes / machine.dram_bytes_per_s * 1e9
        self._line: deque[_Prompt] = deque()
        self._ahead = 0
        self._ready: deque[_Prompt] = deque()
        self._idle = list(range(machine.engines))
        self._savers = [Saver(shell, events, layout, session, self._copy_ns) for _ in self._idle]
        self._speeds: deque[float] = deque(maxlen=METERED)
        self._tokens_per_s = 0.0

    @property
    def unstored_blocks(self) -> int:
        return sum(saver.unstored_blocks for saver in self._savers)

    def arrive(self, number: int, request: Request) -> None:
        keys: list[bytes] = []
        for first, stop in request.pieces:
            keys += self._keys[first:stop]
        session = b""
        if self._hints and request.session is not None:
            session = b"%d" % request.session
        reuse = Reuse(request.priority, (), session, request.category, b"%d" % number)
        self._line.append(_Prompt(request, keys, reuse, self._events.now_ns))
        self._admit()

    # Getting ready

    def _admit(self) -> None:
        while self._line and self._ahead < self._machine.engines:
            self._ahead += 1
            prompt = self._line.popleft()
            now_ns = prompt.admitted_ns = self._events.now_ns
            timeout_ms = self._machine.acquire_timeout_ms
            ticket = self._planner.acquire(
                self._session,
                [ChainQuery([self._layout.layout_id], prompt.keys, prompt.reuse)],
                wait=True,
                now_ns=now_ns,
                deadline_ns=now_ns + timeout_ms * MS,
                hints=Hints(prompt.request.priority, self._tokens_per_s),
            )
            self._shell.wait(ticket, timeout_ms, partial(self._load, prompt, ticket))

    def _load(self, prompt: _Prompt, ticket: AcquireTicket) -> None:
        assert ticket.answer is not None
        (grant,) = ticket.answer
        prompt.held, prompt.lease_id = grant.held, grant.lease_id
        self.seen.blocks_from[Tier.DRAM] += grant.from_dram
        self.seen.blocks_from[Tier.NVME] += grant.held - grant.from_dram
        self.seen.found.count(
            prompt.request,
            len(prompt.keys),
            grant.held + self._held_behind(prompt),
            grant.held,
            self._block_tokens,
            self._machine.prefill,
        )
        at_ns = self._events.now_ns + int(grant.held * self._copy_ns)
        self._events.at(at_ns, partial(self._get_ready, prompt))

    def _held_behind(self, prompt: _Prompt) -> int:
        """Blocks that are held behind what was leased: after a hole, or refused."""
        get, name = self._planner.catalog.get, self._layout.name
        behind = (get(name(key)) for key in prompt.keys[prompt.held :])
        return sum(block is not None and block.readable for block in behind)

    def _get_ready(self, prompt: _Prompt) -> None:
        if prompt.lease_id:
            self._planner.release(self._session, [prompt.lease_id])
            self._shell.execute()
        prompt.loaded_ns = self._events.now_ns
        self._ready.append(prompt)
        self._compute()

    # Computing

    def _compute(self) -> None:
        while self._ready and self._idle:
            prompt, engine = self._ready.popleft(), heappop(self._idle)
            prompt.begun_ns = self._events.now_ns
            tokens = prompt.request.tokens
            # The last token's answer has to be computed, whatever is held.
            had = min(prompt.held * self._block_tokens, max(0, tokens - 1))
            cost = self._machine.prefill
            end_ns = prompt.begun_ns + int((cost.ms(tokens) - cost.ms(had)) * MS)
            self._events.at(end_ns, partial(self._answer, prompt, engine, tokens - had))
            self._ahead -= 1
            self._admit()

    def _answer(self, prompt: _Prompt, engine: int, computed: int) -> None:
        seen, now_ns = self.seen, self._events.now_ns
        loaded_ns = prompt.loaded_ns - prompt.admitted_ns
        computed_ns = now_ns - prompt.begun_ns
        all_ns = now_ns - prompt.came_ns
        seen.first_token_ms.setdefault(prompt.request.priority, []).append(all_ns / MS)
        seen.waited_ms += (all_ns - loaded_ns - computed_ns) / MS
        seen.loaded_ms += loaded_ns / MS
        seen.computed_ms += computed_ns / MS
        if computed >= METERED_TOKENS and computed_ns:
            self._speeds.append(computed / computed_ns * 1e9)
            self._tokens_per_s = statistics.median(self._speeds)
        heappush(self._idle, engine)
        then = partial(self._hint, prompt)
        self._savers[engine].submit(Job(prompt.keys, prompt.held, prompt.reuse, then))
        self._compute()

    def _hint(self, prompt: _Prompt) -> None:
        """Its session's caller says what comes next, once all is stored that ever is."""
        state = prompt.request.then
        if prompt.reuse.session and state is not None:
            expected_ms = prompt.request.expected_ms
            if expected_ms is not None:
                expected_ms = max(0.0, expected_ms - (self._events.now_ns - prompt.came_ns) / MS)
            self._planner.hint(self._session.tenant, prompt.reuse.session, state, expected_ms)
            self._shell.execute()
