"""The gRPC server: where it listens, what it serves beside the store, its limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kvstore.errors import AddressUnusable, TooMany
from kvstore_server import limits
from kvstore_server.callers import Context
from kvstore_server.calls import SERVICE_NAME, Calls
from kvstore_server.service import KVStoreService
from kvstore_server.sockets import check_port_free, creation_mode
from kvstore_server.streams import Streams

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _Watchers:
    """Those who watch, with no session nor tenant: they have places of their own."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._streams = Streams(limits.WATCHES, limits.WATCHES)

    @asynccontextmanager
    async def one(self, context: Context) -> AsyncIterator[None]:
        try:
            with self._streams.one(None):
                yield
        except TooMany as error:
            told = self._calls.failed("Watch", error)
            await context.abort(told.status, told.message, told.trailing_metadata)


# The stubs of these packages leave their asyncio halves out.
class _Health(health.aio.HealthServicer):  # type: ignore[name-defined,misc]
    def __init__(self, watchers: _Watchers) -> None:
        super().__init__()
        self._watchers = watchers

    async def Watch(self, request: Any, context: Context) -> None:
        async with self._watchers.one(context):
            await super().Watch(request, context)


class _Reflection(reflection.aio.ReflectionServicer):  # type: ignore[name-defined,misc]
    def __init__(self, watchers: _Watchers, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._watchers = watchers

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        async with self._watchers.one(context):
            async for answer in super().ServerReflectionInfo(requests, context):
                yield answer


class GrpcEndpoint:
    """One gRPC server on a Unix socket and, if asked for, a loopback port.

    Connections are not given a maximum age: a remote session is one stream, and
    would end with its connection. Dead peers are found by keepalive.
    """

    def __init__(self, service: KVStoreService, *, max_sessions: int) -> None:
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=max_sessions
            + limits.MAX_STREAMS
            + limits.WATCHES
            + limits.SPARE_CALLS,
            options=[
                ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", limits.MAX_CALLS),
                ("grpc.max_metadata_size", limits.MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", limits.MAX_METADATA_BYTES),
                ("grpc.server_handshake_timeout_ms", limits.HANDSHAKE_MS),
                ("grpc.max_connection_idle_ms", limits.CONNECTION_IDLE_MS),
                (
                    "grpc.max_allowed_incoming_connections",
                    2 * max_sessions + limits.SPARE_CONNECTIONS,
                ),
                ("grpc.keepalive_time_ms", limits.KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", limits.MIN_CLIENT_PING_MS),
                # A port is one server's; sharing it would hide a second one.
                ("grpc.so_reuseport", 0),
            ],
        )
        watchers = _Watchers(service.calls)
        self._health = _Health(watchers)
        self._server.add_generic_rpc_handlers((service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            _Reflection(watchers, names), self._server
        )

    def listen_unix(self, path: Path, mode: int) -> None:
        """Raises `AddressUnusable`. The path must have been claimed."""
        try:
            with creation_mode(mode):
                self._server.add_insecure_port(f"unix:{path}")
            path.chmod(mode)
        except (RuntimeError, OSError) as error:
            raise AddressUnusable(f"socket {path}: cannot be made") from error

    def listen_tcp(self, host: str, port: int) -> int:
        """The port. Raises `AddressInUse`, `AddressUnusable`."""
        check_port_free(host, port)
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return self._server.add_insecure_port(target)
        except RuntimeError as error:
            raise AddressUnusable(f"{target}: cannot be listened on") from error

    async def start(self) -> None:
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service answers, for the server and the store."""
        for name in (health.OVERALL_HEALTH, SERVICE_NAME):
            await self._health.set(name, _SERVING if serving else _NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
