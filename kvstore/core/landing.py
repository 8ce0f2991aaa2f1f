"""What is in DRAM and has yet to show that it is worth its place.

What is brought up from NVMe has to lie in DRAM while it is read. Whether it should also
push out what a policy keeps there is another question: where the live set is larger than
DRAM, all of it comes round before any of it is used again, and what is brought up pushes
out just what is wanted next. So it may only *land*: outside the policy's order, in a part
of DRAM that it leaves first. It gets into the order when somebody asks for it again, when
there is room that nobody else wants, and one time in `ONE_IN`, so that a live set that
changes finds its way in. Which of the two is done is decided by trial (`core.promotion`).
(One in so many, and the trial: M. Qureshi et al., "Adaptive insertion policies for high
performance caching", ISCA 2007.)

A model's output is used again only if somebody continues it. Until then it waits in the
same way, and is the first of all to leave.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice

from kvstore.core.catalog import MOST_USES, Replica
from kvstore.core.policies import EvictionPolicy, Use
from kvstore.types import SessionState

ONE_IN = 32
"""So many of those that land get into the order all the same."""
PART = 16
"""Up to one in so many of a class of DRAM may have landed before they leave first."""
LOOKED_AT = 64
"""Landed ones offered at a time: the first may all be in use."""


class Landing(EvictionPolicy):
    """An order of blocks in DRAM around a policy's: see above."""

    by_chain = True

    def __init__(self, policy: EvictionPolicy, has_room: Callable[[], bool]) -> None:
        """`has_room`: nobody would have to leave for one block more."""
        self.lands = False
        """What is brought up lands."""
        self._policy = policy
        self._has_room = has_room
        self._outputs: dict[Replica, int] = {}
        # How often each had been asked for when it came; the one used last is last.
        self._landed: dict[Replica, int] = {}
        self._brought = 0

    def use(self, use: Use) -> None:
        self._policy.use(use)

    def hint(
        self, session: Hashable, state: SessionState, expected_ms: float | None = None
    ) -> None:
        self._policy.hint(session, state, expected_ms)

    def miss(self, stored_key: bytes) -> None:
        self._policy.miss(stored_key)

    def insert(self, replica: Replica) -> None:
        self.enter(replica, brought_up=replica.block.nvme is not None)

    def enter(self, replica: Replica, *, brought_up: bool) -> None:
        block = replica.block
        if block.uses < 0:
            self._outputs[replica] = block.uses
            return
        if brought_up and self.lands and not self._has_room():
            self._brought += 1
            if self._brought % ONE_IN:
                # What nobody waits for (a prefetch) has yet to be asked for the first time.
                self._landed[replica] = block.uses if replica.pins else block.uses + 1
                return
        self._policy.insert(replica)

    def touch(self, replica: Replica) -> None:
        if self._waits(replica):
            self._touch_waiting(replica)
        else:
            self._policy.touch(replica)

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        if self._outputs or self._landed:
            run = list(replicas)
            replicas = [replica for replica in run if not self._waits(replica)]
            for replica in run if len(replicas) < len(run) else ():
                if self._waits(replica):
                    self._touch_waiting(replica)
        self._policy.touch_run(replicas)

    def _waits(self, replica: Replica) -> bool:
        return replica in self._landed or replica in self._outputs

    def _touch_waiting(self, replica: Replica) -> None:
        """Not every touch is somebody who asks: the request that had it brought up goes on
        to store what follows it."""
        waiting = self._landed if replica in self._landed else self._outputs
        before, now = waiting.pop(replica), replica.block.uses
        if now > before or now == MOST_USES:
            self._policy.insert(replica)
        else:
            waiting[replica] = before

    def remove(self, replica: Replica) -> None:
        waiting = self._landed if replica in self._landed else self._outputs
        if waiting.pop(replica, None) is None:
            self._policy.remove(replica)

    def worth(self, replica: Replica) -> float:
        return 0.0 if self._waits(replica) else self._policy.worth(replica)

    def candidates(self) -> Iterator[Replica]:
        yield from self._outputs
        landed = self._landed
        if len(landed) <= len(self) // PART:
            yield from self._policy.candidates()
            yield from landed
            return
        yield from islice(landed, LOOKED_AT)
        yield from self._policy.candidates()
        yield from islice(landed, LOOKED_AT, None)

    def __len__(self) -> int:
        return len(self._policy) + len(self._landed) + len(self._outputs)
