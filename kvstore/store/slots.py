"""Slots of a GPU's memory that drives write into, taken and given back one by one.

Each is taken only where enough is free, and given back when nothing is under way in it. One in
which something may be under way for ever is kept for as long as the process lasts, and so is all
that there is once the GPU does not answer: who gives memory back waits for all that it is at.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.device.vram import Straight, Vram
from kvstore.errors import DeviceError, DeviceFull, DeviceLost, DeviceStuck

SHORT = "others need the GPU's memory"


class SlotsGone(DeviceError):
    """Nothing is read into this GPU's memory any more."""


class Closed(enum.Enum):
    YES = enum.auto()
    NOT_YET = enum.auto()
    """A drive has not answered yet."""
    NEVER = enum.auto()
    """The GPU may write there for ever."""


class GpuSlots:
    """Of one GPU. Every method may be called from any thread; `arrange` and `close` wait for the
    GPU, and are one thread's at a time."""

    def __init__(
        self, vram: Vram, most: int, *, made_up_for: int, block_bytes: int, reserve_bytes: int
    ) -> None:
        """`most`: there are to be so many, of `block_bytes` each. `made_up_for`: of those that
        are kept. `reserve_bytes`: of the GPU's memory, what others are to have left."""
        self.slot_bytes = vram.straight_bytes(1, block_bytes)
        """What each takes of the GPU's memory."""
        self._vram = vram
        self._most = most
        self._made_up_for = made_up_for
        self._block_bytes = block_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        # Under the lock. A slot that is used is nowhere, but with who uses it.
        self._wanted = False
        self._closed = False
        self._stuck = False
        self._aim = most
        """How many there are to be by now."""
        self._complete = False
        """They were all there since they were last wanted."""
        self._idle: list[Straight] = []
        self._usable = 0
        """Those, and those that are used."""
        self._there = 0
        """Those, and all that has not gone back."""
        self._kept: list[Straight] = []
        self._users = 0

    @property
    def held_bytes(self) -> int:
        """Of the GPU's memory."""
        return self._there * self.slot_bytes

    def want(self, wanted: bool) -> bool:
        """Whether there are to be any from now on. False where `arrange` has to see to that."""
        with self._lock:
            self._wanted = wanted
            if wanted:
                return not self._lacks_one
            self._aim, self._complete = self._most, False
            return not self._idle

    def arrange(self, *, try_one: bool) -> None:
        """Take what is lacking, or give back what is not wanted. `try_one`: take one in any case.
        Raises `DeviceFull` where there is no memory for slots now, `DeviceStuck` where the GPU
        does not answer, and any other `DeviceError` with why nothing can be read straight."""
        while True:
            with self._lock:
                lacks_one = self._wanted and self._lacks_one
                self._complete |= self._wanted and not lacks_one
                if self._stuck or not (try_one or lacks_one):
                    break
            try_one = False
            try:
                self._take()
            except DeviceFull:
                if not self._does_with_fewer():
                    raise
        self._give_back()

    @property
    def _lacks_one(self) -> bool:
        return self._usable < self._aim and self._there < self._most + self._made_up_for

    def _take(self) -> None:
        """The planner has looked before the first of them was taken."""
        try:
            free_bytes = self._vram.free_bytes()
        except DeviceLost:
            raise
        except DeviceError as error:
            raise DeviceFull(str(error)) from error
        if free_bytes < self._reserve_bytes + 2 * self.slot_bytes:
            raise DeviceFull(SHORT)
        slot = self._vram.straight(1, self._block_bytes)
        with self._lock:
            self._idle.append(slot)
            self._usable += 1
            self._there += 1

    def _does_with_fewer(self) -> bool:
        """What is kept is not made up for where that would take from others, and the rest is as
        good as ever."""
        with self._lock:
            if not self._complete or not self._usable:
                return False
            self._aim = self._usable
            return True

    def _give_back(self) -> None:
        """Those that are not wanted, but for those that are used. Raises `DeviceStuck`."""
        while True:
            with self._lock:
                if self._wanted or self._stuck or not self._idle:
                    return
                slot = self._idle.pop()
                self._usable -= 1
            try:
                slot.close()
            except DeviceStuck:
                with self._lock:
                    self._stuck = True
                    self._kept.append(slot)
                raise
            with self._lock:
                self._there -= 1

    def close(self) -> Closed:
        """They are used no more. Raises `DeviceStuck`; asked again then, it does not."""
        with self._lock:
            self._closed = True
            self._wanted = False
        self._give_back()
        with self._lock:
            if self._users:
                return Closed.NOT_YET
            return Closed.NEVER if self._stuck else Closed.YES

    # Who uses them

    @contextmanager
    def in_use(self) -> Iterator[Straight | None]:
        """One, None where none is idle, for who says `put_back` or `keep` of it before the end.
        Raises `SlotsGone`: whoever waited for a stuck GPU too would keep the drive from others."""
        with self._lock:
            if self._closed or self._stuck:
                raise SlotsGone("nothing is read into this GPU's memory any more")
            self._users += 1
            slot = self._idle.pop() if self._wanted and self._idle else None
        try:
            yield slot
        finally:
            with self._lock:
                self._users -= 1

    def put_back(self, slot: Straight) -> None:
        """Nothing is under way in it."""
        with self._lock:
            self._idle.append(slot)

    def keep(self, slot: Straight) -> None:
        """Something may be under way in it."""
        with self._lock:
            self._kept.append(slot)
            self._usable -= 1

    def stuck(self) -> None:
        """The GPU does not answer."""
        with self._lock:
            self._stuck = True
