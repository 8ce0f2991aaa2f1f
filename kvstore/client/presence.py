"""Lookups without an RPC: the client's view of the server's directory.

A lookup that this can answer costs microseconds and touches nothing but shared
memory. It answers None where the directory is not to be trusted (the server is
gone, hangs, or cannot be asked for the table's successor right now); then an RPC is
needed to know more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvstore.clock import Clock
from kvstore.errors import KVStoreError
from kvstore.local.directory import DirectoryReader
from kvstore.naming import Namer, namer
from kvstore.types import ChainPresence, check_key

REFETCH_TIMEOUT_S = 0.02
REFETCH_PAUSE_NS = 1_000_000_000
"""After the server did not hand out a table's successor in time."""

Fetch = Callable[[float], tuple[int, bytes]]
"""(descriptor, secret) of the current directory, within so many seconds."""


class Presence:
    """One link's directory. Safe to use from several threads.

    `fetch` asks the server for the directory; the descriptor becomes this object's.
    """

    def __init__(self, fetch: Fetch, clock: Clock, timeout_s: float) -> None:
        """Raises what `fetch` raises, ValueError for a table of another version."""
        self._fetch = fetch
        self._clock = clock
        descriptor, secret = fetch(timeout_s)
        self._reader = DirectoryReader(descriptor)
        self._secret = secret
        self._namers: dict[bytes, Namer] = {}
        self._lock = threading.Lock()
        self._not_before_ns = 0

    def lookup(self, layout_ids: Sequence[bytes], keys: Sequence[bytes]) -> ChainPresence | None:
        """How much of a chain is held, or None where only the server can tell.

        Of `keys` only those are looked at that the search comes by. Raises `BadKey`
        for a first or last key of the wrong length.
        """
        now_ns = self._clock.now_ns()
        reader = self._reader
        if not reader.alive(now_ns):
            if not reader.superseded() or not self._refetch(now_ns):
                return None
            reader = self._reader
        if keys:
            check_key(keys[0])
            check_key(keys[-1])
        return reader.prefix([self._namer(layout_id) for layout_id in layout_ids], keys)

    def _namer(self, layout_id: bytes) -> Namer:
        name = self._namers.get(layout_id)
        if name is None:
            name = self._namers[layout_id] = namer(self._secret, layout_id)
        return name

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
