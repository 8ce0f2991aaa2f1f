"""A client's map of the server's memory, one extent at a time.

An address is `extent * extent_bytes + offset`. An extent is mapped when the first
address in it is used, shared and with its page table filled, so that copies take
no page faults. One writable mapping serves readers too: they get read-only views
of it.

Lifetime. A view keeps its mapping alive: dropping an extent, or closing the
arena, only takes the mapping out of this table, and the memory is unmapped when
the last view of it is gone. So a copy in another thread never loses its memory
under its feet. What a view *means* is another matter: bytes of a slot are only
the block's while its lease lasts.

Mapping goes through libc rather than the `mmap` module because that keeps a
descriptor open for each mapping, and holds the interpreter lock while the kernel
fills the page table.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable

from kvstore.errors import BadRequest, InternalError, Unavailable
from kvstore.types import GPU_ONLY

DEFAULT_MAX_EXTENTS = 4096
"""Extents mapped at once. Bounds address space and page tables, not memory: the
memory is the server's."""

_MAP_POPULATE = 0x8000
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 0x0002
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

FetchExtent = Callable[[int], tuple[int, int]]
"""extent -> (descriptor, bytes). The descriptor becomes the arena's to close."""


class Arena:
    """Views of the server's memory by address.

    Safe to use from several threads; only the first use of an extent takes a
    lock. `fetch` gets the extents' descriptors and may raise what it likes.
    """

    def __init__(
        self, extent_bytes: int, fetch: FetchExtent, *, max_extents: int = DEFAULT_MAX_EXTENTS
    ) -> None:
        if extent_bytes < 1 or extent_bytes & (extent_bytes - 1):
            raise BadRequest(f"extent_bytes must be a power of two, not {extent_bytes}")
        if max_extents < 1:
            raise BadRequest("an arena maps at least one extent")
        self.extent_bytes = extent_bytes
        self._shift = extent_bytes.bit_length() - 1
        self._mask = extent_bytes - 1
        self._fetch = fetch
        self._max_extents = max_extents
        self._lock = threading.Lock()
        self._closed = False
        # extent -> (read-only view, writable view) of all of it, oldest first.
        self._mapped: dict[int, tuple[memoryview, memoryview]] = {}

    @property
    def mapped_extents(self) -> int:
        return len(self._mapped)

    def locate(self, address: int) -> tuple[int, int]:
        """(extent, offset) of an address."""
        return address >> self._shift, address & self._mask

    def view(self, address: int, nbytes: int, *, writable: bool) -> memoryview:
        """`nbytes` of memory at `address`, which must not pass its extent's end.

        The first view into an extent maps it, which asks the server. Raises
        `BadRequest` for a range outside one extent or in no extent, `Unavailable` when the arena
        is closed or the machine refuses to map, and what `fetch` raises.
        """
        view = self.view_mapped(address, nbytes, writable=writable)
        if view is None:
            offset = address & self._mask
            views = self._map(address >> self._shift)
            view = views[writable][offset : offset + nbytes]
        return view

    def views(self, addresses: Iterable[int], nbytes: int, *, writable: bool) -> list[memoryview]:
        """Like `view` for each of many addresses."""
        mapped, shift, mask = self._mapped, self._shift, self._mask
        last = self.extent_bytes - nbytes
        views = []
        for address in addresses:
            offset = address & mask
            if not 0 <= address < GPU_ONLY or nbytes < 0 or offset > last:
                raise _unusable(address, offset, nbytes)
            pair = mapped.get(address >> shift) or self._map(address >> shift)
            views.append(pair[writable][offset : offset + nbytes])
        return views

    def view_mapped(self, address: int, nbytes: int, *, writable: bool) -> memoryview | None:
        """Like `view`, but None where the extent is not mapped yet. Never waits."""
        offset = address & self._mask
        end = offset + nbytes
        if not 0 <= address < GPU_ONLY or nbytes < 0 or end > self.extent_bytes:
            raise _unusable(address, offset, nbytes)
        views = self._mapped.get(address >> self._shift)
        return None if views is None else views[writable][offset:end]

    def drop(self, extent: int) -> None:
        """Let go of an extent. Views that exist stay valid. Idempotent."""
        with self._lock:
            self._mapped.pop(extent, None)

    def close(self) -> None:
        """Let go of every extent; later views raise `Unavailable`. Idempotent."""
        with self._lock:
            self._closed = True
            self._mapped.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError where the table breaks its own rules."""
        with self._lock:
            if len(self._mapped) > self._max_extents:
                raise AssertionError("more extents are mapped than allowed")
            if self._closed and self._mapped:
                raise AssertionError("a closed arena still holds extents")
            for extent, (readable, writable) in self._mapped.items():
                if not readable.readonly or writable.readonly:
                    raise AssertionError(f"extent {extent}: the views are mixed up")
                if {readable.nbytes, writable.nbytes} != {self.extent_bytes}:
                    raise AssertionError(f"extent {extent}: a view has the wrong size")

    def _map(self, extent: int) -> tuple[memoryview, memoryview]:
        with self._lock:
            if self._closed:
                raise Unavailable("detached from the server's memory")
            views = self._mapped.get(extent)
            if views is not None:
                return views
            descriptor, nbytes = self._fetch(extent)
            try:
                writable = _map_file(descriptor, nbytes, self.extent_bytes)
            finally:
                os.close(descriptor)
            while len(self._mapped) >= self._max_extents:
                del self._mapped[next(iter(self._mapped))]
            views = (writable.toreadonly(), writable)
            self._mapped[extent] = views
            return views


def _unusable(address: int, offset: int, nbytes: int) -> BadRequest:
    if address >= GPU_ONLY:
        return BadRequest("a block that is in a GPU's memory alone is not in the server's")
    return BadRequest(f"{nbytes} bytes at offset {offset} pass the extent's end")


def _map_file(descriptor: int, nbytes: int, expected_bytes: int) -> memoryview:
    """All of a file as writable memory that is unmapped with its last view."""
    # A file that is shorter, or could become so, would turn a copy into SIGBUS.
    seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
    if not seals & _F_SEAL_SHRINK:
        raise InternalError("the server handed out memory that may shrink")
    if nbytes != expected_bytes or os.fstat(descriptor).st_size != expected_bytes:
        raise InternalError(f"the server handed out an extent that is not {expected_bytes} bytes")
    address = _libc.mmap(
        None,
        expected_bytes,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_SHARED | _MAP_POPULATE,
        descriptor,
        0,
    )
    if address is None or address == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise Unavailable(f"the machine refuses to map the server's memory: {reason}")
    pages = (ctypes.c_ubyte * expected_bytes).from_address(address)
    unmapping = weakref.finalize(pages, _libc.munmap, address, expected_bytes)
    # At interpreter exit another thread may still be copying; the kernel unmaps.
    unmapping.atexit = False
    return memoryview(pages).cast("B")
