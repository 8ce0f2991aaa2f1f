"""DRAM as extents of shared memory that local clients map.

Each extent is one memfd, sealed against resizing: a client that maps it can
neither shrink it under the server's feet (SIGBUS) nor grow it past the limit.

Memory that was never touched costs a page fault for each 4 KiB of the first
write, six times slower than the copy itself. So a thread makes the next few
extents ahead of need, their pages already there. Those spares count:

    open + spare + being made or given back  <=  capacity

`close_extent` punches a hole through the whole memfd before it closes it: the
memory returns to the machine at once, even if a client still maps the extent
(it then reads zeros). A memfd is used for one extent only and never again, so
what one tenant wrote cannot show in what another is given.

A view handed out keeps its mapping alive: after `close_extent` it reads zeros,
and it is unmapped when the last view goes. Nothing is ever unmapped under a
live view.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from collections import deque

from kvstore.errors import InternalError, TierFailed, TierFull
from kvstore.tiers.descriptors import leave_some

_log = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_HUGE_PAGE_BYTES = 2 << 20
_POPULATE_BYTES = 4 << 20
_SPARES_NICE = 10
"""Populated at a time: the kernel holds a lock of the whole process meanwhile."""

_NO_MEMORY = frozenset(
    (errno.ENOMEM, errno.ENOSPC, errno.EFAULT, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
)
"""How the machine says that it has no more to give. EFAULT is what populating
answers when the fault would have been a SIGBUS."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class _Extent:
    """One memfd and its mapping, every page present."""

    __slots__ = ("fd", "mapping", "view")

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("kvstore-extent", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            leave_some(self.fd)
            os.ftruncate(self.fd, nbytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self.mapping = mmap.mmap(self.fd, nbytes)
            _advise(self.mapping, nbytes)
            _populate(self.mapping, self.fd, nbytes)
        except OSError:
            os.close(self.fd)
            raise
        self.view = memoryview(self.mapping)

    def give_back(self, nbytes: int) -> None:
        """Return the memory, then drop the mapping or leave it to its last view."""
        if _libc.fallocate(self.fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, 0, nbytes) != 0:
            code = ctypes.get_errno()
            _log.error("a closed extent's memory was not returned: %s", os.strerror(code))
        os.close(self.fd)
        self.view.release()
        # Where a view is still out, it holds the mapping, which goes with it.
        with contextlib.suppress(BufferError):
            self.mapping.close()


def _advise(mapping: mmap.mmap, nbytes: int) -> None:
    # Blocks are as good as the prompts they were computed from: not for core dumps.
    mapping.madvise(mmap.MADV_DONTDUMP)
    if nbytes >= _HUGE_PAGE_BYTES:
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # A kernel without huge pages.
                raise


def _populate(mapping: mmap.mmap, fd: int, nbytes: int) -> None:
    """Make every page present and mapped, without holding the GIL."""
    anchor = ctypes.c_char.from_buffer(mapping)
    start = ctypes.addressof(anchor)
    del anchor  # It would keep the mapping from closing.
    for offset in range(0, nbytes, _POPULATE_BYTES):
        piece = min(_POPULATE_BYTES, nbytes - offset)
        if _libc.madvise(start + offset, piece, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # Before Linux 5.14: present, but not yet mapped.
                os.posix_fallocate(fd, 0, nbytes)
                return
            raise OSError(code, os.strerror(code))


class DramTier:
    """A `MemoryTier` of sealed memfds.

    `extent_bytes`: a multiple of the page size. `capacity_bytes`: never
    exceeded, rounded down to whole extents. `spare_extents`: kept ready ahead
    of need, within the capacity; 0 for none (and no thread).
    """

    def __init__(self, extent_bytes: int, capacity_bytes: int, *, spare_extents: int = 4) -> None:
        if extent_bytes <= 0 or extent_bytes % mmap.PAGESIZE:
            raise InternalError(f"an extent is whole pages of {mmap.PAGESIZE}, not {extent_bytes}")
        self.extent_bytes = extent_bytes
        self._max_extents = capacity_bytes // extent_bytes
        self._spare_target = spare_extents
        self._open: dict[int, _Extent] = {}
        self._spares: deque[_Extent] = deque()
        self._in_flight = 0
        self._starved = False
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if spare_extents > 0:
            self._thread = threading.Thread(
                target=self._keep_spares, name="kvstore-dram-spares", daemon=True
            )
            self._thread.start()

    @property
    def usable_bytes(self) -> int:
        """The capacity in whole extents."""
        return self._max_extents * self.extent_bytes

    @property
    def held_bytes(self) -> int:
        """Memory taken from the machine now, spares included. Does not block."""
        with self._changed:
            return self._held() * self.extent_bytes

    @property
    def spare_extents(self) -> int:
        """Extents that are ready to be opened at once. Does not block."""
        return len(self._spares)

    def open_extent(self, extent: int) -> None:
        """Instant while a spare is there; otherwise as long as the machine takes
        to find the memory. Raises `TierFull` at the capacity, or when refused."""
        with self._changed:
            if extent in self._open:
                raise InternalError(f"extent {extent} is open already")
            made = self._take_spare()
            if made is not None:
                self._open[extent] = made
                self._changed.notify_all()
                return
            self._in_flight += 1
        try:
            made = self._make()
        finally:
            with self._changed:
                self._in_flight -= 1
                if made is not None:
                    self._open[extent] = made
                    self._starved = False
                self._changed.notify_all()

    def _take_spare(self) -> _Extent | None:
        """A spare; None when there is room to make one. Called with the lock held."""
        while True:
            if self._stopping:
                raise TierFull("memory is closed")
            if self._spares:
                return self._spares.popleft()
            if self._held() < self._max_extents:
                return None
            if not self._in_flight:
                raise TierFull(f"all {self._max_extents} extents of memory are open")
            self._changed.wait()

    def close_extent(self, extent: int) -> None:
        with self._changed:
            closed = self._open.pop(extent, None)
            if closed is None:
                raise InternalError(f"extent {extent} is not open")
            self._in_flight += 1
        closed.give_back(self.extent_bytes)
        with self._changed:
            self._in_flight -= 1
            self._starved = False
            self._changed.notify_all()

    def view(self, address: int, nbytes: int) -> memoryview:
        extent, offset = divmod(address, self.extent_bytes)
        if offset + nbytes > self.extent_bytes:
            raise InternalError("a slot does not cross extents")
        held = self._open.get(extent)
        if held is None:
            raise InternalError(f"extent {extent} is not open")
        return held.view[offset : offset + nbytes]

    def extent_fd(self, extent: int) -> int:
        """The extent's memfd, valid until the extent is closed."""
        held = self._open.get(extent)
        if held is None:
            raise InternalError(f"extent {extent} is not open")
        return held.fd

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            leftover = [*self._open.values(), *self._spares]
            self._open.clear()
            self._spares.clear()
        for extent in leftover:
            extent.give_back(self.extent_bytes)

    def check_integrity(self) -> None:
        """Raise `InternalError` if more is held than the capacity allows."""
        with self._changed:
            if self._in_flight < 0 or self._held() > max(self._max_extents, 0):
                raise InternalError("more memory is held than the capacity")
            if len({held.fd for held in self._open.values()}) != len(self._open):
                raise InternalError("two extents share a memfd")

    def _held(self) -> int:
        return len(self._open) + len(self._spares) + self._in_flight

    def _make(self) -> _Extent:
        try:
            return _Extent(self.extent_bytes)
        except OSError as error:
            code = error.errno or 0
            what = f"the machine gave no memory for an extent: {error.strerror}"
            if code in _NO_MEMORY:
                raise TierFull(what) from error
            raise TierFailed(what, code) from error

    def _wants_spare(self) -> bool:
        return (
            not self._starved
            and len(self._spares) < self._spare_target
            and self._held() < self._max_extents
        )

    def _keep_spares(self) -> None:
        # On Linux a thread has a priority of its own: zeroing memory ahead of need
        # must not take a core from an engine that is computing.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SPARES_NICE)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._wants_spare())
                if self._stopping:
                    return
                self._in_flight += 1
            made: _Extent | None = None
            try:
                made = self._make()
            except (TierFull, TierFailed) as error:
                # Whoever opens the next extent tries again and gets the error.
                _log.warning("no spare extent: %s", error)
            with self._changed:
                self._in_flight -= 1
                if made is None:
                    self._starved = True
                else:
                    self._spares.append(made)
                self._changed.notify_all()
