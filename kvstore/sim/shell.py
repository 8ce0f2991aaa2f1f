"""Carries out what the planner wants, in virtual time and without a byte: what
`kvstore.store` does for the server.

A batch of copies on the drive begins once its blocks' latencies are over and what was
begun before it has gone through, and takes its bytes' time. All else takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvstore.core.actions import Answer, Copy, Forget, Move
from kvstore.core.catalog import Replica
from kvstore.core.planner import Planner
from kvstore.core.tickets import AcquireTicket, Ticket
from kvstore.sim.events import Events
from kvstore.sim.machine import Machine, nvme_slot_bytes
from kvstore.types import Tier

TICK_NS = 100_000_000
"""How often the server's housekeeping comes round."""
IDLE_TICKS = 12
"""Ticks after the last thing that happened, in which the planner may still think of
something to do: it lets NVMe alone for a second where that had no room."""
MS = 1_000_000


class Drive:
    def __init__(self, machine: Machine) -> None:
        self._costs_ns = {
            Tier.DRAM: (machine.read_latency_s * 1e9, 1e9 / machine.read_bytes_per_s),
            Tier.NVME: (machine.write_latency_s * 1e9, 1e9 / machine.write_bytes_per_s),
        }
        self._free_ns = 0.0

    def begin(self, copies: list[Copy], now_ns: int) -> int:
        """When they have ended."""
        latency_ns, ns_a_byte = self._costs_ns[copies[0].target.tier]
        nbytes = sum(nvme_slot_bytes(c.target.block.layout.block_bytes) for c in copies)
        begin_ns = max(self._free_ns, now_ns + latency_ns * len(copies))
        self._free_ns = begin_ns + nbytes * ns_a_byte
        return int(self._free_ns) + 1


class Shell:
    def __init__(self, planner: Planner, events: Events, drive: Drive) -> None:
        self.planner = planner
        self.moved_bytes = dict.fromkeys(Tier, 0)
        """Into each tier, of those that came from the other."""
        self._events = events
        self._drive = drive
        self._waiting: dict[Ticket, Callable[[], None]] = {}
        self._to_forget: list[Replica] = []
        self._ticks_left = 0
        self._ticking = False

    def execute(self) -> None:
        """To be called after every event of the planner's."""
        self._carry_out()
        self._ticks_left = IDLE_TICKS
        self._keep_ticking()

    def _carry_out(self) -> bool:
        """Whether there was anything to be done."""
        planner, events = self.planner, self._events
        any_done = False
        while (actions := planner.take_actions(events.now_ns)) or planner.chores:
            any_done = True
            for action in actions:
                if isinstance(action, Move):
                    self._begin(action.copies)
                elif isinstance(action, Forget):
                    self._forget(action.replica)
                elif isinstance(action, Answer):
                    self._answered(action.ticket)
            if not actions:
                planner.chores.go_on()
        return any_done

    def _begin(self, copies: list[Copy]) -> None:
        self._events.at(
            self._drive.begin(copies, self._events.now_ns), partial(self._ended, copies)
        )

    def _ended(self, copies: list[Copy]) -> None:
        for copy in copies:
            self.moved_bytes[copy.target.tier] += copy.target.block.layout.block_bytes
            self.planner.transfer_done(copy, self._events.now_ns)
        self.execute()

    def _forget(self, replica: Replica) -> None:
        self._to_forget.append(replica)
        if len(self._to_forget) == 1:
            self._events.at(self._events.now_ns, self._forgotten)

    def _forgotten(self) -> None:
        replicas, self._to_forget = self._to_forget, []
        for replica in replicas:
            self.planner.forgotten(replica)
        self.execute()

    # Waiting

    def wait(self, ticket: Ticket, timeout_ms: int, then: Callable[[], None]) -> None:
        """`then`, once the ticket is answered: now if it is, when time is up at the latest."""
        self.execute()
        if ticket.answer is not None:
            then()
            return
        self._waiting[ticket] = then
        self._watch(ticket, self._events.now_ns + timeout_ms * MS)

    def _watch(self, ticket: Ticket, end_ns: int) -> None:
        doubt_ns = ticket.doubt_ns if isinstance(ticket, AcquireTicket) else None
        if isinstance(ticket, AcquireTicket) and doubt_ns is not None and doubt_ns < end_ns:
            at_ns = max(doubt_ns, self._events.now_ns + MS)
            self._events.at(at_ns, partial(self._doubt, ticket, end_ns))
        else:
            self._events.at(end_ns, partial(self._give_up, ticket))

    def _doubt(self, ticket: AcquireTicket, end_ns: int) -> None:
        if ticket.answer is None:
            self.planner.doubt(ticket, self._events.now_ns)
            self.execute()
            self._watch(ticket, end_ns)

    def _give_up(self, ticket: Ticket) -> None:
        if ticket.answer is None:
            self.planner.give_up(ticket, self._events.now_ns)
            self.execute()
            self._answered(ticket)

    def _answered(self, ticket: Ticket) -> None:
        then = self._waiting.pop(ticket, None)
        if then is not None:
            self._events.at(self._events.now_ns, then)

    # Time

    def _keep_ticking(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._events.at((self._events.now_ns // TICK_NS + 1) * TICK_NS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self._ticks_left -= 1
        self.planner.tick(self._events.now_ns)
        if self._carry_out() or len(self.planner.residency.transfers) or self._waiting:
            self._ticks_left = IDLE_TICKS
        if self._ticks_left:
            self._keep_ticking()
