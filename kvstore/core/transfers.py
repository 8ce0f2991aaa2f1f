"""Transfers between tiers: what may run on a link, in which order, and what is refused.

A link is a device with one queue for both its directions, since what is written to a
drive slows down what is read from it. What goes next is decided in three steps:

1. *Class.* Demand before prefetch before write-back before repair. But each class that
   has something to do is owed a minimum share of what the link moves, so that none
   starves; what it does not use it does not save up.
2. *Tenant.* Of those with something in that class, the one that was served least for
   its weight (start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996). Who was idle
   has no claim on the past: others have borrowed its share, and owe nothing.
3. *Urgency.* What has to start first to be in time, priorities counting as time.

Blocks that go one after the other anyway go in a batch: one thread, one report. A batch is
small, so demand waits for no more than that; what is not demand leaves half the places
free. Amounts are *work*: the nanoseconds that the link would nominally take, so that many
small blocks, few large ones, reads and writes can be compared (`core.learned`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import exp
from typing import NamedTuple

from kvstore.core.actions import Copy
from kvstore.core.breaker import Breaker, BreakerState
from kvstore.core.learned import WINDOW, LinkCost, Prediction
from kvstore.core.pulse import Pulse
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
INFLOW_NS = 5_000_000_000
"""How much of what is more important comes is seen over about so long."""
MOST_TENANTS = 1024
"""Whose inflow is known."""
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


@dataclass(eq=False, slots=True)
class _Lane:
    """One tenant's transfers of one class, by urgency."""

    heap: list[tuple[int, int, int, Transfer]] = field(default_factory=list)
    served: float = 0.0
    """Work for its weight, counted from where it joined the others."""
    queued: int = 0
    work: dict[int, int] = field(default_factory=dict)
    """What is queued, by priority."""


class _Inflow:
    """Work that comes, lately."""

    __slots__ = ("_at_ns", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at_ns = 0

    def note(self, work_ns: int, now_ns: int) -> None:
        self._sum = self._at(now_ns) + work_ns
        self._at_ns = max(self._at_ns, now_ns)

    def rate(self, now_ns: int) -> float:
        """Nanoseconds of work a nanosecond."""
        return self._at(now_ns) / INFLOW_NS

    def _at(self, now_ns: int) -> float:
        return self._sum * exp(min(0, self._at_ns - now_ns) / INFLOW_NS)


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
        self.done_ns = 0
        """Work that has gone through since the start."""
        self._depth = depth
        self._pulse = Pulse()
        self._background = max(1, depth // 2)
        self._weight = weight
        self._minimum = minimum
        self._transfers: dict[Hashable, Transfer] = {}
        self._running: list[Batch] = []
        self._lanes: dict[TransferClass, dict[str, _Lane]] = {c: {} for c in TransferClass}
        self._queued = dict.fromkeys(TransferClass, 0)
        self._queued_bytes = dict.fromkeys(TransferClass, 0)
        self._clock = dict.fromkeys(TransferClass, 0.0)
        self._owed = dict.fromkeys(TransferClass, 0.0)
        self._sequence = 0
        # Demand that comes, by tenant and priority.
        self._inflow: dict[str, dict[int, _Inflow]] = {}
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
        return self._queued[transfer_class] + running

    def oldest_ns(self) -> int | None:
        """When the oldest of what runs began."""
        return min((batch.began_ns for batch in self._running), default=None)

    # Asking

    def refusal(self, transfer_class: TransferClass) -> Refusal | None:
        """Why no transfer of a class can be taken in now, if so."""
        if self.breaker.state is BreakerState.OPEN:
            return Refusal.STALLED
        return Refusal.FULL if self._queued[transfer_class] >= MOST_QUEUED else None

    def push(self, transfer: Transfer) -> None:
        """Queue a transfer whose target has none. To be asked for with `refusal` before."""
        assert transfer.target not in self._transfers
        transfer.work_ns = self.costs[transfer.into].nominal.work_ns(transfer.nbytes)
        self._transfers[transfer.target] = transfer
        if transfer.transfer_class is TransferClass.DEMAND:
            self._note_inflow(transfer)
        self._enqueue(transfer)

    def _note_inflow(self, transfer: Transfer) -> None:
        known = self._inflow.get(transfer.tenant)
        if known is None:
            if len(self._inflow) >= MOST_TENANTS:
                del self._inflow[next(iter(self._inflow))]
            known = self._inflow[transfer.tenant] = {}
        wish = transfer.wish
        known.setdefault(wish.priority, _Inflow()).note(transfer.work_ns, wish.asked_ns)

    def hurry(self, target: Hashable, wish: Wish) -> None:
        """Another wants it too: until it starts it is as urgent as the most urgent of them
        wants it."""
        known = self._transfers.get(target)
        if known is None or known.batch is not None:
            return
        joined = known.wish.joined(wish)
        if joined is not known.wish:
            self._dequeue(known)
            known.wish = joined
            self._enqueue(known)

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
        return [
            entry[3]
            for lane in self._lanes[transfer_class].values()
            for entry in lane.heap
            if entry[2] == entry[3].version
        ]

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
        last_ns = min(work_ns, self._batch_work())
        cost = self.costs[into]
        wait, last = cost.passing(max(0, ahead_ns - last_ns)), cost.turnaround(last_ns)
        slowness = self.slowness(now_ns)
        return Prediction(
            slowness * (wait.ns + last.ns), slowness * (wait.error_ns + last.error_ns)
        )

    def slowness(self, now_ns: int) -> float:
        """By what factor it takes longer at this moment than was learned; 1.0: it does not."""
        if not self._running:
            return 1.0
        passing = sum(self._passing_ns(batch) for batch in self._running)
        return self._pulse.slowness(passing + max(b.said_ns for b in self._running), now_ns)

    def _passing_ns(self, batch: Batch) -> float:
        return self.costs[batch.transfers[0].into].passing(batch.work_ns).ns

    def ahead(self, tenant: str, priority: int, now_ns: int, work_ns: int) -> int:
        """Work that will have gone through once demand of so much, asked for now, has: with
        what is more important and is still to come, where that goes on as it came lately."""
        lanes = self._lanes[TransferClass.DEMAND]
        own = lanes.get(tenant)
        mine = sum(w for p, w in own.work.items() if p >= priority) if own is not None else 0
        # Others get their shares meanwhile, and no more than they ask for.
        others = [(name, lane) for name, lane in lanes.items() if name != tenant and lane.queued]
        fair = (mine + work_ns) / self._weight(tenant)
        theirs = sum(
            min(sum(lane.work.values()), fair * self._weight(name)) for name, lane in others
        )
        owed = sum(share for c, share in self._minimum.items() if self._queued[c])
        running = sum(batch.work_ns for batch in self._running)
        ahead_ns = (running + mine + theirs + work_ns) / (1 - owed)
        return int(ahead_ns + self._to_come(tenant, priority, now_ns, ahead_ns))

    def _to_come(self, tenant: str, priority: int, now_ns: int, ahead_ns: float) -> float:
        """Work of a tenant that is more important and comes in time to go first, while
        `ahead_ns` go through."""
        above = {
            p: inflow.rate(now_ns)
            for p, inflow in self._inflow.get(tenant, {}).items()
            if p > priority
        }
        if not above:
            return 0.0
        passing_ns = self.costs[Tier.DRAM].passing(1_000_000).ns / 1e6
        free = 1 - min(MOST_INFLOW, passing_ns * sum(above.values()))
        wait_ns = passing_ns * ahead_ns / free
        return sum(rate * min(wait_ns, (p - priority) * POINT_NS) for p, rate in above.items())

    def queued_bytes(self, transfer_class: TransferClass) -> int:
        return self._queued_bytes[transfer_class]

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
        if any(self._queued.values()):
            if self._busy_since_ns is None:
                self._busy_since_ns = now_ns
        else:
            self._busy_since_ns = None
            self._passed.clear()
            self._ends = 0
        return begun

    def _free_places(self, transfer_class: TransferClass) -> int:
        """Half of the places are demand's alone."""
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
        self.breaker.answered(batch.began_ns, now_ns)
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

    def _enqueue(self, transfer: Transfer) -> None:
        lanes = self._lanes[transfer.transfer_class]
        lane = lanes.get(transfer.tenant)
        if lane is None:
            lane = lanes[transfer.tenant] = _Lane()
        if not lane.queued:
            lane.served = max(lane.served, self._clock[transfer.transfer_class])
        due_ns = transfer.wish.due_ns - transfer.work_ns
        self._sequence += 1
        transfer.version += 1
        heappush(lane.heap, (due_ns, self._sequence, transfer.version, transfer))
        lane.queued += 1
        priority = transfer.wish.priority
        lane.work[priority] = lane.work.get(priority, 0) + transfer.work_ns
        self._queued[transfer.transfer_class] += 1
        self._queued_bytes[transfer.transfer_class] += transfer.nbytes

    def _dequeue(self, transfer: Transfer) -> None:
        """Take it out; its entry in the heap is void from here on."""
        transfer.version += 1
        lane = self._lanes[transfer.transfer_class][transfer.tenant]
        self._left(lane, transfer)
        if not lane.queued:
            lane.heap.clear()
        elif len(lane.heap) > 2 * lane.queued + 16:
            lane.heap = [entry for entry in lane.heap if entry[2] == entry[3].version]
            heapify(lane.heap)
        if not self._queued[transfer.transfer_class]:
            self._owed[transfer.transfer_class] = 0.0

    def _left(self, lane: _Lane, transfer: Transfer) -> None:
        lane.queued -= 1
        left = lane.work[transfer.wish.priority] - transfer.work_ns
        if left:
            lane.work[transfer.wish.priority] = left
        else:
            del lane.work[transfer.wish.priority]
        self._queued[transfer.transfer_class] -= 1
        self._queued_bytes[transfer.transfer_class] -= transfer.nbytes

    def _next(self, now_ns: int) -> Batch | None:
        transfer_class = self._next_class()
        if transfer_class is None:
            return None
        lanes = self._lanes[transfer_class]
        tenant, lane = min(
            ((name, lane) for name, lane in lanes.items() if lane.queued),
            key=lambda pair: pair[1].served,
        )
        transfers = self._take(lane, -(-lane.queued // self._free_places(transfer_class)))
        work_ns = sum(transfer.work_ns for transfer in transfers)
        self._clock[transfer_class] = lane.served
        lane.served += work_ns / self._weight(tenant)
        if not lane.queued:
            lane.heap.clear()
            # What it was served counts for as long as others are behind.
            if len(lanes) == 1:
                del lanes[tenant]
        self._account(transfer_class, work_ns)
        said = self.costs[transfers[0].into].turnaround(work_ns)
        batch = Batch(transfers, work_ns, now_ns, said.ns, len(transfers))
        for transfer in transfers:
            transfer.batch = batch
        return batch

    def _take(self, lane: _Lane, most: int) -> list[Transfer]:
        """The most urgent, and what fits into a batch with it: no more than its part of
        what waits, so that every place gets some."""
        taken: list[Transfer] = []
        nbytes = 0
        while lane.queued and len(taken) < min(most, BATCH_BLOCKS):
            _, _, version, transfer = lane.heap[0]
            if version == transfer.version:
                nbytes += transfer.nbytes
                if taken and (nbytes > BATCH_BYTES or transfer.into is not taken[0].into):
                    break
                self._left(lane, transfer)
                taken.append(transfer)
            heappop(lane.heap)
        return taken

    def _next_class(self) -> TransferClass | None:
        waiting = [c for c in TransferClass if self._queued[c] and self._free_places(c) > 0]
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
            if self._queued[each] or each is served:
                self._owed[each] = min(most, self._owed[each] + share * work_ns)
            else:
                self._owed[each] = 0.0
        if served in self._minimum:
            left = self._owed[served] - work_ns
            ahead_of_others = any(self._queued[c] for c in TransferClass if c < served)
            # Where nobody waits that is more urgent, more than is owed is nobody's loss.
            self._owed[served] = left if ahead_of_others else max(min(0.0, left + work_ns), left)
