"""The planner in virtual time, with a calculated drive behind it and no bytes at all."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

from kvstore.core.actions import Answer, Forget, Move
from kvstore.core.planner import Planner
from kvstore.core.tickets import Ticket
from kvstore.core.transfers import Batch, Transfer, TransferClass, Wish
from kvstore.types import Tier
from kvstore_benchmarks.transfers.devices import Modelled

TICK_NS = 100_000_000
MOST_AT_ONCE = 1 << 62


class Stack:
    """Runs what is to be done at given times until nothing is left of it."""

    def __init__(self, planner: Planner, drive: Modelled) -> None:
        self.planner = planner
        self._drive = drive
        self._coming: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._waiting: dict[Ticket, Callable[[], None]] = {}
        self.moved = {Tier.DRAM: 0, Tier.NVME: 0}
        """Bytes into each tier."""
        self.busy_ns = 0
        """While the drive had something to do."""
        self._running = 0

    def now_ns(self) -> int:
        return self._drive.now_ns()

    def at(self, at_ns: int, what: Callable[[], None]) -> None:
        heappush(self._coming, (at_ns, next(self._order), what))

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now_ns() + int(seconds * 1e9), what)

    def answered(self, ticket: Ticket, what: Callable[[], None]) -> None:
        """Have something done once a ticket has its answer."""
        self.execute()
        if ticket.answer is not None:
            what()
        else:
            self._waiting[ticket] = what

    def run(self) -> None:
        ticks_ns = self.now_ns()
        while self._coming or self._waiting:
            next_ns = min(self._coming[0][0] if self._coming else MOST_AT_ONCE, ticks_ns)
            before_ns = self.now_ns()
            ended = self._drive.wait(next_ns)
            self.busy_ns += (self.now_ns() - before_ns) if self._running else 0
            for batch, at_ns in ended:
                self._running -= 1
                for transfer in batch.transfers:
                    assert transfer.copy is not None
                    self.moved[transfer.into] += transfer.nbytes
                    self.planner.transfer_done(transfer.copy, at_ns)
            now_ns = self.now_ns()
            while self._coming and self._coming[0][0] <= now_ns:
                heappop(self._coming)[2]()
            if now_ns >= ticks_ns:
                ticks_ns = now_ns + TICK_NS
                self.planner.tick(now_ns)
            self.execute()

    def execute(self) -> None:
        """Carry out what the planner wants by now."""
        planner = self.planner
        while True:
            actions = planner.take_actions(self.now_ns())
            for action in actions:
                if isinstance(action, Move):
                    self._begin(action)
                elif isinstance(action, Forget):
                    planner.forgotten(action.replica)
                elif isinstance(action, Answer) and action.ticket in self._waiting:
                    self.later(0, self._waiting.pop(action.ticket))
            if planner.chores:
                planner.chores.go_on()
            elif not actions:
                return

    def _begin(self, move: Move) -> None:
        wish = Wish(TransferClass.DEMAND)
        transfers = []
        for copy in move.copies:
            target, nbytes = copy.target, copy.target.block.layout.block_bytes
            transfers.append(Transfer(target, nbytes, target.tier, "", wish, copy))
        self._running += 1
        self._drive.begin(Batch(transfers, 1, self.now_ns(), 0.0, len(transfers)))
