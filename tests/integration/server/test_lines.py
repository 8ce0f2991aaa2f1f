"""Calls on lines: whatever a client sends there, it alone is told, and nobody waits."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.wire import frames
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server import limits
from kvstore_server.app import App
from kvstore_server.limits import MAX_BLOCKS, MAX_LINES
from tests.integration.server.harness import (
    LAYOUT,
    PATIENCE_S,
    RawAttachment,
    attached,
    eventually,
    eventually_answered,
    in_loop,
    in_thread,
    keys,
    serving,
)


class RawLine:
    """A line without the client library. Blocking: use `in_thread`."""

    def __init__(self, raw: RawAttachment) -> None:
        assert raw.ask({"op": "line"}) == {"op": "line"}
        self.socket = socket.socket(fileno=raw.fds.pop())
        self.socket.settimeout(PATIENCE_S)

    def call(self, method: str, request: Any, answer: Any) -> Any:
        """The response, or the error's code."""
        self.socket.sendall(call(method, request.SerializeToString()))
        number, message = self.read()
        if number == frames.ANSWER:
            return answer.FromString(message)
        return json.loads(message)["code"]

    def read(self) -> tuple[int, bytes]:
        """The next answer. Raises `EOFError`."""
        length, number = frames.HEAD.unpack(self._read(frames.HEAD.size))
        return number, self._read(length - 1)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def call(method: str, message: bytes) -> bytes:
    return frames.frame(len(method), method.encode(), message)


@asynccontextmanager
async def line_to(app: App) -> AsyncIterator[tuple[RawLine, RawAttachment]]:
    async with attached(app) as (raw, _, _):
        line = await in_thread(RawLine, raw)
        try:
            yield line, raw
        finally:
            line.socket.close()


async def code(line: RawLine) -> str:
    number, message = await in_thread(line.read)
    assert number == frames.ERROR
    answer: str = json.loads(message)["code"]
    return answer


async def info(line: RawLine) -> pb.GetServerInfoResponse:
    answer = await in_thread(
        line.call, "GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse
    )
    assert isinstance(answer, pb.GetServerInfoResponse)
    return answer


async def register(line: RawLine) -> bytes:
    request = pb.RegisterLayoutRequest(layout=LAYOUT)
    answer = await in_thread(line.call, "RegisterLayout", request, pb.RegisterLayoutResponse)
    layout_id: bytes = answer.layout_id
    return layout_id


@in_loop
async def test_the_lines_session_is_that_of_its_attach_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, raw):
        layout_id = await register(line)
        request = pb.ReserveRequest(layout_id=layout_id, count=1)
        slots = (await in_thread(line.call, "Reserve", request, pb.ReserveResponse)).slots
        assert app.store.stats().reservations == 1
        async with line_to(app) as (other, _):
            assert await register(other) == layout_id
            abort = pb.AbortRequest(slots=[slots.first_slot])
            await in_thread(other.call, "Abort", abort, pb.AbortResponse)
            assert app.store.stats().reservations == 1
        raw.close()
        await eventually(lambda: not app.store.stats().reservations)
        with pytest.raises(EOFError):
            await in_thread(line.read)


@in_loop
async def test_a_line_needs_a_session(tmp_path: Path) -> None:
    async with serving(tmp_path) as app:
        raw = await in_thread(RawAttachment, app.config.attach_path)
        assert (await in_thread(raw.ask, {"op": "line"}))["code"] == "BAD_REQUEST"
        assert not raw.fds
        raw.close()


@in_loop
@pytest.mark.parametrize("method", ["Nonsense", "", "OpenSession", "Read", "Write", "\0" * 255])
async def test_what_is_no_unary_method_is_refused_and_the_line_goes_on(
    tmp_path: Path, method: str
) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, _):
        line.socket.sendall(call(method, b""))
        assert await code(line) == "BAD_REQUEST"
        assert (await info(line)).epoch == app.store.epoch


@in_loop
async def test_what_is_no_request_is_refused_and_the_line_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, _):
        line.socket.sendall(call("Acquire", b"\xff" * 100))
        assert await code(line) == "BAD_REQUEST"
        line.socket.sendall(
            call("Acquire", pb.AcquireRequest(chains=[pb.Chain()]).SerializeToString())
        )
        assert await code(line) == "BAD_REQUEST"
        await info(line)


@in_loop
@pytest.mark.parametrize(
    "head",
    [(0, 0), (0xFFFFFFFF, 3), (frames.MAX_FRAME_BYTES + 1, 3), (3, 200)],
    ids=["nothing", "4-gib", "one-too-many", "name-beyond-the-end"],
)
async def test_a_frame_that_cannot_be_is_refused_and_ends_the_line_alone(
    tmp_path: Path, head: tuple[int, int]
) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, raw):
        line.socket.sendall(frames.HEAD.pack(*head) + b"x" * 1000)
        assert await code(line) == "TOO_LARGE"
        with pytest.raises(EOFError):
            await in_thread(line.read)
        again = await in_thread(RawLine, raw)
        await info(again)
        again.socket.close()


@in_loop
async def test_any_bytes_at_all_leave_the_server_serving(tmp_path: Path) -> None:
    noise = random.Random(7)
    async with serving(tmp_path) as app, line_to(app) as (good, raw):
        for _ in range(60):
            line = await in_thread(RawLine, raw)
            data = bytearray(call("Acquire", b"\x0a\x02\x08\x01") * 3)
            for _ in range(noise.randrange(1, 6)):
                data[noise.randrange(len(data))] = noise.randrange(256)
            await in_thread(line.socket.sendall, bytes(data[: noise.randrange(1, len(data))]))
            line.socket.close()
        await info(good)
        await eventually(lambda: not app.busy())


@in_loop
async def test_calls_in_pieces_and_calls_in_a_row_are_answered_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, _):
        one = call("GetServerInfo", b"") + call("Acquire", b"") + call("Nonsense", b"")
        for byte in one + one:
            await in_thread(line.socket.sendall, bytes([byte]))
        numbers = [(await in_thread(line.read))[0] for _ in range(6)]
        assert numbers == [frames.ANSWER, frames.ANSWER, frames.ERROR] * 2


@in_loop
async def test_a_call_whose_client_left_is_cancelled(tmp_path: Path) -> None:
    """It would hold its place until its time is up."""
    async with serving(tmp_path) as app, line_to(app) as (line, raw):
        layout_id = await register(line)
        everything = pb.ReserveRequest(layout_id=layout_id, count=MAX_BLOCKS)
        await in_thread(line.call, "Reserve", everything, pb.ReserveResponse)
        waiting = await in_thread(RawLine, raw)
        more = pb.ReserveRequest(layout_id=layout_id, count=1, wait_ms=60_000)
        waiting.socket.sendall(call("Reserve", more.SerializeToString()))
        await eventually(app.busy)
        await info(line)
        waiting.socket.close()
        await eventually(lambda: not app.busy())


@in_loop
async def test_calls_in_a_row_are_not_done_for_a_client_that_left(tmp_path: Path) -> None:
    """Seconds of work that nobody wants, which the others wait beside."""
    async with serving(tmp_path) as app, line_to(app) as (line, raw):
        await info(line)
        begun = done(app, "GetStats")
        gone = await in_thread(RawLine, raw)
        one = call("GetStats", b"")
        # What fits into the kernel's buffer, and not in a thread: nothing is answered meanwhile.
        sent = gone.socket.send(one * 20_000) // len(one)
        gone.socket.close()
        (connection,) = app._attach.connections
        await eventually(lambda: len(connection._lines) == 1)
        await info(line)
        assert done(app, "GetStats") - begun < sent / 2


@in_loop
async def test_a_call_that_does_not_come_whole_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four megabytes on each of its lines are a client's to take, but not for ever."""
    monkeypatch.setattr(limits, "CALL_TIMEOUT_S", 0.2)
    async with serving(tmp_path) as app, line_to(app) as (line, raw):
        await info(line)
        part = await in_thread(RawLine, raw)
        await in_thread(part.socket.sendall, call("Lookup", bytes(1 << 20))[:-1])
        with pytest.raises((EOFError, ConnectionResetError)):
            await in_thread(part.read)
        part.socket.close()
        await info(line)


def done(app: App, method: str) -> int:
    """Calls of a method that were answered."""
    count = app.metrics.registry.get_sample_value("kvstore_call_seconds_count", {"method": method})
    return int(count or 0)


@in_loop
async def test_the_memory_for_parts_of_calls_is_bounded_over_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_KEPT_BYTES", 1 << 20)
    half = frames.HEAD.pack(1 << 20, 6) + b"Lookup" + bytes(600 << 10)
    async with (
        serving(tmp_path) as app,
        line_to(app) as (first, _),
        line_to(app) as (second, _),
        line_to(app) as (other, _),
    ):
        lines = app._attach.lines
        await in_thread(first.socket.sendall, half)
        await eventually(lambda: lines.kept_bytes == len(half))
        with pytest.raises((EOFError, ConnectionError)):
            await in_thread(second.socket.sendall, half[: 500 << 10])
            await in_thread(second.read)
        assert (await info(other)).max_keys, "small calls go on"
        first.socket.close()
        await eventually(lambda: lines.kept_bytes == 0)


@in_loop
async def test_a_client_that_does_not_read_is_not_called_on_for_more(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, _), line_to(app) as (other, _):
        line.socket.setblocking(False)
        sent = 0
        chunk = call("GetServerInfo", b"") * 500
        for _ in range(200):
            try:
                sent += line.socket.send(chunk)
            except BlockingIOError:
                await asyncio.sleep(0.005)
        await info(other)
        # It took what fits buffers, its own and the kernel's, and closed or left the rest.
        assert sent < 8 << 20


@in_loop
async def test_one_line_too_many_is_refused_and_one_that_ended_makes_room(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, attached(app) as (raw, _, _):
        lines = [await in_thread(RawLine, raw) for _ in range(MAX_LINES)]
        assert (await in_thread(raw.ask, {"op": "line"}))["code"] == "TOO_MANY"
        for line in lines:
            await info(line)
            line.socket.close()

        async def another() -> bool:
            return bool((await in_thread(raw.ask, {"op": "line"}))["op"] == "line")

        await eventually_answered(another)


@in_loop
async def test_the_largest_request_there_may_be_goes_over_a_line(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, line_to(app) as (line, _):
        layout_id = await register(line)
        chain = pb.Chain(layout_ids=[layout_id], keys=keys(*range(65536)))
        request = pb.LookupRequest(chains=[chain])
        found = await in_thread(line.call, "Lookup", request, pb.LookupResponse)
        assert [c.held for c in found.chains] == [0]
