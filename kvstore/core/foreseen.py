"""What is brought up before anybody asks for it: how much there may be, and what becomes of it.

A client that asks and never reads, or says when a session is back and is wrong, is believed
less: of the room for what is foreseen it gets the less the more of it was wasted lately.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.core.catalog import Replica
from kvstore.core.space import SpaceClass

REMEMBERED = 4096
"""Blocks that a reason to foresee is judged by, about."""
TRUSTED = 64
"""Blocks that one counts as having been right about before it was tried."""
RIGHT, SURE = 0.9, 0.95
"""Whose part is less than the first gets the least room, and all of it from the second on."""
LEAST = 1 / 64
"""Of the room, for who was never right: it may be, one day."""


class Reason:
    """Somebody for whose sake blocks are brought up, and how right that was, lately."""

    __slots__ = ("_used", "_wasted")

    def __init__(self) -> None:
        self._used = float(TRUSTED)
        self._wasted = 0.0

    @property
    def right(self) -> float:
        """The part of it that was used."""
        return self._used / (self._used + self._wasted)

    @property
    def room(self) -> float:
        """The part of the room that it gets."""
        return max(LEAST, min(1.0, (self.right - RIGHT) / (SURE - RIGHT)))

    def note(self, *, used: bool) -> None:
        self._used *= 1 - 1 / REMEMBERED
        self._wasted *= 1 - 1 / REMEMBERED
        if used:
            self._used += 1
        else:
            self._wasted += 1


class Foreseen:
    """Replicas in DRAM that nobody has asked for, and those on their way there. Bytes are
    counted since the start, but for `unused_bytes`, which are there now."""

    def __init__(self) -> None:
        self.unused_bytes = self.used_bytes = self.wasted_bytes = 0
        self._unused: dict[Replica, Reason] = {}
        self._coming: dict[Replica, Reason] = {}
        self._held: dict[SpaceClass, int] = {}

    def __contains__(self, replica: Replica) -> bool:
        """It is there and nobody has asked for it."""
        return replica in self._unused

    def held(self, space_class: SpaceClass) -> int:
        """Bytes of a class that have come or are on their way."""
        return self._held.get(space_class, 0)

    def begins(self, target: Replica, reason: Reason) -> None:
        """It is to be filled, for nobody who waits for it."""
        self._coming[target] = reason
        self._hold(target, 1)

    def came(self, target: Replica, *, unasked: bool) -> None:
        """It is filled. Not `unasked`: somebody came to wait for it before that began."""
        reason = self._coming.pop(target, None)
        if reason is None:
            return
        if not unasked:
            self._hold(target, -1)
            return
        self._unused[target] = reason
        self.unused_bytes += target.block.layout.block_bytes
        if target.pins:
            self.asked_for((target,))

    def called_off(self, target: Replica) -> None:
        """It is not filled, after all."""
        if self._coming.pop(target, None) is not None:
            self._hold(target, -1)

    def asked_for(self, replicas: Iterable[Replica]) -> None:
        """Somebody reads replicas in DRAM."""
        if self._unused:
            for replica in list(filter(self._unused.__contains__, replicas)):
                self.used_bytes += self._leaves(replica, used=True)

    def goes(self, replica: Replica) -> None:
        """It is about to stop being READY."""
        if replica in self._unused:
            self.wasted_bytes += self._leaves(replica, used=False)

    def _leaves(self, replica: Replica, *, used: bool) -> int:
        self._unused.pop(replica).note(used=used)
        self._hold(replica, -1)
        nbytes = replica.block.layout.block_bytes
        self.unused_bytes -= nbytes
        return nbytes

    def _hold(self, replica: Replica, change: int) -> None:
        layout = replica.block.layout
        held = self._held.get(layout.dram_class, 0) + change * layout.block_bytes
        if held:
            self._held[layout.dram_class] = held
        else:
            del self._held[layout.dram_class]

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        held: dict[SpaceClass, int] = {}
        for replica in (*self._unused, *self._coming):
            layout = replica.block.layout
            held[layout.dram_class] = held.get(layout.dram_class, 0) + layout.block_bytes
        unused = sum(replica.block.layout.block_bytes for replica in self._unused)
        if held != self._held or unused != self.unused_bytes:
            raise AssertionError("bytes that are foreseen are counted wrongly")
