"""Lines: how processes of this host make calls without gRPC.

A line is one end of a stream socket that a client asked for on its attach connection.
It carries the unary methods of the .proto, one call at a time, as `kvstore.wire.frames`
says; who calls is known from whom the line was given to. A call and its answer cost a
tenth of what gRPC takes in Python (docs/decisions/0008).

A client that closes its line while a call is waiting has left: the call is cancelled. A
client that does not read its answers is not called on for more, and one that does not send
the rest of a call has its line closed, because the part is kept in memory. So has one that
sends a large call while more is kept of others than the server has memory for.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

from google.protobuf.message import DecodeError, Message

from kvstore.errors import BadRequest, TooLarge, TooMany
from kvstore.local.attach import ErrorReply, encode_reply
from kvstore.wire import frames
from kvstore_server import limits
from kvstore_server.callers import Caller
from kvstore_server.calls import Calls, UnaryMethod

_HEAD_BYTES = frames.HEAD.size


class Lines:
    """Makes the lines of one server. Belongs to its event loop."""

    def __init__(self, methods: dict[str, UnaryMethod], calls: Calls) -> None:
        self.methods = {name.encode(): method for name, method in methods.items()}
        self.calls = calls
        self.kept_bytes = 0
        """Of calls that have not come whole or wait for their turn, on all lines."""

    def open(self, caller: Caller, on_end: Callable[[Line], None]) -> tuple[Line, socket.socket]:
        """A line for a caller, and the end to be given to it; both are the caller's to
        close. `on_end` is called once, when the line has ended by itself or by `close`.
        Raises `TooMany`."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise TooMany(f"no line can be made: {error.strerror}") from error
        ours.setblocking(False)
        return Line(self, caller, ours, on_end), theirs


class Line(asyncio.Protocol):
    def __init__(
        self, lines: Lines, caller: Caller, end: socket.socket, on_end: Callable[[Line], None]
    ) -> None:
        self._lines = lines
        self._caller = caller
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._kept_bytes = 0
        self._patience: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._writable = True
        self._ended = False
        loop = asyncio.get_running_loop()
        self._starting = loop.create_task(loop.connect_accepted_socket(lambda: self, end))

    def close(self) -> None:
        """End it, and the call under way. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._received.clear()
        self._count_kept()
        self._patience_ends()
        if self._waiting is not None:
            self._waiting.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._on_end(self)

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._ended:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.close()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._advance()

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._advance()
        self._count_kept()
        crowded = self._lines.kept_bytes > limits.MAX_KEPT_BYTES
        if self._kept_bytes > _HEAD_BYTES + frames.MAX_FRAME_BYTES:
            # Whole calls that wait for the one under way: nobody does that by mistake.
            self.close()
        elif crowded and self._kept_bytes > limits.SMALL_CALL_BYTES:
            self.close()

    def _count_kept(self) -> None:
        kept_bytes = len(self._received)
        self._lines.kept_bytes += kept_bytes - self._kept_bytes
        self._kept_bytes = kept_bytes

    # Calls

    def _advance(self) -> None:
        """Answer the first call that is complete. A further one has its turn after
        everybody else's."""
        received = self._received
        if self._ended or self._waiting is not None or not self._writable:
            return
        if len(received) < _HEAD_BYTES:
            self._await_rest()
            return
        length, name_bytes = frames.HEAD.unpack_from(received)
        if not 1 + name_bytes <= length <= frames.MAX_FRAME_BYTES:
            # What follows cannot be found, so this is the end.
            self._refuse("?", TooLarge(f"a call of {length} bytes, its name of {name_bytes}"))
            self._hang_up()
            return
        end = frames.LENGTH_BYTES + length
        if len(received) < end:
            self._await_rest()
            return
        name = bytes(received[_HEAD_BYTES : _HEAD_BYTES + name_bytes])
        message = bytes(received[_HEAD_BYTES + name_bytes : end])
        del received[:end]
        self._count_kept()
        self._patience_ends()
        self._call(name, message)
        if received:
            asyncio.get_running_loop().call_soon(self._advance)

    def _await_rest(self) -> None:
        if self._received and self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(limits.CALL_TIMEOUT_S, self.close)

    def _patience_ends(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _call(self, name: bytes, message: bytes) -> None:
        method = self._lines.methods.get(name)
        if method is None:
            self._refuse("?", BadRequest("a line carries the unary methods, and no such one"))
            return
        try:
            request = method.parse(message)
        except DecodeError:
            self._refuse(method.name, BadRequest(f"not a request of {method.name}"))
            return
        if method.waits:
            self._waiting = asyncio.get_running_loop().create_task(self._wait(method, request))
            return
        with self._lines.calls.running(method.name):
            try:
                response = method.behaviour(request, self._caller)
            except Exception as error:  # noqa: BLE001 - the outermost frame of a call
                self._refuse(method.name, error)
            else:
                self._answer(response)

    async def _wait(self, method: UnaryMethod, request: Any) -> None:
        with self._lines.calls.running(method.name):
            try:
                response = await method.behaviour(request, self._caller)
            except Exception as error:  # noqa: BLE001 - the outermost frame of a call
                self._refuse(method.name, error)
            else:
                self._answer(response)
            finally:
                self._waiting = None
        if self._received:
            self._advance()

    def _answer(self, response: Message) -> None:
        self._send(frames.ANSWER, response.SerializeToString())

    def _refuse(self, name: str, error: Exception) -> None:
        told = self._lines.calls.failed(name, error)
        self._send(frames.ERROR, encode_reply(ErrorReply(told.code, told.message)))

    def _send(self, kind: int, message: bytes) -> None:
        if self._transport is not None and not self._ended:
            self._transport.write(frames.frame(kind, message))

    def _hang_up(self) -> None:
        """End it once what was said is sent."""
        self._received.clear()
        self._count_kept()
        self._patience_ends()
        if self._transport is not None:
            self._transport.close()
