"""What is brought up before anybody asks for it: how much there may be, for how long it is
kept, and what becomes of it.

Until whoever it is for should have come, it leaves only where nothing else can: it is worth
at least what it cost to bring it up. From then on it leaves first. A client that asks and
never reads, or says when a session is back and is wrong, is believed less: of the room for
what is foreseen it gets the less the more of it was wasted lately. No errand alone may waste
more than others before it have made up for: one session that does not come back is as much as
all the room there is.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.core.catalog import Block, Replica
from kvstore.core.space import SpaceClass

REMEMBERED = 16.0
"""What a reason to foresee is judged by, about: so many times what there is room for."""
ASKED, TOLD, GUESSED = 10.0, 1.0, 1 / 16
"""What one counts as having been right about before it was tried: who asks for chains, who
says when a session is back, and who does not, so that it is only guessed."""
RIGHT, SURE = 0.9, 0.95
"""Whose part is less than the first gets the least room, and all of it from the second on."""
LEAST = 1 / 64
"""Of the room, or else a block, for who was never right: it may be, one day."""


class Waste(enum.Enum):
    """Why what was brought up was not asked for before it left."""

    OVERDUE = "overdue"
    """Nobody had come by its time."""
    UNWANTED = "unwanted"
    """Whom it was for came and did not ask for it, or is gone."""
    PUSHED_OUT = "pushed out"
    """It left before its time: nothing else could, or it was dropped."""


class Reason:
    """Somebody for whose sake blocks are brought up, and how right that was, lately. Amounts
    are parts of the room that there is for what is foreseen."""

    __slots__ = ("_used", "_wasted")

    def __init__(self, trusted: float) -> None:
        self._used = trusted
        self._wasted = 0.0

    @property
    def right(self) -> float:
        """The part of it that was used."""
        return self._used / (self._used + self._wasted)

    @property
    def room(self) -> float:
        """What all that is brought up for it may take."""
        return max(LEAST, min(1.0, (self.right - RIGHT) / (SURE - RIGHT)))

    @property
    def stake(self) -> float:
        """What one errand may: were all of that wasted, it would still be right often enough."""
        return max(LEAST, (1 / RIGHT - 1) * self._used - self._wasted)

    def note(self, amount: float, *, used: bool) -> None:
        kept = max(0.0, 1 - amount / REMEMBERED)
        self._used *= kept
        self._wasted *= kept
        if used:
            self._used += amount
        else:
            self._wasted += amount


@dataclass(eq=False, slots=True)
class Errand:
    """Bringing up what somebody is going to ask for, and keeping it until `until_ns`.
    `brought`: what has not been asked for, of a chain root first."""

    reason: Reason
    until_ns: int
    room_bytes: float = 0.0
    """What there is for all that is foreseen."""
    held_bytes: int = 0
    brought: dict[Replica, None] = field(default_factory=dict)
    over: bool = False
    """Nobody wants it any more."""
    kept: bool = True

    def note(self, replica: Replica, *, used: bool) -> None:
        """What became of something that was brought up for it."""
        self.reason.note(replica.block.layout.block_bytes / self.room_bytes, used=used)


class Foreseen:
    """Replicas in DRAM that nobody has asked for, and those on their way there. Bytes are
    counted since the start, but for `unused_bytes`, which are there now."""

    def __init__(self) -> None:
        self.unused_bytes = self.used_bytes = 0
        self.wasted = dict.fromkeys(Waste, 0)
        self._unused: dict[Replica, Errand] = {}
        self._coming: dict[Replica, Errand] = {}
        self._held: dict[SpaceClass, int] = {}

    def __contains__(self, replica: Replica) -> bool:
        """It is there and nobody has asked for it."""
        return replica in self._unused

    @property
    def wasted_bytes(self) -> int:
        return sum(self.wasted.values())

    def is_kept(self, replica: Replica) -> bool:
        """It has come, or is just coming, for somebody who should still come."""
        errand = self._unused.get(replica) or self._coming.get(replica)
        return errand is not None and errand.kept

    def held(self, space_class: SpaceClass) -> int:
        """Bytes of a class that are kept or on their way."""
        return self._held.get(space_class, 0)

    def may_begin(self, block: Block, errand: Errand, room_bytes: float) -> bool:
        """There is room for a block more, as far as the errand's reason is believed. `room_bytes`:
        that there are for all of its class that is foreseen. Whatever is thought of who asks, one
        block may be tried where there is room for any: in a small memory the least part would
        be less than a block, and who may bring up nothing is never seen to be right."""
        nbytes, reason = block.layout.block_bytes, errand.reason
        if nbytes > room_bytes:
            return False
        held = self.held(block.layout.dram_class)
        return held + nbytes <= max(nbytes, room_bytes * reason.room) and (
            errand.held_bytes + nbytes <= max(nbytes, room_bytes * reason.stake)
        )

    def begins(self, target: Replica, errand: Errand, room_bytes: float) -> None:
        """It is to be filled, for nobody who waits for it. `room_bytes`: that there are for all
        of its class that is."""
        errand.room_bytes = room_bytes
        self._coming[target] = errand
        errand.brought[target] = None
        self._hold(target, errand, 1)

    def came(self, target: Replica, *, unasked: bool) -> None:
        """It is filled. Not `unasked`: somebody came to wait for it before that began."""
        errand = self._coming.pop(target, None)
        if errand is None:
            return
        if not unasked:
            errand.brought.pop(target, None)
            self._hold(target, errand, -1)
            return
        self._unused[target] = errand
        self.unused_bytes += target.block.layout.block_bytes
        if target.pins:
            self.asked_for((target,))

    def called_off(self, target: Replica) -> None:
        """It is not filled, after all."""
        errand = self._coming.pop(target, None)
        if errand is not None:
            errand.brought.pop(target, None)
            self._hold(target, errand, -1)

    def asked_for(self, replicas: Iterable[Replica]) -> list[Replica]:
        """Somebody reads replicas in DRAM. Those that nobody had asked for before."""
        if not self._unused:
            return []
        used = list(filter(self._unused.__contains__, replicas))
        for replica in used:
            self._leaves(replica).note(replica, used=True)
            self.used_bytes += replica.block.layout.block_bytes
        return used

    def goes(self, replica: Replica) -> None:
        """It is about to stop being READY."""
        if replica in self._unused:
            errand = self._leaves(replica)
            errand.note(replica, used=False)
            why = Waste.PUSHED_OUT if errand.kept else Waste.OVERDUE
            self.wasted[Waste.UNWANTED if errand.over else why] += replica.block.layout.block_bytes

    def let_go(self, errand: Errand) -> None:
        """Nobody is expected for it any more: the room is others'."""
        for replica in errand.brought:
            self._hold(replica, errand, -1)
        errand.kept, errand.brought = False, {}

    def _leaves(self, replica: Replica) -> Errand:
        errand = self._unused.pop(replica)
        errand.brought.pop(replica, None)
        self._hold(replica, errand, -1)
        self.unused_bytes -= replica.block.layout.block_bytes
        return errand

    def _hold(self, replica: Replica, errand: Errand, change: int) -> None:
        if not errand.kept:
            return
        layout = replica.block.layout
        errand.held_bytes += change * layout.block_bytes
        held = self._held.get(layout.dram_class, 0) + change * layout.block_bytes
        if held:
            self._held[layout.dram_class] = held
        else:
            del self._held[layout.dram_class]

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        held: dict[SpaceClass, int] = {}
        for replica, errand in (*self._unused.items(), *self._coming.items()):
            if errand.kept:
                layout = replica.block.layout
                held[layout.dram_class] = held.get(layout.dram_class, 0) + layout.block_bytes
        unused = sum(replica.block.layout.block_bytes for replica in self._unused)
        if held != self._held or unused != self.unused_bytes:
            raise AssertionError("bytes that are foreseen are counted wrongly")
