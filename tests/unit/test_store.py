"""The store on tiers in memory: the loop, the threads, and what happens when they fail."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from kvstore.clock import ManualClock, MonotonicClock
from kvstore.config import StoreConfig
from kvstore.errors import (
    BadRequest,
    Draining,
    LeaseExpired,
    NoLowerTier,
    NoSession,
    TierFailed,
    TierFull,
)
from kvstore.local.directory import DirectoryReader
from kvstore.naming import namer
from kvstore.store import Session, Store
from kvstore.tiers.base import BlockHeader, RecoveredBlocks
from kvstore.tiers.memory import HeapMemory, HeapStorage
from kvstore.types import ChainPresence, ChainQuery, LayoutSpec, LeaseGrant, Segment

BLOCK = 5000
SLOT = 8192
EXTENT = 4 * SLOT
SPEC = LayoutSpec("m", "bf16", 16, BLOCK)


class Seen:
    """A StoreObserver that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.kinds: list[str] = []

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None:
        self.events.append(("transfer", src, dst, nbytes))
        self.kinds.append(kind)

    def evicted(self, tier: str, reason: str, blocks: int) -> None:
        self.events.append(("evicted", tier))

    def io_error(self, op: str, errno_name: str) -> None:
        self.events.append(("io_error", op, errno_name))

    def corrupt(self, tier: str) -> None:
        self.events.append(("corrupt", tier))

    def tier_off(self, tier: str) -> None:
        self.events.append(("off", tier))

    def coded(self, codec: str, src: str, dst: str) -> None:
        self.events.append(("coded", codec, src, dst))

    def straight_refused(self, gpu: str, reason: str) -> None:
        self.events.append(("straight_refused", reason))


class Faulty(HeapStorage):
    """Fails, or holds, as told."""

    fail_write: Exception | None = None
    fail_read: Exception | None = None
    refuse_extents = False

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        super().__init__(capacity_bytes, extent_bytes)
        self.gate = threading.Event()
        self.gate.set()

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        if self.refuse_extents:
            raise TierFull("no room for a file")
        super().open_extent(extent, slot_bytes)

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        if self.fail_write is not None:
            raise self.fail_write
        super().write(address, header, payload)

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        assert self.gate.wait(60)
        if self.fail_read is not None:
            raise self.fail_read
        super().read(address, header, into)


class SlowMemory(HeapMemory):
    """Takes its time, or refuses, as told."""

    refuse = False

    def __init__(self, extent_bytes: int, capacity_bytes: int) -> None:
        super().__init__(extent_bytes, capacity_bytes)
        self.gate = threading.Event()
        self.gate.set()

    def open_extent(self, extent: int) -> None:
        assert self.gate.wait(60)
        if self.refuse:
            raise TierFull("the machine gave no memory")
        super().open_extent(extent)


class Rig:
    def __init__(
        self, *, dram_slots: int = 16, nvme_slots: int = 64, costs: Path | None = None
    ) -> None:
        self.costs = costs
        self.seen = Seen()
        self.clock = ManualClock()
        self.dram = SlowMemory(EXTENT, dram_slots * SLOT)
        self.nvme = Faulty(nvme_slots * SLOT, EXTENT) if nvme_slots else None
        self.store = self.make_store()

    def config(self) -> StoreConfig:
        return StoreConfig(dram_capacity_bytes=0, lease_ms=1000, reservation_ms=1000)

    def make_store(self) -> Store:
        return Store(
            config=self.config(),
            clock=self.clock,
            dram=self.dram,
            nvme=self.nvme,
            tenant_key=lambda tenant: tenant.encode(),
            executor=ThreadPoolExecutor(4),
            observer=self.seen,
            costs=self.costs,
        )

    def session(self, tenant: str = "t") -> Session:
        return self.store.open_session(tenant, local=True)

    async def put(self, session: Session, keys: list[bytes], *, wait_ms: int = 30_000) -> int:
        lid = self.store.register_layout(session.tenant, SPEC)
        stored = 0
        while stored < len(keys):
            left = keys[stored:]
            grant = await self.store.reserve(session, lid, len(left), wait_ms)
            if not grant.addresses:
                break
            some = left[: len(grant.addresses)]
            slots = range(grant.first_slot, grant.first_slot + len(some))
            for slot, block_key in zip(slots, some, strict=True):
                self.store.slot_view(session, slot)[:] = content(block_key)
            sums = [xxhash.xxh3_64_intdigest(content(block_key)) for block_key in some]
            parent = keys[stored - 1] if stored else b""
            await self.store.commit(session, lid, [Segment(parent, some, slots, sums)], 0)
            stored += len(some)
        return stored

    async def acquire(
        self, session: Session, keys: list[bytes], *, wait_ms: int = 30_000
    ) -> LeaseGrant:
        lid = self.store.register_layout(session.tenant, SPEC)
        return (await self.store.acquire(session, [ChainQuery([lid], keys)], wait_ms))[0]

    async def presence(self, session: Session, keys: list[bytes]) -> ChainPresence:
        lid = self.store.register_layout(session.tenant, SPEC)
        return (await self.store.lookup(session.tenant, [ChainQuery([lid], keys)]))[0]

    def read(self, session: Session, grant: LeaseGrant) -> list[bytes]:
        return [bytes(self.store.lease_view(session, grant.lease_id, i)) for i in range(grant.held)]


def chain(base: int, length: int) -> list[bytes]:
    return [bytes([base, i]) + bytes(30) for i in range(length)]


def content(key: bytes) -> bytes:
    return (key * (BLOCK // 32 + 1))[:BLOCK]


def run(rig: Rig, body: Callable[[Rig], Awaitable[None]]) -> None:
    async def main() -> None:
        await rig.store.start()
        try:
            await asyncio.wait_for(body(rig), 90)
            rig.store.check_integrity()
        finally:
            await rig.store.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


def test_what_dram_cannot_hold_is_served_from_nvme() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        chains = [chain(base, 8) for base in range(6)]
        for keys in chains:
            assert await rig.put(session, keys) == 8
        for keys in chains:
            grant = await rig.acquire(session, keys)
            assert rig.read(session, grant) == [content(k) for k in keys]
            rig.store.release(session, [grant.lease_id])
        stats = rig.store.stats("t")
        assert stats.tenant_blocks == 48
        assert [tier.used_bytes <= tier.capacity_bytes for tier in stats.tiers] == [True, True]
        assert ("evicted", "dram") in rig.seen.events

    run(Rig(), body)


def test_memory_that_comes_when_its_slots_are_over_is_granted_to_nobody() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        layout_id = rig.store.register_layout("t", SPEC)
        rig.dram.gate.clear()
        waiting = asyncio.create_task(rig.store.reserve(session, layout_id, 2, 0))
        await until(lambda: rig.store.stats().tiers[0].used_bytes == 2 * SLOT)
        rig.clock.advance_ms(1001)
        rig.dram.gate.set()
        assert (await waiting).addresses == []
        assert rig.store.stats().tiers[0].used_bytes == 0
        assert await rig.put(session, chain(1, 2)) == 2

    run(Rig(), body)


def test_memory_that_takes_long_to_come_delays_nobody_else() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        layout_id = rig.store.register_layout("t", SPEC)
        first = await rig.store.reserve(session, layout_id, 4, 0)
        rig.dram.gate.clear()
        waiting = asyncio.create_task(rig.store.reserve(session, layout_id, 2, 0))
        await until(lambda: rig.store.stats().tiers[0].used_bytes == 6 * SLOT)
        sums = [xxhash.xxh3_64_intdigest(bytes(BLOCK))] * 2
        slots = range(first.first_slot, first.first_slot + 2)
        segment = Segment(b"", chain(1, 2), slots, sums)
        committing = asyncio.create_task(rig.store.commit(session, layout_id, [segment], 2))
        await until(lambda: rig.store.stats().committed_blocks == 2)
        assert (await rig.acquire(session, chain(1, 2))).held == 2
        extent = max(r.address for r in rig.store._planner.residency.dram.replicas()) // EXTENT
        with pytest.raises(BadRequest, match="no extent"):
            rig.store.extent_fd(session, extent)
        assert not waiting.done()
        assert not committing.done()
        rig.dram.gate.set()
        assert len((await committing).slots.addresses) == 2
        grant = await waiting
        rig.store.slot_view(session, grant.first_slot)[:] = bytes(BLOCK)
        assert len(grant.addresses) == 2

    run(Rig(), body)


def test_memory_that_the_machine_refuses_is_granted_to_nobody() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 4))
        rig.dram.refuse = True
        layout_id = rig.store.register_layout("t", SPEC)
        assert (await rig.store.reserve(session, layout_id, 2, 0)).addresses == []
        rig.dram.refuse = False
        assert rig.store.stats().reservations == 0
        assert await rig.put(session, chain(2, 4)) == 4, "the rest of DRAM goes on"
        assert rig.store.stats().tiers[0].used_bytes <= 4 * SLOT

    run(Rig(), body)


def test_copies_into_an_extent_that_never_came_end_as_for_want_of_room() -> None:
    async def body(rig: Rig) -> None:
        assert rig.nvme is not None
        rig.nvme.refuse_extents = True
        session = rig.session()
        await rig.put(session, chain(1, 14))
        assert await rig.store.flush("t", False) == 0
        assert not any(event[0] == "io_error" for event in rig.seen.events)

    run(Rig(), body)


def test_what_was_prefetched_is_told_from_what_was_waited_for() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        layout_id = rig.store.register_layout("t", SPEC)
        await rig.put(session, chain(1, 4))
        await rig.store.flush("t", True)
        assert set(rig.seen.kinds) == {"write_back"}
        del rig.seen.kinds[:]
        assert await rig.store.prefetch("t", [ChainQuery([layout_id], chain(1, 2))]) == 2
        await until(lambda: len(rig.seen.kinds) == 2)
        assert (await rig.acquire(session, chain(1, 4))).held == 4
        assert rig.seen.kinds == ["prefetch"] * 2 + ["demand"] * 2

    run(Rig(), body)


def test_a_directory_that_cannot_grow_is_reported_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvstore.listing.MIN_SLOTS", 64)
    monkeypatch.setattr("kvstore.listing.PAGES_A_STEP", 1)

    async def body(rig: Rig) -> None:
        session = rig.session()
        with monkeypatch.context() as patched:
            patched.setattr("kvstore.listing.DirectoryWriter", no_memory)
            for base in range(8):
                await rig.put(session, chain(base, 6))
            failures = ("io_error", "directory", "ENOMEM")
            assert rig.seen.events.count(failures) == 1
            assert caplog.text.count("the directory cannot grow") == 1
            rig.clock.advance_ms(11_000)
            await rig.put(session, chain(8, 1))
            assert rig.seen.events.count(failures) == 2
        rig.clock.advance_ms(11_000)
        await rig.put(session, chain(9, 1))
        await until(lambda: rig.store._listing._table.slots > 64)

    def no_memory(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    run(Rig(nvme_slots=256), body)


def test_a_drained_store_is_found_again_after_a_restart() -> None:
    rig = Rig()

    async def before(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 8))
        await rig.store.drain(10)
        with pytest.raises(Draining):
            await rig.acquire(session, chain(1, 8))
        with pytest.raises(Draining):
            rig.session()

    run(rig, before)
    rig.dram = SlowMemory(EXTENT, 16 * SLOT)
    rig.store = rig.make_store()

    async def after(rig: Rig) -> None:
        session = rig.session()
        assert await rig.presence(session, chain(1, 8)) == (8, 0)
        grant = await rig.acquire(session, chain(1, 8))
        assert rig.read(session, grant) == [content(k) for k in chain(1, 8)]

    run(rig, after)


def test_bytes_that_a_client_spoiled_never_reach_nvme() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        keys = chain(1, 2)
        await rig.put(session, keys)
        grant = await rig.acquire(session, keys)
        rig.dram.view(grant.addresses[1], BLOCK)[17] ^= 1
        rig.store.release(session, [grant.lease_id])
        assert await rig.store.flush("t", False) == 1
        assert (await rig.presence(session, keys)).held == 1
        stats = rig.store.stats()
        assert (stats.mismatched_blocks, stats.corrupt_blocks) == (1, 0)

    run(Rig(), body)


def test_memory_that_was_as_committed_once_and_is_not_any_more_counts_as_corrupt() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 2))
        await rig.store.flush("t", True)
        rig.store.release(session, [(await rig.acquire(session, chain(1, 2))).lease_id])
        grant = await rig.acquire(session, chain(1, 2))
        rig.dram.view(grant.addresses[1], BLOCK)[17] ^= 1
        await rig.store.report_damage("t", grant.addresses)
        assert ("corrupt", "dram") in rig.seen.events
        stats = rig.store.stats()
        assert (stats.mismatched_blocks, stats.corrupt_blocks) == (0, 1)

    run(Rig(), body)


def test_a_failing_disk_is_switched_off_and_dram_goes_on() -> None:
    async def body(rig: Rig) -> None:
        assert rig.nvme is not None
        session = rig.session()
        await rig.put(session, chain(1, 4))
        rig.nvme.fail_write = TierFailed("it broke", 5)
        assert await rig.store.flush("t", False) == 0
        with pytest.raises(NoLowerTier):
            await rig.store.flush("t", False)
        assert ("io_error", "write", "EIO") in rig.seen.events
        assert ("off", "nvme") in rig.seen.events
        assert rig.store.stats().tiers[1].off_because
        assert [tier.healthy for tier in rig.store.stats().tiers] == [True, False]
        for base in range(2, 12):
            assert await rig.put(session, chain(base, 4)) == 4
        grant = await rig.acquire(session, chain(11, 4))
        assert rig.read(session, grant) == [content(k) for k in chain(11, 4)]

    run(Rig(), body)


def test_a_full_disk_delays_nobody_and_is_tried_again() -> None:
    async def body(rig: Rig) -> None:
        assert rig.nvme is not None
        session = rig.session()
        rig.nvme.fail_write = TierFull("no room")
        for base in range(8):
            assert await rig.put(session, chain(base, 4), wait_ms=30_000) == 4
        await until(lambda: not rig.store._planner.residency.busy)
        rig.nvme.fail_write = None
        rig.clock.advance_ms(2000)
        await until(lambda: any(e[:3] == ("transfer", "dram", "nvme") for e in rig.seen.events))

    run(Rig(), body)


def test_a_caller_that_goes_away_leaves_no_lease_behind() -> None:
    async def body(rig: Rig) -> None:
        assert rig.nvme is not None
        session = rig.session()
        await rig.put(session, chain(1, 4))
        await rig.store.flush("t", True)
        rig.nvme.gate.clear()
        waiting = asyncio.create_task(rig.acquire(session, chain(1, 4)))
        await until(lambda: bool(session.tickets))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        rig.nvme.gate.set()
        read = ("transfer", "nvme", "dram", BLOCK)
        await until(lambda: rig.seen.events.count(read) == 4)
        assert rig.store.stats().leases == 0
        rig.store.check_integrity()

    run(Rig(), body)


def test_a_hanging_disk_costs_the_caller_its_patience_and_no_more() -> None:
    async def body(rig: Rig) -> None:
        assert rig.nvme is not None
        session = rig.session()
        await rig.put(session, chain(1, 4))
        await rig.store.flush("t", True)
        await rig.put(session, chain(2, 2))
        rig.nvme.gate.clear()
        grant = await rig.acquire(session, chain(1, 4), wait_ms=50)
        assert grant.held == 0
        other = await rig.acquire(session, chain(2, 2))
        assert other.held == 2
        rig.nvme.gate.set()

    run(Rig(), body)


def test_a_bug_in_a_tier_answers_whoever_waits() -> None:
    async def body(rig: Rig) -> None:
        assert rig.nvme is not None
        session = rig.session()
        await rig.put(session, chain(1, 4))
        await rig.store.flush("t", True)
        rig.nvme.fail_read = RuntimeError("unforeseen")
        grant = await rig.acquire(session, chain(1, 4))
        assert grant.held == 0
        assert ("io_error", "copy", "RuntimeError") in rig.seen.events

    run(Rig(), body)


def test_leases_end_by_the_clock_and_with_their_session() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 2))
        grant = await rig.acquire(session, chain(1, 2))
        rig.clock.advance_ms(1500)
        await until(lambda: rig.store.stats().leases == 0)
        with pytest.raises(LeaseExpired):
            rig.store.lease_view(session, grant.lease_id, 0)
        await rig.acquire(session, chain(1, 2))
        rig.store.close_session(session)
        assert rig.store.stats().leases == 0
        with pytest.raises(NoSession):
            rig.store.session(session.id)

    run(Rig(), body)


def test_an_extent_is_handed_only_to_its_tenant() -> None:
    async def body(rig: Rig) -> None:
        ours, theirs = rig.session("a"), rig.session("b")
        await rig.put(ours, chain(1, 1))
        grant = await rig.acquire(ours, chain(1, 1))
        with pytest.raises(BadRequest, match="no extent"):
            rig.store.extent_fd(theirs, grant.addresses[0] // EXTENT)

    run(Rig(), body)


def test_many_callers_at_once_lose_nothing_and_leak_nothing() -> None:
    async def client(rig: Rig, number: int) -> None:
        session = rig.session(f"tenant{number % 3}")
        for round_ in range(6):
            keys = chain(number * 8 + round_, 1 + round_)
            await rig.put(session, keys, wait_ms=30_000)
            grant = await rig.acquire(session, keys, wait_ms=30_000)
            assert rig.read(session, grant) == [content(k) for k in keys[: grant.held]]
            if grant.lease_id:
                rig.store.release(session, [grant.lease_id])
        rig.store.close_session(session)

    async def body(rig: Rig) -> None:
        await asyncio.gather(*(client(rig, n) for n in range(12)))
        stats = rig.store.stats()
        assert (stats.sessions, stats.leases, stats.reservations) == (0, 0, 0)

    run(Rig(dram_slots=32, nvme_slots=256), body)


def test_the_host_clock_is_one_for_all_processes() -> None:
    """Leases are checked in another process than the one that granted them."""
    here = MonotonicClock().now_ns()
    code = "from kvstore.clock import MonotonicClock; print(MonotonicClock().now_ns())"
    there = int(subprocess.check_output([sys.executable, "-c", code]))
    assert here < there < MonotonicClock().now_ns()


def test_a_clear_lets_other_calls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.core.chores.PART", 1)

    async def body(rig: Rig) -> None:
        ours, theirs = rig.session("a"), rig.session("b")
        await rig.put(ours, chain(1, 40))
        await rig.put(theirs, chain(2, 2))
        clearing = asyncio.create_task(rig.store.clear("a"))
        served = 0
        while not clearing.done():
            grant = await rig.acquire(theirs, chain(2, 2))
            rig.store.release(theirs, [grant.lease_id])
            served += grant.held == 2
            await asyncio.sleep(0)
        assert await clearing == 40
        assert served >= 5
        assert (await rig.presence(ours, chain(1, 40))).held == 0

    run(Rig(), body)


@pytest.mark.parametrize("call", ["lookup", "acquire", "prefetch"])
def test_a_long_call_lets_other_calls_through(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.core.chores.PART", 1)
    monkeypatch.setattr("kvstore.store.calls.LOOKED_AT_A_STEP", 1)

    async def body(rig: Rig) -> None:
        session = rig.session()
        layout_id = rig.store.register_layout("t", SPEC)
        await rig.put(session, chain(1, 12))
        query = ChainQuery([layout_id], chain(1, 12))
        calls: dict[str, Callable[[], Coroutine[None, None, object]]] = {
            "lookup": lambda: rig.store.lookup("t", [query] * 12),
            "acquire": lambda: rig.store.acquire(session, [query], 0),
            "prefetch": lambda: rig.store.prefetch("t", [query]),
        }
        work = asyncio.create_task(calls[call]())
        turns = 0
        while not work.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 12
        answer = await work
        if isinstance(answer, list) and isinstance(answer[0], LeaseGrant):
            assert answer[0].held == 12, "without patience, all that is in DRAM is told"
        else:
            assert answer == ([(12, 12)] * 12 if call == "lookup" else 0)

    run(Rig(), body)


def test_what_was_cleared_stays_so_after_a_restart() -> None:
    rig = Rig(nvme_slots=256)

    async def before(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 100))
        await rig.store.flush("t", False)
        assert await rig.store.clear("t") == 100

    run(rig, before)
    rig.dram = SlowMemory(EXTENT, 16 * SLOT)
    rig.store = rig.make_store()

    async def after(rig: Rig) -> None:
        assert (await rig.presence(rig.session(), chain(1, 100))).held == 0

    run(rig, after)


def test_a_start_that_is_called_off_ends_before_all_blocks_are_read() -> None:
    read = 0

    class Endless(HeapStorage):
        def recovered_blocks(self) -> Iterator[RecoveredBlocks]:
            nonlocal read
            while True:
                read += 1
                yield RecoveredBlocks("t", b"l" * 16, 1, [b"k" * 16], [b""], [1], [0])

    async def main() -> None:
        rig = Rig(nvme_slots=0)
        rig.nvme = Endless(4 * EXTENT, EXTENT)  # type: ignore[assignment]
        rig.store = rig.make_store()
        starting = asyncio.create_task(rig.store.start())
        await until(lambda: read > 10)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.wait_for(rig.store.close(), 10)

    asyncio.run(main())


def test_everything_found_at_a_start_is_in_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the first table takes."""
    monkeypatch.setattr("kvstore.listing.MIN_SLOTS", 64)
    rig = Rig(nvme_slots=256)

    async def before(rig: Rig) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 200))
        await rig.store.flush("t", False)

    run(rig, before)
    rig.dram = SlowMemory(EXTENT, 16 * SLOT)
    rig.store = rig.make_store()

    async def after(rig: Rig) -> None:
        session = rig.session()
        layout_id = rig.store.register_layout("t", SPEC)
        table = DirectoryReader(os.dup(rig.store.directory_fd()))
        name = namer(rig.store.tenant_secret(session), layout_id)
        assert table.prefix([name], chain(1, 200)) == (200, 0)

    run(rig, after)


def test_blocks_too_small_for_the_limit_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Else a tier that evicts at half its capacity is a riddle."""

    async def body(rig: Rig) -> None:
        rig.session()
        rig.store.register_layout("t", SPEC)
        assert not caplog.records
        rig.store._planner.residency.dram.space.max_slots = 15
        rig.store.register_layout("t", LayoutSpec("m", "fp8", 16, BLOCK))
        assert "dram has room for 16 blocks of 5000 bytes" in caplog.text

    run(Rig(), body)
