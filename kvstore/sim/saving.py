"""What an engine has computed is stored, as vLLM's connector does it: a prompt after the
other and a piece after the other, each with slots reserved, the copy, and a commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvstore.core.catalog import Layout
from kvstore.core.sessions import Session
from kvstore.core.tickets import ReserveTicket
from kvstore.sim.events import Events
from kvstore.sim.shell import Shell
from kvstore.types import ChainQuery, Reuse, Segment

RESERVE_WAIT_MS = 100
MOST_QUEUED_BYTES = 2 << 30
"""A prompt that comes while more would wait is not stored."""
PIECE_BYTES = 32 << 20
LEAST_PIECE, MOST_PIECE = 16, 1024
"""Blocks. A trace's are often larger than an engine's, of which a piece has some sixteen."""


@dataclass(eq=False, slots=True)
class Job:
    """Blocks of a prompt from `begin` on. `then` is called when no more of them come."""

    keys: list[bytes]
    begin: int
    reuse: Reuse
    then: Callable[[], None]


class Saver:
    """One engine's. Nothing here waits for it."""

    def __init__(
        self, shell: Shell, events: Events, layout: Layout, session: Session, copy_ns: float
    ) -> None:
        """`copy_ns`: of a block."""
        self.unstored_blocks = 0
        """No slot was there in time, or too much was waiting."""
        self._shell = shell
        self._planner = shell.planner
        self._events = events
        self._layout = layout
        self._session = session
        self._copy_ns = copy_ns
        self._piece = min(MOST_PIECE, max(LEAST_PIECE, PIECE_BYTES // layout.block_bytes))
        self._jobs: deque[Job] = deque()
        self._queued_blocks = 0

    def submit(self, job: Job) -> None:
        blocks = len(job.keys) - job.begin
        most = MOST_QUEUED_BYTES // self._layout.block_bytes
        if self._queued_blocks and self._queued_blocks + blocks > most:
            self.unstored_blocks += blocks
            job.then()
            return
        self._queued_blocks += blocks
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._go_on()

    def _go_on(self) -> None:
        """With the next piece that is not there yet."""
        while self._jobs:
            job = self._jobs[0]
            keys = job.keys[job.begin : job.begin + self._piece]
            if not keys:
                self._jobs.popleft()
                job.then()
                continue
            self._queued_blocks -= len(keys)
            chain = ChainQuery([self._layout.layout_id], keys)
            held = self._planner.lookup(self._session.tenant, chain).held
            job.begin += held
            if held < len(keys):
                self._reserve(job, keys[held:])
                return

    def _reserve(self, job: Job, keys: list[bytes]) -> None:
        ticket = self._planner.reserve(
            self._session,
            self._layout.layout_id,
            len(keys),
            wait=True,
            now_ns=self._events.now_ns,
        )
        self._shell.wait(ticket, RESERVE_WAIT_MS, partial(self._fill, job, keys, ticket))

    def _fill(self, job: Job, keys: list[bytes], ticket: ReserveTicket) -> None:
        assert ticket.answer is not None
        first, count = ticket.answer.first_slot, len(ticket.answer.addresses)
        at_ns = self._events.now_ns + int(count * self._copy_ns)
        self._events.at(at_ns, partial(self._commit, job, keys, range(first, first + count)))

    def _commit(self, job: Job, keys: list[bytes], slots: range) -> None:
        count = len(slots)
        if count:
            parent = job.keys[job.begin - 1] if job.begin else b""
            segment = Segment(parent, keys[:count], slots, [0] * count, job.reuse)
            self._planner.commit(
                self._session,
                self._layout.layout_id,
                [segment],
                reserve=0,
                now_ns=self._events.now_ns,
            )
            self._shell.execute()
        self.unstored_blocks += len(keys) - count
        job.begin += len(keys)
        self._go_on()
