"""The synchronous driver's gRPC."""

from __future__ import annotations

import threading
from typing import Any

import grpc

from kvstore.client.failures import typed_error
from kvstore.client.rpc import CHANNEL_OPTIONS, Endpoint, Stubs, metadata
from kvstore.client.steps import Call, OpenSession, ReadStream, WriteStream
from kvstore.errors import BadRequest, KVStoreError, Unavailable
from kvstore.types import SESSION_ID_BYTES
from kvstore.wire.v1 import kvstore_pb2 as pb

_GRACE_S = 1.0
"""How much longer than gRPC's own end of a call to wait for it. An interrupt can come
at a moment in which it leaves gRPC's thread blocked, and then that end never comes."""


class SyncTransport:
    """One channel. Safe to use from several threads, not after a fork."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = grpc.insecure_channel(endpoint.target, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)
        self._left_running: set[Any] = set()

    def call(self, step: Call) -> Any:
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
                _unheard(step)
            raise typed from error
        except ValueError as error:
            raise _closed(error) from error
        except BaseException:
            # Interrupted: nobody will hear of what was granted.
            _unheard(step)
            raise

    def begin(self, step: Call) -> Begun:
        try:
            future = self._stubs.unary[step.method].future(
                step.request, timeout=step.timeout_s, metadata=metadata(step.session)
            )
        except ValueError as error:
            raise _closed(error) from error
        return Begun(self, step, future)

    def let_run(self, future: Any) -> None:
        """See that a call gets through of which nobody wants the answer: gRPC cancels
        one whose future is garbage."""
        self._left_running.add(future)
        future.add_done_callback(self._left_running.discard)

    def read(self, step: ReadStream) -> None:
        try:
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
            self._stubs.write(
                iter(step.pieces), timeout=step.timeout_s, metadata=metadata(step.session)
            )
        except grpc.RpcError as error:
            raise _typed("Write", error) from error
        except ValueError as error:
            raise _closed(error) from error

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
    """A call under way."""

    def __init__(self, transport: SyncTransport, step: Call, future: Any) -> None:
        self._transport = transport
        self._step = step
        self._future = future

    def end(self) -> Any:
        """Its response. Bounded by the call's own time."""
        try:
            return self._response()
        except Unavailable:
            _unheard(self._step)
            raise
        except KVStoreError:
            raise
        except BaseException:
            # Interrupted: nobody else will hear of what was granted.
            self.drop()
            raise

    def drop(self) -> None:
        """Give back what it grants, if it does. Does not wait where there is no undo."""
        undo = self._step.undo
        if undo is None:
            self._transport.let_run(self._future)
            return
        try:
            back = undo(self._response())
            if back is not None:
                self._transport.call(back)
        except Unavailable:
            _unheard(self._step)
        except KVStoreError:
            # Nothing was granted.
            return
        except BaseException:
            _unheard(self._step)
            raise

    def _response(self) -> Any:
        try:
            return self._future.result(self._step.timeout_s + _GRACE_S)
        except grpc.RpcError as error:
            raise _typed(self._step.method, error) from error
        except grpc.FutureCancelledError:
            raise Unavailable(f"{self._step.method}: the client was closed") from None
        except grpc.FutureTimeoutError:
            raise Unavailable(f"{self._step.method}: no answer in time") from None


class _Stream:
    def __init__(self, call: Any) -> None:
        self._call = call

    def alive(self) -> bool:
        return bool(self._call.is_active())

    def cancel(self) -> None:
        self._call.cancel()


def _unheard(step: Call) -> None:
    if step.undo is not None:
        step.undo(None)


def _typed(method: str, error: grpc.RpcError) -> KVStoreError:
    if not isinstance(error, grpc.Call):
        return Unavailable(f"{method}: {error}")
    return typed_error(method, error.code(), error.details(), error.trailing_metadata())


def _closed(error: ValueError) -> KVStoreError:
    # What grpc raises for a channel that another thread closed in this moment.
    return BadRequest(f"the client is closed, or a field is out of range: {error}")
