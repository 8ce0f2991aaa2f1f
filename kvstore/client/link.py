"""One session with one life of the server, and what the client keeps across sessions.

A `Link` is made by attaching and never changes: when the server restarts, or
drops the session, the client makes another. What was granted under a link means
nothing under the next one, although the server may well hand out the same
numbers again. So the ids that leave the client carry their link's number in the
bits above 64, and an id of an earlier link is told from a current one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.client.lines import Lines
from kvstore.client.presence import Presence
from kvstore.client.rpc import Endpoint
from kvstore.client.steps import Call, SessionStream
from kvstore.client.wire import ServerInfo
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import BadRequest, Unavailable
from kvstore.local.arena import Arena
from kvstore.local.attachment import Attachment
from kvstore.types import LayoutSpec

if TYPE_CHECKING:
    from google.protobuf.message import Message

_TAG_SHIFT = 64
_CLEAN_UP_SHARE = 0.1
BACKOFF_FIRST_S = 0.05
BACKOFF_MOST_S = 2.0
MAX_OWED_ABORTS = 1 << 16


class VramGrant(NamedTuple):
    """The table of what the store has on a GPU, and its memory there: `fetch` gets (descriptor,
    bytes) of an extent, and raises what `Attachment.fetch_extent` does. Descriptors are the
    caller's to close."""

    descriptor: int
    extent_bytes: int
    fetch: Callable[[int], tuple[int, int]]


class Link:
    """A session: its id, its server's epoch and, on the same host, the arena.

    Threads that copy to or from the arena hold the link meanwhile; a link that
    is retired ends its session when the last of them has let go, because the
    server reuses a session's slots as soon as it ends.
    """

    def __init__(
        self,
        *,
        number: int,
        session: bytes,
        info: ServerInfo,
        attachment: Attachment | None,
        lines: Lines | None,
        arena: Arena | None,
        presence: Presence | None,
        stream: SessionStream | None,
    ) -> None:
        self.tag = number << _TAG_SHIFT
        self.session = session
        self.info = info
        self.arena = arena
        self.presence = presence
        self._attachment = attachment
        self._lines = lines
        self._stream = stream
        self._lock = threading.Lock()
        self._holders = 0
        self._retired = False
        # Reservations whose abort did not get through; tried again before the
        # next reserve, since the server keeps their slots until it hears of them.
        self.owed_aborts: set[int] = set()

    @property
    def epoch(self) -> bytes:
        return self.info.epoch

    def call(
        self,
        method: str,
        request: Message,
        timeout_s: float,
        undo: Callable[[Any | None], Call | None] | None = None,
    ) -> Call:
        """The step that makes a call of this session."""
        return Call(method, request, self.session, timeout_s, undo=undo, lines=self._lines)

    def vram(
        self, gpu: str, layout_ids: Sequence[bytes], timeout_s: float, reader: bytes
    ) -> VramGrant:
        """See `Client.vram`."""
        attachment = self._attachment
        if attachment is None:
            raise BadRequest("memory of a GPU needs a server on this host")
        descriptor, extent_bytes = attachment.fetch_vram(gpu, layout_ids, timeout_s, reader)

        def fetch(extent: int) -> tuple[int, int]:
            return attachment.fetch_extent(extent, timeout_s, gpu)

        return VramGrant(descriptor, extent_bytes, fetch)

    def alive(self) -> bool:
        """Whether the session is open as far as can be told without asking."""
        if self._retired:
            return False
        if self._attachment is not None:
            return self._attachment.alive()
        return self._stream is None or self._stream.alive()

    def owns(self, number: int) -> bool:
        """Whether an id was granted under this link."""
        return number >> _TAG_SHIFT == self.tag >> _TAG_SHIFT

    def bare(self, number: int) -> int:
        """The server's id for one of this link's."""
        return number - self.tag

    def hold(self) -> None:
        """Keep the session open until `let_go`. Raises `Unavailable` if it has ended."""
        with self._lock:
            if self._retired:
                raise Unavailable("the session with the server has ended")
            self._holders += 1

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._retired and not self._holders
        if last:
            self._end()

    def retire(self) -> None:
        """End the session, once nobody holds it. Idempotent."""
        with self._lock:
            last = not self._retired and not self._holders
            self._retired = True
        if last:
            self._end()

    def hang_up(self) -> None:
        """End the calls under way with `Unavailable`, and let there be no more."""
        if self._lines is not None:
            self._lines.close()

    def _end(self) -> None:
        self.hang_up()
        if self.arena is not None:
            self.arena.close()
        if self._attachment is not None:
            self._attachment.close()
        if self._stream is not None:
            self._stream.cancel()


class Budget:
    """The time one operation may take, with a little kept back for cleaning up."""

    def __init__(self, timeout_s: float) -> None:
        self._hard = time.monotonic() + timeout_s
        self._soft = self._hard - timeout_s * _CLEAN_UP_SHARE

    def left(self) -> float:
        """Seconds for the next step. Raises `Unavailable` when there are none."""
        left = self._soft - time.monotonic()
        if left <= 0:
            raise Unavailable("no answer from the server in time")
        return left

    def left_to_clean_up(self) -> float:
        return max(self._hard - time.monotonic(), 0.001)


class Counters:
    """What happened to this client since it was made.

    `corrupt`: blocks that arrived with the wrong checksum. `expired`: copies
    discarded because their lease ended meanwhile. `connects`: sessions opened.
    `rpcs`: calls made to the server, streams included.
    """

    __slots__ = ("_lock", "connects", "corrupt", "expired", "rpcs")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.corrupt = 0
        self.expired = 0
        self.connects = 0
        self.rpcs = 0

    def count_rpc(self) -> None:
        with self._lock:
            self.rpcs += 1

    def count_corrupt(self, blocks: int = 1) -> None:
        with self._lock:
            self.corrupt += blocks

    def count_expired(self, blocks: int = 1) -> None:
        with self._lock:
            self.expired += blocks

    def count_connect(self) -> None:
        with self._lock:
            self.connects += 1


class Backoff:
    """When a lost server may be tried again. Calls in between fail at once."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._delay_s = 0.0
        self._next_s = 0.0

    def check(self) -> None:
        """Raises `Unavailable` while it is too early."""
        wait = self._next_s - self._now_s()
        if wait > 0:
            raise Unavailable(f"the server is gone; next try in {wait:.2f} s")

    def failed(self) -> None:
        self._delay_s = min(max(self._delay_s * 2, BACKOFF_FIRST_S), BACKOFF_MOST_S)
        self._next_s = self._now_s() + self._delay_s

    def succeeded(self) -> None:
        self._delay_s = self._next_s = 0.0


@dataclass(slots=True)
class Core:
    """What a client is, whichever way it is driven.

    `socket_path`: the gRPC Unix socket, None for a server reached over TCP.
    `own`: only this user's own server, or root's, may be there (`Endpoint`).
    `layouts`: every layout registered, to be registered again with a server
    that has forgotten them.
    """

    socket_path: str | None
    timeout_s: float
    clock: Clock
    counters: Counters
    backoff: Backoff
    layouts: dict[bytes, LayoutSpec]
    own: bool = False
    link: Link | None = None
    links_made: int = 0
    closed: bool = False

    def check_open(self) -> None:
        if self.closed:
            raise BadRequest("the client is closed")


def new_core(endpoint: Endpoint, timeout_s: float) -> Core:
    if not timeout_s > 0:
        raise BadRequest(f"timeout_s must be positive, not {timeout_s}")
    return Core(
        socket_path=endpoint.socket_path,
        timeout_s=timeout_s,
        clock=MonotonicClock(),
        counters=Counters(),
        backoff=Backoff(),
        layouts={},
        own=endpoint.own,
    )
