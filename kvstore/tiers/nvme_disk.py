"""What the NVMe tier asks of a disk, and the disk itself: files in a directory.

It is all that is asked, so whatever else answers to it (`faulty.FaultyDisk`) can
take the disk's place, with every fault a disk can have.

Files are of fixed size and preallocated; they are read and written in whole pages
at page boundaries, with O_DIRECT where that works. A write is durable after
`fdatasync` of its file, a name after `sync_names`. Every method raises OSError.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvstore.tiers.descriptors import leave_some
from kvstore.tiers.nvme_home import sync_directory
from kvstore.types import ALIGNMENT

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE))
"""How a disk, or the machine, says that it has no room for more; EFBIG is of a limit on files'
sizes (`ulimit -f`)."""


class DiskFile(Protocol):
    """Also a `device.vram.StraightFile`."""

    nbytes: int

    @property
    def descriptor(self) -> int | None:
        """That of a file with O_DIRECT; None where there is none, or where what is behind it is
        not what is read here."""
        ...

    def before_close(self, call: Callable[[], None]) -> None:
        """`call` once, before the descriptor may be another file's. Not called where there is
        no descriptor."""
        ...

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        """Bytes written, maybe fewer than asked for."""
        ...

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        """Bytes read, maybe fewer than asked for; 0 at the end of the file."""
        ...

    def fdatasync(self) -> None: ...
    def close(self) -> None: ...


class Disk(Protocol):
    def names(self) -> list[str]: ...

    def create(self, name: str, nbytes: int) -> DiskFile:
        """A new file with all its room taken; what was there under its name is gone.
        When it raises, there is no such file."""
        ...

    def open(self, name: str) -> DiskFile: ...
    def remove(self, name: str) -> None: ...
    def sync_names(self) -> None: ...


class DirectoryFile:
    def __init__(self, fd: int, nbytes: int, *, direct: bool) -> None:
        self.nbytes = nbytes
        self.descriptor = fd if direct else None
        self._fd = fd
        self._before_close: list[Callable[[], None]] = []

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        return os.pwritev(self._fd, buffers, offset)

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(self._fd, buffers, offset)

    def fdatasync(self) -> None:
        os.fdatasync(self._fd)

    def before_close(self, call: Callable[[], None]) -> None:
        self._before_close.append(call)

    def close(self) -> None:
        self.descriptor = None
        while self._before_close:
            self._before_close.pop()()
        os.close(self._fd)


class Directory:
    """A `Disk`."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        """`direct=False` goes through the page cache."""
        self.path = path
        self._direct = direct
        self._flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)

    def names(self) -> list[str]:
        return os.listdir(self.path)

    def create(self, name: str, nbytes: int) -> DirectoryFile:
        path = self.path / name
        path.unlink(missing_ok=True)
        fd = os.open(path, self._flags | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            leave_some(fd)
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return DirectoryFile(fd, nbytes, direct=self._direct)

    def open(self, name: str) -> DirectoryFile:
        fd = os.open(self.path / name, self._flags)
        return DirectoryFile(fd, os.fstat(fd).st_size, direct=self._direct)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def sync_names(self) -> None:
        sync_directory(self.path)


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True  # What is there already needs no room to be written.
        raise
    finally:
        page.close()
        probe.unlink(missing_ok=True)


def write_all(file: DiskFile, buffers: list[memoryview], offset: int) -> None:
    """Write the pieces in order from `offset` on, in one call unless the kernel
    stops early. Raises OSError."""
    left = sum(map(len, buffers))
    while left:
        done = file.pwritev(buffers, offset)
        if done <= 0:
            raise OSError(errno.EIO, "the write made no progress")
        left -= done
        offset += done
        if left:
            buffers = _after(buffers, done)


def read_all(file: DiskFile, buffers: list[memoryview], offset: int) -> bool:
    """Fill the pieces in order; False when the file ends before. Raises OSError."""
    left = sum(map(len, buffers))
    while left:
        done = file.preadv(buffers, offset)
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
