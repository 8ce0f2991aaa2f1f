"""Places for calls that last as long as their client likes.

Other calls end by themselves. A stream that nobody goes on with does not, and where it has
something to send that is memory of gRPC's, some 2 MB of a `Read`. So streams are counted,
apart from other calls, whose places they cannot take.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from kvstore.errors import TooMany

STUCK_AFTER_S = 1.0
"""A stream on which nothing was sent or received for so long is not waited for at a stop."""


class Stream:
    """One that is under way."""

    def __init__(self) -> None:
        self._moved = time.monotonic()

    def moved(self) -> None:
        """Something was sent or received."""
        self._moved = time.monotonic()

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self._moved


class Streams:
    """At most `most` at a time, and `most_each` of one caller."""

    def __init__(self, most: int, most_each: int) -> None:
        self._most = most
        self._most_each = most_each
        self._open: set[Stream] = set()
        self._of: Counter[Hashable] = Counter()

    @contextmanager
    def one(self, of: Hashable) -> Iterator[Stream]:
        """A stream of a caller, while it lasts. Raises `TooMany`."""
        if self._of[of] >= self._most_each:
            raise TooMany(f"{self._most_each} streams are open already; end one first")
        if len(self._open) >= self._most:
            raise TooMany("the server has as many streams as it may have; try again")
        stream = Stream()
        self._open.add(stream)
        self._of[of] += 1
        try:
            yield stream
        finally:
            self._open.discard(stream)
            self._of[of] -= 1
            if not self._of[of]:
                del self._of[of]

    def stuck(self) -> int:
        """Those with which nobody goes on."""
        return sum(stream.idle_s >= STUCK_AFTER_S for stream in self._open)
