"""What somebody who knows the future would do: bounds, not policies.

`belady` evicts the block whose next use is furthest (L. A. Belady, IBM Systems Journal
5(2), 1966). `belady-bypass` does not take in a block whose own next use is further
still: no policy of any kind can have more block hits.

`cost-belady` weighs the time to the next use by what the block would cost to compute,
with bypass. It is a good clairvoyant schedule for compute, not a proven optimum: that
is a packing problem.

Of blocks that the same request will use next the deepest goes first, so what is held
of a prompt stays a prefix: with equal next uses the root is always used first.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvstore.core.cost import REFERENCE, Prefill
from kvstore.sim.replay import REPORTED_EVERY, Progress, Result
from kvstore.sim.trace import Request, Trace

NEVER = 1 << 40

Stretch = tuple[int, int, int, int]
"""Blocks [first, stop) at a depth, and the request that uses them next."""


class Clairvoyant:
    """A tier of `capacity` blocks whose owner has read the trace to its end.

    Held blocks are grouped by the request that uses them next, a list of [depth, first,
    count] by depth. The group to take from is found in heaps, one for each class of the
    depth of its deepest block, the furthest first."""

    def __init__(
        self,
        trace: Trace,
        capacity: int,
        *,
        by_cost: bool = False,
        bypass: bool = True,
        prefill: Prefill = REFERENCE,
    ) -> None:
        self._trace = trace
        self._prefill = prefill
        self._bypass = bypass
        self._free = capacity
        self._held = bytearray(trace.blocks)
        self._groups: dict[int, list[list[int]]] = {}
        # The depth below which each class begins, and what a block of it costs.
        self._floors = [0]
        while by_cost and self._floors[-1] < 1 << 16:
            self._floors.append(max(self._floors[-1] * 5 // 4, self._floors[-1] + 8))
        self._costs = [prefill.relative(f * trace.block_tokens) for f in self._floors]
        self._heaps: list[list[int]] = [[] for _ in self._floors]

    def run(self, progress: Progress | None = None) -> Result:
        result = Result()
        requests = self._trace.requests
        next_uses = _next_uses(self._trace)
        for number, (request, stretches) in enumerate(zip(requests, next_uses, strict=True)):
            blocks, hits, leading = self._serve(number, stretches)
            result.count(request, blocks, hits, leading, self._trace.block_tokens, self._prefill)
            self._groups.pop(number, None)
            if progress is not None and number % REPORTED_EVERY == 0:
                progress(number / len(requests))
        return result

    def _serve(self, now: int, stretches: list[Stretch]) -> tuple[int, int, int]:
        held = self._held
        hits = depth = 0
        leading = None
        refused: set[int] = set()
        for first, stop, depth, following in stretches:
            begins = depth - first
            at = first
            while at < stop:
                there = bool(held[at])
                end = held.find(not there, at, stop)
                end = stop if end < 0 else end
                if there:
                    hits += end - at
                    if following == NEVER:
                        held[at:end] = bytes(end - at)
                        self._free += end - at
                    else:
                        self._keep(following, begins + at, at, end - at)
                else:
                    if leading is None:
                        leading = begins + at
                    # Behind a hole a block is of no use to the request that asks next.
                    if following != NEVER and following not in refused:
                        if not self._admit(now, following, begins + at, at, end - at):
                            refused.add(following)
                    elif not self._bypass and not self._free:
                        self._free = self._evict(now, now, begins + at, 1)
                at = end
            depth += stop - first
        return depth, hits, depth if leading is None else leading

    def _admit(self, now: int, following: int, depth: int, first: int, count: int) -> bool:
        """Take in as many of these blocks as are worth more than what must go; whether
        that was all of them."""
        taken = min(count, self._free)
        self._free -= taken
        if not self._bypass and not taken:
            taken = self._evict(now, now, depth, 1)
        while taken < count:
            freed = self._evict(now, following, depth + taken, count - taken)
            if not freed:
                break
            taken += freed
        all_taken = taken == count
        if taken and not all_taken and not self._bypass:
            # Each of the rest pushes out the one before it.
            taken -= 1
            self._hold(following, depth + count - 1, first + count - 1, 1)
        if taken:
            self._hold(following, depth, first, taken)
        return all_taken or not self._bypass

    def _hold(self, following: int, depth: int, first: int, count: int) -> None:
        self._held[first : first + count] = b"\1" * count
        self._keep(following, depth, first, count)

    def _keep(self, following: int, depth: int, first: int, count: int) -> None:
        group = self._groups.setdefault(following, [])
        deepest = group[-1][0] if group else -1
        insort(group, [depth, first, count])
        if depth > deepest:
            self._enter(following, depth + count - 1)

    def _enter(self, following: int, depth: int) -> None:
        heappush(self._heaps[self._class(depth)], -following)

    def _class(self, depth: int) -> int:
        low, high = 0, len(self._floors)
        while high - low > 1:
            middle = (low + high) // 2
            if self._floors[middle] <= depth:
                low = middle
            else:
                high = middle
        return low

    def _evict(self, now: int, following: int, depth: int, most: int) -> int:
        """Up to `most` of the blocks that are least worth, if less than one at `depth`
        that is used by `following`; how many."""
        least, where = -1.0, -1
        for number, heap in enumerate(self._heaps):
            while heap and not self._valid(-heap[0], number, now):
                heappop(heap)
            if heap:
                score = (-heap[0] - now) / self._costs[number]
                if score > least:
                    least, where = score, number
        if where < 0:
            return 0
        group = self._groups[-self._heaps[where][0]]
        tail = group[-1]
        last = tail[0] + tail[2] - 1
        if -self._heaps[where][0] == following:
            if last < depth:
                return 0
            most = 1
        elif (following - now) / self._costs[self._class(depth)] >= least:
            return 0
        freed = min(most, tail[2], last - self._floors[where] + 1)
        tail[2] -= freed
        end = tail[1] + tail[2]
        self._held[end : end + freed] = bytes(freed)
        if not tail[2]:
            group.pop()
        if group:
            deepest = group[-1][0] + group[-1][2] - 1
            if self._class(deepest) != where:
                self._enter(-self._heaps[where][0], deepest)
        else:
            del self._groups[-self._heaps[where][0]]
        return freed

    def _valid(self, following: int, number: int, now: int) -> bool:
        group = self._groups.get(following)
        if not group or following < now:
            return False
        return self._class(group[-1][0] + group[-1][2] - 1) == number


def _next_uses(trace: Trace) -> list[list[Stretch]]:
    """For each request its blocks, in stretches that the same request uses next."""
    following = np.full(trace.blocks, NEVER, dtype=np.int64)
    found: list[list[Stretch]] = []
    for number in range(len(trace.requests) - 1, -1, -1):
        found.append(_stretches(trace.requests[number], following))
        for first, stop in trace.requests[number].pieces:
            following[first:stop] = number
    found.reverse()
    return found


def _stretches(request: Request, following: NDArray[np.int64]) -> list[Stretch]:
    stretches: list[Stretch] = []
    depth = 0
    for first, stop in request.pieces:
        part = following[first:stop]
        cuts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), stop - first]
        for begin, end in pairwise(cuts):
            stretches.append((first + begin, first + end, depth + begin, int(part[begin])))
        depth += stop - first
    return stretches
