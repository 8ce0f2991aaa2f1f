"""Work in many parts, each core taking the next one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore.sim.replay import Progress

POLL_S = 0.2

T = TypeVar("T")
Part = Callable[[int, Progress], T]
"""Does the part of that number."""


def spread(parts: int, do: Part[T], processes: int, progress: Progress | None = None) -> list[T]:
    """What came of each part, in their order. What `do` needs is shared, not copied."""
    tell = progress or (lambda done: None)
    if processes == 1 or parts == 1:
        found: list[T] = []
        for number in range(parts):
            found.append(do(number, lambda part: tell((len(found) + part) / parts)))
        return found
    context = multiprocessing.get_context("fork")
    done: Any = context.Array("d", parts, lock=False)
    with context.Pool(min(processes, parts), _begin, (do, done)) as pool:
        pending = pool.map_async(_do_part, range(parts), chunksize=1)
        while not pending.ready():
            pending.wait(POLL_S)
            tell(sum(done) / parts)
        return pending.get()


_shared: tuple[Part[Any], Any] | None = None
# Of a child process only.


def _begin(do: Part[Any], done: Any) -> None:
    global _shared
    _shared = do, done


def _do_part(number: int) -> Any:
    assert _shared is not None
    do, done = _shared

    def note(part: float) -> None:
        done[number] = part

    result = do(number, note)
    note(1.0)
    return result
