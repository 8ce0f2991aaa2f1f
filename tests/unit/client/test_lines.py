"""A client's calls on lines: an answer is that of its own call, or there is none."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from kvstore.client.lines import MOST_LINES, Exchange, Lines
from kvstore.errors import (
    InternalError,
    LeaseExpired,
    NoSession,
    TooLarge,
    Unavailable,
)
from kvstore.local.attach import Attachment, ErrorReply, encode_reply
from kvstore.wire import frames
from kvstore.wire.v1 import kvstore_pb2 as pb


class Server:
    """Hands out lines, keeps their other ends, and answers when it is told to."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.up = True

    def fetch_line(self, timeout_s: float) -> int:
        if not self.up:
            raise Unavailable("the attach connection is lost")
        ours, theirs = socket.socketpair()
        ours.settimeout(5)
        self.ends.append(ours)
        return theirs.detach()

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
    for end in server.ends:
        end.close()


@pytest.fixture
def lines(server: Server) -> Iterator[Lines]:
    lines = Lines(cast(Attachment, server))
    yield lines
    lines.close()
    for line in list(lines._lines):  # Of calls that a test has begun and not ended.
        lines.discard(line)


def begin(lines: Lines, timeout_s: float = 5.0) -> Exchange:
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
    under_way = [begin(lines) for _ in range(MOST_LINES)]
    with pytest.raises(Unavailable, match="under way"):
        begin(lines, 0.02).end()
    assert len(server.ends) == MOST_LINES
    server.answer(3, 3)
    assert renewed(under_way[3]) == 3
    begin(lines)
    assert len(server.ends) == MOST_LINES


def test_a_request_that_is_too_large_is_not_sent(server: Server, lines: Lines) -> None:
    request = pb.LookupRequest(chains=[pb.Chain(keys=bytes(5 << 20))])
    with pytest.raises(TooLarge):
        Exchange(lines, "Lookup", request, 1.0).end()
    assert not server.ends


def test_no_descriptor_is_left_behind(server: Server) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lines = Lines(cast(Attachment, server))
    for timeout_s in (0.01, 0.01, 5.0):
        exchange = begin(lines, timeout_s)
        if timeout_s == 5.0:
            server.answer(2, 1)
            exchange.end()
        else:
            with pytest.raises(Unavailable):
                exchange.end()
    begin(lines).leave()
    lines.close()
    assert len(os.listdir("/proc/self/fd")) == before + len(server.ends)
