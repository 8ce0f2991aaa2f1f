"""An event loop whose time passes only when nobody has anything to do: an hour costs what
there is to decide in it, and the same seed runs the same way.

What would be done in threads is the business of who derives from it.
"""

from __future__ import annotations

import asyncio
from typing import Any


class NothingToDo(Exception):
    """Everybody waits for something that will not happen."""


class VirtualLoop(asyncio.BaseEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._seconds = 1.0
        self._selector = self

    def now_ns(self) -> int:
        """The loop is the store's `Clock` too."""
        return int(self._seconds * 1e9)

    def time(self) -> float:
        return self._seconds

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise NothingToDo
        self._seconds += max(0.0, timeout)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        return None

    def _write_to_self(self) -> None:
        return None
