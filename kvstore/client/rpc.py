"""What the synchronous and the asynchronous transport share: endpoints and methods."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf import message_factory

from kvstore.client import wire
from kvstore.client.wire import MAX_MESSAGE_BYTES, SESSION_METADATA
from kvstore.errors import BadRequest
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The server is on this host or in this rack: no proxy stands in between.
    ("grpc.enable_http_proxy", 0),
    # gRPC's own back-off goes up to two minutes; a cache must be found again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Clients of one process share neither connections nor each other's back-off.
    ("grpc.use_local_subchannel_pool", 1),
]


class Endpoint(NamedTuple):
    """`target`: for gRPC. `socket_path`: of a Unix socket, else None. `own`: nobody named
    it, so that it may only be this user's own server, or root's."""

    target: str
    socket_path: str | None
    own: bool = False


def parse_endpoint(text: str | None) -> Endpoint:
    """ "unix:///path", a plain absolute path, "host:port", or None for the default
    socket. Raises `BadRequest` for anything else."""
    own = text is None
    if text is None:
        from kvstore.config import default_socket_path

        text = str(default_socket_path())
    if text.startswith("unix:"):
        text = text.removeprefix("unix:")
        text = text.removeprefix("//")
        if not os.path.isabs(text):
            raise BadRequest(f"a unix endpoint needs an absolute path, not {text!r}")
    if os.path.isabs(text):
        return Endpoint(f"unix:{text}", text, own)
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise BadRequest(f'an endpoint is "unix:///path", a path, or "host:port", not {text!r}')
    return Endpoint(text, None)


class Method(NamedTuple):
    path: str
    serialize: Callable[[Any], bytes]
    deserialize: Callable[[bytes], Any]


def _methods() -> dict[str, Method]:
    service = pb.DESCRIPTOR.services_by_name["KVStore"]
    return {
        method.name: Method(
            f"/{service.full_name}/{method.name}",
            _message_class(method.input_type).SerializeToString,
            _message_class(method.output_type).FromString,
        )
        for method in service.methods
    }


def _message_class(descriptor: Any) -> type[Message]:
    return message_factory.GetMessageClass(descriptor)


METHODS = _methods()
"""Every RPC of the service by name."""

STREAMS = frozenset({"OpenSession", "Read", "Write"})


class Stubs:
    """What can be called over a channel of either kind, made once."""

    def __init__(self, channel: Any) -> None:
        self.unary: dict[str, Any] = {
            name: channel.unary_unary(
                method.path,
                request_serializer=method.serialize,
                response_deserializer=method.deserialize,
            )
            for name, method in METHODS.items()
            if name not in STREAMS
        }
        opening, reading, writing = (METHODS[n] for n in ("OpenSession", "Read", "Write"))
        self.open: Callable[..., Any] = channel.unary_stream(
            opening.path,
            request_serializer=opening.serialize,
            response_deserializer=opening.deserialize,
        )
        self.read: Callable[..., Any] = channel.unary_stream(
            reading.path,
            request_serializer=reading.serialize,
            response_deserializer=wire.decode_read,
        )
        self.write: Callable[..., Any] = channel.stream_unary(
            writing.path,
            request_serializer=wire.encode_write,
            response_deserializer=writing.deserialize,
        )


def metadata(session: bytes) -> tuple[tuple[str, bytes], ...]:
    return ((SESSION_METADATA, session),) if session else ()
