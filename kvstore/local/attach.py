"""The attach protocol: how a process on the server's host gets a session and memory.

JSON datagrams of at most 4096 bytes over an AF_UNIX SOCK_SEQPACKET socket beside
the gRPC socket. The client speaks first and the server answers every request, in
order, once:

    {"op":"attach","protocol":2}  -> {"op":"attached","session":"<32 hex>",
                                      "epoch":"<hex>","extent_bytes":N,"tenant":"..."}
    {"op":"map","extent":7}       -> {"op":"extent","extent":7,"bytes":N}  + one descriptor
    {"op":"directory"}            -> {"op":"directory","bytes":N,
                                      "secret":"<hex>"}                    + one descriptor
    {"op":"line"}                 -> {"op":"line"}                         + one descriptor
    {"op":"vram","gpu":"...",
     "layouts":["<hex>", ...]}    -> {"op":"vram","extent_bytes":N}        + one descriptor
    {"op":"map","extent":7,
     "gpu":"..."}                 -> {"op":"extent","extent":7,"bytes":N}  + one descriptor
    anything that fails           -> {"op":"error","code":"BAD_REQUEST","message":"..."}

The connection is the session: when it closes, for whatever reason, the session's
leases and reservations are given back. After an error the connection stays open,
unless the error answers `attach`.

This module holds both halves' vocabulary (`encode_*`, `decode_*`) and the client's
half of the conversation (`Attachment`).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvstore.errors import (
    WIRE_ERRORS,
    BadRequest,
    InternalError,
    KVStoreError,
    NoTenant,
    Unavailable,
)
from kvstore.types import SESSION_ID_BYTES

PROTOCOL_VERSION = 2
MAX_DATAGRAM_BYTES = 4096
MAX_UNIX_PATH_BYTES = 107
ATTACH_SUFFIX = ".attach"
"""The attach socket's path is the gRPC socket's path with this at its end."""

_MAX_U64 = (1 << 64) - 1
_CONNECT_RETRY_S = 0.01
_CLOSE_S = 1.0
# Room for two, so that a surplus descriptor is seen and closed.
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(2 * array.array("i").itemsize)


class AttachRequest(NamedTuple):
    protocol: int


class MapRequest(NamedTuple):
    """`gpu`: whose memory it is of; empty: DRAM."""

    extent: int
    gpu: str = ""


class DirectoryRequest(NamedTuple):
    """Asks for the directory as it is now; it may be replaced later."""


class LineRequest(NamedTuple):
    """Asks for a socket to make calls on (`kvstore.wire.frames`)."""


class VramRequest(NamedTuple):
    """Asks for the table of what a GPU's memory has copies of (`kvstore.device.mirrors`).
    `layouts`: ids of those of which this process reads blocks there."""

    gpu: str
    layouts: tuple[bytes, ...]


class Attached(NamedTuple):
    """`session`: 16 bytes. `epoch`: changes with every start of the server."""

    session: bytes
    epoch: bytes
    extent_bytes: int
    tenant: str


class ExtentReply(NamedTuple):
    """Comes with exactly one descriptor, of a file of `nbytes`."""

    extent: int
    nbytes: int


class DirectoryReply(NamedTuple):
    """Comes with exactly one descriptor, of a file of `nbytes`. `secret`: what the
    tenant's blocks are named with (`kvstore.naming`)."""

    nbytes: int
    secret: bytes


class LineReply(NamedTuple):
    """Comes with exactly one descriptor, of a connected stream socket."""


class VramReply(NamedTuple):
    """Comes with exactly one descriptor, of the table. `extent_bytes`: of the GPU's memory."""

    extent_bytes: int


class ErrorReply(NamedTuple):
    """`code` is a name of the wire's `ErrorCode`."""

    code: str
    message: str


Request = AttachRequest | MapRequest | DirectoryRequest | LineRequest | VramRequest
Reply = Attached | ExtentReply | DirectoryReply | LineReply | VramReply | ErrorReply


def attach_path(socket_path: str) -> str:
    """The attach socket that belongs to a gRPC socket."""
    return socket_path + ATTACH_SUFFIX


def encode_request(request: Request) -> bytes:
    match request:
        case AttachRequest(protocol):
            return _encode({"op": "attach", "protocol": protocol})
        case MapRequest(extent, ""):
            return _encode({"op": "map", "extent": extent})
        case MapRequest(extent, gpu):
            return _encode({"op": "map", "extent": extent, "gpu": gpu})
        case VramRequest(gpu, layouts):
            ids = [layout.hex() for layout in layouts]
            return _encode({"op": "vram", "gpu": gpu, "layouts": ids})
        case DirectoryRequest():
            return _encode({"op": "directory"})
        case LineRequest():
            return _encode({"op": "line"})


def decode_request(datagram: bytes) -> Request:
    """What a client asks. Raises `BadRequest` for anything that is not a request."""
    fields = _decode(datagram)
    match fields.get("op"):
        case "attach":
            return AttachRequest(_number(fields, "protocol"))
        case "map":
            gpu = _text(fields, "gpu") if "gpu" in fields else ""
            return MapRequest(_number(fields, "extent"), gpu)
        case "vram":
            return VramRequest(_text(fields, "gpu"), _hexes(fields, "layouts"))
        case "directory":
            return DirectoryRequest()
        case "line":
            return LineRequest()
        case _:
            raise BadRequest('a request\'s "op" is "attach", "map", "directory", "line" or "vram"')


def encode_reply(reply: Reply) -> bytes:
    match reply:
        case Attached(session, epoch, extent_bytes, tenant):
            return _encode(
                {
                    "op": "attached",
                    "session": session.hex(),
                    "epoch": epoch.hex(),
                    "extent_bytes": extent_bytes,
                    "tenant": tenant,
                }
            )
        case ExtentReply(extent, nbytes):
            return _encode({"op": "extent", "extent": extent, "bytes": nbytes})
        case DirectoryReply(nbytes, secret):
            return _encode({"op": "directory", "bytes": nbytes, "secret": secret.hex()})
        case LineReply():
            return _encode({"op": "line"})
        case VramReply(extent_bytes):
            return _encode({"op": "vram", "extent_bytes": extent_bytes})
        case ErrorReply(code, message):
            # A long message must not make the error itself undeliverable.
            return _encode({"op": "error", "code": code, "message": message[:500]})


def decode_reply(datagram: bytes) -> Reply:
    """What the server answers. Raises `InternalError` for anything else."""
    try:
        fields = _decode(datagram)
        match fields.get("op"):
            case "attached":
                return _attached(fields)
            case "extent":
                return ExtentReply(_number(fields, "extent"), _number(fields, "bytes"))
            case "directory":
                return DirectoryReply(_number(fields, "bytes"), _hex(fields, "secret"))
            case "line":
                return LineReply()
            case "vram":
                return VramReply(_number(fields, "extent_bytes"))
            case "error":
                return ErrorReply(_text(fields, "code"), _text(fields, "message"))
    except BadRequest as error:
        raise InternalError(f"the attach socket answered nonsense: {error}") from error
    raise InternalError("the attach socket answered with an unknown op")


def _attached(fields: dict[str, Any]) -> Attached:
    session = _hex(fields, "session")
    extent_bytes = _number(fields, "extent_bytes")
    if len(session) != SESSION_ID_BYTES:
        raise BadRequest(f"a session id is {SESSION_ID_BYTES} bytes")
    if extent_bytes < 1 or extent_bytes & (extent_bytes - 1):
        raise BadRequest("extent_bytes is not a power of two")
    return Attached(session, _hex(fields, "epoch"), extent_bytes, _text(fields, "tenant"))


def error_of(reply: ErrorReply) -> KVStoreError:
    """The typed error a reply stands for."""
    return WIRE_ERRORS.get(reply.code, InternalError)(reply.message)


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
    def connect(cls, path: str, timeout_s: float) -> Attachment:
        """Attach to the server behind the attach socket `path`.

        Raises `Unavailable` when nobody answers in time, `NoTenant` when the
        server knows no tenant for this user, and what else the server answers.
        """
        deadline = time.monotonic() + timeout_s
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _connect(connection, path, deadline)
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

    def fetch_vram(self, gpu: str, layouts: Sequence[bytes], timeout_s: float) -> tuple[int, int]:
        """(descriptor of the table, bytes of an extent). The caller owns the descriptor.

        Raises `BadRequest` where the server has no memory on that GPU, `UnknownLayout`,
        `Unavailable` when the server is gone or does not answer in time.
        """
        reply, descriptor = self._fetch(VramRequest(gpu, tuple(layouts)), timeout_s)
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


def _encode(fields: dict[str, object]) -> bytes:
    datagram = json.dumps(fields, separators=(",", ":")).encode()
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise BadRequest(f"an attach message is at most {MAX_DATAGRAM_BYTES} bytes")
    return datagram


def _decode(datagram: bytes) -> dict[str, Any]:
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise BadRequest(f"an attach message is at most {MAX_DATAGRAM_BYTES} bytes")
    try:
        fields = json.loads(datagram)
    except (ValueError, RecursionError) as error:
        raise BadRequest("an attach message is one JSON object in UTF-8") from error
    if not isinstance(fields, dict):
        raise BadRequest("an attach message is one JSON object in UTF-8")
    return fields


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    # bool is an int to isinstance.
    if type(value) is not int or not 0 <= value <= _MAX_U64:
        raise BadRequest(f'"{name}" must be an unsigned 64-bit number')
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadRequest(f'"{name}" must be a string')
    return value


def _hexes(fields: dict[str, Any], name: str) -> tuple[bytes, ...]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise BadRequest(f'"{name}" must be a list')
    return tuple(_hex({name: value}, name) for value in values)


def _hex(fields: dict[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(_text(fields, name))
    except ValueError as error:
        raise BadRequest(f'"{name}" must be hexadecimal') from error
