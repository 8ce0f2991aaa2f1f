"""How the interpreter is run in a process of one loop, some threads and many objects.

*Garbage collections.* A block is two or three objects that the collector visits and
never finds to be garbage: they are freed by their counts of references
(tests/simulation proves it). A full collection visits them all with every thread
stopped, half a second for each million blocks, and one comes by itself whenever the
process has grown by a quarter. So here full collections come when there are few objects
to visit, and what they leave is set aside (gc.freeze), where no collection looks again.
What was in use at that moment, and is garbage in rings later, stays for ever. That is
why it is done while no call is running, if such a moment comes: of what a server makes,
calls are what ends in rings.

*Turns.* A thread that wants the interpreter asks for it when one other thread has had
it for the switch interval, 5 ms. A busy loop lets go of it more often than that, for an
instant, whenever it looks for events; the thread that waits is woken, comes too late,
and begins to wait anew. LMDB lets go of it for every single record, so beside a busy loop
the removal of 768 blocks took 10 to 30 s. With an interval shorter than the loop's round
it took 0.1 s, and the loop waits less for a thread in the same way.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

SWITCH_INTERVAL_S = 0.0001
YOUNG_OBJECTS = 700
MIDDLE_ROUNDS = 10
"""The interpreter's own: collections of young objects to one of the middle-aged."""
NEVER = 1 << 30

DUE_AFTER = 6
"""Middle collections between two full ones: some 40,000 objects to visit, 20 ms."""
OVERDUE_AFTER = 2 * DUE_AFTER
"""From here on a full collection does not wait for a moment without calls."""
POLL_S = 0.1


def prepare_interpreter() -> None:
    """Before the start, which makes millions of objects and no garbage."""
    gc.disable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)


async def short_collections(busy: Callable[[], bool]) -> None:
    """From the end of the start until cancelled. `busy`: calls are running."""
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
