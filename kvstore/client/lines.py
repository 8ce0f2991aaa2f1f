"""Calls on lines: how a client on the server's host asks without gRPC.

A line is a stream socket that came over the attach connection and carries one call at a
time (`kvstore.wire.frames`). A session keeps as many as it ever had calls under way at
once. A call that is given up takes its line with it: closing it tells the server, and an
answer that comes late cannot be taken for the next one's.
"""

from __future__ import annotations

import contextlib
import socket
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from kvstore.client.rpc import METHODS
from kvstore.client.wire import MAX_MESSAGE_BYTES
from kvstore.errors import InternalError, KVStoreError, NoSession, TooLarge, Unavailable
from kvstore.local.attach import Attachment, ErrorReply, decode_reply, error_of
from kvstore.wire import frames

if TYPE_CHECKING:
    from google.protobuf.message import Message

MOST_LINES = 16
"""Calls of one session at a time. Further ones wait their turn."""
FIRST_BYTES = 64 << 10
"""Read at once: most answers are shorter."""


class Line:
    """A socket; while `owed`, the answer to a call nobody waits for is still to come."""

    __slots__ = ("owed", "socket")

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.owed = False


class Lines:
    """The lines of one session. Safe to use from several threads."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._free: SimpleQueue[Line] = SimpleQueue()
        self._lines: set[Line] = set()
        self._closed = False

    def at_hand(self) -> Line | None:
        """A free line, if there is one. To be given back or discarded."""
        try:
            return self._free.get_nowait()
        except Empty:
            return None

    def take(self, timeout_s: float) -> Line:
        """A free line, or a new one, or the next that comes free.

        Raises `NoSession` where the session has ended, `Unavailable` when there is
        none in time.
        """
        line = self.at_hand()
        if line is not None:
            return line
        if len(self._lines) < MOST_LINES:
            return self._open(timeout_s)
        try:
            return self._free.get(timeout=max(0.0, timeout_s))
        except Empty:
            raise Unavailable("too many calls are under way") from None

    def give_back(self, line: Line) -> None:
        self._free.put(line)
        if self._closed:
            self.close()

    def discard(self, line: Line) -> None:
        """Close a line that has a call on it, or is broken."""
        self._lines.discard(line)
        line.socket.close()

    def close(self) -> None:
        """End every call under way with `Unavailable`. Idempotent."""
        self._closed = True
        for line in list(self._lines):
            # Not closed: whoever waits on it must wake up, and its number not be
            # another file's meanwhile.
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)
        while (free := self.at_hand()) is not None:
            self.discard(free)

    def _open(self, timeout_s: float) -> Line:
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


class Exchange:
    """One call on a line: sent when made, its response heard by `end` or left by `leave`,
    one of which must be called, once. An interrupt costs the line.
    """

    def __init__(self, lines: Lines, method: str, request: Message, timeout_s: float) -> None:
        self._lines = lines
        self._method = method
        self._deadline = time.monotonic() + timeout_s
        self._line: Line | None = None
        self._error: KVStoreError | None = None
        try:
            self._send(encode_call(method, request))
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
        self._lines.give_back(self._line)
        return decode_answer(self._method, number, message)

    def leave(self) -> None:
        """Want no response. Whoever has the line next skips it."""
        if self._line is not None and self._error is None:
            self._line.owed = True
            self._lines.give_back(self._line)

    def _send(self, call: bytes) -> None:
        while True:
            self._line = line = self._lines.take(self._left())
            try:
                if line.owed:
                    self._receive(line.socket)
                    line.owed = False
                break
            except OSError:
                # It is the answer left that does not come.
                self._give_up()
        try:
            line.socket.settimeout(self._left())
            line.socket.sendall(call)
        except OSError as error:
            raise unsent(self._method, error) from error

    def _receive(self, line: socket.socket) -> tuple[int, memoryview]:
        line.settimeout(self._left())
        data = line.recv(FIRST_BYTES)
        missing = missing_of(data)
        if not missing:
            return split(data)
        answer = bytearray(data)
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
        return METHODS[method].deserialize(bytes(message))
    reply = decode_reply(bytes(message)) if number == frames.ERROR else None
    if not isinstance(reply, ErrorReply):
        raise InternalError(f"{method}: the server answered nonsense")
    raise error_of(reply)


def missing_of(answer: bytes | bytearray) -> int:
    """How many bytes of an answer are still to come, at least. Raises
    `ConnectionResetError` for no bytes at all, `InternalError` for what is none."""
    if not answer:
        raise ConnectionResetError
    if len(answer) < frames.HEAD.size:
        return frames.HEAD.size - len(answer)
    length, _ = frames.HEAD.unpack_from(answer)
    missing: int = frames.LENGTH_BYTES + length - len(answer)
    if missing < 0 or length > frames.MAX_FRAME_BYTES:
        raise InternalError("the server answered more than was asked for")
    return missing


def split(answer: bytes | bytearray) -> tuple[int, memoryview]:
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
