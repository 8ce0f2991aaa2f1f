"""Host memory made known to a GPU, so that its copy engines read and write it directly.

The server's memory comes as extents, each mapped when its first address is used. Pinning
one takes about 0.1 s a GB, so it is done in a thread of its own; until then, and where the
machine refuses, copies of it take the way through memory that is pinned already (`gpu`).

Lifetime. A pin lasts as long as the mapping: it is undone when the last view of it goes,
before the memory is unmapped. (Finalizers run in the reverse of the order in which they were
made, and the one that unmaps was made with the mapping.)
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import weakref
from queue import SimpleQueue
from typing import Any, Protocol

from kvstore.errors import DeviceError, DeviceFull

logger = logging.getLogger("kvstore.device")


class Registrar(Protocol):
    def register(self, address: int, nbytes: int) -> None: ...
    def unregister(self, address: int) -> None: ...


class _Pin:
    __slots__ = ("address", "pinned", "wanted")

    def __init__(self, address: int) -> None:
        self.address = address
        self.pinned = False
        self.wanted = True


class Pins:
    """Used by any thread. Once the machine refuses to pin more, no more is asked of it."""

    def __init__(self, driver: Registrar, *, in_background: bool = True) -> None:
        self._driver = driver
        self._lock = threading.RLock()  # A finalizer may run anywhere.
        self._pins: dict[int, _Pin] = {}
        self._refused = False
        self._closed = False
        self._queue: SimpleQueue[weakref.ref[Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if in_background:
            self._thread = threading.Thread(target=self._work, name="kvstore-pin", daemon=True)
            self._thread.start()

    @property
    def refused(self) -> bool:
        """Whether the machine lets no more memory be pinned."""
        return self._refused

    def covers(self, view: memoryview) -> bool:
        """Whether the memory of `view` is pinned. If it is not, it is asked for. It stays
        pinned for as long as the view is held."""
        mapping = view.obj
        if not isinstance(mapping, ctypes.Array):
            return False  # Not memory of the arena: nobody says how long it lasts.
        pin = self._pins.get(id(mapping))
        if pin is None:
            pin = self._ask_for(mapping)
        return pin is not None and pin.pinned

    def close(self) -> None:
        """Undo all pins. Idempotent."""
        with self._lock:
            self._closed = True
            pins, self._pins = list(self._pins.values()), {}
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        for pin in pins:
            self._undo(pin)

    def _ask_for(self, mapping: ctypes.Array[Any]) -> _Pin | None:
        with self._lock:
            if self._refused or self._closed:
                return None
            pin = self._pins.get(id(mapping))
            if pin is not None:
                return pin
            pin = self._pins[id(mapping)] = _Pin(ctypes.addressof(mapping))
            undoing = weakref.finalize(mapping, self._let_go, id(mapping))
            # At the interpreter's exit others may still be copying; the driver cleans up.
            undoing.atexit = False
        if self._thread is None:
            self._pin(mapping)
        else:
            self._queue.put(weakref.ref(mapping))
        return pin

    def _work(self) -> None:
        while (reference := self._queue.get()) is not None:
            mapping = reference()
            if mapping is not None:
                self._pin(mapping)
            # Not to be the one that holds the memory until the next comes.
            mapping = None

    def _pin(self, mapping: ctypes.Array[Any]) -> None:
        pin = self._pins.get(id(mapping))
        if pin is None or self._refused or self._closed:
            return
        try:
            self._driver.register(pin.address, ctypes.sizeof(mapping))
        except DeviceError as error:
            self._refused = True
            log = logger.warning if isinstance(error, DeviceFull) else logger.error
            log("Host memory cannot be pinned (%s); copies take longer.", error)
            return
        with self._lock:
            pin.pinned = pin.wanted
        if not pin.wanted:
            self._undo_now(pin)

    def _let_go(self, key: int) -> None:
        with self._lock:
            pin = self._pins.pop(key, None)
        if pin is not None:
            self._undo(pin)

    def _undo(self, pin: _Pin) -> None:
        with self._lock:
            pinned, pin.pinned, pin.wanted = pin.pinned, False, False
        if pinned:
            self._undo_now(pin)

    def _undo_now(self, pin: _Pin) -> None:
        # A GPU that is lost has no pins left.
        with contextlib.suppress(DeviceError):
            self._driver.unregister(pin.address)
