"""What a client says is damaged: seen to, never believed, and not for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from kvstore.store import Session, Store
from kvstore.store.suspicions import PAUSES
from kvstore.types import Segment
from tests.unit.test_store import (
    BLOCK,
    EXTENT,
    SLOT,
    SPEC,
    Rig,
    SlowMemory,
    chain,
    content,
    run,
    until,
)

LOOK_MS = 10


class Watched(SlowMemory):
    """Knows how often the thread looked at a slot; it holds that up as told."""

    def __init__(self, extent_bytes: int, capacity_bytes: int) -> None:
        super().__init__(extent_bytes, capacity_bytes)
        self.looked_at = 0
        self.may_look = threading.Event()
        self.may_look.set()
        self.on_look: Callable[[], None] = lambda: None

    def view(self, address: int, nbytes: int) -> memoryview:
        if threading.current_thread().name.startswith("kvstore-memory"):
            self.looked_at += 1
            self.on_look()
            assert self.may_look.wait(60)
        return super().view(address, nbytes)


class Suspicious(Rig):
    def make_store(self) -> Store:
        self.dram = self.memory = Watched(EXTENT, 16 * SLOT)
        self.memory.on_look = lambda: self.clock.advance_ms(LOOK_MS)
        return super().make_store()

    async def addresses(self, session: Session, keys: list[bytes]) -> list[int]:
        """Of blocks, once they are stored."""
        await self.put(session, keys)
        grant = await self.acquire(session, keys)
        self.store.release(session, [grant.lease_id])
        return grant.addresses

    def damage(self, address: int) -> None:
        self.memory.view(address, BLOCK)[BLOCK // 2] ^= 1


def test_what_is_damaged_is_dropped_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        session, keys = rig.session(), chain(1, 4)
        addresses = await rig.addresses(session, keys)
        rig.damage(addresses[2])
        await rig.store.report_damage("t", addresses[2:3])
        assert (await rig.presence(session, keys)).held == 2
        assert rig.store.stats().mismatched_blocks == 1
        assert "not what was committed" in caplog.text
        assert await rig.put(session, keys) == 4, "nothing is in the way of another"
        grant = await rig.acquire(session, keys)
        assert rig.read(session, grant) == [content(k) for k in keys]

    run(Suspicious(), body)


def test_a_client_that_commits_wrong_checksums_does_not_look_like_failing_hardware() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        session, keys = rig.session(), chain(1, 1)
        layout_id = rig.store.register_layout("t", SPEC)
        grant = await rig.store.reserve(session, layout_id, 1, 0)
        rig.store.slot_view(session, grant.first_slot)[:] = content(keys[0])
        segment = Segment(b"", keys, range(grant.first_slot, grant.first_slot + 1), [12345])
        await rig.store.commit(session, layout_id, [segment], 0)
        leased = await rig.acquire(session, keys)
        await rig.store.report_damage("t", leased.addresses)
        stats = rig.store.stats()
        assert (stats.mismatched_blocks, stats.corrupt_blocks) == (1, 0)
        assert not any(event[0] == "corrupt" for event in rig.seen.events)

    run(Suspicious(), body)


def test_what_was_seen_to_be_whole_and_is_damaged_later_counts_as_corrupt() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        session, keys = rig.session(), chain(1, 1)
        addresses = await rig.addresses(session, keys)
        await rig.store.report_damage("t", addresses)
        rig.clock.advance_ms(PAUSES * LOOK_MS)
        rig.damage(addresses[0])
        await rig.store.report_damage("t", addresses)
        stats = rig.store.stats()
        assert (stats.mismatched_blocks, stats.corrupt_blocks) == (0, 1)
        assert rig.seen.events.count(("corrupt", "dram")) == 1

    run(Suspicious(), body)


def test_a_block_that_is_also_on_nvme_is_read_from_there() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        session, keys = rig.session(), chain(1, 4)
        addresses = await rig.addresses(session, keys)
        await rig.store.flush("t", drop=False)
        for address in addresses:
            rig.damage(address)
        await rig.store.report_damage("t", addresses)
        assert tuple(await rig.presence(session, keys)) == (4, 0)
        grant = await rig.acquire(session, keys)
        assert rig.read(session, grant) == [content(k) for k in keys]

    run(Suspicious(), body)


def test_who_names_good_blocks_has_none_dropped_and_is_not_heard_for_a_while() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        liar, honest = rig.session("liar"), rig.session("t")
        lies = await rig.addresses(liar, chain(1, 4))
        addresses = await rig.addresses(honest, chain(2, 2))
        rig.damage(addresses[1])
        for _ in range(50):
            await rig.store.report_damage("liar", lies)
        assert rig.memory.looked_at == 4
        assert (await rig.presence(liar, chain(1, 4))).held == 4
        rig.clock.advance_ms(PAUSES * 4 * LOOK_MS - 1)
        await rig.store.report_damage("liar", lies)
        assert rig.memory.looked_at == 4
        await rig.store.report_damage("t", addresses)
        assert (await rig.presence(honest, chain(2, 2))).held == 1, "others are heard"
        rig.clock.advance_ms(1)
        rig.damage(lies[3])
        await rig.store.report_damage("liar", lies[3:])
        assert (await rig.presence(liar, chain(1, 4))).held == 3, "some day it may be true"
        await rig.store.report_damage("liar", lies[3:])
        assert rig.memory.looked_at == 7, "what is gone is not looked at"

    run(Suspicious(), body)


def test_one_report_of_a_tenant_is_looked_at_at_a_time() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        session = rig.session()
        addresses = await rig.addresses(session, chain(1, 4))
        rig.memory.may_look.clear()
        waiting = asyncio.create_task(rig.store.report_damage("t", addresses[:1]))
        await until(lambda: rig.memory.looked_at == 1)
        for _ in range(10):
            await asyncio.wait_for(rig.store.report_damage("t", addresses), 30)
        rig.memory.may_look.set()
        await waiting
        assert rig.memory.looked_at == 1

    run(Suspicious(), body)


def test_a_slot_is_nobody_elses_while_it_is_looked_at_though_its_caller_left() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Suspicious)
        session, keys = rig.session(), chain(1, 1)
        addresses = await rig.addresses(session, keys)
        rig.memory.may_look.clear()
        waiting = asyncio.create_task(rig.store.report_damage("t", addresses))
        await until(lambda: rig.memory.looked_at == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.wait_for(rig.store.clear("t"), 30)
        assert rig.store.stats().tiers[0].used_bytes == SLOT
        rig.memory.may_look.set()
        await until(lambda: rig.store.stats().tiers[0].used_bytes == 0)

    run(Suspicious(), body)
