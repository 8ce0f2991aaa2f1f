from __future__ import annotations

import errno
import os
import random

import pytest

from kvstore.clock import ManualClock
from kvstore.listing import MIN_SLOTS, Listing
from kvstore.local.directory import MAX_LOAD, PAGE_WORDS, DirectoryReader
from kvstore.naming import namer

NAME = namer(b"secret", b"layout")


def names(count: int, start: int = 0) -> list[bytes]:
    return [NAME(n.to_bytes(32, "little")) for n in range(start, start + count)]


def test_a_table_that_fills_up_is_replaced_and_loses_nothing() -> None:
    """Changes made while the larger table is being filled are in it too, whether or not
    their page was copied already; readers have the old table until the new one is whole."""
    listing = Listing(0, b"an epoch", ManualClock())
    truth = dict.fromkeys(names(int(MIN_SLOTS * MAX_LOAD)), 1)
    listing.change([(name, True, False) for name in truth])
    assert not listing.needs_growth
    listing.change([(name, True, False) for name in names(1, start=10**7)])
    truth[names(1, start=10**7)[0]] = 1
    assert listing.needs_growth
    before = DirectoryReader(os.dup(listing.fd))
    growing = listing.grow()
    assert not listing.needs_growth, "it is under way"

    rng = random.Random(1)
    added = iter(names(10**4, start=10**6))
    gone: list[bytes] = []
    steps = 0
    while True:
        try:
            growing.send(None)
        except StopIteration:
            break
        steps += 1
        leaving = rng.sample(list(truth), 20)
        changed = rng.sample([name for name in truth if name not in leaving], 20)
        coming = [next(added) for _ in range(20)]
        listing.change([(name, False, False) for name in leaving])
        listing.change([(name, True, True) for name in changed])
        listing.change([(name, False, True) for name in coming])
        truth.update(dict.fromkeys(changed, 3) | dict.fromkeys(coming, 2))
        for name in leaving:
            del truth[name]
        gone += leaving
        assert before.alive(0)
        assert all(before.find(name) == truth[name] for name in changed + coming)

    assert steps > 5
    assert before.superseded()
    after = DirectoryReader(os.dup(listing.fd))
    assert after.alive(0)
    assert after.header.slots == 2 * before.header.slots
    assert all(after.find(name) == info for name, info in truth.items())
    assert not any(map(after.find, gone))
    assert listing.unlisted == 0
    assert not listing.needs_growth
    listing.close()
    assert not after.alive(0)
    assert not after.superseded()


def test_a_growth_that_was_stopped_leaves_the_table_as_it_is() -> None:
    listing = Listing(0, b"an epoch", ManualClock())
    held = names(int(MIN_SLOTS * MAX_LOAD) + 1)
    listing.change([(name, True, False) for name in held])
    reader = DirectoryReader(os.dup(listing.fd))
    growing = listing.grow()
    growing.send(None)
    growing.close()
    assert listing.needs_growth
    assert reader.alive(0)
    listing.change([(held[0], False, False)])
    assert [bool(reader.find(name)) for name in held] == [False] + [True] * (len(held) - 1)
    listing.close()


def test_a_store_that_ends_while_its_table_grows_ends_both() -> None:
    listing = Listing(0, b"an epoch", ManualClock())
    reader = DirectoryReader(os.dup(listing.fd))
    growing = listing.grow()
    growing.send(None)
    listing.close()
    growing.close()
    assert not reader.alive(0)
    assert not reader.superseded()


def test_names_that_collide_do_not_make_the_table_grow() -> None:
    """A tenant can make them at will, and each time the table would be twice as large."""
    listing = Listing(0, b"an epoch", ManualClock())
    colliding = [number.to_bytes(8, "little") + bytes(8) for number in range(4, 4000, 4)]
    listing.change([(name, True, False) for name in colliding])
    assert listing.unlisted == len(colliding) - PAGE_WORDS
    assert not listing.needs_growth
    listing.close()


@pytest.mark.parametrize("count", [0, 1, 3000, 40_000])
def test_what_is_found_at_a_start_is_listed_at_once(count: int) -> None:
    """As it would be block by block, in a table that has room for more."""
    listing = Listing(0, b"an epoch", ManualClock())
    earlier = DirectoryReader(os.dup(listing.fd))
    found = names(count)
    listing.begin([found[: count // 3], found[count // 3 :], []])
    reader = DirectoryReader(os.dup(listing.fd))
    assert earlier.superseded() == (reader.header.slots > earlier.header.slots)
    assert {reader.find(name) for name in found} <= {2}
    assert not any(map(reader.find, names(2000, start=10**7)))
    assert listing._table.entries == count
    assert listing.unlisted == 0
    assert not listing.needs_growth
    # Searches pass every word on their way, so whatever goes leaves the others found.
    listing.change([(name, False, False) for name in found[::2]])
    assert {reader.find(name) for name in found[1::2]} <= {2}
    assert not any(map(reader.find, found[::2]))
    listing.close()


def test_names_made_for_one_page_are_listed_at_once_as_far_as_it_has_room() -> None:
    listing = Listing(0, b"an epoch", ManualClock())
    made = [(n << 8).to_bytes(8, "little") + bytes(8) for n in range(1, 3 * PAGE_WORDS)]
    listing.begin([[*made, made[0]]])
    reader = DirectoryReader(os.dup(listing.fd))
    listed = [name for name in made if reader.find(name)]
    assert len(listed) == listing._table.entries == PAGE_WORDS
    assert listing.unlisted == len(made) - PAGE_WORDS
    listing.change([(name, False, False) for name in listed[:10]])
    assert sum(map(bool, map(reader.find, made))) == PAGE_WORDS
    listing.close()


def test_without_memory_for_a_larger_table_as_much_is_listed_as_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = Listing(0, b"an epoch", ManualClock())

    def no_memory(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr("kvstore.listing.DirectoryWriter", no_memory)
    found = names(MIN_SLOTS // 2)
    with pytest.raises(OSError, match="no memory"):
        listing.begin([found])
    reader = DirectoryReader(os.dup(listing.fd))
    assert sum(map(bool, map(reader.find, found))) == listing._table.entries > 0.99 * len(found)
    listing.close()
