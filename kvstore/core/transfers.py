"""Transfers between tiers: what may run now, in which order.

One bounded number of copies runs at a time. Demand goes before prefetch, and
prefetch before write-back; within a class, first come, first served. A copy that
has not started can be promoted to demand, when somebody comes to wait for what
was only prefetched.
"""

from __future__ import annotations

import enum

from kvstore.core.actions import Copy
from kvstore.core.catalog import Replica


class TransferClass(enum.IntEnum):
    """What a transfer is for, most urgent first."""

    DEMAND = 0
    PREFETCH = 1
    WRITE_BACK = 2

    @property
    def label(self) -> str:
        return self.name.lower()


class TransferQueue:
    """Queued copies by their target; at most one copy per target."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._queued: dict[TransferClass, dict[Replica, Copy]] = {c: {} for c in TransferClass}
        self._running: dict[Replica, tuple[TransferClass, Copy]] = {}

    def __len__(self) -> int:
        return len(self._running) + sum(len(queue) for queue in self._queued.values())

    def depth(self, transfer_class: TransferClass) -> int:
        """Copies of a class that are queued or running."""
        running = sum(1 for c, _ in self._running.values() if c is transfer_class)
        return len(self._queued[transfer_class]) + running

    def push(self, copy: Copy, transfer_class: TransferClass) -> None:
        self._queued[transfer_class][copy.target] = copy

    def promote(self, target: Replica) -> None:
        """Somebody waits for `target`: if its copy has not started, it is demand now."""
        copy = self._queued[TransferClass.PREFETCH].pop(target, None)
        if copy is not None:
            self._queued[TransferClass.DEMAND][target] = copy

    def cancel(self, target: Replica) -> Copy | None:
        """Take a copy out that has not started; None when it has."""
        for queue in self._queued.values():
            copy = queue.pop(target, None)
            if copy is not None:
                return copy
        return None

    def start(self) -> list[Copy]:
        """The copies to start now."""
        started = []
        background = sum(1 for c, _ in self._running.values() if c is TransferClass.WRITE_BACK)
        for transfer_class, queue in self._queued.items():
            while queue and len(self._running) < self._max_running:
                if transfer_class is TransferClass.WRITE_BACK:
                    # Half the places stay free, so that demand need not wait for one.
                    if background >= max(1, self._max_running // 2):
                        break
                    background += 1
                target = next(iter(queue))
                copy = queue.pop(target)
                self._running[target] = (transfer_class, copy)
                started.append(copy)
        return started

    def copies(self) -> list[Copy]:
        """All that are queued or running."""
        queued = [copy for queue in self._queued.values() for copy in queue.values()]
        return queued + [copy for _, copy in self._running.values()]

    def finish(self, target: Replica) -> TransferClass:
        """A started copy has ended, well or badly."""
        return self._running.pop(target)[0]
