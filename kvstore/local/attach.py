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
     "layouts":["<hex>", ...],
     "reader":"<hex>"}            -> {"op":"vram","extent_bytes":N}        + one descriptor
    {"op":"map","extent":7,
     "gpu":"..."}                 -> {"op":"extent","extent":7,"bytes":N}  + one descriptor
    anything that fails           -> {"op":"error","code":"BAD_REQUEST","message":"..."}

The connection is the session: when it closes, for whatever reason, the session's
leases and reservations are given back. After an error the connection stays open,
unless the error answers `attach`.

This module holds both halves' vocabulary. The client's half of the conversation is
`local.attachment`, the server's `kvstore_server.attach`.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from kvstore.errors import WIRE_ERRORS, BadRequest, InternalError, KVStoreError
from kvstore.types import SESSION_ID_BYTES

PROTOCOL_VERSION = 2
MAX_DATAGRAM_BYTES = 4096
ATTACH_SUFFIX = ".attach"
"""The attach socket's path is the gRPC socket's path with this at its end."""

_MAX_U64 = (1 << 64) - 1


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
    `layouts`: ids of those of which this process reads blocks there. `reader`: what the
    acquires name that are for it (`AcquireRequest.reader`); empty: nothing."""

    gpu: str
    layouts: tuple[bytes, ...]
    reader: bytes = b""


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
        case VramRequest(gpu, layouts, reader):
            ids = [layout.hex() for layout in layouts]
            named = {"reader": reader.hex()} if reader else {}
            return _encode({"op": "vram", "gpu": gpu, "layouts": ids, **named})
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
            reader = _hex(fields, "reader") if "reader" in fields else b""
            return VramRequest(_text(fields, "gpu"), _hexes(fields, "layouts"), reader)
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
