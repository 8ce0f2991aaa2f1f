"""The attach protocol's words: what is encoded is decoded, nonsense is refused."""

from __future__ import annotations

import json

import pytest

from kvstore.errors import BadRequest, InternalError, NoTenant
from kvstore.local.attach import (
    MAX_DATAGRAM_BYTES,
    Attached,
    AttachRequest,
    ErrorReply,
    ExtentReply,
    MapRequest,
    Reply,
    Request,
    VramReply,
    VramRequest,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    error_of,
)

REQUESTS = [
    AttachRequest(1), MapRequest(0), MapRequest((1 << 64) - 1), MapRequest(7, "GPU-1"),
    VramRequest("GPU-1", ()), VramRequest("GPU-1", (bytes(16), b"\xff" * 16)),
    VramRequest("GPU-1", (bytes(16),), bytes(range(64))),
]  # fmt: skip
REPLIES = [
    Attached(b"s" * 16, b"epoch", 1 << 26, "alice"),
    ExtentReply(7, 1 << 26),
    VramReply(1 << 26),
    ErrorReply("NO_TENANT", "who are you?"),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_survives_the_wire(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_survives_the_wire(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


def test_the_messages_are_those_of_the_specification() -> None:
    assert json.loads(encode_request(AttachRequest(1))) == {"op": "attach", "protocol": 1}
    assert json.loads(encode_request(MapRequest(7))) == {"op": "map", "extent": 7}
    assert json.loads(encode_request(VramRequest("GPU-1", (b"\1" * 16,)))) == {
        "op": "vram",
        "gpu": "GPU-1",
        "layouts": ["01" * 16],
    }
    assert json.loads(encode_request(VramRequest("GPU-1", (), b"\2"))) == {
        "op": "vram",
        "gpu": "GPU-1",
        "layouts": [],
        "reader": "02",
    }
    assert json.loads(encode_reply(Attached(b"\1" * 16, b"\2", 4096, "t"))) == {
        "op": "attached",
        "session": "01" * 16,
        "epoch": "02",
        "extent_bytes": 4096,
        "tenant": "t",
    }


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"{",
        b"[" * 4000,
        b"{}",
        b'{"op":"detach"}',
        b'{"op":["map"]}',
        b'{"op":"map"}',
        b'{"op":"map","extent":-1}',
        b'{"op":"map","extent":true}',
        b'{"op":"map","extent":1.0}',
        b'{"op":"map","extent":"7"}',
        b'{"op":"map","extent":18446744073709551616}',
        b'{"op":"attach","protocol":null}',
        b'{"op":"map","extent":7,"gpu":7}',
        b'{"op":"vram","gpu":"GPU-1"}',
        b'{"op":"vram","layouts":[]}',
        b'{"op":"vram","gpu":"GPU-1","layouts":"00"}',
        b'{"op":"vram","gpu":"GPU-1","layouts":["0g"]}',
        b'{"op":"vram","gpu":"GPU-1","layouts":[7]}',
        b'{"op":"vram","gpu":"GPU-1","layouts":[],"reader":7}',
        b'{"op":"vram","gpu":"GPU-1","layouts":[],"reader":"0g"}',
        b'{"op":"map","extent":7}' + b" " * MAX_DATAGRAM_BYTES,
    ],
)
def test_a_datagram_that_is_no_request_is_a_bad_request(datagram: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_request(datagram)


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "attached", "session": "00", "epoch": "", "extent_bytes": 4096, "tenant": ""},
        {"op": "attached", "session": "0" * 32, "epoch": "", "extent_bytes": 3, "tenant": ""},
        {"op": "attached", "session": "z" * 32, "epoch": "", "extent_bytes": 4, "tenant": ""},
        {"op": "extent", "extent": 7},
        {"op": "error"},
        {"op": "hello"},
    ],
)
def test_a_server_talking_nonsense_is_an_internal_error(fields: dict[str, object]) -> None:
    with pytest.raises(InternalError):
        decode_reply(json.dumps(fields).encode())


def test_a_long_error_is_still_deliverable() -> None:
    datagram = encode_reply(ErrorReply("BAD_REQUEST", "\N{SNOWMAN}" * 100_000))
    assert len(datagram) <= MAX_DATAGRAM_BYTES


def test_an_error_reply_becomes_its_typed_error() -> None:
    assert isinstance(error_of(ErrorReply("NO_TENANT", "m")), NoTenant)
    assert isinstance(error_of(ErrorReply("FROM_THE_FUTURE", "m")), InternalError)
