"""The admin port: /livez, /readyz and /metrics over HTTP/1.1 on loopback.

Alive means that the store's housekeeping came round lately. It runs in the same
loop as every call, so a loop that is stuck, and housekeeping that died, both fail
the check; an open port proves nothing.

Only GET, no bodies, one request a connection, everything bounded in size and time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvstore.metrics import Metrics
from kvstore_server.limits import (
    ADMIN_CONNECTIONS,
    ADMIN_REQUEST_BYTES,
    ADMIN_TIMEOUT_S,
    STALLED_AFTER_S,
)
from kvstore_server.sockets import port_error

_log = logging.getLogger(__name__)

_TEXT = "text/plain; charset=utf-8"


class Health:
    """What the probes are told. `stalled_seconds` is None until the store works."""

    def __init__(self) -> None:
        self.ready = False
        self.why_not_ready = "starting"
        self.stalled_seconds: Callable[[], float] | None = None

    @property
    def live(self) -> bool:
        return self.stalled_seconds is None or self.stalled_seconds() < STALLED_AFTER_S


class _Response(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes


class AdminServer:
    """Answers on one port until closed."""

    def __init__(self, health: Health, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """The port, which is a free one for `port` 0. Raises `AddressInUse`,
        `AddressUnusable`."""
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=ADMIN_REQUEST_BYTES
            )
        except OSError as error:
            raise port_error(host, port, error) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= ADMIN_CONNECTIONS:
                async with asyncio.timeout(ADMIN_TIMEOUT_S):
                    request = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_encode(self._respond(request)))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # The client went, dawdled or talked too much: it gets no answer.
        except Exception as error:  # noqa: BLE001
            # The outermost frame of whatever comes in here.
            self._metrics.unexpected("admin")
            _log.error("a fault while answering on the admin port", exc_info=error)
        finally:
            self._open -= 1
            writer.close()

    def _respond(self, request: bytes) -> _Response:
        lines = request.decode("latin-1").split("\r\n")
        parts = lines[0].split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            return _text(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request")
        if parts[0] != "GET":
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET")
        match parts[1].partition("?")[0]:
            case "/livez":
                return _verdict(self._health.live, "no progress")
            case "/readyz":
                ready = self._health.ready and self._health.live
                return _verdict(ready, self._health.why_not_ready or "no progress")
            case "/metrics":
                return _scrape(self._metrics.registry, lines)
        return _text(HTTPStatus.NOT_FOUND, "try /livez, /readyz or /metrics")


def _verdict(good: bool, why_not: str) -> _Response:
    if good:
        return _text(HTTPStatus.OK, "ok")
    return _text(HTTPStatus.SERVICE_UNAVAILABLE, why_not)


def _scrape(registry: CollectorRegistry, lines: list[str]) -> _Response:
    accept = ""
    for line in lines[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "accept":
            accept = value.strip()
    encoder, content_type = choose_encoder(accept)
    return _Response(HTTPStatus.OK, content_type, encoder(registry))


def _text(status: HTTPStatus, text: str) -> _Response:
    return _Response(status, _TEXT, text.encode() + b"\n")


def _encode(response: _Response) -> bytes:
    head = (
        f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
        f"Content-Type: {response.content_type}\r\n"
        f"Content-Length: {len(response.body)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + response.body
