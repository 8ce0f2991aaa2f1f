"""A device that keeps the contract of `base` and nothing beyond it, for tests.

What is started on it is held back and done piece by piece in any order that the events
allow: perhaps before the engine's computing that wrote what is to be copied, perhaps long
after the caller forgot about it. So where a wait is missing, bytes are wrong in a unit test.

What it holds back is decided by a seed; `Temper` says how.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np
import xxhash

from kvstore.device import codec
from kvstore.device.base import Blocks, Coding, Copies, Event, Memory, Piece, Stream
from kvstore.device.host import Bytes, as_bytes
from kvstore.device.vram import Vram


class Temper(Enum):
    """When things are done that nobody waits for. LATE: when the test ends the device's
    idleness (`settle`). ANY: at any call, by chance. EAGER: at the first call that finds
    their events past, the newest first."""

    LATE = "late"
    ANY = "any"
    EAGER = "eager"


class _Task:
    """Something to do, after others."""

    __slots__ = ("_after", "_run", "done")

    def __init__(self, run: Callable[[], None], after: Sequence[_Task]) -> None:
        self._run = run
        self._after = after
        self.done = False

    def ready(self) -> bool:
        return all(task.done for task in self._after)

    def do(self) -> None:
        """With all that it comes after."""
        waiting = [self]
        while waiting:
            task = waiting[-1]
            lacking = [other for other in task._after if not other.done]
            if lacking:
                waiting += lacking
                continue
            waiting.pop()
            if not task.done:
                task.done = True
                task._run()


class _Past:
    """The event that all of `tasks` are done."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.tasks = tasks


class AdversarialDevice:
    """Its KV cache lies in host memory. `compute` plays the engine. Used by any thread."""

    def __init__(
        self, seed: int = 0, temper: Temper = Temper.LATE, vram: Vram | None = None
    ) -> None:
        """`vram`: one that lies in host memory (`vram_stand_in`)."""
        self.vram = vram
        self._random = random.Random(seed)
        self._temper = temper
        self._lock = threading.RLock()
        self._held_back: list[_Task] = []
        self._computing: list[_Task] = []
        self.most_held_back = 0

    def blocks(
        self,
        memory: Memory,
        pieces: Sequence[Piece],
        num_blocks: int,
        coding: Coding | None = None,
    ) -> Blocks:
        return _Blocks(memory, pieces, coding)

    def stream(self) -> Stream:
        return _Stream(self)

    def computed(self) -> Event:
        with self._lock:
            return _Past(self._computing[-1:])

    def close(self) -> None:
        self.settle()

    def compute(self, run: Callable[[], None]) -> None:
        """Launch something as the engine does, whose launches run in order."""
        with self._lock:
            task = _Task(run, self._computing[-1:])
            self._computing = [task]
            self.hold_back([task])

    def settle(self) -> None:
        """Do all that is held back, in any order that is allowed."""
        with self._lock:
            while self._held_back:
                self._do_one()

    def hold_back(self, tasks: Sequence[_Task]) -> None:
        with self._lock:
            self._held_back += tasks
            self.most_held_back = max(self.most_held_back, len(self._held_back))
            self._act_up()

    def do(self, tasks: Sequence[_Task]) -> None:
        """Wait for these."""
        with self._lock:
            self._act_up()
            for task in self._random.sample(list(tasks), len(tasks)):
                task.do()
            self._held_back = [task for task in self._held_back if not task.done]
            self._act_up()

    def _act_up(self) -> None:
        if self._temper is Temper.EAGER:
            while any(task.ready() for task in self._held_back):
                self._do_one()
        elif self._temper is Temper.ANY:
            for _ in range(self._random.randint(0, len(self._held_back))):
                self._do_one()

    def _do_one(self) -> None:
        """One of those whose turn it is. In a list without circles there is one."""
        ready = [task for task in self._held_back if task.ready()]
        task = ready[-1] if self._temper is Temper.EAGER else self._random.choice(ready)
        task.do()
        self._held_back = [task for task in self._held_back if not task.done]


class _Blocks:
    within = True

    def __init__(self, memory: Memory, pieces: Sequence[Piece], coding: Coding | None) -> None:
        self._owner = memory.owner
        self._bytes = as_bytes(memory)
        self._pieces = pieces
        self.coding = coding
        raw_bytes = sum(piece.nbytes for piece in pieces)
        self.block_bytes = raw_bytes if coding is None else coding.nbytes(raw_bytes)

    def pieces_of(self, block_id: int) -> list[Bytes]:
        starts = [(each.offset + block_id * each.stride, each.nbytes) for each in self._pieces]
        return [self._bytes[start : start + nbytes] for start, nbytes in starts]


class _Stream:
    def __init__(self, device: AdversarialDevice) -> None:
        self._device = device
        self._after: list[_Task] = []

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, _Past)
        self._after = [task for task in (*self._after, *event.tasks) if not task.done]

    def load(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        return self._start(blocks, block_ids, slots, save=False)

    def save(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        return self._start(blocks, block_ids, slots, save=True)

    def load_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        return self._within(blocks, block_ids, addresses, save=False)

    def save_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        return self._within(blocks, block_ids, addresses, save=True)

    def close(self) -> None:
        pass

    def _within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int], *, save: bool
    ) -> _Copies:
        parts = [as_bytes(Memory(address, blocks.block_bytes, None)).data for address in addresses]
        copies = self._start(blocks, block_ids, parts, save=save)
        copies.slots = []
        return copies

    def _start(
        self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview], *, save: bool
    ) -> _Copies:
        assert isinstance(blocks, _Blocks)
        tasks = []
        for block_id, slot in zip(block_ids, slots, strict=True):
            if blocks.coding is not None:
                run = _code(blocks.pieces_of(block_id), slot, blocks.coding, save)
                tasks.append(_Task(run, self._after))
                continue
            start = 0
            for piece in blocks.pieces_of(block_id):
                part = slot[start : start + piece.nbytes]
                start += piece.nbytes
                tasks.append(_Task(_copy(piece, part, save), self._after))
        self._device.hold_back(tasks)
        return _Copies(self._device, tasks, list(slots))


def _copy(piece: Bytes, part: memoryview, save: bool) -> Callable[[], None]:
    def run() -> None:
        if save:
            part[:] = piece.data
        else:
            piece[:] = part

    return run


def _code(
    pieces: Sequence[Bytes], slot: memoryview, coding: Coding, save: bool
) -> Callable[[], None]:
    """All of a block: a scale is of elements of one piece or of two."""

    def run() -> None:
        raw = np.concatenate(pieces)
        if save:
            codec.encode(*coding, raw.data, slot)
            return
        codec.decode(*coding, slot, raw.data)
        start = 0
        for piece in pieces:
            piece[:] = raw[start : start + len(piece)]
            start += len(piece)

    return run


class _Copies:
    def __init__(
        self, device: AdversarialDevice, tasks: Sequence[_Task], slots: Sequence[memoryview]
    ) -> None:
        self._device = device
        self._tasks = tasks
        self.slots = slots
        """Those of which checksums are taken."""

    def finish(self) -> list[int]:
        self._device.do(self._tasks)
        return self.unfinished()

    def unfinished(self) -> list[int]:
        """What `finish` would say if it did not wait: for tests that plant that bug."""
        return [xxhash.xxh3_64_intdigest(slot) for slot in self.slots]
