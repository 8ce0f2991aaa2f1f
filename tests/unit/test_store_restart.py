"""What a store does with what it finds on NVMe."""

from __future__ import annotations

from kvstore.tiers.memory import HeapMemory
from tests.unit.test_store import EXTENT, SLOT, Rig, chain, run


def test_blocks_of_a_layout_that_is_lost_are_dropped_and_the_store_starts() -> None:
    rig = Rig()

    async def before(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 4))
        await rig.store.flush("t", False)

    run(rig, before)
    assert rig.nvme is not None
    rig.nvme._layouts.clear()
    rig.dram = HeapMemory(EXTENT, 16 * SLOT)
    rig.store = rig.make_store()

    async def after(rig: Rig) -> None:
        assert rig.nvme is not None
        session = rig.session()
        assert rig.store.stats("t").tenant_blocks == 0
        assert list(rig.nvme.recovered_blocks()) == []
        assert await rig.put(session, chain(1, 4)) == 4

    run(rig, after)
