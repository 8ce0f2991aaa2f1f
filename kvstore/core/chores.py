"""What takes long, done a part at a time, so that no other call waits for it.

A chore is an iterator that does a little with every step and tells what that cost. The
shell has the next part done whenever it has let others go first. What a chore goes
through changes between its steps; it must look again before it touches anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

SEEN = 1
"""The cost of a block that was looked at."""
NAMED = 5
"""The cost of a block that was looked for by its key."""
CHANGED = 100
"""The cost of a block that came, went or moved."""
PART = 15_000
"""What a part may cost: three milliseconds, or up to ten where little of what it
touches is in the processor's caches."""

Chore = Iterator[int]


class Chores:
    def __init__(self) -> None:
        self.part = PART
        self._chores: deque[Chore] = deque()
        self._spent = 0

    def __len__(self) -> int:
        return len(self._chores)

    @property
    def piece(self) -> int:
        """How many blocks a chore should go through in a step, where it can do so
        faster than one by one."""
        return max(1, self.part // 8)

    def next_turn(self) -> None:
        """Whatever happens from here on happens after others have had their turn."""
        self._spent = 0

    def add(self, chore: Chore) -> None:
        """Do the first part at once: most are no longer than that. All that are added
        in one turn share what a part may cost."""
        while self._spent < self.part:
            cost = next(chore, None)
            if cost is None:
                return
            self._spent += cost
        self._chores.append(chore)

    def go_on(self) -> None:
        """Do the next part, of one chore after the other."""
        if not self._chores:
            return
        chore = self._chores.popleft()
        cost = 0
        for step in chore:
            cost += step
            if cost >= self.part:
                self._chores.append(chore)
                return
