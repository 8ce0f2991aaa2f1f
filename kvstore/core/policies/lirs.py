"""LIRS: what counts is the time between a block's last two uses, not since the last.
Blocks with short ones (LIR) keep nearly all the room; the others (HIR) pass through a
hundredth of it.

Source: S. Jiang, X. Zhang, "LIRS: an efficient low inter-reference recency set
replacement policy", SIGMETRICS 2002. The stack remembers as many blocks that left as
there is room for, where the paper sets no bound. O(1) an operation, amortised; `mark` tells
whether a replica is LIR.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ghosts import Ghosts
from kvstore.core.policies.ring import Ring

PASSING = 0.01
REMEMBERED = 1.0


class LIRS(EvictionPolicy):
    def __init__(self) -> None:
        # Least recent first; None for a block that left.
        self._stack: OrderedDict[bytes, Replica | None] = OrderedDict()
        self._gone = Ghosts()
        self._passing = Ring()
        self._kept = 0
        self._room = 0
        """LIR blocks there may be; 0 until the first is to go."""

    def insert(self, replica: Replica) -> None:
        stored_key = replica.block.stored_key
        again = self._gone.take(stored_key)
        self._push(replica)
        if again or not self._room:
            replica.mark = True
            self._kept += 1
            self._fit()
        else:
            replica.mark = False
            self._passing.append(replica)

    def touch(self, replica: Replica) -> None:
        stored_key = replica.block.stored_key
        again = stored_key in self._stack
        self._push(replica)
        if replica.mark:
            self._prune()
        elif again:
            self._passing.discard(replica)
            replica.mark = True
            self._kept += 1
            self._fit()
        else:
            self._passing.renew(replica)

    def remove(self, replica: Replica) -> None:
        stored_key = replica.block.stored_key
        room = len(self)
        if replica.mark:
            self._kept -= 1
            del self._stack[stored_key]
            self._prune()
            return
        self._passing.discard(replica)
        if stored_key in self._stack:
            self._stack[stored_key] = None
            self._gone.add(stored_key)
            while len(self._gone) > room * REMEMBERED:
                del self._stack[self._gone.pop()]

    def candidates(self) -> Iterator[Replica]:
        self._room = max(len(self) - max(int(len(self) * PASSING), 1), 1)
        self._fit()
        yield from self._passing
        for replica in self._stack.values():
            if replica is not None and replica.mark:
                yield replica

    def __len__(self) -> int:
        return self._kept + len(self._passing)

    def _push(self, replica: Replica) -> None:
        self._stack[replica.block.stored_key] = replica
        self._stack.move_to_end(replica.block.stored_key)

    def _fit(self) -> None:
        """Turn the least recent LIR blocks that are too many into HIR ones."""
        while self._room and self._kept > self._room:
            self._prune()
            _, replica = self._stack.popitem(last=False)
            assert replica is not None
            replica.mark = False
            self._kept -= 1
            self._passing.append(replica)
        self._prune()

    def _prune(self) -> None:
        """Let the stack begin with a LIR block."""
        stack = self._stack
        while stack:
            stored_key = next(iter(stack))
            replica = stack[stored_key]
            if replica is not None and replica.mark:
                return
            del stack[stored_key]
            if replica is None:
                self._gone.take(stored_key)
