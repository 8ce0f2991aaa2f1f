"""The two messages that carry blocks, framed by hand.

A protobuf message copies its bytes in and out, which halves what gRPC can move.
`ReadResponse` and `WriteRequest` are simple enough to write and read directly;
the bytes on the wire are exactly those of the .proto.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvstore.errors import BadRequest
from kvstore.wire.v1 import kvstore_pb2 as pb

_READ_DATA = 0x0A
"""ReadResponse.data: field 1, length-delimited."""

_WRITE_SLOT = 0x08
_WRITE_DATA = 0x12
_WRITE_TAGS = frozenset({_WRITE_SLOT, _WRITE_DATA})


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """A `WriteRequest`. `data` may borrow from the message it was read from."""

    slot: int
    data: memoryview


def frame_read(data: memoryview) -> bytes:
    """A serialized `ReadResponse` with a copy of `data`."""
    prefix = bytearray((_READ_DATA,))
    length = len(data)
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return b"".join((prefix, data))


def parse_write(message: bytes) -> WriteChunk:
    """A serialized `WriteRequest`, without copying its data. Raises `BadRequest`."""
    slot = position = 0
    data = memoryview(b"")
    try:
        while position < len(message):
            tag = message[position]
            if tag not in _WRITE_TAGS:
                return _parse_any(message)
            value, position = _varint(message, position + 1)
            if tag == _WRITE_SLOT:
                slot = value & (1 << 64) - 1
            else:
                if position + value > len(message):
                    raise BadRequest("a message of Write is cut short")
                data = memoryview(message)[position : position + value]
                position += value
    except IndexError:
        raise BadRequest("a message of Write is cut short") from None
    return WriteChunk(slot, data)


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """(value, position after it). Raises `IndexError` at the message's end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BadRequest("a message of Write has an overlong number")


def _parse_any(message: bytes) -> WriteChunk:
    """What the fast path does not know, such as fields of a later version."""
    try:
        request = pb.WriteRequest.FromString(message)
    except DecodeError:
        raise BadRequest("a message of Write is not a WriteRequest") from None
    return WriteChunk(request.slot, memoryview(request.data))
