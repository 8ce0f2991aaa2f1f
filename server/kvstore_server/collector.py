"""Keeps garbage collections short in a process of millions of objects.

A block is two or three objects that the interpreter's collector visits and never finds
to be garbage: they are freed by their counts of references (tests/simulation proves
it). A full collection visits them all with every thread stopped, half a second for each
million blocks, and one comes by itself whenever the process has grown by a quarter.

So here full collections come when there are few objects to visit, and what they leave
is set aside (gc.freeze), where no collection looks again. What was in use at that
moment, and is garbage in rings later, stays for ever. That is why it is done while no
call is running, if such a moment comes: of what a server makes, calls are what ends
in rings.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

YOUNG_OBJECTS = 700
MIDDLE_ROUNDS = 10
"""The interpreter's own: collections of young objects to one of the middle-aged."""
NEVER = 1 << 30

DUE_AFTER = 6
"""Middle collections between two full ones: some 40,000 objects to visit, 20 ms."""
OVERDUE_AFTER = 2 * DUE_AFTER
"""From here on a full collection does not wait for a moment without calls."""
POLL_S = 0.1


def no_collections() -> None:
    """For the start, which makes millions of objects and no garbage."""
    gc.disable()


async def short_collections(busy: Callable[[], bool]) -> None:
    """Runs until cancelled. `busy`: calls are running."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, MIDDLE_ROUNDS, NEVER)
    gc.enable()
    done = _middle_collections()
    while True:
        await asyncio.sleep(POLL_S)
        since = _middle_collections() - done
        if since >= OVERDUE_AFTER or (since >= DUE_AFTER and not busy()):
            gc.collect()
            gc.freeze()
            done = _middle_collections()


def _middle_collections() -> int:
    collections: int = gc.get_stats()[1]["collections"]
    return collections
