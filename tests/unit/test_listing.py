from __future__ import annotations

import asyncio
import os

from kvstore.clock import ManualClock
from kvstore.listing import MIN_SLOTS, Listing
from kvstore.local.directory import IN_DRAM, MAX_LOAD, DirectoryReader
from kvstore.naming import namer

NAME = namer(b"secret", b"layout")


def names(count: int, start: int = 0) -> list[bytes]:
    return [NAME(n.to_bytes(32, "little")) for n in range(start, start + count)]


def test_a_table_that_fills_up_is_replaced_and_loses_nothing() -> None:
    """Changes made while the larger table is being filled are in it too."""
    blocks = dict.fromkeys(names(int(MIN_SLOTS * MAX_LOAD) + 1), True)
    listing = Listing(0, b"an epoch", ManualClock(), lambda name: (name in blocks, False))

    async def main() -> None:
        listing.change([(name, True, False) for name in blocks])
        assert listing.needs_growth
        before = DirectoryReader(os.dup(listing.fd))
        growing = listing.grow(list(blocks))
        assert not listing.needs_growth, "it is under way"
        task = asyncio.create_task(growing)
        await asyncio.sleep(0)
        gone, added = list(blocks)[::7], names(300, start=10**6)
        for name in gone:
            del blocks[name]
        blocks.update(dict.fromkeys(added, True))
        listing.change([(name, False, False) for name in gone])
        listing.change([(name, True, False) for name in added])
        await task
        assert before.superseded()
        after = DirectoryReader(os.dup(listing.fd))
        assert after.header.slots == 2 * before.header.slots
        assert all(after.find(name) == IN_DRAM for name in blocks)
        assert not any(after.find(name) for name in gone)
        assert listing.unlisted == 0

    asyncio.run(main())
    listing.close()
