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
    # The only thing gRPC itself runs out of is the size of a message.
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooLarge,
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
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return kind(f"{method}: no answer in time")
    return kind(f"{method}: {details or status}")
