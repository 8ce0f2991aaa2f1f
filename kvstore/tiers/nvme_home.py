"""The data directory: whose it is, which version wrote it, and its secret.

LOCK        held (flock) by the one server that uses the directory
VERSION     the version of everything beside it
secret      32 random bytes, from which tenants' keys are derived
layouts     what tenants' layouts are, with a checksum
index/      LMDB
segments/   one file a segment
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

import xxhash

from kvstore.errors import DataError, DataInUse, DataUnusable, DataVersion

_log = logging.getLogger(__name__)

DATA_VERSION = 3
SECRET_BYTES = 32
SMALL_FILES_BYTES = 2 << 20
"""Kept for LOCK, VERSION, secret, layouts, LMDB's lock file and the directories."""

_LAYOUTS_BYTES = SMALL_FILES_BYTES // 4  # While it is replaced, there are two.

Layouts = dict[tuple[str, bytes], dict[str, object]]
"""(tenant, layout id) -> fields of the LayoutSpec."""

_VERSION_PREFIX = "kvstore-data "
_UNCLAIMED = frozenset(("LOCK", "VERSION.tmp", "lost+found"))
"""What a directory may hold and still be taken for a new one."""

_ADVICE = {
    errno.EACCES: "give this user the right to read and write there, or choose another directory",
    errno.EPERM: "give this user the right to read and write there, or choose another directory",
    errno.EROFS: "mount it writable, or choose another directory",
    errno.ENOTDIR: "choose a directory, or remove the file that is in the way",
    errno.EEXIST: "choose a directory, or remove the file that is in the way",
    errno.EISDIR: "remove the directory that is in the way, or choose another",
    errno.ENOSPC: "free some space, or choose another directory",
    errno.EDQUOT: "free some space, or choose another directory",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use larger extents",
}


def unusable(path: Path, error: OSError) -> DataUnusable:
    """The typed error for `error`, with what to do about it."""
    advice = _ADVICE.get(error.errno or 0, "choose another directory")
    there = str(error.filename or path)
    where = "" if there == str(path) else f" ({there})"
    return DataUnusable(f"data directory {path}: {error.strerror}{where}; {advice}")


class DataHome:
    """An open data directory, locked against every other server."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.index = path / "index"
        self.segments = path / "segments"
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> DataHome:
        """Take the directory, made if it is not there. Raises `DataInUse`,
        `DataVersion`, `DataUnusable`."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_foreign(path)
            home = cls(path, _lock(path))
        except OSError as error:
            raise unusable(path, error) from error
        try:
            home._check_version()
            home.index.mkdir(mode=0o700, exist_ok=True)
            home.segments.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            home.close()
            raise unusable(path, error) from error
        except DataError:
            home.close()
            raise
        return home

    def close(self) -> None:
        os.close(self._lock_fd)

    def secret(self) -> bytes:
        """32 bytes, the same for the directory's whole life. Raises `DataUnusable`."""
        file = self.path / "secret"
        try:
            if not file.exists():
                if any(self.segments.glob("*.seg")):
                    _log.error("%s is gone: what is stored is not found again", file)
                _write_durably(file, secrets.token_bytes(SECRET_BYTES))
            secret = file.read_bytes()
        except OSError as error:
            raise unusable(file, error) from error
        if len(secret) != SECRET_BYTES:
            raise DataUnusable(
                f"{file} is damaged; remove the data directory to start with an empty one"
            )
        return secret

    def read_layouts(self) -> Layouts:
        """What `write_layouts` kept last. Raises `DataUnusable`."""
        file = self.path / "layouts"
        try:
            data = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise unusable(file, error) from error
        checksum, _, text = data.partition(b"\n")
        if not data:
            return {}
        if checksum != _checksum(text):
            _log.error("%s is damaged; what is stored in these layouts is lost", file)
            return {}
        return {(tenant, bytes.fromhex(name)): spec for tenant, name, spec in json.loads(text)}

    def layouts_sound(self) -> bool:
        """Raises OSError where there are none."""
        checksum, _, text = (self.path / "layouts").read_bytes().partition(b"\n")
        return checksum == _checksum(text)

    def write_layouts(self, layouts: Layouts) -> None:
        """All of them, or those of before. Durable. Raises OSError."""
        entries = [(tenant, name.hex(), spec) for (tenant, name), spec in layouts.items()]
        text = json.dumps(entries).encode()
        if len(text) > _LAYOUTS_BYTES:
            raise OSError(errno.ENOSPC, "there are too many layouts")
        _write_durably(self.path / "layouts", _checksum(text) + b"\n" + text)

    def _check_version(self) -> None:
        file = self.path / "VERSION"
        if not file.exists():
            _write_durably(file, f"{_VERSION_PREFIX}{DATA_VERSION}\n".encode())
        with file.open("rb") as stream:
            text = stream.read(64).decode(errors="replace").strip()
        if text != f"{_VERSION_PREFIX}{DATA_VERSION}":
            found = text.removeprefix(_VERSION_PREFIX) or "unknown"
            raise DataVersion(
                f"data directory {self.path} has version {found!r}, this server needs "
                f"{DATA_VERSION}; use the server that wrote it, or another directory, or, as "
                f"it is a cache, start over: rm -r {self.path}"
            )


def _checksum(data: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(data).encode()


def _refuse_foreign(path: Path) -> None:
    """Before anything is put there. Raises `DataUnusable`, OSError."""
    names = set(os.listdir(path))
    strange = sorted(names - _UNCLAIMED)
    if not strange or "VERSION" in names:
        return
    if {"index", "secret", "segments"} <= names:
        raise DataUnusable(
            f"data directory {path} has lost its VERSION file; choose another directory, or, as "
            f"it is a cache, start over: rm -r {path}"
        )
    raise DataUnusable(
        f"data directory {path} holds other files ({strange[0]!r}); "
        "choose an empty or a new directory"
    )


def _lock(path: Path) -> int:
    """The descriptor that holds the lock; closing it gives the lock back."""
    fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        who = f" (process {holder})" if holder.isdigit() else ""
        raise DataInUse(
            f"data directory {path} is used by another server{who}; "
            "stop that one, or choose another directory"
        ) from error
    except OSError:
        os.close(fd)
        raise
    with suppress(OSError):  # It is for people: a full disk is used all the same.
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _write_durably(file: Path, data: bytes) -> None:
    """All of `data` under the name, or no such file. Mode 0600."""
    partial = file.with_name(file.name + ".tmp")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        # A disk that is nearly full takes a part, and only then says that it is full.
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    partial.rename(file)
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
