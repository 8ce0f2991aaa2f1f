"""Carries out what the planner wants, in virtual time and without a byte: what
`kvstore.store` does for the server.

Batches of copies take the drive's time (`sim.batches`). All else takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvstore.core.actions import Answer, Copy, Forget, Move
from kvstore.core.catalog import Replica
from kvstore.core.limits import Limits
from kvstore.core.planner import Planner
from kvstore.core.space import Space
from kvstore.core.tickets import Ticket
from kvstore.sim.batches import Batches
from kvstore.sim.events import Events
from kvstore.types import Tier

TICK_NS = 100_000_000
"""How often the server's housekeeping comes round."""
IDLE_TICKS = 12
"""Ticks after the last thing that happened, in which the planner may still think of
something to do: it lets NVMe alone for a second where that had no room."""
LEASE_MS = 30_000
MOST_HELD = 1 << 20
MS = 1_000_000


def planner(
    eviction: str,
    dram: Space,
    nvme: Space | None,
    *,
    slot_bytes: Callable[[int], int],
    batches: int,
    nvme_bytes_per_day: int = 0,
) -> Planner:
    """For one session, which is not held to how much it may ask for. `slot_bytes`: that a
    block occupies on the drive, which is what moves; `batches`: of copies at a time."""
    return Planner(
        Limits(
            lease_ms=LEASE_MS,
            reservation_ms=LEASE_MS,
            max_sessions=1,
            max_leases=MOST_HELD,
            max_reservations=MOST_HELD,
            max_layouts=1,
            max_running=batches,
        ),
        tenant_key=str.encode,
        eviction=eviction,
        dram=dram,
        nvme=nvme,
        nvme_slot_bytes=None if nvme is None else slot_bytes,
        nvme_bytes_per_day=nvme_bytes_per_day,
    )


class Shell:
    def __init__(self, planner: Planner, events: Events, drive: Batches) -> None:
        self.planner = planner
        self.moved_bytes = dict.fromkeys(Tier, 0)
        """Into each tier, of those that came from the other."""
        self._events = events
        self._drive = drive
        self._waiting: dict[Ticket, Callable[[], None]] = {}
        self._to_forget: list[Replica] = []
        self._ticks_left = 0
        self._ticking = False
        self._looks_ns: int | None = None

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
        self._look_in_time()
        return any_done

    def _look_in_time(self) -> None:
        looks_ns = self.planner.looks_ns()
        if looks_ns is not None and (self._looks_ns is None or looks_ns < self._looks_ns):
            self._looks_ns = looks_ns
            self._events.at(max(looks_ns, self._events.now_ns), partial(self._look, looks_ns))

    def _look(self, looks_ns: int) -> None:
        if self._looks_ns == looks_ns:
            self._looks_ns = None
            self._carry_out()

    def _begin(self, copies: list[Copy]) -> None:
        slots = [copy.target.block.layout.nvme_class for copy in copies]
        nbytes = sum(slot.slot_bytes for slot in slots if slot is not None)
        into = copies[0].target.tier
        self._drive.begin(into, len(copies), nbytes, partial(self._ended, copies))

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

    def wait(self, ticket: Ticket, timeout_ms: int | None, then: Callable[[], None]) -> None:
        """`then`, once the ticket is answered: now if it is, when time is up at the latest.
        None: as long as it takes."""
        self.execute()
        if ticket.answer is not None:
            then()
            return
        self._waiting[ticket] = then
        if timeout_ms is not None:
            end_ns = self._events.now_ns + timeout_ms * MS
            self._events.at(end_ns, partial(self._give_up, ticket))

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
        else:
            self._rest()

    def _rest(self) -> None:
        """Ticks would change nothing until something happens, or what is foreseen is due.
        The latter may be hours later, so nobody waits for it."""
        due_ns = self.planner.prefetches.next_ns()
        if due_ns is not None:
            tick_ns = -(-max(due_ns, self._events.now_ns) // TICK_NS) * TICK_NS
            self._events.at(tick_ns, lambda: None, awaited=False)
        self._events.rest(self._wake)

    def _wake(self) -> None:
        """As after the tick that would have been the latest."""
        self.planner.tick(self._events.now_ns // TICK_NS * TICK_NS)
        self.execute()
