"""An event loop whose time passes only when nobody has anything to do: an hour costs what
there is to decide in it, and the same seed runs the same way.

What would be done in threads is the business of who derives from it.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

MOST_TURNS = 1_000_000
"""Of the loop, until time has passed that can be noticed."""
NOTICED_S = 1e-6


class NothingToDo(Exception):
    """Everybody waits for something that will not happen."""


class Endless(Exception):
    """Time does not pass any more, or passes and nothing comes of it. Says what is still
    to be done, and when."""


class TimelessLoop(asyncio.BaseEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self.ends_s = math.inf
        """By when all should be over."""
        self._seconds = self._noticed_s = 1.0
        self._turns = 0
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
        self._turns += 1
        if self._seconds - self._noticed_s >= NOTICED_S:
            self._noticed_s, self._turns = self._seconds, 0
        if self._turns > MOST_TURNS or self._seconds > self.ends_s:
            self._turns = 0
            raise Endless(f"at {self._seconds:.9f} s, with {self._state()}")
        return []

    def _state(self) -> str:
        ready, scheduled = vars(self)["_ready"], sorted(vars(self)["_scheduled"])
        waiting = [task for task in asyncio.all_tasks(self) if not task.done()]
        soon = ", ".join(repr(handle) for handle in (*ready, *scheduled)[:5])
        return f"{len(ready)} ready, {len(scheduled)} later ({soon}), {len(waiting)} tasks"

    def _process_events(self, event_list: list[Any]) -> None:
        return None

    def _write_to_self(self) -> None:
        return None
