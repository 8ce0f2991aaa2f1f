"""Transfers of one class that wait: whose is next, and which of theirs.

Of those with something to do, the tenant goes first that was served least for its weight
(start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996). Who was idle has no claim on
the past: others have borrowed its share, and owe nothing. Of one tenant's, what has to
start first to be in time goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.core.transfers import Transfer


class Lane:
    """One tenant's, by urgency."""

    __slots__ = ("heap", "queued", "served", "work")

    def __init__(self, served: float) -> None:
        self.heap: list[tuple[int, int, int, Transfer]] = []
        self.served = served
        """Work for its weight, counted from where it joined the others."""
        self.queued = 0
        self.work: dict[int, int] = {}
        """What is queued, by priority."""


class Lanes:
    """All of a class."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self.queued = 0
        self.queued_bytes = 0
        self._weight = weight
        self._lanes: dict[str, Lane] = {}
        self._clock = 0.0
        self._sequence = 0

    def transfers(self) -> list[Transfer]:
        return [
            entry[3]
            for lane in self._lanes.values()
            for entry in lane.heap
            if entry[2] == entry[3].version
        ]

    def add(self, transfer: Transfer) -> None:
        lane = self._lanes.get(transfer.tenant)
        if lane is None:
            lane = self._lanes[transfer.tenant] = Lane(self._clock)
        elif not lane.queued:
            lane.served = max(lane.served, self._clock)
        due_ns = transfer.wish.due_ns - transfer.work_ns
        self._sequence += 1
        transfer.version += 1
        heappush(lane.heap, (due_ns, self._sequence, transfer.version, transfer))
        lane.queued += 1
        priority = transfer.wish.priority
        lane.work[priority] = lane.work.get(priority, 0) + transfer.work_ns
        self.queued += 1
        self.queued_bytes += transfer.nbytes

    def remove(self, transfer: Transfer) -> None:
        """Its entry in the heap is void from here on."""
        transfer.version += 1
        lane = self._lanes[transfer.tenant]
        self._left(lane, transfer)
        if not lane.queued:
            lane.heap.clear()
        elif len(lane.heap) > 2 * lane.queued + 16:
            lane.heap = [entry for entry in lane.heap if entry[2] == entry[3].version]
            heapify(lane.heap)

    def take(self, places: int, most_blocks: int, most_bytes: int) -> list[Transfer]:
        """The most urgent of whose turn it is, and what fits into a batch with it: no more
        than its part of what waits, so that each of `places` gets some."""
        tenant, lane = min(
            ((name, lane) for name, lane in self._lanes.items() if lane.queued),
            key=lambda pair: pair[1].served,
        )
        taken = self._take(lane, min(most_blocks, -(-lane.queued // places)), most_bytes)
        self._clock = lane.served
        lane.served += sum(transfer.work_ns for transfer in taken) / self._weight(tenant)
        if not lane.queued:
            lane.heap.clear()
            # What it was served counts for as long as others are behind.
            if len(self._lanes) == 1:
                del self._lanes[tenant]
        return taken

    def _take(self, lane: Lane, most_blocks: int, most_bytes: int) -> list[Transfer]:
        taken: list[Transfer] = []
        nbytes = 0
        while lane.queued and len(taken) < most_blocks:
            _, _, version, transfer = lane.heap[0]
            if version == transfer.version:
                nbytes += transfer.nbytes
                if taken and (nbytes > most_bytes or transfer.into is not taken[0].into):
                    break
                self._left(lane, transfer)
                taken.append(transfer)
            heappop(lane.heap)
        return taken

    def _left(self, lane: Lane, transfer: Transfer) -> None:
        priority = transfer.wish.priority
        lane.queued -= 1
        lane.work[priority] -= transfer.work_ns
        if not lane.work[priority]:
            del lane.work[priority]
        self.queued -= 1
        self.queued_bytes -= transfer.nbytes

    def ahead(self, tenant: str, priority: int, work_ns: int) -> float:
        """Work that goes first of a tenant's own, and of others: their shares meanwhile, and
        no more than they ask for. `work_ns` is what the tenant comes with."""
        own = self._lanes.get(tenant)
        mine = sum(w for p, w in own.work.items() if p >= priority) if own is not None else 0
        fair = (mine + work_ns) / self._weight(tenant)
        theirs = sum(
            min(sum(lane.work.values()), fair * self._weight(name))
            for name, lane in self._lanes.items()
            if name != tenant and lane.queued
        )
        return mine + theirs
