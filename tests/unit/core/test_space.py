"""Slots against a model: who is in which, and that none is given out twice."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.core.catalog import Block, Catalog, NvmeReplica, Replica
from kvstore.core.lifecycle import State
from kvstore.core.space import Space, SpaceClass
from kvstore.types import ALIGNMENT, LayoutSpec

LAYOUT, _ = Catalog(lambda tenant: b"k", max_layouts=1).register_layout(
    "t", LayoutSpec("m", "bf16", 16, 4096)
)
EXTENT = 4 * ALIGNMENT
SMALL, LARGE = SpaceClass("a", ALIGNMENT), SpaceClass("b", 2 * ALIGNMENT)
classes = st.sampled_from([SMALL, LARGE])


def somebody() -> Replica:
    return NvmeReplica(Block(b"s" * 16, b"", LAYOUT), 0, State.READY)


class Slots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # Room for three extents, but not for as many of small slots.
        self.space = Space(3 * EXTENT, EXTENT, max_slots=9)
        self.used: dict[int, tuple[SpaceClass, Replica]] = {}

    @rule(space_class=classes)
    def open(self, space_class: SpaceClass) -> None:
        number = self.space.open_extent(space_class)
        if number is not None:
            assert self.space.residents_of(number) == []

    @rule(space_class=classes, count=st.integers(1, 5))
    def allocate(self, space_class: SpaceClass, count: int) -> None:
        for _ in range(count):
            resident = somebody()
            address = self.space.allocate(space_class, resident)
            if address is None:
                return
            assert address not in self.used
            self.used[address] = (space_class, resident)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.used)))
        del self.used[address]
        self.space.free(address)
        assert self.space.at(address) is None

    @rule(space_class=classes)
    def change_hands(self, space_class: SpaceClass) -> None:
        number = self.space.empty_extent(space_class)
        if number is not None:
            self.space.close_extent(number)
            assert self.space.residents_of(number) == []
            assert self.space.open_extent(space_class) is not None

    @invariant()
    def agree(self) -> None:
        self.space.check_integrity()
        by_address = [resident for _, (_, resident) in sorted(self.used.items())]
        assert list(self.space.residents()) == by_address
        assert all(self.space.at(a) is resident for a, (_, resident) in self.used.items())
        assert self.space.used_bytes == sum(c.slot_bytes for c, _ in self.used.values())


test_no_slot_is_lost_or_given_out_twice = Slots.TestCase


def test_an_address_between_slots_is_no_slot() -> None:
    space = Space(EXTENT, EXTENT)
    space.open_extent(LARGE)
    with pytest.raises(ValueError, match="no slot"):
        space.at(EXTENT + ALIGNMENT)
    with pytest.raises(ValueError, match="no slot"):
        space.at(2 * EXTENT)


def test_slots_are_bounded_whatever_the_capacity() -> None:
    """Each costs memory, and on disk a place in the index and time at a start."""
    space = Space(10 * EXTENT, EXTENT, max_slots=10)
    assert space.free_slots(SMALL) == space.total_slots(SMALL) == 8
    assert [space.open_extent(SMALL) for _ in range(3)] == [1, 2, None]
    assert space.free_slots(SMALL) == space.total_slots(SMALL) == 8
    assert space.total_slots(LARGE) == 2
    assert [space.open_extent(LARGE) for _ in range(2)] == [3, None]
    with pytest.raises(ValueError, match="does not fit"):
        space.restore_extent(9, LARGE)
    assert space.spare_extents == 7


def test_an_extent_is_not_given_up_for_one_that_may_not_be_opened() -> None:
    space = Space(10 * EXTENT, EXTENT, max_slots=10)
    for space_class in (SMALL, SMALL, LARGE):
        space.open_extent(space_class)
    assert space.empty_extent(SMALL) is None
    assert space.empty_extent(LARGE) == 1
    assert not space.may_replace(LARGE, SMALL)
    assert space.may_replace(SMALL, LARGE)
