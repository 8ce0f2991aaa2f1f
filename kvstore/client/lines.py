"""Calls on lines: how a client on the server's host asks without gRPC.

A line is a stream socket that came over the attach connection and carries one call at a
time (`kvstore.wire.frames`). A session keeps as many as it ever had calls under way at
once. A call that is given up takes its line with it: closing it tells the server, and an
answer that comes late cannot be taken for the next one's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import weakref
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from kvstore.client.rpc import METHODS
from kvstore.client.wire import MAX_MESSAGE_BYTES
from kvstore.errors import InternalError, KVStoreError, NoSession, TooLarge, Unavailable
from kvstore.local.attach import ErrorReply, decode_reply, error_of
from kvstore.local.attachment import Attachment
from kvstore.wire import frames

if TYPE_CHECKING:
    from google.protobuf.message import Message

MOST_CALLS = 16
"""Of one session at a time. Further ones wait their turn."""
MOST_BEGUN = MOST_CALLS // 2
"""Calls that are begun and not ended. Whoever has begun one may need a further call before
it ends the first, so not all turns may be theirs."""
FIRST_BYTES = 64 << 10
"""Read at once: most answers are shorter."""


class Line:
    """A socket; while `owed`, the answer to a call nobody waits for is still to come."""

    __slots__ = ("owed", "socket")

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.owed = False


class Lines:
    """The lines of one session. Safe to use from several threads.

    A forked child does not inherit them: its copies are closed in the child.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._lines: set[Line] = set()
        # The one used last is the one used next, so that few are open.
        self._free: deque[Line] = deque()
        self._turns = _turns(MOST_CALLS)
        self._begun = _turns(MOST_BEGUN)
        self._closed = False
        _open_lines.add(self)

    # Turns, for callers that are threads

    def wait_turn(self, timeout_s: float) -> None:
        """Raises `Unavailable` when there is none in time. To be ended."""
        try:
            self._turns.get(timeout=max(0.0, timeout_s))
        except Empty:
            raise Unavailable("too many calls are under way") from None
        if self._closed:
            self.end_turn()
            raise Unavailable("the session with the server has ended")

    def end_turn(self) -> None:
        self._turns.put(None)

    def may_begin(self) -> bool:
        """Whether there is a place for a call that is begun; then to be ended."""
        try:
            self._begun.get_nowait()
        except Empty:
            return False
        return True

    def end_begun(self) -> None:
        self._begun.put(None)

    # Lines

    def at_hand(self) -> Line | None:
        """A free line, if there is one. To be kept or discarded."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def open(self, timeout_s: float) -> Line:
        """A new line. To be kept or discarded.

        Raises `NoSession` where the session has ended, `Unavailable` when the server
        does not answer in time.
        """
        try:
            line = Line(self._attachment.fetch_line(timeout_s))
        except Unavailable as error:
            if self._attachment.alive():
                raise
            raise NoSession("the session with the server has ended") from error
        self._lines.add(line)
        if self._closed:
            self.discard(line)
            raise Unavailable("the session with the server has ended")
        return line

    def keep(self, line: Line) -> None:
        """It is free."""
        self._free.append(line)
        if self._closed:
            self.close()

    def discard(self, line: Line) -> None:
        """Close a line that has a call on it, or is broken."""
        self._lines.discard(line)
        _shut(line)
        line.socket.close()

    def close(self) -> None:
        """End every call under way with `Unavailable`. Idempotent."""
        self._closed = True
        for line in list(self._lines):
            # Not closed: whoever waits on it must wake up, and its number not be
            # another file's meanwhile.
            _shut(line)
        while (free := self.at_hand()) is not None:
            self.discard(free)
        # For one of those who wait; it hands it on.
        self.end_turn()

    def close_in_child(self) -> None:
        """Not shut down: they are the parent's still."""
        for line in list(self._lines):
            line.socket.close()
        self._lines.clear()
        self._free.clear()


_open_lines: weakref.WeakSet[Lines] = weakref.WeakSet()


def _close_inherited() -> None:
    for lines in list(_open_lines):
        lines.close_in_child()


os.register_at_fork(after_in_child=_close_inherited)


def _turns(count: int) -> SimpleQueue[None]:
    turns: SimpleQueue[None] = SimpleQueue()
    for _ in range(count):
        turns.put(None)
    return turns


def _shut(line: Line) -> None:
    """The server hears of it, whoever else has a copy."""
    with contextlib.suppress(OSError):
        line.socket.shutdown(socket.SHUT_RDWR)


class Exchange:
    """One call on a line: sent when made, its response heard by `end` or left by `leave`,
    one of which must be called, once. An interrupt costs the line.

    `sent`: the server may have done it. What goes wrong before is raised by `end`.
    """

    def __init__(self, lines: Lines, method: str, request: Message, timeout_s: float) -> None:
        self._lines = lines
        self._method = method
        self._deadline = time.monotonic() + timeout_s
        self._line: Line | None = None
        self._error: KVStoreError | None = None
        self.sent = False
        try:
            call = encode_call(method, request)
            lines.wait_turn(timeout_s)
        except KVStoreError as error:
            self._error = error
            return
        try:
            self._send(call)
            self.sent = True
        except BaseException as error:
            self._give_up()
            if not isinstance(error, KVStoreError):
                raise
            self._error = error

    def end(self) -> Any:
        """The response. Raises what the server answers, `Unavailable` when it does not
        in time, `NoSession` where the session was lost before it heard of the call."""
        if self._error is not None:
            raise self._error
        assert self._line is not None
        try:
            number, message = self._receive(self._line.socket)
        except OSError as error:
            self._give_up()
            raise unheard(self._method, error) from error
        except BaseException:
            self._give_up()
            raise
        self._lines.keep(self._line)
        self._lines.end_turn()
        return decode_answer(self._method, number, message)

    def leave(self) -> None:
        """Want no response. Whoever has the line next skips it."""
        if self._line is not None:
            self._line.owed = True
            self._lines.keep(self._line)
            self._lines.end_turn()

    def _send(self, call: bytes) -> None:
        while True:
            self._line = line = self._lines.at_hand() or self._lines.open(self._left())
            try:
                if line.owed:
                    self._receive(line.socket)
                    line.owed = False
                break
            except OSError:
                # It is the answer left that does not come.
                self._lines.discard(line)
        try:
            line.socket.settimeout(self._left())
            line.socket.sendall(call)
        except OSError as error:
            raise unsent(self._method, error) from error

    def _receive(self, line: socket.socket) -> tuple[int, memoryview]:
        answer = bytearray()
        missing = FIRST_BYTES
        while missing:
            line.settimeout(self._left())
            data = line.recv(max(missing, FIRST_BYTES))
            if not data:
                raise ConnectionResetError
            answer += data
            missing = missing_of(answer)
        return split(answer)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"{self._method}: no answer in time")
        return left

    def _give_up(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            self._lines.discard(line)
        self._lines.end_turn()


def encode_call(method: str, request: Message) -> bytes:
    """Raises `TooLarge`."""
    message = METHODS[method].serialize(request)
    if len(message) > MAX_MESSAGE_BYTES:
        raise TooLarge(f"{method}: a message of {len(message)} bytes, of {MAX_MESSAGE_BYTES}")
    name = method.encode()
    return frames.frame(len(name), name, message)


def decode_answer(method: str, number: int, message: memoryview) -> Any:
    """The response. Raises the error that it is."""
    if number == frames.ANSWER:
        try:
            return METHODS[method].deserialize(bytes(message))
        except DecodeError as error:
            raise InternalError(f"{method}: the server answered nonsense") from error
    reply = decode_reply(bytes(message)) if number == frames.ERROR else None
    if not isinstance(reply, ErrorReply):
        raise InternalError(f"{method}: the server answered nonsense")
    raise error_of(reply)


def missing_of(answer: bytearray) -> int:
    """How many bytes of an answer are still to come, at least. Raises `InternalError`
    for what is none."""
    if len(answer) < frames.HEAD.size:
        return frames.HEAD.size - len(answer)
    length, _ = frames.HEAD.unpack_from(answer)
    missing: int = frames.LENGTH_BYTES + length - len(answer)
    if missing < 0 or length > frames.MAX_FRAME_BYTES:
        raise InternalError("the server answered more than was asked for")
    return missing


def split(answer: bytearray) -> tuple[int, memoryview]:
    """The number of a complete answer and what follows."""
    return answer[frames.LENGTH_BYTES], memoryview(answer)[frames.HEAD.size :]


def unsent(method: str, error: OSError) -> KVStoreError:
    """For a call that could not be sent whole, and therefore was not done."""
    if isinstance(error, TimeoutError):
        return Unavailable(f"{method}: the server takes no calls")
    return NoSession(f"{method}: the session with the server has ended")


def unheard(method: str, error: OSError) -> Unavailable:
    """For a call that may have been done, or not."""
    if isinstance(error, TimeoutError):
        return Unavailable(f"{method}: no answer in time")
    return Unavailable(f"{method}: the connection to the server is lost")
