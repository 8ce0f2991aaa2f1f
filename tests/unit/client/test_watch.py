"""That a watch says what a lookup says, without going its way each time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvstore.client.watch import Watch
from kvstore.local.directory import STALE_AFTER_NS, SUPERSEDED
from tests.unit.client.test_presence import KEYS, LAYOUT, OTHER, Rig


def core_of(rig: Rig) -> Any:
    """A client's, as far as a lookup goes."""
    link = SimpleNamespace(
        presence=rig.presence, info=SimpleNamespace(max_keys=10), alive=rig._is_open
    )
    return SimpleNamespace(
        link=link, closed=False, layouts={LAYOUT: None, OTHER: None}, clock=rig.clock
    )


def test_a_watch_sees_what_comes_and_goes() -> None:
    rig = Rig()
    watch = Watch(core_of(rig), [LAYOUT])
    assert watch.holds(KEYS[0]) is False
    rig.list(2)
    assert [watch.holds(key) for key in KEYS[:3]] == [True, True, False]
    assert rig.polls == 1


def test_a_block_is_held_where_all_layouts_have_it() -> None:
    rig = Rig()
    rig.list(3)
    rig.list(2, OTHER)
    watch = Watch(core_of(rig), [LAYOUT, OTHER])
    assert [watch.holds(key) for key in (KEYS[1], KEYS[1], KEYS[2])] == [True, True, False]


def test_a_watch_follows_to_the_next_table_and_the_next_session() -> None:
    rig = Rig()
    core = core_of(rig)
    watch = Watch(core, [LAYOUT])
    assert watch.holds(KEYS[0]) is False
    old, rig.table = rig.table, rig.new_table()
    rig.list(1)
    old.close(SUPERSEDED)
    assert watch.holds(KEYS[0]) is True
    assert watch.holds(KEYS[0]) is True
    restarted = Rig()
    core.link = core_of(restarted).link
    assert watch.holds(KEYS[0]) is False
    core.link = None
    assert watch.holds(KEYS[0]) is None


def test_a_server_without_a_sign_of_life_is_not_believed() -> None:
    rig = Rig()
    rig.list(1)
    watch = Watch(core_of(rig), [LAYOUT])
    assert watch.holds(KEYS[0]) is True
    rig.clock.advance_ms(STALE_AFTER_NS / 1e6)
    assert watch.holds(KEYS[0]) is None
