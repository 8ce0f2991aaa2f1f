"""A client's calls on lines: an answer is that of its own call, or there is none."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from kvstore.client.lines import MOST_BEGUN, MOST_CALLS, Exchange, Lines
from kvstore.client.rpc import Endpoint
from kvstore.client.steps import Call
from kvstore.client.transport import SyncTransport
from kvstore.client.transport_aio import AsyncTransport
from kvstore.errors import (
    InternalError,
    LeaseExpired,
    NoSession,
    TooLarge,
    Unavailable,
)
from kvstore.local.attach import ErrorReply, encode_reply
from kvstore.local.attachment import Attachment
from kvstore.wire import frames
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.unit.descriptors import open_descriptors


class Server:
    """Hands out lines, keeps their other ends, and answers when it is told to."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.up = True
        self._fetching = threading.Lock()

    def fetch_line(self, timeout_s: float) -> int:
        with self._fetching:
            if not self.up:
                raise Unavailable("the attach connection is lost")
            ours, theirs = socket.socketpair()
            ours.settimeout(60)
            self.ends.append(ours)
            return theirs.detach()

    def close(self) -> None:
        """A thread of a test that is over may be fetching still."""
        with self._fetching:
            self.up = False
        for end in self.ends:
            end.close()

    def alive(self) -> bool:
        return self.up

    def hear(self, end: int) -> bytes:
        head = self.ends[end].recv(frames.HEAD.size)
        length, name_bytes = frames.HEAD.unpack(head)
        rest = b""
        while len(rest) < length - 1:
            rest += self.ends[end].recv(length - 1 - len(rest))
        return rest[:name_bytes]

    def answer(self, end: int, lease: int) -> None:
        response = pb.RenewResponse(expires_ns=lease)
        self.send(end, frames.frame(frames.ANSWER, response.SerializeToString()))

    def send(self, end: int, data: bytes) -> None:
        self.ends[end].sendall(data)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def lines(server: Server) -> Iterator[Lines]:
    lines = Lines(cast(Attachment, server))
    yield lines
    lines.close()
    for line in list(lines._lines):  # Of calls that a test has begun and not ended.
        lines.discard(line)


def begin(lines: Lines, timeout_s: float = 60.0) -> Exchange:
    return Exchange(lines, "Renew", pb.RenewRequest(), timeout_s)


def renewed(exchange: Exchange) -> Any:
    return exchange.end().expires_ns


def test_calls_one_after_the_other_use_one_line(server: Server, lines: Lines) -> None:
    for number in range(3):
        exchange = begin(lines)
        assert server.hear(0) == b"Renew"
        server.answer(0, number)
        assert renewed(exchange) == number
    assert len(server.ends) == 1


def test_calls_at_a_time_get_each_its_own_answer(server: Server, lines: Lines) -> None:
    first, second = begin(lines), begin(lines)
    server.answer(1, 2)
    server.answer(0, 1)
    assert (renewed(first), renewed(second)) == (1, 2)


def test_an_answer_in_pieces_is_put_together(server: Server, lines: Lines) -> None:
    exchange = begin(lines)
    answer = frames.frame(frames.ANSWER, pb.RenewResponse(expires_ns=9).SerializeToString())

    def dribble() -> None:
        for byte in answer:
            server.send(0, bytes([byte]))
            time.sleep(0.001)

    sender = threading.Thread(target=dribble)
    sender.start()
    assert renewed(exchange) == 9
    sender.join()


def test_a_late_answer_is_not_taken_for_the_next_calls(server: Server, lines: Lines) -> None:
    with pytest.raises(Unavailable, match="in time"):
        begin(lines, 0.02).end()
    exchange = begin(lines)
    server.answer(1, 2)
    assert renewed(exchange) == 2
    assert not server.ends[0].recv(100).startswith(b"\0"), "it was sent"
    assert server.ends[0].recv(100) == b"", "the server is told that nobody listens"


def test_the_answer_to_a_call_that_was_left_is_skipped(server: Server, lines: Lines) -> None:
    begin(lines).leave()
    server.hear(0)
    server.answer(0, 1)
    exchange = begin(lines)
    server.hear(0)
    server.answer(0, 2)
    assert renewed(exchange) == 2
    assert len(server.ends) == 1


def test_a_line_whose_left_answer_never_came_is_not_used(server: Server, lines: Lines) -> None:
    begin(lines).leave()
    server.ends[0].close()
    exchange = begin(lines)
    server.answer(1, 2)
    assert renewed(exchange) == 2


def test_an_interrupt_costs_the_line(
    server: Server, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = begin(lines)

    def interrupt(self: Exchange) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "_left", interrupt)
        with pytest.raises(KeyboardInterrupt):
            exchange.end()
    assert server.hear(0) == b"Renew"
    assert server.ends[0].recv(1) == b""
    again = begin(lines)
    server.answer(1, 2)
    assert renewed(again) == 2


def test_an_error_is_that_of_the_server_and_keeps_the_line(server: Server, lines: Lines) -> None:
    exchange = begin(lines)
    error = encode_reply(ErrorReply("LEASE_EXPIRED", "too late"))
    server.hear(0)
    server.send(0, frames.frame(frames.ERROR, error))
    with pytest.raises(LeaseExpired, match="too late"):
        exchange.end()
    begin(lines)
    assert server.hear(0) == b"Renew"


@pytest.mark.parametrize(
    "answer",
    [
        frames.frame(7, b""),
        frames.frame(frames.ERROR, b"{}"),
        frames.HEAD.pack(0xFFFFFFFF, 0) + b"x",
        frames.frame(frames.ANSWER, b"") * 2,
    ],
    ids=["no-such-kind", "no-error", "4-gib", "two"],
)
def test_nonsense_is_an_error(server: Server, lines: Lines, answer: bytes) -> None:
    exchange = begin(lines)
    server.send(0, answer)
    with pytest.raises(InternalError):
        exchange.end()


def test_a_call_that_was_not_sent_was_not_done(server: Server, lines: Lines) -> None:
    """So that it may be made again with the next session."""
    exchange = begin(lines)
    server.answer(0, 1)
    exchange.end()
    server.ends[0].close()
    with pytest.raises(NoSession):
        begin(lines).end()
    server.up = False
    with pytest.raises(NoSession):
        begin(lines).end()


def test_a_call_that_was_sent_and_not_answered_may_have_been_done(
    server: Server, lines: Lines
) -> None:
    exchange = begin(lines)
    server.hear(0)
    server.ends[0].close()
    with pytest.raises(Unavailable):
        exchange.end()


def test_closing_wakes_who_waits(server: Server, lines: Lines) -> None:
    exchange = begin(lines, 60.0)
    threading.Timer(0.05, lines.close).start()
    with pytest.raises(Unavailable):
        exchange.end()
    with pytest.raises(Unavailable):
        begin(lines).end()


def test_calls_beyond_the_most_lines_wait_for_one_in_time(server: Server, lines: Lines) -> None:
    under_way = [begin(lines) for _ in range(MOST_CALLS)]
    with pytest.raises(Unavailable, match="under way"):
        begin(lines, 0.02).end()
    assert len(server.ends) == MOST_CALLS
    server.answer(3, 3)
    assert renewed(under_way[3]) == 3
    begin(lines)
    assert len(server.ends) == MOST_CALLS


def test_those_that_wait_for_a_turn_end_with_the_session(server: Server, lines: Lines) -> None:
    """They would wait out their time for a session that is gone."""
    under_way = [begin(lines) for _ in range(MOST_CALLS)]
    errors: list[str] = []

    def wait() -> None:
        with pytest.raises(Unavailable) as error:
            begin(lines, 60.0).end()
        errors.append(str(error.value))

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    lines.close()
    for thread in waiting:
        thread.join(60)
    assert len(errors) == 3
    assert all("has ended" in error for error in errors)
    for exchange in under_way:
        with pytest.raises(Unavailable):
            exchange.end()


def test_given_up_calls_do_not_use_up_the_turns(server: Server, lines: Lines) -> None:
    for _ in range(2 * MOST_CALLS):
        with pytest.raises(Unavailable, match="in time"):
            begin(lines, 0.001).end()
    exchange = begin(lines)
    server.answer(len(server.ends) - 1, 5)
    assert renewed(exchange) == 5


def step(lines: Lines, undone: list[Any], timeout_s: float = 60.0) -> Call:
    def undo(response: Any) -> None:
        undone.append(response)

    return Call("Renew", pb.RenewRequest(), b"", timeout_s, undo=undo, lines=lines)


@pytest.fixture
def transport() -> Iterator[SyncTransport]:
    transport = SyncTransport(Endpoint("unix:/nowhere", None))
    yield transport
    transport.close()


def test_calls_that_are_begun_leave_turns_for_others(
    server: Server, lines: Lines, transport: SyncTransport
) -> None:
    """Who has begun one needs another call before it ends the first."""
    undone: list[Any] = []
    begun = [transport.begin(step(lines, undone)) for _ in range(MOST_CALLS)]
    assert len(server.ends) == MOST_BEGUN
    plain = begin(lines)
    server.hear(MOST_BEGUN)
    server.answer(MOST_BEGUN, 1)
    assert renewed(plain) == 1
    for end in range(MOST_BEGUN):
        server.hear(end)
        server.answer(end, end)
        assert begun[end].end().expires_ns == end
    # The others are made when they are wanted, or not at all.
    begun[-1].drop()
    ender = threading.Thread(target=begun[-2].end)
    ender.start()
    while not (called := [i for i, end in enumerate(server.ends) if has_call(end)]):
        time.sleep(0.001)
    server.answer(called[0], 7)
    ender.join(60)
    assert not undone


def has_call(end: socket.socket) -> bool:
    """There is a call to hear."""
    end.setblocking(False)
    try:
        end.recv(1 << 16)
    except BlockingIOError:
        return False
    finally:
        end.settimeout(60)
    return True


def test_only_what_was_sent_is_undone(
    server: Server, lines: Lines, transport: SyncTransport
) -> None:
    """Undoing what nobody heard of ends the session, with all that others hold."""
    undone: list[Any] = []
    under_way = [begin(lines) for _ in range(MOST_CALLS)]
    with pytest.raises(Unavailable, match="under way"):
        transport.call(step(lines, undone, 0.01))
    assert not undone
    server.answer(0, 1)
    renewed(under_way[0])
    with pytest.raises(Unavailable, match="in time"):
        transport.call(step(lines, undone, 0.01))
    assert undone == [None]


def test_an_answer_that_breaks_off_ends_the_call(server: Server, lines: Lines) -> None:
    exchange = begin(lines)
    server.send(0, frames.HEAD.pack(1000, frames.ANSWER) + b"part")
    server.ends[0].close()
    with pytest.raises(Unavailable):
        exchange.end()


async def until(true: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it does not come")


def in_loop(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_an_answer_that_breaks_off_does_not_hang_the_loop(server: Server, lines: Lines) -> None:
    async def main() -> None:
        transport = AsyncTransport(Endpoint("unix:/nowhere", None))
        calling = asyncio.create_task(transport.call(step(lines, [])))
        await until(lambda: bool(server.ends) and has_call(server.ends[0]))
        server.send(0, frames.HEAD.pack(1000, frames.ANSWER) + b"part")
        server.ends[0].close()
        with pytest.raises(Unavailable):
            await calling
        await transport.close()

    in_loop(main())


def test_cancelled_calls_do_not_use_up_the_lines(server: Server, lines: Lines) -> None:
    async def main() -> None:
        transport = AsyncTransport(Endpoint("unix:/nowhere", None))
        for moment in range(3 * MOST_CALLS):
            calling = asyncio.create_task(transport.call(step(lines, [])))
            for _ in range(moment % 5):
                await asyncio.sleep(0)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
        calling = asyncio.create_task(transport.call(step(lines, [])))
        await until(lambda: any(map(has_call, server.ends)))
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert len(lines._lines) <= MOST_CALLS
        await transport.close()

    in_loop(main())


def test_a_forked_child_leaves_its_parents_lines_alone(server: Server, lines: Lines) -> None:
    exchange = begin(lines)
    child = os.fork()
    if child == 0:
        lines.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    server.answer(0, 4)
    assert renewed(exchange) == 4


def test_a_response_that_is_none_is_an_error_of_the_tree(server: Server, lines: Lines) -> None:
    exchange = begin(lines)
    server.send(0, frames.frame(frames.ANSWER, b"\xff\xff"))
    with pytest.raises(InternalError):
        exchange.end()


def test_a_request_that_is_too_large_is_not_sent(server: Server, lines: Lines) -> None:
    request = pb.LookupRequest(chains=[pb.Chain(keys=bytes(5 << 20))])
    with pytest.raises(TooLarge):
        Exchange(lines, "Lookup", request, 1.0).end()
    assert not server.ends


def test_no_descriptor_is_left_behind(server: Server) -> None:
    before = open_descriptors()
    lines = Lines(cast(Attachment, server))
    for timeout_s in (0.01, 0.01, 60.0):
        exchange = begin(lines, timeout_s)
        if timeout_s == 60.0:
            server.answer(2, 1)
            exchange.end()
        else:
            with pytest.raises(Unavailable):
                exchange.end()
    begin(lines).leave()
    lines.close()
    assert open_descriptors() == before + len(server.ends)
