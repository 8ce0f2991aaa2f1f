"""A GPU's memory without a GPU: in memfds, which other processes map.

What the GPU is like stands in a file, which every process that uses it reads again at every
call, so that a test can have somebody else take its memory, or have it fail, at any moment:

    {"bytes": 268435456, "taken": 0, "lost": false, "refuses": []}

`bytes`: what the GPU has. `taken`: of these, by others than the store. `refuses`: names of
methods that find no memory.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.errors import DeviceError, DeviceFull, DeviceLost, NoDevice

PREFIX = "stand-in:"


class StandInVram:
    """`name` is PREFIX and the file's path."""

    granularity = mmap.PAGESIZE

    def __init__(self, name: str) -> None:
        self.name = name
        self._path = Path(name.removeprefix(PREFIX))
        self._lock = threading.Lock()
        self._made_bytes = 0
        if not self._path.is_file():
            raise NoDevice(f"there is no {self._path} that says what the GPU is like")

    def free_bytes(self) -> int:
        says = self.ask("free_bytes")
        return max(0, int(says["bytes"]) - int(says.get("taken", 0)) - self._made_bytes)

    def make(self, nbytes: int) -> _Made:
        if self.free_bytes() < nbytes or "make" in self.ask("make").get("refuses", ()):
            raise DeviceFull(f"the GPU has no {nbytes} bytes to spare")
        self.count(nbytes)
        return _Made(self, nbytes)

    def open(self, descriptor: int, nbytes: int) -> _Opened:
        if "open" in self.ask("open").get("refuses", ()):
            raise DeviceFull("the GPU maps no more memory")
        try:
            if os.fstat(descriptor).st_size < nbytes:
                raise DeviceError("what is to be opened is not as large as was said")
            return _Opened(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ))
        except (OSError, ValueError) as error:
            raise DeviceError(f"what is to be opened cannot be mapped: {error}") from error

    def finish(self) -> None:
        self.ask("finish")

    def close(self) -> None:
        pass

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


class _Made:
    def __init__(self, vram: StandInVram, nbytes: int) -> None:
        self._vram = vram
        self._nbytes = nbytes
        self.descriptor = os.memfd_create("kvstore-vram", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, nbytes)
        self._memory = mmap.mmap(self.descriptor, nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        self._vram.ask("write")
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
        return int(self._bytes.__array_interface__["data"][0])

    def close(self) -> None:
        self._bytes = None
        self._memory.close()
