"""One tier as the planner sees it: slots, who is in them, and who goes first.

A pool binds two things that must never disagree: the space (who is in which slot)
and the policies (in which order they would leave, one order a space class). A replica
has its slot from the moment it is made to the moment it is GONE.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from kvstore.core.catalog import Block, DramReplica, NvmeReplica, Replica
from kvstore.core.lifecycle import State
from kvstore.core.places.shortlist import MayGo, Shortlist
from kvstore.core.policies import EvictionPolicy, Use
from kvstore.core.space import Space, SpaceClass
from kvstore.types import SessionState, Tier

REPLICAS: dict[Tier, type[Replica]] = {Tier.DRAM: DramReplica, Tier.NVME: NvmeReplica}


class Pool:
    def __init__(
        self, tier: Tier, space: Space, make_policy: Callable[[SpaceClass], EvictionPolicy]
    ) -> None:
        self.tier = tier
        self.space = space
        self.evictions = 0
        self._replica = REPLICAS[tier]
        self._replicas = 0
        self._make_policy = make_policy
        self._policies: dict[SpaceClass, EvictionPolicy] = {}
        self._shortlists: dict[SpaceClass, Shortlist] = {}
        self._use = Use()
        self._told: dict[SpaceClass, Use] = {}

    def __len__(self) -> int:
        return self._replicas

    def place(self, block: Block, space_class: SpaceClass, state: State) -> Replica | None:
        """A new replica in a free slot; None when there is no free slot."""
        replica = self._replica(block, 0, state)
        address = self.space.allocate(space_class, replica)
        if address is None:
            return None
        replica.address = address
        self._replicas += 1
        return replica

    def restore(
        self, blocks: Sequence[Block | None], addresses: Sequence[int], space_class: SpaceClass
    ) -> list[int]:
        """Give each block a replica that was found at a start, FILLING until all is found.
        Which of them have none: where there is no block, and where the slot is taken or is
        none of the class."""
        make, state = self._replica, State.FILLING
        replicas = [
            None if block is None else make(block, address, state)
            for block, address in zip(blocks, addresses, strict=True)
        ]
        refused = self.space.restore_slots(addresses, space_class, replicas)
        self._replicas += len(replicas) - len(refused)
        for row in refused:
            replicas[row] = None
        for replica in filter(None, replicas):
            replica.block.nvme = replica
        return refused

    def use(self, use: Use) -> None:
        """What comes and is touched from now on is for this request."""
        self._use = use

    def hint(self, session: Hashable, state: SessionState, expected_ms: float | None) -> None:
        """See the policies'."""
        for space_class, policy in self._policies.items():
            policy.hint(session, state, expected_ms)
            self._shortlists[space_class].reordered()

    def judge_anew(self) -> None:
        """Others may leave than before."""
        for shortlist in self._shortlists.values():
            shortlist.reordered()

    def insert_all(self, replicas: Iterable[Replica], space_class: SpaceClass) -> None:
        """`insert` for each, in this order."""
        self._policy(space_class).insert_all(replicas)

    def insert(self, replica: Replica, space_class: SpaceClass) -> None:
        """The replica became READY: from now on it may be evicted."""
        self._policy(space_class).insert(replica)

    def _policy(self, space_class: SpaceClass) -> EvictionPolicy:
        """Told which request it is for."""
        policy = self._policies.get(space_class)
        if policy is None:
            policy = self._policies[space_class] = self._make_policy(space_class)
            self._shortlists[space_class] = Shortlist()
        if self._told.get(space_class) is not self._use:
            self._told[space_class] = self._use
            policy.use(self._use)
        return policy

    def touch(self, replica: Replica, space_class: SpaceClass) -> None:
        self._policy(space_class).touch(replica)
        self._shortlists[space_class].used((replica,))

    def touch_run(self, replicas: list[Replica], space_class: SpaceClass) -> None:
        """`touch` for many of one class, the last one last."""
        if replicas:
            self._policy(space_class).touch_run(replicas)
            self._shortlists[space_class].used(replicas)

    def withdraw(self, replica: Replica, space_class: SpaceClass) -> None:
        """The replica is not READY any more; its slot is still used."""
        self._policies[space_class].remove(replica)
        self._shortlists[space_class].used((replica,))

    def vacate(self, replica: Replica) -> None:
        """The replica is GONE: its slot is free."""
        assert replica.state is State.GONE
        self.space.free(replica.address)
        self._replicas -= 1

    def replicas(self) -> Iterator[Replica]:
        """See `Space.residents`."""
        return self.space.residents()

    def coldest(self, space_class: SpaceClass, may_go: MayGo) -> Replica | None:
        """The first replica in eviction order that may go, by and large (`core.places.shortlist`).

        Those found in use on the way count as used now, so that they are not looked
        at again and again."""
        shortlist = self._shortlists.get(space_class)
        if shortlist is None:
            return None
        found, in_use = shortlist.find(self.candidates(space_class), may_go)
        self.touch_run(in_use, space_class)
        return found

    def passed_over(self, space_class: SpaceClass) -> Replica | None:
        """The next of those that would have left before what was found last, had they been
        written; each is told once until the order is walked again."""
        shortlist = self._shortlists.get(space_class)
        return None if shortlist is None else shortlist.behind()

    def may_leave(self, replica: Replica, space_class: SpaceClass) -> None:
        """It has been written to the next tier, or will not be: if it was passed over for
        that, it leaves first."""
        self._shortlists[space_class].may_leave(replica)

    def worth(self, replica: Replica, space_class: SpaceClass) -> float:
        """See the policies'."""
        return self._policies[space_class].worth(replica)

    def candidates(self, space_class: SpaceClass) -> Iterator[Replica]:
        """READY replicas of a class in eviction order."""
        policy = self._policies.get(space_class)
        return iter(()) if policy is None else policy.candidates()

    def listed(self, space_class: SpaceClass) -> int:
        """How many replicas of a class are READY."""
        policy = self._policies.get(space_class)
        return 0 if policy is None else len(policy)

    def check_integrity(self, space_class_of: Callable[[Replica], SpaceClass]) -> None:
        """Slots, replicas and policies agree; raises AssertionError."""
        self.space.check_integrity()
        order = {c: set(policy.candidates()) for c, policy in self._policies.items()}
        ready = 0
        used = 0
        replicas = list(self.replicas())
        for replica in replicas:
            space_class = space_class_of(replica)
            used += space_class.slot_bytes
            listed = replica in order.get(space_class, ())
            if self.space.at(replica.address) is not replica or replica.tier is not self.tier:
                raise AssertionError("a replica is entered at another address")
            if replica.state is State.GONE:
                raise AssertionError("a replica that is gone holds a slot")
            if listed != (replica.state is State.READY):
                raise AssertionError(f"a {replica.state.value} replica is wrongly listed")
            ready += listed
        if used != self.space.used_bytes or len(replicas) != len(self):
            raise AssertionError("used slots and replicas differ")
        if ready != sum(map(len, order.values())):
            raise AssertionError("a policy holds a replica that is not entered")
        if any(len(order[c]) != len(policy) for c, policy in self._policies.items()):
            raise AssertionError("a policy has lost count")
