"""The asynchronous driver's calls: on lines where there are any, else over gRPC.

Everything here belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio

from kvstore.client import lines as lines_
from kvstore.client.failures import typed_error
from kvstore.client.lines import Line, Lines
from kvstore.client.rpc import CHANNEL_OPTIONS, Endpoint, Stubs, metadata
from kvstore.client.steps import Call, OpenSession, ReadStream, WriteStream
from kvstore.errors import BadRequest, KVStoreError, Unavailable
from kvstore.types import SESSION_ID_BYTES
from kvstore.wire.v1 import kvstore_pb2 as pb


class AsyncTransport:
    """One channel of the running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint.target, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)
        self._turns = asyncio.Semaphore(lines_.MOST_CALLS)
        # Of its own: others' work must not wait for a server that hangs.
        self._opening = ThreadPoolExecutor(1, "kvstore-line")

    async def call(self, step: Call) -> Any:
        if step.lines is not None:
            return await self._call_on_line(step, step.lines)
        try:
            return await self._stubs.unary[step.method](
                step.request,
                timeout=step.timeout_s,
                metadata=metadata(step.session),
                wait_for_ready=step.wait_for_ready,
            )
        except grpc.RpcError as error:
            typed = _typed(step.method, error)
            if isinstance(typed, Unavailable):
                step.unheard()
            raise typed from error
        except (ValueError, grpc.aio.UsageError) as error:
            raise _closed(error) from error

    async def _call_on_line(self, step: Call, lines: Lines) -> Any:
        call = lines_.encode_call(step.method, step.request)
        sent = False
        try:
            async with asyncio.timeout(step.timeout_s):
                line = await self._line(lines, step.timeout_s)
                try:
                    await _send(step.method, line.socket, call)
                    sent = True
                    number, message = await _receive(step.method, line.socket)
                except BaseException:
                    lines.discard(line)
                    self._turns.release()
                    raise
        except (TimeoutError, Unavailable) as error:
            if sent:
                step.unheard()
            if isinstance(error, Unavailable):
                raise
            raise Unavailable(f"{step.method}: no answer in time") from None
        lines.keep(line)
        self._turns.release()
        return lines_.decode_answer(step.method, number, message)

    async def _line(self, lines: Lines, timeout_s: float) -> Line:
        """A line and the turn that goes with it. One that is being opened for a caller
        who left has its turn still, so that there are never more lines than turns."""
        await self._turns.acquire()
        line = lines.at_hand()
        if line is not None:
            return line
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(self._opening, lines.open, timeout_s)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(partial(self._opened_for_nobody, lines))
            raise
        except BaseException:
            self._turns.release()
            raise

    def _opened_for_nobody(self, lines: Lines, opening: asyncio.Future[Line]) -> None:
        self._turns.release()
        if not opening.cancelled() and opening.exception() is None:
            lines.keep(opening.result())

    async def read(self, step: ReadStream) -> None:
        try:
            async with self._turn("Read", step.timeout_s):
                stream = self._stubs.read(
                    step.request, timeout=step.timeout_s, metadata=metadata(step.session)
                )
                async for piece in stream:
                    step.sink(piece)
        except grpc.RpcError as error:
            raise _typed("Read", error) from error
        except (ValueError, grpc.aio.UsageError) as error:
            raise _closed(error) from error

    async def write(self, step: WriteStream) -> None:
        try:
            async with self._turn("Write", step.timeout_s):
                await self._stubs.write(
                    iter(step.pieces), timeout=step.timeout_s, metadata=metadata(step.session)
                )
        except grpc.RpcError as error:
            raise _typed("Write", error) from error
        except (ValueError, grpc.aio.UsageError) as error:
            raise _closed(error) from error

    @asynccontextmanager
    async def _turn(self, method: str, timeout_s: float) -> AsyncIterator[None]:
        """To have one of a session's streams: of more the server refuses some."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._turns.acquire()
        except TimeoutError:
            raise Unavailable(f"{method}: others' calls took too long") from None
        try:
            yield
        finally:
            self._turns.release()

    async def open_session(self, step: OpenSession) -> tuple[bytes, _Stream]:
        try:
            call = self._stubs.open(pb.OpenSessionRequest())
        except grpc.aio.UsageError as error:
            raise _closed(error) from error
        try:
            # The stream has no deadline, being the session; its first message has.
            first = await asyncio.wait_for(call.read(), step.timeout_s)
        except TimeoutError:
            call.cancel()
            raise Unavailable("OpenSession: no answer in time") from None
        except grpc.RpcError as error:
            raise _typed("OpenSession", error) from error
        except BaseException:
            call.cancel()
            raise
        # A stream that ends at once yields a marker, not a message.
        session: bytes = getattr(first, "session", b"")
        if len(session) != SESSION_ID_BYTES:
            call.cancel()
            raise Unavailable("OpenSession: the server opened no session")
        return session, _Stream(call)

    async def close(self) -> None:
        """Ends every RPC under way. Idempotent."""
        self._opening.shutdown(wait=False, cancel_futures=True)
        await self._channel.close(None)


async def _send(method: str, line: socket.socket, call: bytes) -> None:
    line.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_sendall(line, call)
    except OSError as error:
        raise lines_.unsent(method, error) from error


async def _receive(method: str, line: socket.socket) -> tuple[int, memoryview]:
    """The answer, as `lines.split` gives it."""
    loop = asyncio.get_running_loop()
    answer = bytearray()
    missing = lines_.FIRST_BYTES
    try:
        while missing:
            data = await loop.sock_recv(line, max(missing, lines_.FIRST_BYTES))
            if not data:
                raise ConnectionResetError
            answer += data
            missing = lines_.missing_of(answer)
    except OSError as error:
        raise lines_.unheard(method, error) from error
    return lines_.split(answer)


class _Stream:
    def __init__(self, call: Any) -> None:
        self._call = call

    def alive(self) -> bool:
        return not self._call.done()

    def cancel(self) -> None:
        self._call.cancel()


def _typed(method: str, error: grpc.RpcError) -> KVStoreError:
    if not isinstance(error, grpc.aio.AioRpcError):
        return Unavailable(f"{method}: {error}")
    trailing: Any = error.trailing_metadata()
    return typed_error(method, error.code(), error.details(), trailing)


def _closed(error: Exception) -> KVStoreError:
    return BadRequest(f"the client is closed, or a field is out of range: {error}")
