from __future__ import annotations

import itertools

import pytest

from kvstore.core.catalog import Block, Catalog, DramReplica, Replica
from kvstore.core.lifecycle import INITIAL_STATES, TRANSITIONS, Event, State
from kvstore.errors import IllegalTransition
from kvstore.types import LayoutSpec


def a_replica(state: State) -> Replica:
    catalog = Catalog(lambda tenant: b"k", max_layouts=1)
    layout, _ = catalog.register_layout("t", LayoutSpec("m", "bf16", 16, 4096))
    return DramReplica(Block(b"s" * 16, b"", layout), 0, state)


@pytest.mark.parametrize(
    ("state", "event"),
    [pair for pair in itertools.product(State, Event) if pair not in TRANSITIONS],
)
def test_an_illegal_event_raises_and_changes_nothing(state: State, event: Event) -> None:
    replica = a_replica(state)
    with pytest.raises(IllegalTransition):
        replica.apply(event)
    assert replica.state is state


def test_every_state_is_reached_and_every_way_ends() -> None:
    reached = set(INITIAL_STATES)
    while True:
        more = {new for (old, _), new in TRANSITIONS.items() if old in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(State)
    dead_ends = {s for s in State if not any(old is s for old, _ in TRANSITIONS)}
    assert dead_ends == {State.GONE, State.DAMAGED}
