"""A GPU's memory without a GPU: in memfds, which other processes map.

What the GPU is like stands in a file, which every process that uses it reads again at every
call, so that a test can have somebody else take its memory, or have it fail, at any moment:

    {"bytes": 268435456, "taken": 0, "lost": false, "refuses": [], "hangs": [], "spoils": []}

`bytes`: what the GPU has. `taken`: of these, by others than the store. `refuses`: names of
methods that find no memory; of `peer`, that it reaches no other GPU; of `straight`, `fill`,
`deliver`, `write_now`, that they fail. `hangs`: of the last three, and of `close`, which gives back
what is read straight into, those that do not go on for as long as that stands there: in `fill` it
is the drive that hangs, in the others the GPU, for which nobody waits for ever. `spoils`: "fill",
that what is read straight arrives damaged.

What is read straight comes from the file by `preadv`, so that disks which fail, wait or lie do so
here too. Slots hold nothing for longer than is promised.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvstore.device import waits
from kvstore.device.vram import Made, StraightFile
from kvstore.errors import (
    DeviceError,
    DeviceFull,
    DeviceLost,
    DeviceStuck,
    InternalError,
    NoDevice,
)
from kvstore.types import align_up

PREFIX = "stand-in:"
_HANGING_S = 0.002


class StandInVram:
    """`name` is PREFIX and the file's path."""

    granularity = mmap.PAGESIZE

    def __init__(self, name: str) -> None:
        self.name = name
        self._path = Path(name.removeprefix(PREFIX))
        self._lock = threading.Lock()
        self._made_bytes = self._slots_bytes = 0
        if not self._path.is_file():
            raise NoDevice(f"there is no {self._path} that says what the GPU is like")

    def free_bytes(self) -> int:
        says = self.ask("free_bytes")
        taken = int(says.get("taken", 0)) + self._made_bytes + self._slots_bytes
        return max(0, int(says["bytes"]) - taken)

    def make(self, nbytes: int) -> _Made:
        if self.free_bytes() < nbytes or "make" in self.ask("make").get("refuses", ()):
            raise DeviceFull(f"the GPU has no {nbytes} bytes to spare")
        self.count(nbytes)
        return _Made(self, nbytes)

    def open(self, descriptor: int, nbytes: int) -> _Opened:
        return self._open(descriptor, nbytes, mmap.PROT_READ)

    def open_to_write(self, descriptor: int, nbytes: int, gpu: str) -> _Opened:
        if gpu != self.name and "peer" in self.ask("open").get("refuses", ()):
            raise DeviceError(f"this GPU does not reach {gpu}")
        return self._open(descriptor, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)

    def _open(self, descriptor: int, nbytes: int, access: int) -> _Opened:
        if "open" in self.ask("open").get("refuses", ()):
            raise DeviceFull("the GPU maps no more memory")
        try:
            if os.fstat(descriptor).st_size < nbytes:
                raise DeviceError("what is to be opened is not as large as was said")
            return _Opened(mmap.mmap(descriptor, nbytes, prot=access))
        except (OSError, ValueError) as error:
            raise DeviceError(f"what is to be opened cannot be mapped: {error}") from error

    def finish(self) -> None:
        self.ask("finish")

    def straight(self, slots: int, slot_bytes: int) -> _Straight:
        self.ask_unless_refused("straight")
        if self.free_bytes() < self.straight_bytes(slots, slot_bytes):
            raise DeviceFull(f"the GPU has no {slots} slots to spare")
        return _Straight(self, slots, slot_bytes)

    def straight_bytes(self, slots: int, slot_bytes: int) -> int:
        return slots * align_up(slot_bytes)

    def close(self) -> None:
        pass

    def ask_unless_refused(self, call: str) -> dict[str, Any]:
        """`ask`, once the call does not hang any more. Raises `DeviceError` where it fails, and
        `DeviceStuck` where it is the GPU that hangs, not a drive, and for long."""
        until = inf if call == "fill" else time.monotonic() + waits.PATIENCE_S
        while call in (says := self.ask(call)).get("hangs", ()):
            if time.monotonic() >= until:
                raise DeviceStuck(f"{call} has not ended")
            time.sleep(_HANGING_S)
        if call in says.get("refuses", ()):
            raise DeviceError(f"the GPU refuses {call}")
        return says

    def ask(self, _: str) -> dict[str, Any]:
        """What the GPU is like now. Raises `DeviceLost`."""
        try:
            says: dict[str, Any] = json.loads(self._path.read_text())
        except (OSError, ValueError) as error:
            raise DeviceLost(f"the GPU is gone: {error}") from error
        if says.get("lost"):
            raise DeviceLost("the GPU is lost")
        return says

    def count(self, nbytes: int) -> None:
        with self._lock:
            self._made_bytes += nbytes

    def count_slots(self, nbytes: int) -> None:
        with self._lock:
            self._slots_bytes += nbytes


class _Made:
    def __init__(self, vram: StandInVram, nbytes: int) -> None:
        self._vram = vram
        self._nbytes = nbytes
        self.descriptor = os.memfd_create("kvstore-vram", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, nbytes)
        self._memory = mmap.mmap(self.descriptor, nbytes)

    @property
    def address(self) -> int:
        return _address_of(np.frombuffer(self._memory, np.uint8))

    def write(self, offset: int, data: memoryview) -> None:
        self._vram.ask("write")
        self._memory[offset : offset + data.nbytes] = data

    def write_now(self, offset: int, data: memoryview) -> None:
        self._vram.ask_unless_refused("write_now")
        self._memory[offset : offset + data.nbytes] = data

    def free(self) -> None:
        if self._nbytes:
            self._vram.count(-self._nbytes)
            self._nbytes = 0
            self._memory.close()
            os.close(self.descriptor)


class _Opened:
    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        # Keeps the mapping from being closed, as a copy that is under way does.
        self._bytes: Any = np.frombuffer(memory, np.uint8)

    @property
    def address(self) -> int:
        return _address_of(self._bytes)

    def close(self) -> None:
        self._bytes = None
        self._memory.close()


class _Straight:
    def __init__(self, vram: StandInVram, slots: int, slot_bytes: int) -> None:
        self._vram = vram
        self._slots = [memoryview(mmap.mmap(-1, align_up(slot_bytes))) for _ in range(slots)]
        self._taken = [threading.Lock() for _ in range(slots)]
        self._nbytes = vram.straight_bytes(slots, slot_bytes)
        vram.count_slots(self._nbytes)

    def fill(self, slot: int, file: StraightFile, offset: int, nbytes: int) -> int:
        with self._take(slot) as memory:
            memory[:] = b"\xa5" * len(memory)
            says = self._vram.ask_unless_refused("fill")
            done, pages = 0, align_up(nbytes)
            if pages > len(memory):
                raise InternalError(f"{nbytes} bytes for a slot of {len(memory)}")
            while done < pages:
                got = file.preadv([memory[done:pages]], offset + done)
                if not got:
                    raise DeviceError("the file ends before what is to be read")
                done += got
            if "fill" in says.get("spoils", ()):
                memory[nbytes // 2] ^= 1
            return xxhash.xxh3_64_intdigest(memory[:nbytes])

    def deliver(self, slot: int, to: Made, offset: int, nbytes: int) -> None:
        with self._take(slot) as memory:
            self._vram.ask_unless_refused("deliver")
            to.write_now(offset, memory[:nbytes])
            memory[:] = b"\x5a" * len(memory)

    def close(self) -> None:
        with suppress(DeviceLost):
            self._vram.ask_unless_refused("close")
        self._vram.count_slots(-self._nbytes)
        self._nbytes = 0
        if any(taken.locked() for taken in self._taken):
            raise InternalError("what is given back is used")
        self._slots.clear()

    @contextmanager
    def _take(self, slot: int) -> Iterator[memoryview]:
        if not self._slots:
            raise InternalError("what is used was given back")
        if not self._taken[slot].acquire(blocking=False):
            raise InternalError("two threads use a slot at once")
        try:
            yield self._slots[slot]
        finally:
            self._taken[slot].release()


def _address_of(memory: Any) -> int:
    return int(memory.__array_interface__["data"][0])
