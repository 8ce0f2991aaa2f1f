"""Whether a block is held, asked again and again by who cannot wait.

A lookup finds its way from the client to the words of the directory each time. Where
another's work has driven all of that out of the processor's caches, every function on the way
costs microseconds; so a watch remembers where it leads.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.client.calls import lookup_at_hand
from kvstore.client.link import Core, Link
from kvstore.local.directory import STALE_AFTER_NS, DirectoryReader
from kvstore.naming import Namer


class Watch:
    """Looks for single blocks, of which all layouts are needed.

    It does not ask whether the connection is open. So the directory of a server that died is
    believed for as long as its last sign of life counts; whoever acts on that is told by the
    acquire that fails. Safe to use from several threads.
    """

    __slots__ = ("_core", "_layout_ids", "_now_ns", "_way")

    def __init__(self, core: Core, layout_ids: Sequence[bytes]) -> None:
        self._core = core
        self._layout_ids = layout_ids
        self._now_ns = core.clock.now_ns
        self._way: tuple[Link, DirectoryReader, list[Namer]] | None = None

    def holds(self, key: bytes) -> bool | None:
        """None where only the server can tell. `key`: 32 bytes."""
        way = self._way
        if way is not None:
            link, reader, names = way
            if link is self._core.link and self._now_ns() - reader.beat[0] < STALE_AFTER_NS:
                for name in names:  # noqa: SIM110 (a generator is one more function)
                    if not reader.find(name(key)):
                        return False
                return True
        return self._look_for_way(key)

    def _look_for_way(self, key: bytes) -> bool | None:
        seen = lookup_at_hand(self._core, self._layout_ids, (key,))
        link = self._core.link
        if seen is None or link is None or link.presence is None:
            self._way = None
            return None
        self._way = link, *link.presence.way(self._layout_ids)
        return seen.held > 0
