"""What is in DRAM and has yet to show that it is worth its place.

What is brought up from NVMe has to lie in DRAM while it is read. Whether it should also
push out what a policy keeps there is another question: where the live set is larger than
DRAM, all of it comes round before any of it is used again, and what is brought up pushes
out just what is wanted next. So it may only *land*: outside the policy's order, in a part
of DRAM that it leaves first. It gets into the order when somebody asks for it again, when
there is room that nobody else wants, and one time in `ONE_IN`, so that a live set that
changes finds its way in. Which of the two is done is decided by trial (`core.places.promotion`).
(One in so many, and the trial: M. Qureshi et al., "Adaptive insertion policies for high
performance caching", ISCA 2007.)

A model's output is used again only if somebody continues it. Until then it waits in the
same way, and is the first of all to leave. What was brought up for somebody who is still to
come (`core.places.foreseen`) waits too, and leaves last; where nobody came, first.
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

    def __init__(
        self,
        policy: EvictionPolicy,
        has_room: Callable[[], bool],
        is_kept: Callable[[Replica], bool] = lambda replica: False,
    ) -> None:
        """`has_room`: nobody would have to leave for one block more. `is_kept`: a replica
        that comes in is for somebody who is still to come."""
        self.lands = False
        """What is brought up lands."""
        self._policy = policy
        self._has_room = has_room
        self._is_kept = is_kept
        # How often each had been asked for when it came; the one used last is last.
        self._doubtful: dict[Replica, int] = {}
        self._landed: dict[Replica, int] = {}
        self._kept: dict[Replica, int] = {}
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
        if not replica.pins and self._is_kept(replica):
            self._kept[replica] = block.uses
            return
        if block.uses < 0:
            self._doubtful[replica] = block.uses
            return
        if brought_up and self.lands and not self._has_room():
            self._brought += 1
            if self._brought % ONE_IN:
                # What nobody waits for (a prefetch) has yet to be asked for the first time.
                self._landed[replica] = block.uses if replica.pins else block.uses + 1
                return
        self._policy.insert(replica)

    @property
    def kept(self) -> int:
        """How many leave last."""
        return len(self._kept)

    def let_go(self, replica: Replica) -> None:
        """Nobody is expected for it any more."""
        before = self._kept.pop(replica, None)
        if before is not None:
            self._doubtful[replica] = before

    def touch(self, replica: Replica) -> None:
        waiting = self._waiting(replica)
        if waiting is None:
            self._policy.touch(replica)
        else:
            self._touch_waiting(replica, waiting)

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        if self._doubtful or self._landed or self._kept:
            ordered: list[Replica] = []
            for replica in replicas:
                waiting = self._waiting(replica)
                if waiting is None:
                    ordered.append(replica)
                else:
                    self._touch_waiting(replica, waiting)
            replicas = ordered
        self._policy.touch_run(replicas)

    def _waiting(self, replica: Replica) -> dict[Replica, int] | None:
        """Where it waits; None where it is in the policy's order."""
        for waiting in (self._landed, self._doubtful, self._kept):
            if replica in waiting:
                return waiting
        return None

    def _touch_waiting(self, replica: Replica, waiting: dict[Replica, int]) -> None:
        """Not every touch is somebody who asks: the request that had it brought up goes on
        to store what follows it."""
        before, now = waiting.pop(replica), replica.block.uses
        if now > before or now == MOST_USES:
            self._policy.insert(replica)
        else:
            waiting[replica] = before

    def remove(self, replica: Replica) -> None:
        waiting = self._waiting(replica)
        if waiting is None:
            self._policy.remove(replica)
        else:
            del waiting[replica]

    def worth(self, replica: Replica) -> float:
        return 0.0 if self._waiting(replica) is not None else self._policy.worth(replica)

    def candidates(self) -> Iterator[Replica]:
        waiting = self._doubtful or self._landed or self._kept
        return self._all_candidates() if waiting else self._policy.candidates()

    def _all_candidates(self) -> Iterator[Replica]:
        yield from self._doubtful
        landed = self._landed
        first = LOOKED_AT if len(landed) > len(self) // PART else 0
        yield from islice(landed, first)
        yield from self._policy.candidates()
        yield from islice(landed, first, None)
        # Of a chain the root came first, and leaves last.
        yield from reversed(self._kept)

    def __len__(self) -> int:
        return len(self._policy) + len(self._landed) + len(self._doubtful) + len(self._kept)
