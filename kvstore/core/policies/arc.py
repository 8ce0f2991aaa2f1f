"""ARC: a list of what was used once and one of what was used again share the room, and
the names of what left either tell which of the two should have had more.

Source: N. Megiddo, D. S. Modha, "ARC: a self-tuning, low overhead replacement cache",
FAST 2003. O(1) an operation; `mark` tells whether a replica was used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.ghosts import Ghosts
from kvstore.core.policies.ring import Ring


class ARC(EvictionPolicy):
    def __init__(self) -> None:
        self._once = Ring()
        self._again = Ring()
        self._once_gone = Ghosts()
        self._again_gone = Ghosts()
        self._room = 0
        self._share = 0.0
        """The room that `_once` should have, of `_room`."""
        self._missed = b""
        self._missed_again = False

    def miss(self, stored_key: bytes) -> None:
        if stored_key == self._missed:
            return
        once, again = len(self._once_gone), len(self._again_gone)
        self._missed_again = False
        if self._once_gone.take(stored_key):
            self._missed = stored_key
            self._share = min(self._share + max(again / once, 1.0), self._room)
        elif self._again_gone.take(stored_key):
            self._missed = stored_key
            self._missed_again = True
            self._share = max(self._share - max(once / again, 1.0), 0.0)

    def insert(self, replica: Replica) -> None:
        stored_key = replica.block.stored_key
        self.miss(stored_key)
        replica.mark = stored_key == self._missed
        (self._again if replica.mark else self._once).append(replica)
        self._missed, self._missed_again = b"", False
        self._forget()

    def touch(self, replica: Replica) -> None:
        if replica.mark:
            self._again.renew(replica)
        else:
            self._once.discard(replica)
            self._again.append(replica)
            replica.mark = True

    def remove(self, replica: Replica) -> None:
        self._room = len(self)
        if replica.mark:
            self._again.discard(replica)
            self._again_gone.add(replica.block.stored_key)
        else:
            self._once.discard(replica)
            self._once_gone.add(replica.block.stored_key)

    def candidates(self) -> Iterator[Replica]:
        once = len(self._once)
        if once > self._share or (once and once == self._share and self._missed_again):
            return chain(self._once, self._again)
        return chain(self._again, self._once)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def _forget(self) -> None:
        """As many names as replicas, and no more of the ones than there is room."""
        room = max(self._room, len(self))
        self._once_gone.keep(max(room - len(self._once), 0))
        self._again_gone.keep(max(2 * room - len(self) - len(self._once_gone), 0))
