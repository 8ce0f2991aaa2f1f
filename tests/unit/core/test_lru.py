"""The order through the replicas' own links, against one that is kept beside them."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.core.catalog import Block, Catalog, DramReplica, Replica
from kvstore.core.lifecycle import State
from kvstore.core.policies import LRU
from kvstore.types import LayoutSpec

LAYOUT, _ = Catalog(lambda tenant: b"k", max_layouts=1).register_layout(
    "t", LayoutSpec("m", "bf16", 16, 4096)
)
COUNT = 12
members = st.integers(0, COUNT - 1)


class TwoOrders(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.replicas: list[Replica] = [
            DramReplica(Block(bytes([n]) * 16, b"", LAYOUT), n, State.READY) for n in range(COUNT)
        ]
        self.lru = LRU()
        self.model: OrderedDict[Replica, None] = OrderedDict()

    @rule(members=st.lists(members, max_size=COUNT))
    def come(self, members: list[int]) -> None:
        for number in members:
            replica = self.replicas[number]
            if replica not in self.model:
                self.lru.insert(replica)
                self.model[replica] = None

    @rule(number=members)
    def leave(self, number: int) -> None:
        replica = self.replicas[number]
        if replica in self.model:
            self.lru.remove(replica)
            del self.model[replica]

    @rule(number=members)
    def touch(self, number: int) -> None:
        replica = self.replicas[number]
        if replica in self.model:
            self.lru.touch(replica)
            self.model.move_to_end(replica)

    @rule(members=st.lists(members, max_size=2 * COUNT))
    def touch_many(self, members: list[int]) -> None:
        """In any order, and some twice: a client may name a key twice in a chain."""
        self._touch_run([self.replicas[n] for n in members if self.replicas[n] in self.model])

    @rule(start=st.integers(0, COUNT), length=st.integers(0, COUNT))
    def touch_neighbours(self, start: int, length: int) -> None:
        self._touch_run(list(self.model)[start : start + length])

    def _touch_run(self, run: list[Replica]) -> None:
        self.lru.touch_run(iter(run))
        for replica in run:
            self.model.move_to_end(replica)

    @invariant()
    def agree(self) -> None:
        assert list(self.lru.candidates()) == list(self.model)
        assert len(self.lru) == len(self.model)
        held = [replica.after is not None for replica in self.replicas]
        assert held == [replica in self.model for replica in self.replicas]


test_the_order_is_that_of_use = TwoOrders.TestCase
