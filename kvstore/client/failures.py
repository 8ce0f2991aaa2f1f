"""gRPC's failures as the project's errors."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from kvstore.client.wire import ERROR_METADATA
from kvstore.errors import (
    WIRE_ERRORS,
    BadRequest,
    InternalError,
    KVStoreError,
    NoSession,
    NoTenant,
    TooLarge,
    TooMany,
    Unavailable,
)

# For failures that gRPC itself makes, on either side, and that therefore lack
# the trailing metadata.
_BY_STATUS: dict[grpc.StatusCode, type[KVStoreError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.UNAUTHENTICATED: NoSession,
    grpc.StatusCode.PERMISSION_DENIED: NoTenant,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooMany,
}


def typed_error(
    method: str,
    status: grpc.StatusCode | None,
    details: str | None,
    trailing: Iterable[tuple[str, str | bytes]] | None,
) -> KVStoreError:
    """The error for one failed RPC."""
    for name, value in trailing or ():
        if name == ERROR_METADATA:
            code = value.decode(errors="replace") if isinstance(value, bytes) else value
            if code in WIRE_ERRORS:
                return WIRE_ERRORS[code](details or code)
    kind = InternalError if status is None else _BY_STATUS.get(status, InternalError)
    if kind is TooMany and "message" in (details or ""):
        # Of the two things that gRPC itself runs out of, the other one: its limit of
        # calls at a time is worth a retry, a message that is too large is not.
        kind = TooLarge
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return kind(f"{method}: no answer in time")
    return kind(f"{method}: {details or status}")
