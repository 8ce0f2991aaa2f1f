"""A drive, calculated: requests that have their latency to themselves and share its time.

What `kvstore serve --device modelled:...` waits for (`tiers.modelled`), and what the simulator
moves blocks on (`sim.batches`). Nothing of what the drive's insides do is modelled: caches,
wear, pauses to clean up.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


class Pace(NamedTuple):
    """What one direction of a drive takes of a request that is alone."""

    latency_ns: float
    ns_a_byte: float


SMALLEST_NS = 1e-3
"""What is left of a request by rounding is nothing."""


@dataclass(eq=False, slots=True)
class Request:
    """`latency_ns` are left that pass beside those of others, and then `work_ns` of the
    drive's whole time."""

    latency_ns: float
    work_ns: float

    @property
    def over(self) -> bool:
        return self.latency_ns <= 0 and self.work_ns <= 0


class Drive:
    """Up to `depth` requests at a time, the others in turn; each has its latency to itself
    and then an even share of the drive. Not thread-safe. Times are the caller's."""

    def __init__(self, depth: int, now_ns: float = 0.0) -> None:
        self.speed = 1.0
        """What of its time the drive makes use of; 0.0: it hangs. To be changed right
        after `advance`."""
        self._depth = depth
        self._now_ns = now_ns
        self._under_way: list[Request] = []
        self._waiting: deque[Request] = deque()

    @property
    def now_ns(self) -> float:
        return self._now_ns

    def begin(self, latency_ns: float, work_ns: float) -> Request:
        """A request comes, now. One that is nothing is over."""
        request = Request(latency_ns, work_ns)
        if not request.over:
            self._waiting.append(request)
            self._fill_up()
        return request

    def next_ns(self) -> float:
        """When something about the requests changes, if no other begins."""
        step_ns = self._step_ns()
        return self._now_ns + step_ns / self.speed if self.speed else math.inf

    def advance(self, now_ns: float) -> None:
        """Time has passed. A clock that went back has stood still."""
        while (next_ns := self.next_ns()) <= now_ns:
            self._pass(self._step_ns())
            self._now_ns = next_ns
        if now_ns > self._now_ns:
            self._pass((now_ns - self._now_ns) * self.speed)
            self._now_ns = now_ns

    def ends_ns(self, request: Request) -> float:
        """When a request is over, if no other begins before."""
        ahead = Drive(self._depth, self._now_ns)
        ahead.speed = self.speed
        copies = {id(r): Request(r.latency_ns, r.work_ns) for r in self._all()}
        ahead._under_way = [copies[id(r)] for r in self._under_way]
        ahead._waiting.extend(copies[id(r)] for r in self._waiting)
        copy = copies.get(id(request))
        while copy is not None and not copy.over:
            next_ns = ahead.next_ns()
            if next_ns == math.inf:
                return next_ns
            ahead.advance(next_ns)
        return ahead._now_ns

    def _all(self) -> list[Request]:
        return [*self._under_way, *self._waiting]

    def _fill_up(self) -> None:
        while self._waiting and len(self._under_way) < self._depth:
            self._under_way.append(self._waiting.popleft())

    def _moving(self) -> int:
        return sum(request.latency_ns <= 0 for request in self._under_way)

    def _step_ns(self) -> float:
        """At full speed, until a latency or a request is over."""
        moving = self._moving()
        return min(
            (r.latency_ns if r.latency_ns > 0 else r.work_ns * moving for r in self._under_way),
            default=math.inf,
        )

    def _pass(self, ns: float) -> None:
        moving = self._moving()
        for request in self._under_way:
            if request.latency_ns > 0:
                left = request.latency_ns - ns
                request.latency_ns = left if left > SMALLEST_NS else 0.0
            else:
                left = request.work_ns - ns / moving
                request.work_ns = left if left > SMALLEST_NS else 0.0
        if any(request.over for request in self._under_way):
            self._under_way = [r for r in self._under_way if not r.over]
            self._fill_up()
