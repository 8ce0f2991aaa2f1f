"""What every call has in common: counting, timing, and errors becoming statuses.

Handlers raise the project's errors. Anything else that escapes one is a bug: the
client sees INTERNAL, the log gets type and place, and nothing of the request.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from kvstore.errors import BadRequest, KVStoreError
from kvstore.metrics import Metrics
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.callers import Caller, Context
from kvstore_server.status import INTERNAL, WireError, wire_error

_log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["KVStore"]
SERVICE_NAME = _SERVICE.full_name
METHODS: dict[str, Any] = {method.name: method for method in _SERVICE.methods}
"""Descriptors of the .proto's methods by name."""

_MARKS = frozenset({"OpenSession"})
"""Streams that only mark a session's life. They are not counted as running: they end
when the server says so."""


class UnaryMethod:
    """A method that takes one message and answers with one.

    `behaviour`: a function, plain or async (then `waits`), from (request, caller) to
    the response.
    """

    def __init__(self, name: str, request: type[Message], behaviour: Callable[..., Any]) -> None:
        self.name = name
        self.parse: Callable[[bytes], Message] = request.FromString
        self.behaviour = behaviour
        self.waits = inspect.iscoroutinefunction(behaviour)


class Calls:
    """Runs handlers, and knows how many are running."""

    def __init__(self, metrics: Metrics, caller_of: Callable[[Context], Caller]) -> None:
        self._metrics = metrics
        self._caller_of = caller_of
        self.under_way = 0
        """Calls that are running, streams included."""

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Around a call, from its request to its response."""
        began = time.perf_counter()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._metrics.call_done(name, time.perf_counter() - began)

    def failed(self, name: str, error: Exception) -> WireError:
        """What a client is told of an error that escaped a handler."""
        answer = wire_error(error) if isinstance(error, KVStoreError) else INTERNAL
        if answer is INTERNAL:
            self._metrics.unexpected("call")
            _log.error("a fault while answering %s", name, exc_info=error)
        self._metrics.rejected(answer.code)
        return answer

    def handler_for(self, method: Any, behaviour: Callable[..., Any], **codec: Any) -> Any:
        """The gRPC handler of a method of the .proto.

        `method`: its descriptor. `behaviour`: for a unary answer a function, plain
        or async, from (request, caller) to the response; for a stream an async
        function of (request, caller, context) that writes to the context itself. A
        stream of requests comes as serialized messages. `codec` overrides the
        serializer.
        """
        codec = {
            "response_serializer": message_class(method.output_type).SerializeToString,
            **codec,
        }
        name: str = method.name
        parse = message_class(method.input_type).FromString
        waits = inspect.iscoroutinefunction(behaviour)

        def read(request: Any) -> Any:
            # Here, because gRPC takes what cannot be read for a fault of the server, and
            # logs each.
            if method.client_streaming:
                return request
            try:
                return parse(request)
            except DecodeError:
                raise BadRequest(f"not a request of {name}") from None

        async def answer(request: Any, context: Context) -> Any:
            with self.running(name):
                try:
                    response = behaviour(read(request), self._caller_of(context))
                    return await response if waits else response
                except Exception as error:  # noqa: BLE001 - the outermost frame of a call
                    await self._refuse(name, context, error)

        async def stream(request: Any, context: Context) -> None:
            try:
                await behaviour(read(request), self._caller_of(context), context)
            except Exception as error:  # noqa: BLE001 - the outermost frame of a call
                await self._refuse(name, context, error)

        async def counted_stream(request: Any, context: Context) -> None:
            with self.running(name):
                await stream(request, context)

        if method.server_streaming:
            handler = stream if name in _MARKS else counted_stream
            return grpc.unary_stream_rpc_method_handler(handler, **codec)
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(answer, **codec)
        return grpc.unary_unary_rpc_method_handler(answer, **codec)

    async def _refuse(self, name: str, context: Context, error: Exception) -> None:
        if isinstance(error, grpc.aio.BaseError):
            raise error  # The client went away, or the answer could not be sent.
        answer = self.failed(name, error)
        await context.abort(answer.status, answer.message, answer.trailing_metadata)


def message_class(descriptor: Any) -> type[Message]:
    """The generated class of a message of the .proto."""
    generated: type[Message] = getattr(pb, descriptor.name)
    return generated
