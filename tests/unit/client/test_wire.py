"""The hand-written encodings are protobuf's, and failures keep their meaning."""

from __future__ import annotations

import os

import grpc
import pytest
from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.client import wire
from kvstore.client.failures import typed_error
from kvstore.client.rpc import METHODS, parse_endpoint
from kvstore.client.steps import WritePiece
from kvstore.types import CommitOutcome, LayoutSpec, Segment, SlotGrant
from kvstore.wire.columns import pack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb

SIZES = [0, 1, 127, 128, 16_383, 16_384, 1 << 20]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("slot", [0, 1, 127, 128, 300, (1 << 32) - 1, (1 << 64) - 1])
def test_a_written_piece_is_what_protobuf_reads(nbytes: int, slot: int) -> None:
    data = os.urandom(nbytes)
    encoded = wire.encode_write(WritePiece(slot, memoryview(data)))
    assert pb.WriteRequest.FromString(encoded) == pb.WriteRequest(slot=slot, data=data)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_read_piece_is_what_protobuf_wrote(nbytes: int) -> None:
    data = os.urandom(nbytes)
    assert wire.decode_read(pb.ReadResponse(data=data).SerializeToString()) == data


def test_a_read_piece_with_fields_of_a_later_version_is_still_read() -> None:
    known, unknown = pb.ReadResponse(data=b"abc").SerializeToString(), b"\x10\x05"
    for encoded in (known + unknown, unknown + known):
        assert bytes(wire.decode_read(encoded)) == b"abc"


@pytest.mark.parametrize("encoded", [b"\x0a", b"\x0a\x05ab", b"\x0a" + b"\xff" * 12])
def test_a_truncated_read_piece_is_not_data(encoded: bytes) -> None:
    with pytest.raises(DecodeError):
        _ = wire.decode_read(encoded)


def test_every_field_of_a_layout_reaches_the_wire() -> None:
    spec = LayoutSpec("m", "bfloat16", 16, 4096, "r", "LBHNC", 1, 2, 3, "b", "fp8")
    message = wire.layout_message(spec)
    assert len(message.ListFields()) == len(pb.Layout.DESCRIPTOR.fields)
    assert all(
        getattr(message, f.name) == getattr(spec, f.name) for f in pb.Layout.DESCRIPTOR.fields
    )


def test_an_outcome_of_a_later_version_is_not_taken_for_a_block_that_is_there() -> None:
    response = pb.CommitResponse()
    response.MergeFromString(b"\x0a\x05\x01\x63\x02\x03\x04")
    assert wire.commit_answer(response, 0).outcomes == [
        CommitOutcome.STORED,
        CommitOutcome.ABSENT,
        CommitOutcome.PRESENT,
        CommitOutcome.CONFLICT,
        CommitOutcome.ABSENT,
    ]


def test_every_outcome_has_its_number_on_the_wire() -> None:
    named = {outcome.name: int(outcome) for outcome in CommitOutcome}
    on_the_wire = dict(pb.CommitResponse.Outcome.items())
    assert on_the_wire == named | {"OUTCOME_UNSPECIFIED": 0}


def test_a_links_tag_is_added_to_slots_and_taken_away_again() -> None:
    tag = 3 << 64
    grant = wire.slot_grant(
        pb.Slots(first_slot=7, addresses=pack_numbers([0, 4096]), expires_ns=9), tag
    )
    assert grant == SlotGrant(tag + 7, [0, 4096], 9)
    none = wire.slot_grant(pb.Slots(), tag)
    assert none == SlotGrant(0, [], 0), "no slot has the number of none"
    segment = Segment(b"p" * 32, [b"k" * 32, b"l" * 32], [tag + 7, 0], [1, (1 << 64) - 1])
    (message,) = wire.segment_messages([segment], tag)
    assert message == pb.Segment(
        parent=segment.parent,
        keys=b"k" * 32 + b"l" * 32,
        slots=pack_numbers([7, 0]),
        checksums=pack_numbers(segment.checksums),
    )


def test_every_error_on_the_wire_has_its_class() -> None:
    for name in pb.ErrorCode.DESCRIPTOR.values_by_name:
        if name != "ERROR_CODE_UNSPECIFIED":
            error = typed_error("M", grpc.StatusCode.UNKNOWN, "why", [("kvstore-error", name)])
            assert error.code == name
            assert type(error) is errors.WIRE_ERRORS[name]
            assert str(error) == "why"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.Unavailable),
        (grpc.StatusCode.CANCELLED, errors.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.TooMany),
        (grpc.StatusCode.UNIMPLEMENTED, errors.InternalError),
        (None, errors.InternalError),
    ],
)
def test_failures_of_grpc_itself_have_a_type_too(
    status: grpc.StatusCode | None, kind: type[errors.KVStoreError]
) -> None:
    for trailing in (None, [], [("kvstore-error", "FROM_THE_FUTURE")], [("x-bin", b"\0")]):
        assert type(typed_error("M", status, None, trailing)) is kind


@pytest.mark.parametrize(
    ("text", "target", "path"),
    [
        ("unix:///run/s", "unix:/run/s", "/run/s"),
        ("unix:/run/s", "unix:/run/s", "/run/s"),
        ("/run/s", "unix:/run/s", "/run/s"),
        ("host:9440", "host:9440", None),
        ("[::1]:9440", "[::1]:9440", None),
    ],
)
def test_endpoints_are_told_apart(text: str, target: str, path: str | None) -> None:
    assert parse_endpoint(text) == (target, path, False)


def test_only_a_server_that_nobody_named_has_to_be_ones_own() -> None:
    found = parse_endpoint(None)
    assert found.own
    assert not parse_endpoint(found.socket_path).own


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "h:0", "h:65536", "unix:rel", "a/b"])
def test_what_is_no_endpoint_is_a_bad_request(text: str) -> None:
    with pytest.raises(errors.BadRequest):
        parse_endpoint(text)


def test_every_rpc_of_the_service_is_known() -> None:
    service = pb.DESCRIPTOR.services_by_name["KVStore"]
    assert set(METHODS) == {method.name for method in service.methods}


def test_a_message_too_large_for_grpc_is_told_from_a_busy_server() -> None:
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    large = "CLIENT: Sent message larger than max (20000000 vs. 16777216)"
    assert type(typed_error("M", status, large, None)) is errors.TooLarge
    busy = "Concurrent RPC limit exceeded!"
    assert type(typed_error("M", status, busy, None)) is errors.TooMany
