"""Lookups without an RPC: the client's view of the server's directory.

A lookup that this can answer costs microseconds and touches nothing but shared
memory. It answers None where the directory is not to be trusted (the server is
gone, hangs, or cannot be asked for the table's successor right now); then an RPC is
needed to know more.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence

from kvstore.clock import Clock
from kvstore.errors import KVStoreError
from kvstore.local.directory import DirectoryReader
from kvstore.naming import Namer, namer
from kvstore.types import KEY_BYTES, ChainPresence, check_key

REFETCH_TIMEOUT_S = 0.02
REFETCH_PAUSE_NS = 1_000_000_000
"""After the server did not hand out a table's successor in time."""

OPEN_FOR_NS = 10_000_000
"""How long a connection that was open counts as open: asking costs a system call. So
for so long at most the directory of a server that died without closing it is believed;
what a lookup says is as old as that anyway when somebody acts on it, and the acquire
fails like any other call."""

Fetch = Callable[[float], tuple[int, bytes]]
"""(descriptor, secret) of the current directory, within so many seconds."""


class Presence:
    """One link's directory. Safe to use from several threads.

    `fetch` asks the server for the directory; the descriptor becomes this object's.
    """

    def __init__(self, fetch: Fetch, clock: Clock, timeout_s: float) -> None:
        """Raises what `fetch` raises, ValueError for a table of another version."""
        self._fetch = fetch
        self._now_ns = clock.now_ns
        descriptor, secret = fetch(timeout_s)
        self._reader = DirectoryReader(descriptor)
        self._namers = _Namers(secret)
        self._lock = threading.Lock()
        self._not_before_ns = 0
        self._open_until_ns = 0
        _presences.add(self)

    def lookup(
        self, layout_ids: Sequence[bytes], keys: Sequence[bytes], is_open: Callable[[], bool]
    ) -> ChainPresence | None:
        """How much of a chain is held, or None where only the server can tell.

        `is_open` tells whether the connection to the server is, and is not asked each
        time. Of `keys` only those are looked at that the search comes by. Raises
        `BadKey` for a first or last key of the wrong length.
        """
        now_ns = self._now_ns()
        if now_ns >= self._open_until_ns:
            if not is_open():
                return None
            self._open_until_ns = now_ns + OPEN_FOR_NS
        reader = self._reader
        if not reader.alive(now_ns):
            if not reader.superseded() or not self._refetch(now_ns):
                return None
            reader = self._reader
        if keys and not len(keys[0]) == len(keys[-1]) == KEY_BYTES:
            check_key(keys[0])
            check_key(keys[-1])
        return reader.prefix(map(self._namers.__getitem__, layout_ids), keys)

    def way(self, layout_ids: Sequence[bytes]) -> tuple[DirectoryReader, list[Namer]]:
        """What a lookup ends at: the table there is now, which may be superseded at any time,
        and how blocks of these layouts are named in it."""
        return self._reader, [self._namers[layout_id] for layout_id in layout_ids]

    def _refetch(self, now_ns: int) -> bool:
        """Map the successor. False when that is under way elsewhere or did not work."""
        if now_ns < self._not_before_ns or not self._lock.acquire(blocking=False):
            return False
        try:
            if self._reader.superseded():
                # The old table stays mapped for threads that are searching it; it
                # goes with the last reference.
                descriptor, _ = self._fetch(REFETCH_TIMEOUT_S)
                self._reader = DirectoryReader(descriptor)
        except (KVStoreError, ValueError):
            self._not_before_ns = now_ns + REFETCH_PAUSE_NS
            return False
        finally:
            self._lock.release()
        return self._reader.alive(now_ns)


class _Namers(dict[bytes, Namer]):
    """A namer for each layout id, made when it is first asked for."""

    def __init__(self, secret: bytes) -> None:
        super().__init__()
        self._secret = secret

    def __missing__(self, layout_id: bytes) -> Namer:
        made = self[layout_id] = namer(self._secret, layout_id)
        return made


_presences: weakref.WeakSet[Presence] = weakref.WeakSet()


def _forget_connections() -> None:
    for presence in list(_presences):
        presence._open_until_ns = 0


# A forked child has no connection, whatever its parent had a moment ago.
os.register_at_fork(after_in_child=_forget_connections)
