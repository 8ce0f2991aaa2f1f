"""One extent on disk: a preallocated file, read and written past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.types import ALIGNMENT

FILE_SUFFIX = ".kv"


def file_name(extent: int) -> str:
    return f"{extent:08d}{FILE_SUFFIX}"


def extent_of(name: str) -> int | None:
    """The extent that a file of this name holds; None for any other file."""
    stem = name.removesuffix(FILE_SUFFIX)
    if stem == name or not (stem.isascii() and stem.isdigit()):
        return None
    return int(stem) if name == file_name(int(stem)) else None


def direct_io_works(directory: Path) -> bool:
    """Whether files there can be written with O_DIRECT in pages of 4096 bytes."""
    probe = directory / "probe.tmp"
    page = mmap.mmap(-1, ALIGNMENT)
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            return os.pwrite(fd, page, 0) == ALIGNMENT
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        page.close()
        probe.unlink(missing_ok=True)


class ExtentFile:
    """An open extent file.

    Its descriptor is closed when the last transfer in it has ended, not before:
    a descriptor closed under a transfer could by then be another file's.
    """

    def __init__(self, path: Path, slot_bytes: int, fd: int) -> None:
        self.slot_bytes = slot_bytes
        self._path = path
        self._fd = fd
        self._users = 1
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, nbytes: int, slot_bytes: int, *, direct: bool) -> ExtentFile:
        """Make the file with all its room taken. Raises OSError, leaving no file."""
        path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return cls(path, slot_bytes, fd)

    @classmethod
    def reopen(cls, path: Path, slot_bytes: int, *, direct: bool) -> ExtentFile:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        return cls(path, slot_bytes, os.open(path, flags))

    @contextmanager
    def held(self) -> Iterator[int]:
        """The descriptor, sure to stay open meanwhile. Raises OSError once closed."""
        with self._lock:
            if not self._users:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield self._fd
        finally:
            self._leave()

    def close(self) -> None:
        self._leave()

    def remove(self) -> None:
        """Unlink and close: the room is free when the last transfer has ended."""
        self._path.unlink(missing_ok=True)
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self._fd)


def write_all(fd: int, buffers: list[memoryview], offset: int) -> None:
    """Write the pieces in order from `offset` on, in one call unless the kernel
    stops early. Raises OSError."""
    left = sum(map(len, buffers))
    while left:
        done = os.pwritev(fd, buffers, offset)
        if done <= 0:
            raise OSError(errno.EIO, "the write made no progress")
        left -= done
        offset += done
        if left:
            buffers = _after(buffers, done)


def read_all(fd: int, buffers: list[memoryview], offset: int) -> bool:
    """Fill the pieces in order; False when the file ends before. Raises OSError."""
    left = sum(map(len, buffers))
    while left:
        done = os.preadv(fd, buffers, offset)
        if done <= 0:
            return False
        left -= done
        offset += done
        if left:
            buffers = _after(buffers, done)
    return True


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    rest: list[memoryview] = []
    for piece in buffers:
        if done < len(piece):
            rest.append(piece[done:])
        done = max(0, done - len(piece))
    return rest
