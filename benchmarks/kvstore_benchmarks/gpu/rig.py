"""What is measured on: a GPU, memory of it that plays the KV cache, and slots of an arena."""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstore.device.base import Blocks, Coding, Memory, Piece
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.gpu_driver import Driver
from kvstore.errors import Unavailable
from kvstore.local.arena import Arena

EXTENT_BYTES = 64 << 20
_PIN_S = 60.0


class Rig:
    """`nbytes` of KV cache and as many of slots. To be closed."""

    def __init__(self, driver: Driver, nbytes: int, extent_bytes: int = EXTENT_BYTES) -> None:
        self.driver = driver
        self.nbytes = nbytes
        self.on_gpu = driver.allocate(nbytes)
        self._plain = driver.allocate_host(nbytes)
        self.plain = memoryview((ctypes.c_ubyte * nbytes).from_address(self._plain)).cast("B")
        self._arena = Arena(extent_bytes, lambda extent: _extent(extent_bytes))
        self._raw = driver.new_stream()

    def close(self) -> None:
        self._arena.close()
        self.driver.free_host(self._plain)
        self.driver.free(self.on_gpu)

    def device(self, kernel_below: int) -> GpuDevice:
        return GpuDevice(self.driver, Tuning(kernel_below=kernel_below))

    def blocks(
        self, device: GpuDevice, piece: int, pieces: int, coding: Coding | None = None
    ) -> tuple[Blocks, int]:
        """(blocks, how many): piece i of all blocks lies before piece i + 1 of any."""
        count = self.nbytes // (piece * pieces)
        places = [Piece(index * count * piece, piece, piece) for index in range(pieces)]
        return device.blocks(Memory(self.on_gpu, self.nbytes, self), places, count, coding), count

    def slots(self, count: int, nbytes: int) -> list[memoryview]:
        room = self._arena.extent_bytes // nbytes
        places = (divmod(index, room) for index in range(count))
        addresses = [extent * self._arena.extent_bytes + place * nbytes for extent, place in places]
        return self._arena.views(addresses, nbytes, writable=True)

    def pin(self, device: GpuDevice, slots: Sequence[memoryview]) -> bool:
        """Wait until the slots are pinned; False where the machine refuses."""
        deadline = time.monotonic() + _PIN_S
        while not all(device.pins.covers(slot) for slot in slots):
            if device.pins.refused:
                return False
            if time.monotonic() > deadline:
                raise Unavailable("pinning the slots takes too long")
            time.sleep(0.005)
        return True

    def copy_plainly(self, *, to_gpu: bool) -> None:
        """All of the KV cache in one copy, from or to pinned memory."""
        ends = np.array([self.on_gpu, self._plain], np.uint64)
        to, from_ = (ends[:1], ends[1:]) if to_gpu else (ends[1:], ends[:1])
        self.driver.copy(to, from_, np.array([self.nbytes], np.uint64), self._raw)
        self.driver.synchronize(self.driver.record(self._raw))


def _extent(nbytes: int) -> tuple[int, int]:
    descriptor = os.memfd_create("kvstore-bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return descriptor, nbytes


def no_checksums(slots: Sequence[memoryview]) -> list[int]:
    """In place of checksums, to measure copies alone."""
    return [0] * len(slots)


def gpu_name() -> dict[str, Any]:
    """What a reader needs to know of the GPU."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "gpu_memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
    }
