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
CHANGED = 50
"""The cost of a block that came, went or moved."""
PART = 5_000
"""What a part may cost: about a millisecond."""

Chore = Iterator[int]


class Chores:
    def __init__(self) -> None:
        self.part = PART
        self._chores: deque[Chore] = deque()

    def __len__(self) -> int:
        return len(self._chores)

    def add(self, chore: Chore) -> None:
        """Do the first part at once: most are no longer than that."""
        self._chores.appendleft(chore)
        self.go_on()

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
