"""Loads that arrive, background that is always there, and what becomes of them.

A load is a chain of blocks, over when its last block is there. Loads arrive at random
(Poisson), at a rate that keeps the device busy for a given part of its time; a part of
them has the higher priority. Beside them so many prefetches and write-backs always wait.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.core.transfers import Link, Transfer, TransferClass, Wish
from kvstore.types import Tier
from kvstore_benchmarks.transfers.devices import Device
from kvstore_benchmarks.transfers.rivals import Queue, fifo

BLOCK_BYTES = 1 << 20
BLOCKS_A_LOAD = 32
HIGH, LOW = 80, 40
HIGH_SHARE = 0.2
"""Of the loads."""
BACKGROUND = (16, 16)
"""Prefetches and write-backs that wait at any time."""
PATIENCE = 20.0
"""Deadlines: so many times what a load takes alone."""


class Stream(NamedTuple):
    """Loads of one kind, at `load` of the device's time. `waiting`: this many at any time
    instead."""

    priority: int
    load: float
    tenant: str = ""
    waiting: int = 0


class Capacity(NamedTuple):
    """What the device moves when it does nothing else, bytes a second."""

    read: float
    write: float


@dataclass(slots=True)
class Seen:
    """`latency_s` and `late` of the loads of each stream that came and ended after the
    beginning was over; `moved` while that lasted: bytes by class, and of demand by tenant."""

    latency_s: list[list[float]]
    late: list[int]
    refused: list[int]
    seconds: float = 0.0
    moved: dict[TransferClass, int] = field(default_factory=lambda: dict.fromkeys(TransferClass, 0))
    of_tenant: dict[str, int] = field(default_factory=dict)
    longest_wait_s: dict[TransferClass, float] = field(
        default_factory=lambda: dict.fromkeys(TransferClass, 0.0)
    )


@dataclass(eq=False, slots=True)
class _Load:
    stream: int
    came_ns: int
    deadline_ns: int
    left: int = BLOCKS_A_LOAD


class Run:
    def __init__(
        self, line: Queue, device: Device, capacity: Capacity, streams: Sequence[Stream],
        *, background: tuple[int, int], seed: int,
    ) -> None:  # fmt: skip
        """`background`: prefetches and write-backs that wait at any time."""
        self._line = line
        self._device = device
        self._streams = streams
        self._rng = random.Random(seed)
        self._background = background
        self._alone_s = BLOCKS_A_LOAD * BLOCK_BYTES / capacity.read
        self._loads: dict[int, _Load] = {}
        self._pushed_ns: dict[int, int] = {}
        self._number = self._running = self._counted_ns = 0
        count = len(streams)
        self.seen = Seen([[] for _ in range(count)], [0] * count, [0] * count)

    def run(self, begins_s: float, seconds: float) -> Seen:
        """What was seen in `seconds`, once `begins_s` are over."""
        device, seen = self._device, self.seen
        began_ns = device.now_ns()
        counted_ns = began_ns + int(begins_s * 1e9)
        ends_ns = counted_ns + int(seconds * 1e9)
        self._counted_ns = counted_ns
        coming = [self._arrivals(stream, began_ns) for stream in self._streams]
        due = [next(arrivals) for arrivals in coming]
        for number, stream in enumerate(self._streams):
            for _ in range(stream.waiting):
                self._ask(number, began_ns)
        both = (TransferClass.PREFETCH, TransferClass.WRITE_BACK)
        for transfer_class, waiting in zip(both, self._background, strict=True):
            for _ in range(waiting):
                self._push_background(transfer_class, began_ns)
        while (now_ns := device.now_ns()) < ends_ns:
            for number, at_ns in enumerate(due):
                while at_ns <= now_ns:
                    self._ask(number, int(at_ns))
                    at_ns = due[number] = next(coming[number])
            for batch in self._line.start(now_ns):
                for transfer in batch.transfers:
                    self._note_start(transfer, now_ns)
                device.begin(batch)
                self._running += 1
            for batch, at_ns in device.wait(math.ceil(min([ends_ns, *due]))):
                self._running -= 1
                for transfer in batch.transfers:
                    self._line.ended(transfer.target, at_ns, well=True)
                    self._ended(transfer, at_ns)
        seen.seconds = (device.now_ns() - counted_ns) / 1e9
        while self._running:
            # What is under way is not the next run's.
            self._running -= len(device.wait(device.now_ns() + 1_000_000_000))
        return seen

    def _arrivals(self, stream: Stream, now_ns: int) -> Iterator[float]:
        rng = random.Random(self._rng.random())
        at_ns = float(now_ns)
        while True:
            if stream.load <= 0:
                yield float("inf")
                continue
            at_ns += rng.expovariate(stream.load / self._alone_s) * 1e9
            yield at_ns

    def _ask(self, number: int, now_ns: int) -> None:
        stream = self._streams[number]
        patience_s = PATIENCE * self._alone_s * (10 if stream.waiting else 1)
        deadline_ns = now_ns + int(patience_s * 1e9)
        load = _Load(number, now_ns, deadline_ns)
        if isinstance(self._line, Link) and not stream.waiting:
            work_ns = BLOCKS_A_LOAD * self._line.costs[Tier.DRAM].nominal.work_ns(BLOCK_BYTES)
            said = self._line.ready(Tier.DRAM, stream.tenant, stream.priority, now_ns, work_ns)
            if now_ns + said.ns > deadline_ns:
                self.seen.refused[number] += now_ns >= self._counted_ns
                return
        wish = Wish(TransferClass.DEMAND, now_ns, stream.priority, deadline_ns)
        for _ in range(BLOCKS_A_LOAD):
            self._loads[self._push(wish, Tier.DRAM, stream.tenant, now_ns)] = load

    def _push_background(self, transfer_class: TransferClass, now_ns: int) -> None:
        into = Tier.NVME if transfer_class is TransferClass.WRITE_BACK else Tier.DRAM
        self._push(Wish(transfer_class, now_ns), into, "", now_ns)

    def _push(self, wish: Wish, into: Tier, tenant: str, now_ns: int) -> int:
        self._number += 1
        self._line.push(Transfer(self._number, BLOCK_BYTES, into, tenant, wish))
        self._pushed_ns[self._number] = now_ns
        return self._number

    def _note_start(self, transfer: Transfer, now_ns: int) -> None:
        assert isinstance(transfer.target, int)
        waited = (now_ns - self._pushed_ns.pop(transfer.target)) / 1e9
        longest = self.seen.longest_wait_s
        if now_ns >= self._counted_ns:
            longest[transfer.transfer_class] = max(longest[transfer.transfer_class], waited)

    def _ended(self, transfer: Transfer, at_ns: int) -> None:
        seen = self.seen
        counted = at_ns >= self._counted_ns
        if counted:
            seen.moved[transfer.transfer_class] += transfer.nbytes
        if transfer.transfer_class is not TransferClass.DEMAND:
            self._push_background(transfer.transfer_class, at_ns)
            return
        if counted:
            tenant = transfer.tenant
            seen.of_tenant[tenant] = seen.of_tenant.get(tenant, 0) + transfer.nbytes
        assert isinstance(transfer.target, int)
        load = self._loads.pop(transfer.target)
        load.left -= 1
        if load.left:
            return
        if load.came_ns >= self._counted_ns:
            seen.latency_s[load.stream].append((at_ns - load.came_ns) / 1e9)
            seen.late[load.stream] += at_ns > load.deadline_ns
        if self._streams[load.stream].waiting:
            self._ask(load.stream, at_ns)


def capacity_of(device: Device, depth: int, seconds: float) -> Capacity:
    """What a device moves when it only reads, and only writes."""
    moved = []
    for background in ((32, 0), (0, 32)):
        run = Run(fifo(depth), device, Capacity(1e9, 1e9), [], background=background, seed=1)
        seen = run.run(seconds / 4, seconds)
        moved.append(sum(seen.moved.values()) / seen.seconds)
    return Capacity(*moved)
