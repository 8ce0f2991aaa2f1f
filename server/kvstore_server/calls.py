"""What every call has in common: counting, timing, and errors becoming statuses.

Handlers raise the project's errors. Anything else that escapes one is a bug: the
client sees INTERNAL, the log gets type and place, and nothing of the request.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from kvstore.errors import KVStoreError
from kvstore.metrics import Metrics
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.status import INTERNAL, WireError, wire_error

_log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["KVStore"].full_name

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]


class Calls:
    """Runs handlers, and knows how many are running.

    Streams that only mark a session's life are not counted as running: they end
    when the server says so.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def idle(self) -> bool:
        """No call is running."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        """Until no call is running."""
        await self._idle.wait()

    @asynccontextmanager
    async def answering(self, name: str, context: Context) -> AsyncIterator[None]:
        """Around a handler: errors leave as their statuses."""
        began = time.perf_counter()
        self._running += 1
        self._idle.clear()
        try:
            async with self.translating(name, context):
                yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
            self._metrics.call_done(name, time.perf_counter() - began)

    @asynccontextmanager
    async def translating(self, name: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except KVStoreError as error:
            answer = wire_error(error)
            if answer is INTERNAL:
                self._report(name, error)
            await self._abort(context, answer)
        except (asyncio.CancelledError, grpc.aio.BaseError):
            raise  # The client went away, or the answer could not be sent.
        except Exception as error:  # noqa: BLE001
            # The outermost frame of every call.
            self._report(name, error)
            await self._abort(context, INTERNAL)

    def _report(self, name: str, error: Exception) -> None:
        self._metrics.unexpected("call")
        _log.error("a fault while answering %s", name, exc_info=error)

    async def _abort(self, context: Context, answer: WireError) -> None:
        self._metrics.rejected(answer.code)
        await context.abort(answer.status, answer.message, answer.trailing_metadata)

    def handler_for(self, method: Any, behaviour: Behaviour, **codec: Any) -> Any:
        """The gRPC handler of a method of the .proto.

        `method`: its descriptor. `behaviour`: for a unary answer a function, plain
        or async, from (request, context) to the response; for a stream an async
        function that writes to the context itself and does its own translating.
        `codec` overrides the (de)serializers.
        """
        request_type, response_type = _message(method.input_type), _message(method.output_type)
        codec = {
            "request_deserializer": request_type.FromString,
            "response_serializer": response_type.SerializeToString,
            **codec,
        }
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(behaviour, **codec)
        name: str = method.name
        waits = inspect.iscoroutinefunction(behaviour)

        async def answer(request: Any, context: Context) -> Any:
            async with self.answering(name, context):
                response = behaviour(request, context)
                return await response if waits else response

        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(answer, **codec)
        return grpc.unary_unary_rpc_method_handler(answer, **codec)


def _message(descriptor: Any) -> Any:
    return getattr(pb, descriptor.name)
