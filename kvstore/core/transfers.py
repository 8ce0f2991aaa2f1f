"""Transfers between tiers: what may run on a link, in which order, and what is refused.

A link is a device with one queue for both its directions, since what is written to a
drive slows down what is read from it. What goes next is decided in three steps:

1. *Class.* Demand before prefetch before write-back before repair. But each class that
   has something to do is owed a minimum share of what the link moves, so that none
   starves; what it does not use it does not save up.
2. *Tenant.* Of those with something in that class, the one that was served least for
   its weight (`core.links.lanes`).
3. *Urgency.* What has to start first to be in time, priorities counting as time.

Blocks that go one after the other anyway go in a batch: one thread, one report. A batch is
small, so demand waits for no more than that; what is not demand leaves one place
free. Amounts are *work*: the nanoseconds that the link would nominally take, so that many
small blocks, few large ones, reads and writes can be compared (`core.links.learned`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from kvstore.core.actions import Copy
from kvstore.core.links.breaker import Breaker, BreakerState
from kvstore.core.links.inflow import Inflow
from kvstore.core.links.lanes import Lanes
from kvstore.core.links.learned import WINDOW, LinkCost, Prediction
from kvstore.core.links.pulse import Pulse
from kvstore.types import Refusal, Tier

BATCH_BYTES = 2 << 20
BATCH_BLOCKS = 64
"""What runs as one, at most; a block is never divided."""
MOST_QUEUED = 1 << 16
"""Transfers of one class."""
POINT_NS = 20_000_000
"""What a point of priority is worth in time. Of two demands, one that is 50 points above
the other goes first unless the other should have started a second earlier."""
PATIENCE_NS = 1_000_000_000
"""For who does not say by when."""
MOST_OWED = 2
"""So many batches a class can be owed at most."""
MOST_INFLOW = 0.9
"""Of the link's time, as far as is believed."""
BROKEN = 2.5
"""A link so many times slower than predicted is not the one that was learned."""


class TransferClass(enum.IntEnum):
    """What a transfer is for, most urgent first."""

    DEMAND = 0
    PREFETCH = 1
    WRITE_BACK = 2
    REPAIR = 3

    @property
    def label(self) -> str:
        return self.name.lower()


MINIMUM: Mapping[TransferClass, float] = {
    TransferClass.PREFETCH: 0.01,
    TransferClass.WRITE_BACK: 0.03,
    TransferClass.REPAIR: 0.01,
}
"""Shares of a link that a class gets whatever is more urgent."""


class Wish(NamedTuple):
    """How urgent something is. `deadline_ns`: by when it should have ended, absolute."""

    transfer_class: TransferClass
    asked_ns: int = 0
    priority: int = 50
    deadline_ns: int | None = None

    @property
    def due_ns(self) -> int:
        """What orders wishes of one class: the time left, and priorities as time."""
        deadline = self.deadline_ns
        if deadline is None:
            deadline = self.asked_ns + PATIENCE_NS
        return deadline - self.priority * POINT_NS

    def joined(self, other: Wish) -> Wish:
        """As urgent as the more urgent of both."""
        if self.transfer_class != other.transfer_class:
            return min(self, other, key=lambda wish: wish.transfer_class)
        return min(self, other, key=lambda wish: wish.due_ns)


class Drag(NamedTuple):
    """What a batch takes, nanoseconds, to be compared with what it took before: at worst, as
    slow as what runs shows the link to be, and at best, as slow as what has ended does."""

    worst: float
    best: float


@dataclass(eq=False, slots=True)
class Transfer:
    """One block's way into tier `into`. `target` names it: one transfer a target.
    `copy` is the caller's."""

    target: Hashable
    nbytes: int
    into: Tier
    tenant: str
    wish: Wish
    copy: Copy | None = None
    work_ns: int = 0
    version: int = 0
    """Entries of a queue for an older one are void."""
    batch: Batch | None = None

    @property
    def transfer_class(self) -> TransferClass:
        return self.wish.transfer_class


@dataclass(eq=False, slots=True)
class Batch:
    """Transfers of one class, tenant and direction, to be made one after the other."""

    transfers: list[Transfer]
    work_ns: int
    began_ns: int
    said_ns: float
    """How long it was predicted to take."""
    going: int
    """Transfers that have not ended."""
    well: bool = True
    beside: int = 1
    """Batches that ran at the same time, it among them."""

    @property
    def transfer_class(self) -> TransferClass:
        return self.transfers[0].transfer_class


class Link:
    """One link's queue. Not thread-safe."""

    def __init__(
        self,
        depth: int,
        costs: Mapping[Tier, LinkCost],
        weight: Callable[[str], float] = lambda tenant: 1.0,
        minimum: Mapping[TransferClass, float] = MINIMUM,
    ) -> None:
        """`depth`: batches at a time. `costs`: by the tier that a transfer goes into.
        `weight`: a tenant's share, for what it is to those of others."""
        self.costs = costs
        self.breaker = Breaker()
        self.inflow = Inflow(lambda: {transfer.tenant for transfer in self._transfers.values()})
        """Demand that comes."""
        self.done_ns = 0
        """Work that has gone through since the start."""
        self._depth = depth
        self._pulse = Pulse()
        self._background = max(1, depth - 1)
        self._minimum = minimum
        self._transfers: dict[Hashable, Transfer] = {}
        self._running: list[Batch] = []
        self._lanes = {c: Lanes(weight) for c in TransferClass}
        self._owed = dict.fromkeys(TransferClass, 0.0)
        # Since when the link has had more to do than it could, and what went through.
        self._busy_since_ns: int | None = None
        self._passed: dict[Tier, int] = {}
        self._ends = 0

    def __len__(self) -> int:
        return len(self._transfers)

    def __iter__(self) -> Iterator[Transfer]:
        """All that are queued or running."""
        return iter(list(self._transfers.values()))

    def depth(self, transfer_class: TransferClass) -> int:
        """Transfers of a class that are queued or running."""
        running = sum(b.going for b in self._running if b.transfer_class is transfer_class)
        return self._lanes[transfer_class].queued + running

    # Asking

    def refusal(self, transfer_class: TransferClass) -> Refusal | None:
        """Why no transfer of a class can be taken in now, if so."""
        if self.breaker.state is BreakerState.OPEN:
            return Refusal.STALLED
        return Refusal.FULL if self._lanes[transfer_class].queued >= MOST_QUEUED else None

    def push(self, transfer: Transfer) -> None:
        """Queue a transfer whose target has none. To be asked for with `refusal` before."""
        assert transfer.target not in self._transfers
        transfer.work_ns = self.costs[transfer.into].nominal.work_ns(transfer.nbytes)
        self._transfers[transfer.target] = transfer
        if transfer.transfer_class is TransferClass.DEMAND:
            self._note_inflow(transfer)
        self._lanes[transfer.transfer_class].add(transfer)

    def _note_inflow(self, transfer: Transfer) -> None:
        wish = transfer.wish
        self.inflow.note(transfer.tenant, wish.priority, transfer.work_ns, wish.asked_ns)

    def hurry(self, target: Hashable, wish: Wish) -> None:
        """Another wants it too: until it starts it is as urgent as the most urgent of them
        wants it."""
        known = self._transfers.get(target)
        if known is None or known.batch is not None:
            return
        joined = known.wish.joined(wish)
        if joined is not known.wish:
            self._dequeue(known)
            was_demand = known.transfer_class is TransferClass.DEMAND
            known.wish = joined
            if not was_demand and known.transfer_class is TransferClass.DEMAND:
                self._note_inflow(known)
            self._lanes[known.transfer_class].add(known)

    def cancel(self, target: Hashable) -> Transfer | None:
        """Take a transfer out that has not started; None when it has, or is not there."""
        transfer = self._transfers.get(target)
        if transfer is None or transfer.batch is not None:
            return None
        self._dequeue(transfer)
        del self._transfers[target]
        return transfer

    def queued(self, transfer_class: TransferClass) -> list[Transfer]:
        """What has not started."""
        return self._lanes[transfer_class].transfers()

    def ready(
        self, into: Tier, tenant: str, priority: int, now_ns: int, work_ns: int
    ) -> Prediction:
        """How long until demand of so much work, asked for now, would have gone through.
        Costs nothing to ask, however much is queued."""
        ahead_ns = self.ahead(tenant, priority, now_ns, work_ns)
        return self.through(into, ahead_ns, work_ns, now_ns)

    def through(self, into: Tier, ahead_ns: int, work_ns: int, now_ns: int) -> Prediction:
        """How long until `ahead_ns` have gone through, the last `work_ns` of it into a tier,
        as slowly as the link is now."""
        said, slowness = self.said(into, ahead_ns, work_ns), self.slowness(now_ns)
        return Prediction(slowness * said.ns, slowness * said.error_ns)

    def said(self, into: Tier, ahead_ns: int, work_ns: int) -> Prediction:
        """As `through`, as slowly as the link mostly is."""
        cost = self.costs[into]
        if ahead_ns <= sum(batch.work_ns for batch in self._running):
            # Nothing of it has still to begin.
            return cost.passing(ahead_ns)
        last_ns = min(work_ns, self._batch_work())
        wait, last = cost.passing(max(0, ahead_ns - last_ns)), cost.turnaround(last_ns)
        return Prediction(wait.ns + last.ns, wait.error_ns + last.error_ns)

    def drag(self, now_ns: int) -> Drag:
        """How slow it is at this moment."""
        work_ns, cost = self._batch_work(), self.costs[Tier.DRAM]
        passing, turnaround = cost.passing(work_ns), cost.turnaround(work_ns)
        said_ns = passing.ns + turnaround.ns
        error_ns = passing.error_ns + turnaround.error_ns
        return Drag(
            self.slowness(now_ns) * (said_ns + error_ns),
            self.steady * max(said_ns / 2, said_ns - error_ns),
        )

    @property
    def pace(self) -> float:
        """Nanoseconds that a nanosecond of work mostly takes to go through."""
        return self.costs[Tier.DRAM].passing(1_000_000).ns / 1e6

    def slowness(self, now_ns: int) -> float:
        """By what factor it takes longer at this moment than was learned; 1.0: it does not."""
        return self._pulse.slowness(self._running_ns(), now_ns) if self._running else 1.0

    def slow_ns(self, times: float) -> float:
        """When `slowness` will be as much or more, if nothing ends until then."""
        return self._pulse.slow_ns(times, self._running_ns()) if self._running else inf

    @property
    def steady(self) -> float:
        """By what factor what has ended lately was slower than was learned."""
        return self._pulse.steady if self._running else 1.0

    @property
    def due_ns(self) -> float:
        """When all that runs should have ended, as slowly as what ended lately."""
        return self._pulse.due_ns(self._running_ns()) if self._running else inf

    def _running_ns(self) -> float:
        """What there was to do for what runs when the latest of it began."""
        passing = sum(self._passing_ns(batch) for batch in self._running)
        return passing + max(batch.said_ns for batch in self._running)

    def _passing_ns(self, batch: Batch) -> float:
        return self.costs[batch.transfers[0].into].passing(batch.work_ns).ns

    def ahead(self, tenant: str, priority: int, now_ns: int, work_ns: int) -> int:
        """Work that will have gone through once demand of so much, asked for now, has: with
        what is more important and is still to come, where that goes on as it came lately."""
        ahead_ns = self.queued_ahead(tenant, priority, work_ns)
        return int(ahead_ns + self.to_come(tenant, priority, now_ns, ahead_ns))

    def queued_ahead(self, tenant: str, priority: int, work_ns: int) -> float:
        """As `ahead`, of what is here."""
        queued_ns = self._lanes[TransferClass.DEMAND].ahead(tenant, priority, work_ns)
        owed = sum(share for c, share in self._minimum.items() if self._lanes[c].queued)
        running_ns = sum(batch.work_ns for batch in self._running)
        return (running_ns + queued_ns + work_ns) / (1 - owed)

    def to_come(
        self, tenant: str, priority: int, now_ns: int, ahead_ns: float, waited_ns: int = 0
    ) -> float:
        """Work of a tenant that is more important and comes in time to go before what has
        waited for `waited_ns`, while `ahead_ns` go through."""
        above = self.inflow.above(tenant, priority, now_ns)
        if not above:
            return 0.0
        free = 1 - min(MOST_INFLOW, self.pace * sum(rate for _, rate in above))
        wait_ns = self.pace * ahead_ns / free
        return sum(
            rate * max(0.0, min(wait_ns, points * POINT_NS - waited_ns)) for points, rate in above
        )

    def queued_bytes(self, transfer_class: TransferClass) -> int:
        return self._lanes[transfer_class].queued_bytes

    # Running

    def start(self, now_ns: int) -> list[Batch]:
        """What is to begin now."""
        begun: list[Batch] = []
        was_idle = not self._running
        while len(self._running) < self._places():
            batch = self._next(now_ns)
            if batch is None:
                break
            self._running.append(batch)
            begun.append(batch)
        if begun:
            if was_idle:
                self._pulse.begin(now_ns)
            for batch in self._running:
                batch.beside = max(batch.beside, len(self._running))
        if any(lanes.queued for lanes in self._lanes.values()):
            if self._busy_since_ns is None:
                self._busy_since_ns = now_ns
        else:
            self._busy_since_ns = None
            self._passed.clear()
            self._ends = 0
        return begun

    def _free_places(self, transfer_class: TransferClass) -> int:
        """One of the places is demand's alone."""
        free = self._places() - len(self._running)
        if transfer_class is TransferClass.DEMAND:
            return free
        demand = sum(b.transfer_class is TransferClass.DEMAND for b in self._running)
        return min(free, self._background - len(self._running) + demand)

    def _places(self) -> int:
        state = self.breaker.state
        if state is BreakerState.OPEN:
            return 0
        return 1 if state is BreakerState.TRYING else self._depth

    def ended(self, target: Hashable, now_ns: int, *, well: bool) -> Transfer:
        """A transfer that was started has ended."""
        transfer = self._transfers.pop(target)
        batch = transfer.batch
        assert batch is not None
        transfer.batch = None  # So that both are freed at once.
        self.done_ns += transfer.work_ns
        batch.going -= 1
        batch.well &= well
        if not batch.going:
            self._running.remove(batch)
            if batch.well:
                self._note(batch, now_ns)
        return transfer

    def _note(self, batch: Batch, now_ns: int) -> None:
        self.breaker.answered(batch.began_ns)
        into = batch.transfers[0].into
        taken_ns = now_ns - batch.began_ns
        self._pulse.ended(self._passing_ns(batch), now_ns)
        if self.slowness(now_ns) >= BROKEN:
            self.costs[into].fade()
            self._pulse.begin(now_ns)
        full = self._busy_since_ns is None and batch.beside >= self._depth
        self.costs[into].note(
            batch.work_ns, taken_ns, batch.said_ns, now_ns, batch.beside, full=full
        )
        if self._busy_since_ns is None:
            return
        self._passed[into] = self._passed.get(into, 0) + batch.work_ns
        self._ends += 1
        if self._ends >= WINDOW:
            taken_ns, passed = now_ns - self._busy_since_ns, sum(self._passed.values())
            for into in self._passed:
                self.costs[into].note_pace(passed, taken_ns)
            self._busy_since_ns = now_ns
            self._passed.clear()
            self._ends = 0

    # Order

    def _dequeue(self, transfer: Transfer) -> None:
        lanes = self._lanes[transfer.transfer_class]
        lanes.remove(transfer)
        if not lanes.queued:
            self._owed[transfer.transfer_class] = 0.0

    def _next(self, now_ns: int) -> Batch | None:
        transfer_class = self._next_class()
        if transfer_class is None:
            return None
        transfers = self._lanes[transfer_class].take(
            self._free_places(transfer_class), BATCH_BLOCKS, BATCH_BYTES
        )
        work_ns = sum(transfer.work_ns for transfer in transfers)
        self._account(transfer_class, work_ns)
        said = self.costs[transfers[0].into].turnaround(work_ns)
        batch = Batch(transfers, work_ns, now_ns, said.ns, len(transfers))
        for transfer in transfers:
            transfer.batch = batch
        return batch

    def _next_class(self) -> TransferClass | None:
        waiting = [c for c in TransferClass if self._lanes[c].queued and self._free_places(c) > 0]
        if not waiting:
            return None
        owed = max(waiting, key=self._owed.__getitem__)
        return owed if self._owed[owed] >= self._batch_work() else waiting[0]

    def _batch_work(self) -> int:
        return self.costs[Tier.DRAM].nominal.work_ns(BATCH_BYTES)

    def _account(self, served: TransferClass, work_ns: int) -> None:
        """What each class with something to do is owed, and what is paid."""
        most = MOST_OWED * self._batch_work()
        for each, share in self._minimum.items():
            if self._lanes[each].queued or each is served:
                self._owed[each] = min(most, self._owed[each] + share * work_ns)
            else:
                self._owed[each] = 0.0
        if served in self._minimum:
            left = self._owed[served] - work_ns
            ahead_of_others = any(self._lanes[c].queued for c in TransferClass if c < served)
            # Where nobody waits that is more urgent, more than is owed is nobody's loss.
            self._owed[served] = left if ahead_of_others else max(min(0.0, left + work_ns), left)
