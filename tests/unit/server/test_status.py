"""Errors on the wire: every one has a status, and comes back as what it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from kvstore import errors
from kvstore.errors import WIRE_ERRORS, KVStoreError
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.status import INTERNAL, STATUS, wire_error

PROTO = Path(__file__).parents[3] / "proto/kvstore/wire/v1/kvstore.proto"


def tree(root: type[KVStoreError] = KVStoreError) -> Iterator[type[KVStoreError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_the_wires_codes_the_errors_and_the_statuses_are_the_same_set() -> None:
    names = set(pb.ErrorCode.keys()) - {"ERROR_CODE_UNSPECIFIED"}
    assert names == set(WIRE_ERRORS) == set(STATUS)


def test_statuses_are_the_documented_ones() -> None:
    documented = {
        name: status
        for status, name in re.findall(
            r"// \[([A-Z_]+)\][^\n]*\n(?:  //[^\n]*\n)*  ([A-Z_]+) = \d+;", PROTO.read_text()
        )
    }
    assert documented == {code: status.name for code, status in STATUS.items()}


@pytest.mark.parametrize("code", WIRE_ERRORS)
def test_a_code_comes_back_as_the_error_it_was(code: str) -> None:
    error = WIRE_ERRORS[code]("why")
    answer = wire_error(error)
    assert dict(answer.trailing_metadata) == {"kvstore-error": code}
    assert type(WIRE_ERRORS[answer.code](answer.message)) is type(error)
    if code != "INTERNAL":
        assert answer.message == "why"


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_every_error_has_an_answer_and_faults_of_the_server_say_nothing(
    kind: type[KVStoreError],
) -> None:
    answer = wire_error(kind("inner details"))
    assert isinstance(answer.status, StatusCode)
    theirs = issubclass(kind, (errors.ClientError, errors.Refused))
    if theirs and not issubclass(kind, errors.Unavailable):
        assert (answer.status, answer.message) == (STATUS[kind.code], "inner details")
    else:
        assert answer == INTERNAL
