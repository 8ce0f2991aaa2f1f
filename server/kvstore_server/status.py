"""Errors as gRPC statuses: the one place where the tree meets the wire.

A client learns the error's name from trailing metadata and its nature from the
status. What is not meant to leave the server (a failing tier, a bug) leaves as
INTERNAL with a text that says nothing of the request.
"""

from __future__ import annotations

from typing import NamedTuple

from grpc import StatusCode

from kvstore.errors import WIRE_ERRORS, KVStoreError

ERROR_METADATA = "kvstore-error"

INTERNAL_TEXT = "a fault of the server; its log has more"

STATUS: dict[str, StatusCode] = {
    "BAD_REQUEST": StatusCode.INVALID_ARGUMENT,
    "BAD_KEY": StatusCode.INVALID_ARGUMENT,
    "BAD_SIZE": StatusCode.INVALID_ARGUMENT,
    "TOO_LARGE": StatusCode.INVALID_ARGUMENT,
    "UNKNOWN_LAYOUT": StatusCode.NOT_FOUND,
    "LEASE_EXPIRED": StatusCode.FAILED_PRECONDITION,
    "RESERVATION_EXPIRED": StatusCode.FAILED_PRECONDITION,
    "FOREIGN_LEASE": StatusCode.PERMISSION_DENIED,
    "NO_SPACE": StatusCode.RESOURCE_EXHAUSTED,
    "TOO_MANY": StatusCode.RESOURCE_EXHAUSTED,
    "NO_SESSION": StatusCode.UNAUTHENTICATED,
    "NO_TENANT": StatusCode.PERMISSION_DENIED,
    "NO_LOWER_TIER": StatusCode.FAILED_PRECONDITION,
    "DRAINING": StatusCode.UNAVAILABLE,
    "INTERNAL": StatusCode.INTERNAL,
}
"""Wire code -> status, as the .proto documents it at `ErrorCode`."""


class WireError(NamedTuple):
    """An error as a client will see it."""

    status: StatusCode
    code: str
    message: str

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((ERROR_METADATA, self.code),)


INTERNAL = WireError(StatusCode.INTERNAL, "INTERNAL", INTERNAL_TEXT)


def wire_error(error: KVStoreError) -> WireError:
    """What leaves the server for `error`."""
    if error.code not in WIRE_ERRORS or error.code == INTERNAL.code:
        return INTERNAL
    return WireError(STATUS[error.code], error.code, str(error))
