"""The gRPC server: where it listens, what it serves beside the store, its limits."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.errors import AddressUnusable
from kvstore_server import limits
from kvstore_server.calls import SERVICE_NAME
from kvstore_server.service import KVStoreService
from kvstore_server.sockets import check_port_free, creation_mode

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GrpcEndpoint:
    """One gRPC server on a Unix socket and, if asked for, a loopback port.

    Connections are not given a maximum age: a remote session is one stream, and
    would end with its connection. Dead peers are found by keepalive.
    """

    def __init__(self, service: KVStoreService, *, max_sessions: int) -> None:
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=max_sessions + limits.SPARE_CALLS,
            options=[
                ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", limits.MAX_STREAMS),
                ("grpc.max_metadata_size", limits.MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", limits.MAX_METADATA_BYTES),
                ("grpc.keepalive_time_ms", limits.KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", limits.MIN_CLIENT_PING_MS),
                # A port is one server's; sharing it would hide a second one.
                ("grpc.so_reuseport", 0),
            ],
        )
        # The stubs of this package leave its asyncio half out.
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server.add_generic_rpc_handlers((service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
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
