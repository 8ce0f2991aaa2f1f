"""Straight reads by cuFile (GPUDirect Storage), into memory of cudaMalloc that it knows.

*Straight or not at all.* Where cuFile cannot read straight it reads by way of the host too, and
says nothing of it; here it is told not to (`PROPERTIES_ALLOW_COMPAT_MODE`), before its driver is
opened, which is the last moment that counts. What then fails is a `DeviceError`: cuFile does not
tell whose fault an error is, and of a drive's own the next ordinary read tells. How much was read
it tells since cuda-bindings 13.1 [nvidia.github.io/cuda-python: 13.1.0 release notes].

*One library, several GPUs.* The driver is the process's: the first to read straight opens it, the
last closes it. So are handles of files: one for a segment, however many GPUs it is read to.
Registering one looks a file up in the kernel, and is done once; it is undone before the
descriptor is closed, and so never means another file that has its number then. After a fork cuFile
must not be used [docs.nvidia.com: gpudirect-storage/best-practices-guide, API usage].

*Threads.* cuFile's calls may come from any, with a context of the GPU current [ditto]. They wait
until the bytes are there. Each slot has a stream, and memory for its checksum, of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import xxhash

from kvstore.device import checksum_kernel
from kvstore.device.gpu_driver import Driver
from kvstore.device.gpu_staging import memory_at
from kvstore.device.vram import Made, StraightFile
from kvstore.device.waits import waited_for
from kvstore.errors import DeviceError, DeviceStuck, DriverTooOld, InternalError, NoDevice
from kvstore.types import align_up

_PINNED_BYTES = 2 << 20
"""Memory is pinned for drives by pages of the GPU's, 64 KiB and more: none is to be anybody else's
too."""

_RESULT_BYTES = 256
"""Of a slot, pinned: a checksum's words, or bytes too few for the kernels."""


def bytes_taken(slots: int, slot_bytes: int) -> int:
    """Of the GPU's memory, by so many slots: what drives write into, and sums."""
    sums_bytes = slots * checksum_kernel.sums_bytes(align_up(slot_bytes))
    return _pinned_bytes(slots, slot_bytes) + sums_bytes


def _pinned_bytes(slots: int, slot_bytes: int) -> int:
    return align_up(slots * align_up(slot_bytes), _PINNED_BYTES)


class CuFileStraight:
    """`device.vram.Straight` of a real GPU."""

    def __init__(self, driver: Driver, slots: int, slot_bytes: int) -> None:
        """Raises `DeviceError`, with the reason."""
        self._driver = driver
        self._slot_bytes = slot_bytes = align_up(slot_bytes)
        self._stuck = self._closed = False
        if not driver.can_checksum():
            raise DeviceError("the kernels that take checksums cannot be compiled here")
        with ExitStack() as undo:
            driver.enter()
            self._cufile = _library.open()
            undo.callback(_library.close)
            self._sums_bytes = checksum_kernel.sums_bytes(slot_bytes)
            pinned_bytes = _pinned_bytes(slots, slot_bytes)
            self._slots = driver.allocate(pinned_bytes)
            undo.callback(_quietly, driver.free, self._slots)
            self._sums = driver.allocate(slots * self._sums_bytes)
            undo.callback(_quietly, driver.free, self._sums)
            self._results = driver.allocate_host(slots * _RESULT_BYTES)
            undo.callback(_quietly, driver.free_host, self._results)
            self._streams = [driver.new_stream() for _ in range(slots)]
            with translated(self._cufile):
                self._cufile.buf_register(self._slots, pinned_bytes, 0)
            undo.callback(self._deregister)
            self._undo = undo.pop_all()

    def fill(self, slot: int, file: StraightFile, offset: int, nbytes: int) -> int:
        pages = align_up(nbytes)
        if pages > self._slot_bytes:
            raise InternalError(f"{nbytes} bytes for a slot of {self._slot_bytes}")
        handle = _library.handle(file)
        self._driver.enter()
        done, start = 0, slot * self._slot_bytes
        with translated(self._cufile):
            while done < pages:
                got = self._cufile.read(
                    handle, self._slots, pages - done, offset + done, start + done
                )
                if got is None:
                    raise DriverTooOld("these cuda-bindings do not tell how much was read: 13.1 do")
                if got <= 0:
                    raise DeviceError(f"cuFile read {done} of {pages} bytes ({got})")
                done += got
        return self._checksum(slot, nbytes)

    def deliver(self, slot: int, to: Made, offset: int, nbytes: int) -> None:
        self._copy(slot, to.address + offset, nbytes)

    def close(self) -> None:
        if self._closed or self._stuck:
            return
        # What gives memory back waits for the GPU for as long as that takes, with locks that other
        # threads need. So it is seen first that the GPU is at work.
        try:
            self._copy(0, self._results, 1)
        except DeviceStuck:
            raise
        except DeviceError:
            pass
        self._closed = True
        self._undo.close()

    def _checksum(self, slot: int, nbytes: int) -> int:
        result = self._results + slot * _RESULT_BYTES
        if nbytes <= checksum_kernel.SHORT:
            self._copy(slot, result, nbytes)
            return xxhash.xxh3_64_intdigest(memory_at(result, nbytes))
        with self._waited_for(slot) as stream:
            self._driver.run_checksum(
                self._slots + slot * self._slot_bytes,
                nbytes,
                self._sums + slot * self._sums_bytes,
                result,
                stream,
            )
        words = np.frombuffer(memory_at(result, checksum_kernel.RESULT_BYTES), np.uint64)
        return checksum_kernel.merged(words.tolist(), nbytes)

    def _copy(self, slot: int, to: int, nbytes: int) -> None:
        """The beginning of a slot."""
        if not nbytes:
            return
        ends = (to, self._slots + slot * self._slot_bytes, nbytes)
        to_, from_, size = (np.array([each], np.uint64) for each in ends)
        with self._waited_for(slot) as stream:
            self._driver.copy(to_, from_, size, stream)

    @contextlib.contextmanager
    def _waited_for(self, slot: int) -> Iterator[Any]:
        stream = self._streams[slot]
        try:
            with waited_for(self._driver, stream):
                yield stream
        except DeviceStuck:
            # What is under way for ever keeps its memory.
            self._stuck = True
            raise

    def _deregister(self) -> None:
        with contextlib.suppress(DeviceError), translated(self._cufile):
            self._driver.enter()
            self._cufile.buf_deregister(self._slots)


def _quietly(free: Callable[[int], None], address: int) -> None:
    # A GPU that is lost has taken it along.
    with contextlib.suppress(DeviceError):
        free(address)


class _Library:
    """cuFile, while anybody uses it, and the files that are registered with it. Thread-safe."""

    def __init__(self) -> None:
        # Apart: the driver may take its time to open, and who closes a file is a drive's thread.
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._users = 0
        self._cufile: Any = None
        self._handles: dict[StraightFile, int] = {}
        self._followed: set[StraightFile] = set()
        """Those that tell when they are closed: once is enough."""

    def open(self) -> Any:
        """`cuda.bindings.cufile`; for each, `close`. Raises `DeviceError`."""
        with self._opening:
            if not self._users:
                self._cufile = _load()
                with translated(self._cufile):
                    way_round = self._cufile.BoolConfigParameter.PROPERTIES_ALLOW_COMPAT_MODE
                    self._cufile.set_parameter_bool(int(way_round), False)
                    self._cufile.driver_open()
            self._users += 1
            return self._cufile

    def close(self) -> None:
        with self._opening:
            self._users -= 1
            if self._users:
                return
            with self._lock:
                for file in list(self._handles):
                    self._deregister(file)
            with contextlib.suppress(DeviceError), translated(self._cufile):
                self._cufile.driver_close()

    def handle(self, file: StraightFile) -> int:
        """Of a file that stays open meanwhile. Raises `DeviceError`."""
        with self._lock:
            handle = self._handles.get(file)
            if handle is None:
                handle = self._handles[file] = self._register(file)
                if file not in self._followed:
                    self._followed.add(file)
                    file.before_close(partial(self._forget, file))
            return handle

    def _register(self, file: StraightFile) -> int:
        if file.descriptor is None:
            raise DeviceError("a file without O_DIRECT cannot be read straight")
        with translated(self._cufile):
            described = self._cufile.Descr()
            described.type = self._cufile.FileHandleType.OPAQUE_FD
            described.handle.fd = file.descriptor
            described.fs_ops = 0
            handle: int = self._cufile.handle_register(described.ptr)
        return handle

    def _forget(self, file: StraightFile) -> None:
        with self._lock:
            self._followed.discard(file)
            self._deregister(file)

    def _deregister(self, file: StraightFile) -> None:
        handle = self._handles.pop(file, None)
        if handle is not None:
            with contextlib.suppress(DeviceError), translated(self._cufile):
                self._cufile.handle_deregister(handle)


_library = _Library()


def _load() -> Any:
    try:
        from cuda.bindings import cufile
    except ImportError as error:
        raise NoDevice(f"there is no cuFile: {error}") from error
    return cufile


@contextlib.contextmanager
def translated(cufile: Any) -> Iterator[None]:
    """What cuFile raises is a `DeviceError`."""
    try:
        yield
    # RuntimeError: there is no library, or not this function in it. ValueError: an errno, which
    # its own error takes for a status.
    except (cufile.cuFileError, RuntimeError, ValueError, OSError) as error:
        raise DeviceError(f"cuFile does not read straight here: {error}") from error
