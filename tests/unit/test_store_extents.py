"""What a store does when the disk has no room for one more extent."""

from __future__ import annotations

from kvstore.errors import TierFull
from tests.unit.test_store import EXTENT, SLOT, Faulty, Rig, chain, run


class Cramped(Faulty):
    def open_extent(self, extent: int, slot_bytes: int) -> None:
        if self._extents:
            raise TierFull("no room")
        super().open_extent(extent, slot_bytes)


def test_copies_into_an_extent_that_could_not_be_made_find_no_room_and_no_bug() -> None:
    """Those that begin after that is known too: more are queued than run at once."""
    rig = Rig()
    rig.nvme = Cramped(64 * SLOT, EXTENT)
    rig.store = rig.make_store()

    async def body(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 14))
        await rig.store.flush("t", False)
        assert not [event for event in rig.seen.events if event[0] == "io_error"]
        assert rig.store.stats().tiers[1].blocks

    run(rig, body)
