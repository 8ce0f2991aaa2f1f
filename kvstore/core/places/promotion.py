"""Whether what is brought up from NVMe should push out what is in DRAM, decided by trial.

A sample of the blocks, chosen by name, is tried on two small DRAMs beside the real one, as
much smaller as the sample is of all blocks. In one what is brought up goes into the
policy's order, in the other it lands (`core.places.landing`). The real one does as the one that
has more hits, lately. Both have a policy of the same kind as the real one, so a policy that
copes with a live set larger than DRAM by itself is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from kvstore.core.catalog import Block, Replica
from kvstore.core.lifecycle import State
from kvstore.core.places.landing import Landing
from kvstore.core.policies import EvictionPolicy, MakePolicy, Use
from kvstore.types import SessionState, Tier

MOST_TRIED = 512
"""Blocks of each of the small DRAMs."""
BETTER = 1.02
SURE = 3.0
"""How much more hits the other must have than the one that is done: as a factor, and in
standard deviations of a count."""
KEPT = 0.9
"""Of what was counted, from one comparison to the next."""
SAMPLED_OF = 1 << 16


class TriedBlock(Block):
    """Stands for a block, which may be gone."""

    __slots__ = ()


class TriedReplica(Replica):
    __slots__ = ()
    tier = Tier.DRAM


class Trial:
    """A small DRAM of the sample's blocks."""

    def __init__(self, policy: EvictionPolicy, *, lands: bool) -> None:
        self.order = Landing(policy, has_room=lambda: self._had_room)
        self.order.lands = lands
        self.hits = 0.0
        self.room = 0
        self._held: dict[bytes, Replica] = {}
        self._had_room = True

    def use(self, block: Block, *, new: bool) -> None:
        """A block was stored (`new`) or used."""
        replica = self._held.get(block.stored_key)
        if replica is not None:
            self.hits += 1
            replica.block.uses = block.uses
            self.order.touch(replica)
            return
        self._had_room = len(self._held) < self.room
        if not self._had_room:
            self._drop()
        tried = TriedBlock(block.stored_key, block.parent, block.layout, block.depth)
        tried.uses = block.uses
        replica = TriedReplica(tried, 0, State.READY)
        replica.pins = 1
        self.order.enter(replica, brought_up=not new)
        self._held[block.stored_key] = replica
        if not new:
            # As in the real one: it came, and then is used.
            self.order.touch(replica)

    def keep(self, room: int, sampled: Callable[[bytes], bool]) -> None:
        """Hold so many, of those that are `sampled(name)`."""
        self.room = room
        for name in [name for name in self._held if not sampled(name)]:
            self.order.remove(self._held.pop(name))
        while len(self._held) > room:
            self._drop()

    def _drop(self) -> None:
        victim = next(self.order.candidates())
        self.order.remove(victim)
        del self._held[victim.block.stored_key]


class DramOrder(Landing):
    """A class of DRAM: the order in which blocks leave it."""

    def __init__(
        self,
        make_policy: MakePolicy,
        has_room: Callable[[], bool],
        is_kept: Callable[[Replica], bool] = lambda replica: False,
    ) -> None:
        super().__init__(make_policy(), has_room, is_kept)
        self._make_policy = make_policy
        # Made when first something is brought up.
        self._trials: list[Trial] = []
        self._room = 0
        self._below = SAMPLED_OF
        """Of the sample are the names whose number is less."""
        self._uses = 0

    def use(self, use: Use) -> None:
        super().use(use)
        for trial in self._trials:
            trial.order.use(use)

    def hint(
        self, session: Hashable, state: SessionState, expected_ms: float | None = None
    ) -> None:
        super().hint(session, state, expected_ms)
        for trial in self._trials:
            trial.order.hint(session, state, expected_ms)

    def insert(self, replica: Replica) -> None:
        super().insert(replica)
        if replica.block.nvme is None:
            self._try((replica,), new=True)
        elif not self._trials and self._room:
            self._trials = [Trial(self._make_policy(), lands=lands) for lands in (False, True)]
            self._make_room()

    def touch(self, replica: Replica) -> None:
        super().touch(replica)
        self._try((replica,), new=False)

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        run = list(replicas) if self._trials else replicas
        super().touch_run(run)
        self._try(run, new=False)

    def remove(self, replica: Replica) -> None:
        if len(self) > self._room:
            self._room = len(self)
            self._make_room()
        super().remove(replica)

    def _make_room(self) -> None:
        """The trials are of the real one's size, as much smaller as the sample is."""
        while self._room * self._below // SAMPLED_OF > MOST_TRIED:
            self._below //= 2
        for trial in self._trials:
            room = max(1, self._room * self._below // SAMPLED_OF)
            trial.keep(room, lambda name: _number(name) < self._below)

    def _try(self, replicas: Iterable[Replica], *, new: bool) -> None:
        if not self._trials:
            return
        below = self._below
        sample = [r.block for r in replicas if _number(r.block.stored_key) < below]
        for block in sample:
            for trial in self._trials:
                trial.use(block, new=new)
        self._uses += len(sample)
        if self._uses >= 2 * self._trials[0].room:
            self._uses = 0
            self._compare()

    def _compare(self) -> None:
        does, other = self._trials[self.lands], self._trials[not self.lands]
        if other.hits > BETTER * does.hits + SURE * (does.hits + 1) ** 0.5:
            self.lands = not self.lands
        for trial in self._trials:
            trial.hits *= KEPT


def _number(name: bytes) -> int:
    """Names are as good as random."""
    return name[-2] << 8 | name[-1]
