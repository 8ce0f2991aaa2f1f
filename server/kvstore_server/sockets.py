"""The server's names in the file system: who may serve at a path.

gRPC removes whatever it finds at a Unix socket's path before it binds, a live
server's socket included. So the path is claimed first: an flock on
`<socket>.serving`, which the kernel drops with its holder however it dies, says
that a server is alive; whatever sockets are there without it are left over from a
dead one, unless somebody answers behind them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.config import ATTACH_SUFFIX
from kvstore.errors import AddressInUse, AddressUnusable, Unavailable
from kvstore.local.ownership import make_directory

CLAIM_SUFFIX = ".serving"
ATTACH_BACKLOG = 4096
"""What a kernel allows by default (`net.core.somaxconn`): beyond it connects are refused
at once, and all processes of a host may come in the same moment."""


class SocketClaim:
    """The exclusive right to serve at a path, until `release`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.attach_path = Path(f"{path}{ATTACH_SUFFIX}")
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, mode: int) -> SocketClaim:
        """Claim `path`; a missing directory is made, closed to whom `mode` excludes.
        Raises `AddressInUse`, `AddressUnusable`."""
        try:
            make_directory(path.parent, mode)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(f"{path}{CLAIM_SUFFIX}", flags, 0o600)
        except Unavailable as error:
            raise AddressUnusable(str(error)) from error
        except OSError as error:
            raise AddressUnusable(f"socket {path}: {error.strerror}") from error
        claim = cls(path, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_stale(claim.path, socket.SOCK_STREAM)
            _remove_stale(claim.attach_path, socket.SOCK_SEQPACKET)
        except BlockingIOError:
            os.close(descriptor)
            raise AddressInUse(f"socket {path}: another server is serving there") from None
        except OSError as error:
            os.close(descriptor)
            raise AddressUnusable(f"socket {path}: {error.strerror}") from error
        except (AddressInUse, AddressUnusable):
            os.close(descriptor)
            raise
        return claim

    def release(self) -> None:
        """Remove what is left of the sockets, then let others have the path."""
        for path in (self.path, self.attach_path):
            path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise AddressUnusable(f"{path} is in the way and is not a socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) in (0, errno.EAGAIN, errno.EPROTOTYPE):
            raise AddressInUse(f"socket {path}: somebody else is serving there")
    path.unlink()


@contextmanager
def creation_mode(mode: int) -> Iterator[None]:
    """Files made meanwhile get at most the permissions `mode`."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


def listen_seqpacket(path: Path, mode: int) -> socket.socket:
    """A listening, non-blocking SOCK_SEQPACKET socket. Raises `AddressUnusable`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.setblocking(False)
        with creation_mode(mode):
            listener.bind(str(path))
        path.chmod(mode)
        listener.listen(ATTACH_BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressUnusable(f"socket {path}: {error.strerror}") from error
    return listener


def check_port_free(host: str, port: int) -> None:
    """Raises `AddressInUse` or `AddressUnusable` with the reason, which gRPC hides."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise port_error(host, port, error) from error


def port_error(host: str, port: int, error: OSError) -> AddressInUse | AddressUnusable:
    if error.errno == errno.EADDRINUSE:
        return AddressInUse(f"{host}:{port} is in use by another process")
    return AddressUnusable(f"{host}:{port}: {os.strerror(error.errno or 0)}")
