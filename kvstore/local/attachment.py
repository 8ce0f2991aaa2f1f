"""A client's end of the attach protocol: a session, and descriptors of what belongs to it."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Sequence

from kvstore.errors import BadRequest, InternalError, KVStoreError, NoTenant, Unavailable
from kvstore.local.attach import (
    MAX_DATAGRAM_BYTES,
    PROTOCOL_VERSION,
    Attached,
    AttachRequest,
    DirectoryReply,
    DirectoryRequest,
    ErrorReply,
    ExtentReply,
    LineReply,
    LineRequest,
    MapRequest,
    Reply,
    Request,
    VramReply,
    VramRequest,
    decode_reply,
    encode_request,
    error_of,
)
from kvstore.local.ownership import check_listener

MAX_UNIX_PATH_BYTES = 107

_CONNECT_RETRY_S = 0.01
_CLOSE_S = 1.0
# Room for two, so that a surplus descriptor is seen and closed.
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(2 * array.array("i").itemsize)


class Attachment:
    """A client's open attach connection: a session, and a source of extents.

    Safe to use from several threads. A forked child does not inherit it: the
    child's copy of the socket is closed in the child, so that the session ends
    with the process that made it.
    """

    def __init__(self, connection: socket.socket, attached: Attached) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        # Replies still to come for requests that gave up waiting: they arrive in
        # order, before the reply to the next request.
        self._owed = 0
        self._closed = False
        self.session = attached.session
        self.epoch = attached.epoch
        self.extent_bytes = attached.extent_bytes
        self.tenant = attached.tenant
        _open_attachments.add(self)

    @classmethod
    def connect(cls, path: str, timeout_s: float, *, own: bool = False) -> Attachment:
        """Attach to the server behind the attach socket `path`.

        Raises `Unavailable` when nobody answers in time, `Untrusted` when it is to be
        this user's `own` server, or root's, and is not, `NoTenant` when the server knows
        no tenant for this user, and what else the server answers.
        """
        deadline = time.monotonic() + timeout_s
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _connect(connection, path, deadline)
            if own:
                check_listener(connection, path)
            _send(connection, AttachRequest(PROTOCOL_VERSION), deadline)
            datagram, descriptors = _receive(connection, deadline)
            _close_all(descriptors)
            reply = decode_reply(datagram)
            if isinstance(reply, ErrorReply):
                raise error_of(reply)
            if not isinstance(reply, Attached):
                raise InternalError("the attach socket did not answer the attach request")
            return cls(connection, reply)
        except BaseException:
            connection.close()
            raise

    def fetch_extent(self, extent: int, timeout_s: float, gpu: str = "") -> tuple[int, int]:
        """(descriptor, bytes) of an extent, of DRAM or a GPU's memory. The caller owns the
        descriptor.

        Raises `BadRequest` for an extent this client may not have, `Unavailable`
        when the server is gone or does not answer in time.
        """
        reply, descriptor = self._fetch(MapRequest(extent, gpu), timeout_s)
        if not isinstance(reply, ExtentReply) or reply.extent != extent:
            os.close(descriptor)
            raise InternalError(f"the attach socket did not hand out extent {extent}")
        return descriptor, reply.nbytes

    def fetch_directory(self, timeout_s: float) -> tuple[int, bytes]:
        """(descriptor, the tenant's secret). The caller owns the descriptor.

        Raises `Unavailable` when the server is gone or does not answer in time.
        """
        reply, descriptor = self._fetch(DirectoryRequest(), timeout_s)
        if not isinstance(reply, DirectoryReply):
            os.close(descriptor)
            raise InternalError("the attach socket did not hand out the directory")
        return descriptor, reply.secret

    def fetch_vram(
        self, gpu: str, layouts: Sequence[bytes], timeout_s: float, reader: bytes = b""
    ) -> tuple[int, int]:
        """(descriptor of the table, bytes of an extent); see `VramRequest`. The caller owns
        the descriptor.

        Raises `BadRequest` where the server has no memory on that GPU, `UnknownLayout`,
        `Unavailable` when the server is gone or does not answer in time.
        """
        reply, descriptor = self._fetch(VramRequest(gpu, tuple(layouts), reader), timeout_s)
        if not isinstance(reply, VramReply):
            os.close(descriptor)
            raise InternalError("the attach socket did not hand out a table of mirrors")
        return descriptor, reply.extent_bytes

    def fetch_line(self, timeout_s: float) -> int:
        """Descriptor of a socket to make this session's calls on. The caller owns it.

        Raises `Unavailable` when the server is gone or does not answer in time,
        `TooMany` when the session has as many as it may.
        """
        reply, descriptor = self._fetch(LineRequest(), timeout_s)
        if not isinstance(reply, LineReply):
            os.close(descriptor)
            raise InternalError("the attach socket did not hand out a line")
        return descriptor

    def _fetch(self, request: Request, timeout_s: float) -> tuple[Reply, int]:
        """The reply, and the one descriptor that comes with it."""
        deadline = time.monotonic() + timeout_s
        # Without a time of its own, which a signal could come after: whoever has the lock
        # has a deadline, and those who had to wait beyond theirs are gone at once.
        with self._lock:
            if self._closed:
                raise Unavailable("detached from the server")
            while self._owed:
                _close_all(_receive(self._socket, deadline)[1])
                self._owed -= 1
            _send(self._socket, request, deadline)
            self._owed += 1
            datagram, descriptors = _receive(self._socket, deadline)
            self._owed -= 1
        try:
            reply = decode_reply(datagram)
            if isinstance(reply, ErrorReply):
                raise error_of(reply)
            if len(descriptors) != 1:
                raise InternalError("the attach socket sent a reply without its descriptor")
        except KVStoreError:
            _close_all(descriptors)
            raise
        return reply, descriptors[0]

    def alive(self) -> bool:
        """Whether the connection is still open. Costs a microsecond, never waits."""
        descriptor = self._socket.fileno()
        if self._closed or descriptor < 0:
            return False
        # A poll object of its own for each call: one may not be used by two
        # threads at once.
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        return not poll.poll(0)

    def close(self) -> None:
        """End the session. Idempotent."""
        self._closed = True
        # Wakes whoever waits for an answer.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # Not for ever: an interrupt may have left the lock taken.
        held = self._lock.acquire(timeout=_CLOSE_S)
        self._socket.close()
        if held:
            self._lock.release()

    def _close_in_child(self) -> None:
        # The lock may be held by a thread that does not exist in the child.
        self._closed = True
        self._socket.close()


_open_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


def _close_inherited() -> None:
    for attachment in list(_open_attachments):
        attachment._close_in_child()


os.register_at_fork(after_in_child=_close_inherited)


def _connect(connection: socket.socket, path: str, deadline: float) -> None:
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise BadRequest(f"a socket path is at most {MAX_UNIX_PATH_BYTES} bytes: {path}")
    while True:
        connection.settimeout(_remaining(deadline))
        try:
            connection.connect(path)
            return
        except BlockingIOError:
            # The listener's backlog is full; on AF_UNIX that is not waited for.
            time.sleep(min(_CONNECT_RETRY_S, _remaining(deadline)))
        except PermissionError as error:
            raise NoTenant(f"this user may not open {path}") from error
        except TimeoutError as error:
            raise Unavailable(f"no answer from {path} in time") from error
        except OSError as error:
            raise Unavailable(f"no server at {path}: {error.strerror or error}") from error


def _send(connection: socket.socket, request: Request, deadline: float) -> None:
    connection.settimeout(_remaining(deadline))
    try:
        connection.send(encode_request(request))
    except TimeoutError as error:
        raise Unavailable("the attach socket takes no requests") from error
    except OSError as error:
        raise Unavailable(f"the attach connection is lost: {error}") from error


def _receive(connection: socket.socket, deadline: float) -> tuple[bytes, list[int]]:
    """One datagram and the descriptors that came with it, which the caller owns."""
    connection.settimeout(_remaining(deadline))
    try:
        # Not `socket.recv_fds`, which drops its flags: the descriptors would be
        # inherited by every child.
        datagram, ancillary, flags, _ = connection.recvmsg(
            MAX_DATAGRAM_BYTES, _DESCRIPTOR_SPACE, socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError as error:
        raise Unavailable("the attach socket did not answer in time") from error
    except OSError as error:
        raise Unavailable(f"the attach connection is lost: {error}") from error
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if not datagram:
        _close_all(descriptors)
        raise Unavailable("the server closed the attach connection")
    if flags & socket.MSG_TRUNC:
        _close_all(descriptors)
        raise Unavailable(f"the attach socket sent more than {MAX_DATAGRAM_BYTES} bytes")
    return datagram, list(descriptors)


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Unavailable("the attach socket did not answer in time")
    return left


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
