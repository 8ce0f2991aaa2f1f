"""Whose a server is: no other user's is taken for this user's own.

The default socket may be under a directory that everybody can write to, where whoever
comes first makes what is missing. Directories, files and listeners found by such a path
alone count only where they are this user's or root's, who could do anything anyway.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from kvstore.errors import Unavailable, Untrusted

_UCRED = struct.Struct("iII")
_OTHERS_WRITE = 0o022


def make_directory(directory: Path, socket_mode: int = 0o600) -> None:
    """A directory that lets in whom a socket of `socket_mode` lets in, and nobody else.

    One that is there stays as it is. Raises `OSError`, and `Untrusted` for another user's.
    """
    directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        check_directory(directory)
        return
    group = 0o010 if socket_mode & 0o070 else 0
    others = 0o001 if socket_mode & 0o007 else 0
    directory.chmod(0o700 | group | others)


def check_directory(directory: Path, *, private: bool = False) -> None:
    """Raises `Untrusted` for a directory, or a link to one, that is another user's, and where
    `private` for one that others may write to; `Unavailable` where there is none."""
    try:
        # Who made a link can make it lead elsewhere.
        owners = {directory.lstat().st_uid, (found := directory.stat()).st_uid}
    except OSError as error:
        raise Unavailable(f"no server: {directory}: {error.strerror}") from error
    if not all(map(_trusted, owners)):
        raise Untrusted(f"directory {directory} belongs to another user")
    if private and found.st_mode & _OTHERS_WRITE:
        raise Untrusted(f"others can write to directory {directory}: chmod go-w it")


def check_listener(connection: socket.socket, path: str) -> None:
    """Raises `Untrusted` where the other end of a Unix socket, found at `path`, is neither
    this user's nor root's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if not _trusted(uid):
        raise Untrusted(f"the server at {path} is user {uid}'s, not this user's own")


def open_file(path: str, flags: int) -> int:
    """Descriptor of a file of this user's, made where `flags` say so and then for nobody else.

    Raises `OSError`, and `Untrusted` for a file of others or of other names too. Never waits.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not _trusted(found.st_uid):
        os.close(descriptor)
        raise Untrusted(f"{path} is in the way: not a file of this user's alone")
    return descriptor


def _trusted(uid: int) -> bool:
    return uid in (0, os.geteuid())
