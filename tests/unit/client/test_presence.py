"""When a client believes the directory, and what it does about a table's successor."""

from __future__ import annotations

import os

import pytest

from kvstore.client.presence import OPEN_FOR_NS, REFETCH_PAUSE_NS, Presence
from kvstore.clock import ManualClock
from kvstore.errors import BadKey, Unavailable
from kvstore.local.directory import STALE_AFTER_NS, SUPERSEDED, DirectoryWriter
from kvstore.naming import namer
from kvstore.types import ChainPresence

SECRET, LAYOUT, OTHER = b"secret", b"layout", b"other layout"
KEYS = [number.to_bytes(32, "little") for number in range(10)]


class Rig:
    """A server's directory, and a client's view of it with a connection to be cut."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.table = self.new_table()
        self.fetches = self.polls = 0
        self.open = self.answers = True
        self.presence = Presence(self._fetch, self.clock, 1.0)

    def new_table(self) -> DirectoryWriter:
        return DirectoryWriter(64, b"an epoch", self.clock.now_ns())

    def _fetch(self, timeout_s: float) -> tuple[int, bytes]:
        self.fetches += 1
        if not self.answers:
            raise Unavailable("no answer")
        return os.dup(self.table.fd), SECRET

    def _is_open(self) -> bool:
        self.polls += 1
        return self.open

    def list(self, count: int, layout: bytes = LAYOUT) -> None:
        name = namer(SECRET, layout)
        self.table.change([(name(key), True, False) for key in KEYS[:count]])

    def lookup(self, *layouts: bytes, keys: list[bytes] = KEYS) -> ChainPresence | None:
        return self.presence.lookup(layouts or (LAYOUT,), keys, self._is_open)


def test_the_connection_is_not_asked_about_each_time() -> None:
    rig = Rig()
    rig.list(3)
    for _ in range(10):
        assert rig.lookup() == (3, 3)
    assert rig.polls == 1
    rig.clock.advance_ms(OPEN_FOR_NS / 1e6)
    rig.lookup()
    assert rig.polls == 2


def test_a_connection_that_is_closed_is_noticed_in_time_and_asked_about_again() -> None:
    rig = Rig()
    assert rig.lookup() == (0, 0)
    rig.open = False
    rig.clock.advance_ms(OPEN_FOR_NS / 1e6)
    assert rig.lookup() is None
    assert rig.lookup() is None
    assert rig.polls == 3


def test_a_server_without_a_sign_of_life_is_not_believed() -> None:
    rig = Rig()
    rig.clock.advance_ms(STALE_AFTER_NS / 1e6)
    assert rig.lookup() is None
    rig.table.beat(rig.clock.now_ns())
    assert rig.lookup() == (0, 0)
    rig.table.close()
    assert rig.lookup() is None
    assert rig.fetches == 1


def test_a_tables_successor_is_fetched_and_used_at_once() -> None:
    rig = Rig()
    rig.list(3)
    assert rig.lookup() == (3, 3)
    old, rig.table = rig.table, rig.new_table()
    rig.list(5)
    old.close(SUPERSEDED)
    assert rig.lookup() == (5, 5)
    assert rig.fetches == 2


def test_a_successor_that_cannot_be_had_is_not_asked_for_each_time() -> None:
    """Lookups must stay quick when the server is too busy to answer."""
    rig = Rig()
    rig.table.close(SUPERSEDED)
    rig.table = rig.new_table()
    rig.answers = False
    for _ in range(5):
        assert rig.lookup() is None
    assert rig.fetches == 2
    rig.answers = True
    rig.clock.advance_ms(REFETCH_PAUSE_NS / 1e6)
    assert rig.lookup() == (0, 0)
    assert rig.fetches == 3


def test_every_layout_has_its_own_names() -> None:
    rig = Rig()
    rig.list(4)
    rig.list(2, OTHER)
    assert rig.lookup(LAYOUT) == (4, 4)
    assert rig.lookup(OTHER) == (2, 2)
    assert rig.lookup(LAYOUT, OTHER) == (2, 2)


@pytest.mark.parametrize("keys", [[b"short"], [KEYS[0], b"short"], [KEYS[0] + b"x", KEYS[1]]])
def test_a_key_of_the_wrong_length_is_refused(keys: list[bytes]) -> None:
    rig = Rig()
    with pytest.raises(BadKey):
        rig.lookup(keys=keys)
    assert rig.lookup(keys=[]) == (0, 0)
