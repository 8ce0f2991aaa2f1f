"""A drive that hangs costs misses, and nothing that is in memory."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvstore.core.transfers import TransferClass
from kvstore.store import Session, Store
from kvstore.tiers.faulty import Fault, FaultyDisk, MemoryDisk
from kvstore.tiers.nvme import NvmeTier
from kvstore.types import LeaseGrant, Tier
from tests.unit.test_store import EXTENT, Rig, chain, until

T = TypeVar("T")

HANG_S = 30.0
THREADS = 6


class Hanging(Rig):
    """A rig whose drive hangs in every call while it is told to."""

    def __init__(self, folder: Path) -> None:
        self.hanging = False
        self.hanging_calls: set[str] | None = None
        """None: all of them."""
        self.goes_on = threading.Event()
        self.stuck = 0
        super().__init__(dram_slots=32)
        disk = FaultyDisk(
            MemoryDisk(), self.fault, random.Random(1), pause=lambda seconds: self.hang(seconds)
        )
        self.tier = NvmeTier.open(
            folder / "data", 8 << 20, EXTENT, 4096, disk=disk, clock=self.clock
        )
        self.store = self.make_store()

    def make_store(self) -> Store:
        self.nvme = getattr(self, "tier", None)
        self.executor = ThreadPoolExecutor(THREADS)
        return super().make_store()

    def fault(self, call: str) -> Fault | None:
        hangs = self.hanging_calls is None or call in self.hanging_calls
        return Fault("delay", seconds=HANG_S) if self.hanging and hangs else None

    def hang(self, seconds: float) -> None:
        self.stuck += 1
        assert self.goes_on.wait(60)

    async def save(self, *chains: list[bytes]) -> Session:
        """Blocks that are only on the drive, and whose they are."""
        session = self.session()
        for keys in chains:
            await self.put(session, keys)
        await self.store.flush("t", drop=True)
        return session

    async def hang_with(
        self, session: Session, *chains: list[bytes]
    ) -> list[asyncio.Task[LeaseGrant]]:
        """The drive hangs; who asks for these waits."""
        self.hanging = True
        waiting = [
            asyncio.create_task(self.acquire(session, keys, wait_ms=60_000)) for keys in chains
        ]
        await until(lambda: self.stuck > 0)
        return waiting

    def come_back(self) -> None:
        self.hanging = False
        self.goes_on.set()

    @property
    def stalled(self) -> bool:
        return {tier.tier: tier.stalled for tier in self.store.stats().tiers}[Tier.NVME]


def run(folder: Path, body: Callable[[Hanging], Awaitable[None]]) -> None:
    rig = Hanging(folder)

    async def main() -> None:
        await rig.store.start()
        try:
            await asyncio.wait_for(body(rig), 90)
            await until(lambda: not rig.store._planner.residency.transfers)
            rig.store.check_integrity()
        finally:
            rig.come_back()
            await rig.store.close()

    asyncio.run(main())


def test_who_waits_for_a_drive_that_hangs_is_answered_within_five_seconds(tmp_path: Path) -> None:
    async def body(rig: Hanging) -> None:
        keys = chain(1, 8)
        session = await rig.save(keys)
        (waiting,) = await rig.hang_with(session, keys)
        rig.clock.advance_ms(2_500)
        await asyncio.sleep(0.3)
        assert not waiting.done(), "a drive may take that long"
        rig.clock.advance_ms(2_000)
        assert (await waiting).held == 0
        assert rig.stalled
        again = await asyncio.wait_for(rig.acquire(session, keys, wait_ms=60_000), 30)
        assert again.held == 0, "nobody is sent there meanwhile"
        rig.come_back()
        await until(lambda: not rig.store._planner.residency.transfers)

    run(tmp_path, body)


def test_memory_is_served_and_grows_while_a_drive_hangs(tmp_path: Path) -> None:
    async def body(rig: Hanging) -> None:
        saved = [chain(base, 2) for base in range(8)]
        session = await rig.save(*saved)
        waiting = await rig.hang_with(session, *saved)
        for base in range(100, 103):
            keys = chain(base, 2)
            assert await rig.put(session, keys) == 2
            grant = await rig.acquire(session, keys)
            assert grant.held == 2
            rig.store.release(session, [grant.lease_id])
        rig.clock.advance_ms(4_000)
        await asyncio.gather(*waiting)
        for base in range(110, 130):
            # More than there is room for: what is dirty goes, as it cannot be written.
            assert await rig.put(session, chain(base, 4)) == 4
        rig.come_back()
        await until(lambda: not rig.store._planner.residency.transfers)

    run(tmp_path, body)


def test_a_drive_that_answers_again_is_used_again(tmp_path: Path) -> None:
    async def body(rig: Hanging) -> None:
        keys = chain(1, 8)
        session = await rig.save(keys)
        (waiting,) = await rig.hang_with(session, keys)
        rig.clock.advance_ms(4_000)
        await waiting
        rig.come_back()
        await until(lambda: not rig.store._planner.residency.transfers)
        await asyncio.sleep(0.3)
        grant = await rig.acquire(session, keys)
        assert grant.held == 8
        assert not rig.stalled
        assert [tier.stalls for tier in rig.store.stats().tiers] == [0, 1]

    run(tmp_path, body)


def test_a_drive_that_is_slow_and_gets_on_is_not_taken_for_one_that_hangs(tmp_path: Path) -> None:
    """A batch of many blocks may take long, and so may the files that they go into."""

    async def body(rig: Hanging) -> None:
        keys = chain(1, 16)
        session = await rig.save(keys)
        grant = await slowly(rig, {"preadv"}, rig.acquire(session, keys, wait_ms=600_000))
        assert grant.held == 16
        rig.store.release(session, [grant.lease_id])
        assert await rig.put(session, chain(2, 16)) == 16
        flushed = rig.store.flush("t", drop=False)
        assert await slowly(rig, {"create", "pwritev"}, flushed) == 16
        assert [tier.stalls for tier in rig.store.stats().tiers] == [0, 0]

    run(tmp_path, body)


async def slowly(rig: Hanging, calls: set[str], work: Coroutine[Any, Any, T]) -> T:
    """What comes of `work` while each of these calls of the drive's takes 1.4 seconds, or
    twice as long where a thread begins it just as time passes."""
    passed = threading.Condition()
    begun_ns: dict[int, int] = {}

    def take_long(seconds: float) -> None:
        me, began_ns = threading.get_ident(), rig.clock.now_ns()
        with passed:
            begun_ns[me] = began_ns
            passed.wait_for(lambda: rig.clock.now_ns() >= began_ns + 1_400_000_000, 60)
            del begun_ns[me]

    def all_are_new() -> bool:
        return bool(begun_ns) and min(begun_ns.values()) == rig.clock.now_ns()

    rig.hang, rig.hanging_calls, rig.hanging = take_long, calls, True  # type: ignore[method-assign]
    task = asyncio.create_task(work)
    while not task.done():
        await until(lambda: task.done() or all_are_new())
        rig.clock.advance_ms(1_400)
        await asyncio.sleep(0.25)  # Longer than until somebody looks at the time.
        with passed:
            passed.notify_all()
    rig.hanging = False
    return await task


@pytest.mark.parametrize("drains", [False, True])
def test_a_drive_that_hangs_for_a_while_gets_all_that_is_flushed(
    tmp_path: Path, drains: bool
) -> None:
    """What was called off as it hung is written once it answers."""

    async def body(rig: Hanging) -> None:
        session = rig.session()
        assert await rig.put(session, chain(1, 12)) == 12
        rig.hanging_calls, rig.hanging = {"pwritev"}, True
        first = asyncio.ensure_future(rig.store.flush("t", drop=False))
        await until(lambda: rig.stuck > 2)
        assert await rig.put(session, chain(2, 12)) == 12
        work = rig.store.drain(60) if drains else rig.store.flush("t", drop=False)
        second = asyncio.ensure_future(work)
        link = rig.store._planner.residency.transfers
        await until(lambda: link.depth(TransferClass.WRITE_BACK) == 24)
        rig.clock.advance_ms(4_000)
        await until(lambda: rig.stalled)
        assert link.depth(TransferClass.WRITE_BACK) == 12, "the others were called off"
        await asyncio.sleep(0.3)
        assert not first.done() and not second.done()
        rig.come_back()
        await asyncio.gather(first, second)
        assert rig.store.stats().tiers[1].blocks == 24

    run(tmp_path, body)


def test_a_drive_that_hangs_already_is_waited_for_by_who_stops(tmp_path: Path) -> None:
    async def body(rig: Hanging) -> None:
        keys = chain(1, 8)
        session = await rig.save(keys)
        (waiting,) = await rig.hang_with(session, keys)
        rig.clock.advance_ms(4_000)
        await waiting
        assert rig.stalled
        assert await rig.put(session, chain(2, 8)) == 8
        stop = asyncio.ensure_future(rig.store.drain(60))
        await asyncio.sleep(0.3)
        assert not stop.done()
        rig.come_back()
        await stop
        assert rig.store.stats().tiers[1].blocks == 16

    run(tmp_path, body)


def test_a_store_is_closed_though_its_drive_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.store.calls.CLOSE_S", 0.2)
    rig = Hanging(tmp_path)

    async def main() -> None:
        await rig.store.start()
        keys = chain(1, 8)
        session = await rig.save(keys)
        await rig.hang_with(session, keys)
        assert not await asyncio.wait_for(rig.store.close(), 30)

    asyncio.run(main())
    rig.come_back()


def test_a_drive_whose_syncs_hang_keeps_one_thread_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who read from it need the others."""
    monkeypatch.setattr("kvstore.store.upkeep.SYNC_S", 0.0)

    async def body(rig: Hanging) -> None:
        session = rig.session()
        await rig.put(session, chain(0, 2))
        await rig.store.flush("t", drop=True)
        rig.hanging_calls, rig.hanging = {"fdatasync"}, True
        # More than memory may hold of what is not on the drive, until a sync hangs and more
        # was written since.
        for base in range(1, 100):
            await rig.put(session, chain(base, 8))
            if rig.stuck and rig.store._movement.unsynced:
                break
        await asyncio.sleep(0.5)
        assert rig.stuck == 1
        rig.come_back()

    run(tmp_path, body)


def test_who_does_not_wait_for_a_sync_that_hangs_is_let_go_and_it_goes_on(tmp_path: Path) -> None:
    async def body(rig: Hanging) -> None:
        session, keys = rig.session(), chain(1, 4)
        await rig.put(session, keys)
        rig.hanging_calls, rig.hanging = {"fdatasync"}, True
        for _ in range(2 * THREADS):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(rig.store.flush("t", drop=True), 0.05)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(rig.store.clear("u"), 0.05)
        assert rig.stuck == 1, "others have threads"
        grant = await asyncio.wait_for(rig.acquire(session, keys), 30)
        assert grant.held == 4
        rig.store.release(session, [grant.lease_id])
        rig.come_back()
        await asyncio.wait_for(rig.store.flush("t", drop=True), 30)
        assert not rig.store._movement.unsynced

    run(tmp_path, body)


def test_what_is_told_while_a_sync_is_under_way_is_synced_by_the_next(tmp_path: Path) -> None:
    async def body(rig: Hanging) -> None:
        session = rig.session()
        await rig.put(session, chain(1, 2))
        rig.hanging_calls, rig.hanging = {"fdatasync"}, True
        first = asyncio.create_task(rig.store.flush("t", drop=False))
        await until(lambda: rig.stuck > 0)
        await rig.put(session, chain(2, 2))
        others = [asyncio.create_task(rig.store.flush("t", drop=False)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (first, *others))
        syncs, sync = 0, rig.tier.sync

        def counted() -> None:
            nonlocal syncs
            syncs += 1
            sync()

        rig.tier.sync = counted  # type: ignore[method-assign]
        rig.come_back()
        await asyncio.gather(first, *others)
        assert syncs == 1, "one for all of them"

    run(tmp_path, body)
