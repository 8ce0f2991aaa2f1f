"""Hand-framed messages are the .proto's, byte for byte and in both directions."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.errors import BadRequest
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.framing import WriteChunk, frame_read, parse_write

SIZES = [1, 127, 128, 16383, 16384, 1 << 20, (2 << 20) + 1]


@pytest.mark.parametrize("size", SIZES)
def test_a_framed_read_is_what_protobuf_would_send(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    framed = frame_read(memoryview(data)[:size])
    assert framed == pb.ReadResponse(data=data[:size]).SerializeToString()


@given(st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_any_write_reads_back_as_what_was_sent(slot: int, data: bytes) -> None:
    chunk = parse_write(pb.WriteRequest(slot=slot, data=data).SerializeToString())
    assert (chunk.slot, bytes(chunk.data)) == (slot, data)


def test_fields_of_a_later_version_are_ignored() -> None:
    known = pb.WriteRequest(slot=3, data=b"abc").SerializeToString()
    for stranger in (b"\x38\x05", b"\x42\x02hi", b"\x4d\x00\x00\x00\x00"):
        for message in (stranger + known, known + stranger):
            chunk = parse_write(message)
            assert (chunk.slot, bytes(chunk.data)) == (3, b"abc")


@example(message=b"\r\x80\x80\x80\x80")
@given(st.binary(max_size=60))
def test_nonsense_is_refused_or_read_as_protobuf_would(message: bytes) -> None:
    try:
        expected = pb.WriteRequest.FromString(message)
    except Exception:  # noqa: BLE001
        with pytest.raises(BadRequest):
            parse_write(message)
        return
    chunk = parse_write(message)
    assert chunk == WriteChunk(expected.slot, memoryview(expected.data))


def test_a_write_does_not_copy_its_data() -> None:
    message = pb.WriteRequest(slot=1, data=bytes(1000)).SerializeToString()
    assert parse_write(message).data.obj is message
