"""The synchronous driver's calls: on lines where there are any, else over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import grpc

from kvstore.client.background import Background, Outcome
from kvstore.client.failures import typed_error
from kvstore.client.lines import MOST_CALLS, Exchange, Lines
from kvstore.client.rpc import CHANNEL_OPTIONS, Endpoint, Stubs, metadata
from kvstore.client.steps import Call, OpenSession, ReadStream, WriteStream
from kvstore.errors import BadRequest, KVStoreError, Unavailable
from kvstore.types import SESSION_ID_BYTES
from kvstore.wire.v1 import kvstore_pb2 as pb

T = TypeVar("T")

_GRACE_S = 1.0
"""How much longer to wait for a call than its own time, at whose end gRPC ends it."""


class SyncTransport:
    """One channel. Safe to use from several threads, not after a fork."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = grpc.insecure_channel(endpoint.target, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)
        self._background = Background()
        self._turns = threading.Semaphore(MOST_CALLS)

    def call(self, step: Call) -> Any:
        if step.lines is None:
            return self._call(step)
        return _hear(step, Exchange(step.lines, step.method, step.request, step.timeout_s))

    def _call(self, step: Call) -> Any:
        try:
            return self._stubs.unary[step.method](
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
        except ValueError as error:
            raise _closed(error) from error

    def begin(self, step: Call) -> Begun:
        if step.lines is None:
            outcome = self.start(partial(self._call, step))
            return Begun(self, step, partial(_wait, step, outcome), _nothing)
        if not step.lines.may_begin():
            # Made when its response is wanted, or in the background where it is not.
            later = partial(self.call, step)
            return Begun(self, step, later, partial(self.start, later), sent=False)
        lines, exchange = step.lines, None
        try:
            exchange = Exchange(lines, step.method, step.request, step.timeout_s)
        finally:
            if exchange is None:
                lines.end_begun()
        return Begun(
            self, step, partial(_end_begun, step, exchange), partial(_leave_begun, lines, exchange)
        )

    def start(self, work: Callable[[], T]) -> Outcome[T]:
        """Have `work` done while the caller goes on."""
        return self._background.start(work)

    def read(self, step: ReadStream) -> None:
        try:
            with self._turn("Read", step.timeout_s):
                stream = self._stubs.read(
                    step.request, timeout=step.timeout_s, metadata=metadata(step.session)
                )
                for piece in stream:
                    step.sink(piece)
        except grpc.RpcError as error:
            raise _typed("Read", error) from error
        except ValueError as error:
            raise _closed(error) from error

    def write(self, step: WriteStream) -> None:
        try:
            with self._turn("Write", step.timeout_s):
                self._stubs.write(
                    iter(step.pieces), timeout=step.timeout_s, metadata=metadata(step.session)
                )
        except grpc.RpcError as error:
            raise _typed("Write", error) from error
        except ValueError as error:
            raise _closed(error) from error

    @contextmanager
    def _turn(self, method: str, timeout_s: float) -> Iterator[None]:
        """To have one of a session's streams: of more the server refuses some."""
        if not self._turns.acquire(timeout=timeout_s):
            raise Unavailable(f"{method}: others' calls took too long")
        try:
            yield
        finally:
            self._turns.release()

    def open_session(self, step: OpenSession) -> tuple[bytes, _Stream]:
        try:
            call = self._stubs.open(pb.OpenSessionRequest())
        except ValueError as error:
            raise _closed(error) from error
        # The stream has no deadline, being the session; its first message has.
        timer = threading.Timer(step.timeout_s, call.cancel)
        timer.daemon = True
        timer.start()
        try:
            session: bytes = next(call).session
        except StopIteration:
            raise Unavailable("OpenSession: the server ended the session at once") from None
        except grpc.RpcError as error:
            raise _typed("OpenSession", error) from error
        finally:
            timer.cancel()
        if len(session) != SESSION_ID_BYTES:
            call.cancel()
            raise Unavailable("OpenSession: the server sent no session id")
        return session, _Stream(call)

    def close(self) -> None:
        """Ends every RPC under way with `Unavailable`. Idempotent."""
        self._channel.close()


class Begun:
    """A call under way, or, where it is not `sent` yet, one that `end` makes.

    `wait`: its response; `leave`: nobody wants it. One of them is called, once.
    """

    def __init__(
        self,
        transport: SyncTransport,
        step: Call,
        wait: Callable[[], Any],
        leave: Callable[[], Any],
        *,
        sent: bool = True,
    ) -> None:
        self._transport = transport
        self._step = step
        self._wait = wait
        self._leave = leave
        self._sent = sent

    def end(self) -> Any:
        """Its response."""
        return self._wait()

    def drop(self) -> None:
        """Have given back what it grants, if it does. Does not wait."""
        undo = self._step.undo
        if undo is None:
            self._leave()
        elif self._sent:
            self._transport.start(partial(self._undo, undo))

    def _undo(self, undo: Callable[[Any | None], Call | None]) -> None:
        try:
            response = self._wait()
        except KVStoreError:
            # Nothing was granted, or `undo` knows already that nobody heard of it.
            return
        back = undo(response)
        if back is None:
            return
        try:
            self._transport.call(back)
        except Unavailable:
            undo(None)
        except KVStoreError:
            # There is nothing to give back any more.
            return


def _wait(step: Call, outcome: Outcome[Any]) -> Any:
    try:
        return outcome.wait(step.timeout_s + _GRACE_S)
    except Unavailable:
        step.unheard()
        raise


def _hear(step: Call, exchange: Exchange) -> Any:
    try:
        return exchange.end()
    except Unavailable:
        if exchange.sent:
            step.unheard()
        raise


def _end_begun(step: Call, exchange: Exchange) -> Any:
    try:
        return _hear(step, exchange)
    finally:
        assert step.lines is not None
        step.lines.end_begun()


def _leave_begun(lines: Lines, exchange: Exchange) -> None:
    exchange.leave()
    lines.end_begun()


class _Stream:
    def __init__(self, call: Any) -> None:
        self._call = call

    def alive(self) -> bool:
        return bool(self._call.is_active())

    def cancel(self) -> None:
        self._call.cancel()


def _nothing() -> None:
    return


def _typed(method: str, error: grpc.RpcError) -> KVStoreError:
    if not isinstance(error, grpc.Call):
        return Unavailable(f"{method}: {error}")
    return typed_error(method, error.code(), error.details(), error.trailing_metadata())


def _closed(error: ValueError) -> KVStoreError:
    # What grpc raises for a channel that another thread closed in this moment.
    return BadRequest(f"the client is closed, or a field is out of range: {error}")
