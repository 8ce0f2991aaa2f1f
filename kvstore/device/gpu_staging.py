"""Memory that copies pass through, on the GPU and pinned on the host."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np

from kvstore.device.gpu_driver import Driver
from kvstore.errors import DeviceLost


class Staging:
    """What one step at a time passes through, of the kinds that were needed."""

    def __init__(self, driver: Driver, least: int) -> None:
        """`least`: bytes to take at a time, so that nothing grows while an engine runs."""
        self._driver = driver
        self._least = least
        self._held: dict[str, tuple[int, int]] = {}

    def on_gpu(self, nbytes: int) -> int:
        return self._at_least("gpu", max(nbytes, self._least))

    def on_host(self, nbytes: int) -> int:
        return self._at_least("host", max(nbytes, self._least))

    def table(self, nbytes: int) -> int:
        """On the host, for what a kernel reads."""
        return self._at_least("table", nbytes)

    def free(self) -> None:
        for kind in list(self._held):
            self._free(kind)

    def _at_least(self, kind: str, nbytes: int) -> int:
        address, held = self._held.get(kind, (0, 0))
        if held < nbytes:
            self._free(kind)
            allocate = self._driver.allocate if kind == "gpu" else self._driver.allocate_host
            address = allocate(nbytes)
            self._held[kind] = (address, nbytes)
        return address

    def _free(self, kind: str) -> None:
        address, _ = self._held.pop(kind, (0, 0))
        if address:
            free = self._driver.free if kind == "gpu" else self._driver.free_host
            # A GPU that is lost has taken it along.
            with contextlib.suppress(DeviceLost):
                free(address)


def memory_at(address: int, nbytes: int) -> memoryview:
    """Of the host."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def address_of(view: memoryview) -> int:
    """Also of memory that may only be read."""
    array = np.frombuffer(view, np.uint8)
    return int(array.__array_interface__["data"][0])
