"""Who may leave next, so that the order need not be walked for each that leaves.

Where much waits to be written to the next tier, the coldest of an order may not leave yet
and are passed over, hundreds of them for each one that is found. So a walk remembers whom
it passed over: as soon as one of them may leave it is the next to. And a long walk goes on
for a few more of those that may leave, so that what it passed over is passed over once for
all of them. Where it finds none whatever comes to may leave is the next to, and it is walked
anew only after a while.

All of this is only a hint where to look: whoever is offered is judged again, and who is
used meanwhile is neither offered nor waited for any more.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from kvstore.core.catalog import Replica

SCANNED = 2048
"""Replicas looked at in a walk: some milliseconds."""
PASSED_A_FIND = 4
"""A walk goes on for one more that may leave for each so many that it passed over, for as
many steps again at most."""
MOST_IN_USE = 1024
"""Of them that are in use: whoever is told of them moves them out of the way."""
BARREN = 64
"""Times that nobody is found without a walk, after one that found nobody in so many; and
what may leave meanwhile without having been passed over, kept ready."""


class Verdict(enum.Enum):
    """Whether a replica may leave its tier."""

    GO = enum.auto()
    IN_USE = enum.auto()
    """Not before whoever uses it lets go."""
    LAST = enum.auto()
    """Only when nothing else may: it has children, and what is there of a chain should
    stay a prefix."""
    LATER = enum.auto()
    """Once it is written to the next tier."""


MayGo = Callable[[Replica], Verdict]


class Shortlist:
    """Of one order."""

    __slots__ = ("_barren", "_offered", "_passed", "_unwritten")

    def __init__(self) -> None:
        self._offered: OrderedDict[Replica, None] = OrderedDict()
        self._passed: set[Replica] = set()
        # Those of the latest walk that `behind` has not told yet.
        self._unwritten: deque[Replica] = deque()
        # How often nobody is found without a walk.
        self._barren = 0

    def find(self, order: Iterator[Replica], may_go: MayGo) -> tuple[Replica | None, list[Replica]]:
        """The first that may go, among the `SCANNED` coldest, or in its stead one with
        children; and those found in use on the way."""
        found = self._next_offered(may_go)
        in_use: list[Replica] = []
        if found is None and self._barren:
            self._barren -= 1
        elif found is None or (self._passed and not self._unwritten):
            # What will be passed over next is to be written in time.
            walked = self._walk(order, may_go, in_use, found)
            found = found or walked
        return found, in_use

    def _next_offered(self, may_go: MayGo) -> Replica | None:
        while self._offered:
            replica = self._offered.popitem(last=False)[0]
            if may_go(replica) is Verdict.GO:
                return replica
        return None

    def _walk(
        self,
        order: Iterator[Replica],
        may_go: MayGo,
        in_use: list[Replica],
        leaving: Replica | None,
    ) -> Replica | None:
        """`leaving`: one that is found already."""
        found = last_resort = None
        passed: list[Replica] = []
        more = end = step = 0
        for step, replica in enumerate(islice(order, SCANNED), 1):
            if replica is leaving:
                continue
            verdict = may_go(replica)
            if verdict is Verdict.GO:
                if found is None:
                    found = replica
                    more, end = len(passed) // PASSED_A_FIND, 2 * step - 1
                else:
                    self._offered[replica] = None
                    more -= 1
            elif verdict is Verdict.LATER:
                passed.append(replica)
            elif verdict is Verdict.LAST and last_resort is None:
                last_resort = replica
            else:
                in_use.append(replica)
            if found is not None and (not more or step >= end):
                break
            if len(in_use) >= MOST_IN_USE:
                break
        self._passed.update(passed)
        self._unwritten = deque(passed)
        if leaving is not None and found is not None:
            self._offered[found] = None
        found = found or last_resort
        self._barren = BARREN if found is None and step == SCANNED and not in_use else 0
        return found

    def behind(self) -> Replica | None:
        """The next of those that were passed over and not used since, once each walk."""
        while self._unwritten:
            replica = self._unwritten.popleft()
            if replica in self._passed:
                return replica
        return None

    def may_leave(self, replica: Replica) -> None:
        """It has been written, or will not be: if it was passed over, it is the next."""
        if replica in self._passed or (self._barren and len(self._offered) < BARREN):
            self._passed.discard(replica)
            self._offered[replica] = None

    def used(self, replicas: Iterable[Replica]) -> None:
        """They are not the coldest any more, or not in the order."""
        if self._passed:
            self._passed.difference_update(replicas)
        if self._offered:
            for replica in self._offered.keys() & replicas:
                del self._offered[replica]

    def reordered(self) -> None:
        """The order is not what it was, or others may leave."""
        self._offered.clear()
        self._barren = 0
