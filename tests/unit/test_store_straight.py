"""Blocks read from NVMe straight into a GPU's memory, from the store to a reader, on a stand-in."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.config import StoreConfig
from kvstore.device.mirrors import Mirrors
from kvstore.device.vram import StraightFile
from kvstore.device.vram_stand_in import StandInVram, _Straight
from kvstore.errors import BadRequest, DeviceLost, DeviceStuck, TierFailed
from kvstore.store import MAX_RUNNING, Session, Store
from kvstore.store.slots import SHORT, GpuSlots
from kvstore.store.straight import FAILURES, NOT_YET, UNUSED
from kvstore.tiers.base import BlockHeader, Fill
from kvstore.types import GPU_ONLY, ChainQuery, LeaseGrant, VramStats
from tests.unit.test_store import BLOCK, EXTENT, SLOT, SPEC, Faulty, chain, content, run, until
from tests.unit.test_store_vram import VramRig, read

READER = b"engine"
ONE = 3
"""A GPU of so many extents has one to spare: two are left to others."""
SLOTS_BYTES = MAX_RUNNING * SLOT
"""What drives write into takes of a GPU, beside its extents."""


class Drive(Faulty):
    """Whose straight reads may wait, before the drive or after it, as told."""

    straight_reads = 0

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        super().__init__(capacity_bytes, extent_bytes)
        self.before, self.after = threading.Event(), threading.Event()
        self.counting = threading.Lock()
        self.reading = 0
        self.hangs = False
        self.before.set()
        self.after.set()

    def read_straight(self, address: int, header: BlockHeader, fill: Fill) -> None:
        def at_the_drive(file: StraightFile, offset: int, nbytes: int) -> int:
            assert self.before.wait(60)
            checksum = fill(file, offset, nbytes)
            assert self.after.wait(60)
            return checksum

        self.straight_reads += 1
        if self.fail_read is not None:
            raise self.fail_read
        with self.counting:
            self.reading += 1
        try:
            super().read_straight(address, header, at_the_drive)
        finally:
            with self.counting:
                self.reading -= 1

    def overdue(self) -> bool:
        return self.hangs

    def damage(self) -> None:
        """All payloads."""
        for _, payload in self._blocks.values():
            payload[BLOCK // 2] ^= 1


class StraightRig(VramRig):
    nvme: Drive

    def __init__(self, directory: Path, *, extents: int = ONE) -> None:
        self.drive = Drive(64 * SLOT, EXTENT)
        super().__init__(directory, extents=extents)
        self.gpu.say(bytes=extents * EXTENT + SLOTS_BYTES)

    def make_store(self) -> Store:
        self.nvme = self.drive
        self.vram = StandInVram(self.gpu.name)
        return Store(
            config=StoreConfig(
                dram_capacity_bytes=0, lease_ms=1000, reservation_ms=1000,
                vram_capacity_bytes=8 * EXTENT, vram_reserve_bytes=EXTENT, vram_gpudirect=True,
            ),
            clock=self.clock, dram=self.dram, nvme=self.nvme,
            tenant_key=lambda tenant: tenant.encode(),
            executor=ThreadPoolExecutor(MAX_RUNNING + 4), observer=self.seen, vram=[self.vram],
        )  # fmt: skip

    def named_reader(self, session: Session, name: bytes = READER) -> Mirrors:
        reader = self.reader(session)
        layout_id = self.store.register_layout(session.tenant, SPEC)
        self.store.open_vram(session, self.gpu.name, [layout_id], name)
        return reader

    async def on_drive(self, session: Session, keys: list[bytes]) -> None:
        """Blocks that are nowhere else."""
        await self.put(session, keys)
        await self.store.flush(session.tenant, drop=True)

    async def ask(
        self, session: Session, keys: list[bytes], *, name: bytes = READER, wait_ms: int = 30_000
    ) -> LeaseGrant:
        layout_id = self.store.register_layout(session.tenant, SPEC)
        chains = [ChainQuery([layout_id], keys)]
        return (await self.store.acquire(session, chains, wait_ms, reader=name))[0]

    async def ready(self, session: Session) -> None:
        """Until the GPU has an extent for such blocks: while it gets that, what is asked for
        comes up into DRAM."""
        await until(lambda: self.stats.not_straight_because != NOT_YET)
        keys = chain(99, EXTENT // SLOT)
        await self.on_drive(session, keys)
        await self.straight_at_last(session, keys)
        assert await self.store.clear("t")
        self.drive.straight_reads = 0
        self.seen.events.clear()
        self.before = self.stats

    async def straight_at_last(self, session: Session, keys: list[bytes]) -> LeaseGrant:
        for _ in range(500):
            grant = await self.ask(session, keys)
            if min(grant.addresses) >= GPU_ONLY:
                return grant
            self.store.release(session, [grant.lease_id])
            await self.store.flush(session.tenant, drop=True)
            await asyncio.sleep(0.01)
        raise AssertionError("the GPU has no room")

    @property
    def straight(self) -> int:
        """Blocks since `ready`."""
        return self.stats.straight_blocks - self.before.straight_blocks

    @property
    def bounced(self) -> int:
        return self.stats.bounced_blocks - self.before.bounced_blocks

    @property
    def stats(self) -> VramStats:
        return self.store.vram_stats()[0]

    async def relieve(self) -> None:
        """Others need nothing more, and have not for a while."""
        self.gpu.say(taken=0)
        (gpu,) = self.store._gpus._gpus
        await until(lambda: not gpu.mirrors.lacking)
        self.clock.advance_ms(6000)

    @property
    def slots(self) -> GpuSlots:
        (gpu,) = self.store._gpus._gpus
        assert gpu._straight is not None
        return gpu._straight._slots

    @property
    def read_up(self) -> int:
        """Blocks that came up into DRAM."""
        return len([e for e in self.seen.events if e[:3] == ("transfer", "nvme", "dram")])


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block each."""
    monkeypatch.setattr("kvstore.store.straight.MOST_SLOT_BYTES", SLOT)


Body = Callable[[StraightRig, Session, Mirrors], Awaitable[None]]


def go(directory: Path, body: Body, *, extents: int = ONE) -> StraightRig:
    rig = StraightRig(directory, extents=extents)

    async def with_reader(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        await rig.ready(session)
        await body(rig, session, reader)
        reader.close()

    run(rig, with_reader)
    return rig


def is_there(reader: Mirrors, grant: LeaseGrant, keys: list[bytes]) -> None:
    assert grant.held == len(keys)
    assert read(reader, grant) == {i: content(key) for i, key in enumerate(keys)}


def test_what_is_on_the_drive_alone_is_read_into_the_gpus_memory_and_not_into_dram(
    tmp_path: Path,
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 4))
        grant = await rig.ask(session, chain(1, 4))
        assert all(address >= GPU_ONLY for address in grant.addresses)
        is_there(reader, grant, chain(1, 4))
        assert rig.read_up == 0
        assert ("transfer", "nvme", "vram", BLOCK) in rig.seen.events
        assert rig.stats.reads_straight
        assert rig.straight == 4
        is_there(reader, await rig.ask(session, chain(1, 4)), chain(1, 4))
        assert rig.drive.straight_reads == 4, "what is there is not read again"
        with pytest.raises(BadRequest, match="in a GPU's memory alone"):
            rig.store.lease_view(session, grant.lease_id, 0)

    go(tmp_path, body)


def test_who_names_no_reader_or_another_is_given_dram(tmp_path: Path) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        await rig.ask(session, chain(1, 2))
        for name in (b"", b"somebody"):
            grant = await rig.ask(rig.session(), chain(1, 2), name=name)
            assert grant.held == 2
            assert all(address < GPU_ONLY for address in grant.addresses)
        remote = rig.store.open_session("t", local=False)
        await rig.on_drive(session, chain(2, 2))
        assert all(a < GPU_ONLY for a in (await rig.ask(remote, chain(2, 2))).addresses)
        with pytest.raises(BadRequest, match="at most 64 bytes"):
            rig.named_reader(session, bytes(65))

    go(tmp_path, body)


def test_a_block_that_is_not_read_straight_comes_by_way_of_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        rig.gpu.say(refuses=["fill"])
        is_there(reader, await rig.ask(session, chain(1, 2)), chain(1, 2))
        rig.gpu.say(refuses=[])
        assert rig.bounced == 2
        await rig.on_drive(session, chain(2, 1))
        is_there(reader, await rig.ask(session, chain(2, 1)), chain(2, 1))
        assert (rig.bounced, rig.straight) == (2, 1)
        assert rig.stats.reads_straight
        assert rig.seen.events.count(("straight_refused", "failed")) == 2

    go(tmp_path, body)
    assert "a block was not read straight into" in caplog.text


@pytest.mark.parametrize("refused", ["fill", "deliver"])
def test_after_three_that_failed_blocks_come_up_into_dram(tmp_path: Path, refused: str) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 3))
        rig.gpu.say(refuses=[refused])
        is_there(reader, await rig.ask(session, chain(1, 3)), chain(1, 3))
        assert not rig.stats.reads_straight
        assert refused in rig.stats.not_straight_because
        assert rig.seen.events.count(("straight_refused", "off")) == 1
        rig.gpu.say(refuses=[])
        await rig.on_drive(session, chain(2, 1))
        grant = await rig.ask(session, chain(2, 1))
        assert grant.addresses[0] < GPU_ONLY
        assert rig.read(session, grant) == [content(chain(2, 1)[0])]
        assert rig.stats.healthy

    go(tmp_path, body)


def test_a_slot_in_which_a_read_failed_is_never_used_again_nor_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever failed there may be writing still."""

    async def read_once(
        rig: StraightRig, session: Session, reader: Mirrors, keys: list[bytes]
    ) -> None:
        grant = await rig.ask(session, keys)
        is_there(reader, grant, keys)
        rig.store.release(session, [grant.lease_id])

    filled: list[_Straight] = []
    closed: list[_Straight] = []
    failed: set[_Straight] = set()
    fill = _Straight.fill

    def noted(self: _Straight, slot: int, file: StraightFile, offset: int, nbytes: int) -> int:
        filled.append(self)
        return fill(self, slot, file, offset, nbytes)

    monkeypatch.setattr(_Straight, "fill", noted)

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        monkeypatch.setattr(_Straight, "close", lambda slot: closed.append(slot))
        await rig.on_drive(session, chain(1, 2))
        rig.gpu.say(refuses=["fill"])
        filled.clear()
        await read_once(rig, session, reader, chain(1, 2))
        failed.update(filled)
        assert len(failed) == 2
        rig.gpu.say(refuses=[])
        await until(lambda: rig.slots._usable == MAX_RUNNING)
        filled.clear()
        for number in range(2, 2 + 2 * MAX_RUNNING):
            await rig.on_drive(session, chain(number, 1))
            await read_once(rig, session, reader, chain(number, 1))
        assert len(filled) == 2 * MAX_RUNNING
        assert not failed.intersection(filled)

    go(tmp_path, body)
    assert len(set(closed)) == len(closed) == MAX_RUNNING
    assert not failed.intersection(closed)


def test_a_gpu_that_reads_wrong_has_no_good_block_dropped_and_is_believed_nothing(
    tmp_path: Path,
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 4))
        rig.gpu.say(spoils=["fill"])
        is_there(reader, await rig.ask(session, chain(1, 4)), chain(1, 4))
        assert not rig.stats.reads_straight
        assert not any(event[0] == "corrupt" for event in rig.seen.events)

    go(tmp_path, body)


def test_damage_on_the_drive_is_a_miss_and_says_nothing_of_the_gpu(tmp_path: Path) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 4))
        rig.drive.damage()
        grant = await rig.ask(session, chain(1, 4))
        assert grant.held == 0
        assert rig.seen.events.count(("corrupt", "nvme")) >= 1
        assert (await rig.presence(session, chain(1, 4))).held < 4
        assert rig.stats.reads_straight
        assert rig.bounced == 0

    go(tmp_path, body)


def test_a_drive_that_fails_is_switched_off_as_ever(tmp_path: Path) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        rig.drive.fail_read = TierFailed("reading failed: gone", 5)
        assert (await rig.ask(session, chain(1, 2))).held == 0
        assert ("off", "nvme") in rig.seen.events
        assert rig.stats.healthy
        assert (await rig.put(session, chain(3, 2))) == 2

    go(tmp_path, body)


@pytest.mark.parametrize("where", ["before", "after"])
def test_memory_goes_back_to_the_gpu_while_a_drive_hangs_and_is_not_written_after(
    tmp_path: Path, where: str
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        gate: threading.Event = getattr(rig.drive, where)
        gate.clear()
        asking = asyncio.create_task(rig.ask(session, chain(1, 2)))
        await until(lambda: rig.drive.straight_reads > 0)
        made = rig.vram._made_bytes
        assert made
        rig.gpu.say(taken=16 * EXTENT)
        await until(lambda: rig.vram._made_bytes == 0)
        # A slot goes back when nothing is under way in it.
        await until(lambda: rig.vram._slots_bytes == rig.drive.reading * SLOT)
        assert 0 < rig.stats.held_bytes == rig.vram._slots_bytes
        assert rig.stats.short
        assert not asking.done()
        gate.set()
        assert (await asking).held == 0
        assert (rig.straight, rig.bounced) == (0, 0)
        await until(lambda: rig.vram._slots_bytes == 0)
        assert rig.stats.not_straight_because == SHORT
        assert rig.seen.events.count(("straight_refused", "memory")) == 1
        assert not any(event[0] in ("corrupt", "io_error") for event in rig.seen.events)
        await rig.relieve()
        grant = await rig.ask(session, chain(1, 2))
        assert grant.held == 2
        rig.store.release(session, [grant.lease_id])
        await rig.straight_at_last(session, chain(1, 2))
        assert rig.vram._slots_bytes == SLOTS_BYTES

    go(tmp_path, body)


def test_a_drive_that_hangs_in_straight_reads_stalls_as_ever_and_keeps_no_memory_of_the_gpus(
    tmp_path: Path,
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 4))
        rig.drive.before.clear()
        asking = asyncio.create_task(rig.ask(session, chain(1, 4), wait_ms=60_000))
        await until(lambda: rig.drive.straight_reads > 0)
        await asyncio.sleep(0.2)
        assert not asking.done(), "a drive may take long"
        rig.drive.hangs = True
        assert (await asking).held == 0
        assert rig.store.stats().tiers[1].stalled
        rig.gpu.say(taken=16 * EXTENT)
        await until(lambda: rig.vram._made_bytes == 0)
        again = await asyncio.wait_for(rig.ask(session, chain(1, 4), wait_ms=60_000), 30)
        assert again.held == 0, "nobody is sent there meanwhile"
        rig.drive.hangs = False
        rig.drive.before.set()
        await until(lambda: not rig.store._planner.residency.transfers)
        await until(lambda: rig.vram._slots_bytes == 0)
        assert rig.stats.not_straight_because == SHORT

    go(tmp_path, body)


def test_nobody_is_shown_another_block_while_memory_comes_and_goes(tmp_path: Path) -> None:
    """Several readers ask for more than the GPU has room for; pressure comes and goes, blocks are
    cleared, reads fail."""
    rng = random.Random(1)
    seen = 0

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        nonlocal seen
        for base in range(1, 9):
            await rig.put(session, chain(base, 6))
        readers = [(session, reader)]
        second = rig.session()
        readers.append((second, rig.named_reader(second)))

        async def ask(turn: int) -> None:
            nonlocal seen
            who, mirrors = readers[turn % 2]
            keys = chain(rng.randrange(1, 9), 6)
            grant = await rig.ask(who, keys, wait_ms=30_000)
            for index, data in read(mirrors, grant).items():
                assert data == content(keys[index])
                seen += grant.addresses[index] >= GPU_ONLY
            if grant.held:
                rig.store.release(who, [grant.lease_id])

        for turn in range(2_000):
            # How much of the GPU's memory is there when somebody asks is a race.
            if turn > 60 and seen > 20:
                break
            await asyncio.gather(*(ask(turn + each) for each in range(3)))
            await rig.store.flush("t", drop=True)
            rig.clock.advance_ms(300)
            match rng.randrange(8):
                case 0:
                    rig.gpu.say(taken=16 * EXTENT)
                case 1 | 2:
                    rig.gpu.say(taken=0)
                    rig.clock.advance_ms(5000)
                case 3:
                    await rig.store.clear("t")
                    for base in range(1, 9):
                        await rig.put(session, chain(base, 6))
                case 4 if turn > 45:
                    rig.gpu.say(refuses=["deliver"])
                    await ask(turn)
                    rig.gpu.say(refuses=[])
            await asyncio.sleep(0.005)
            rig.store.check_integrity()
        readers[1][1].close()

    go(tmp_path, body, extents=16)
    assert seen > 20


def test_what_is_cleared_while_it_is_read_is_found_by_nobody(tmp_path: Path) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        grant = await rig.ask(session, chain(1, 2))
        is_there(reader, grant, chain(1, 2))
        rig.store.release(session, [grant.lease_id])
        await rig.on_drive(session, chain(2, 1))
        rig.drive.after.clear()
        reads = rig.drive.straight_reads
        asking = asyncio.create_task(rig.ask(session, chain(2, 1)))
        await until(lambda: rig.drive.straight_reads > reads)
        clearing = asyncio.create_task(rig.store.clear("t"))
        await asyncio.sleep(0.05)
        rig.drive.after.set()
        late = await asking
        await clearing
        assert read(reader, grant) == {}
        if late.held:
            assert read(reader, late) in ({}, {0: content(chain(2, 1)[0])})
            rig.store.release(session, [late.lease_id])
        await until(lambda: read(reader, late) == {} if late.held else True)
        assert (await rig.ask(session, chain(2, 1))).held == 0

    go(tmp_path, body)


def test_what_was_read_straight_is_read_again_after_a_restart(tmp_path: Path) -> None:
    rigs: list[StraightRig] = []

    async def first(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 3))
        is_there(reader, await rig.ask(session, chain(1, 3)), chain(1, 3))

    rigs.append(go(tmp_path, first))

    class Restarted(StraightRig):
        def make_store(self) -> Store:
            self.drive = rigs[0].drive
            return super().make_store()

    rig = Restarted(tmp_path)

    async def second(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        is_there(reader, await rig.straight_at_last(session, chain(1, 3)), chain(1, 3))
        reader.close()

    run(rig, second)


def test_where_nothing_can_be_read_straight_it_is_said_why_and_dram_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = StraightRig(tmp_path)
    rig.gpu.say(refuses=["straight"])

    async def body(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        await rig.on_drive(session, chain(1, 4))
        for _ in range(3):
            grant = await rig.ask(session, chain(1, 4))
            assert rig.read(session, grant) == [content(key) for key in chain(1, 4)]
            await asyncio.sleep(0.05)
        await until(lambda: "refuses straight" in rig.stats.not_straight_because)
        assert rig.stats.healthy
        assert not rig.stats.reads_straight
        assert ("straight_refused", "unusable") in rig.seen.events
        await until(lambda: rig.on_gpu == 4)
        reader.close()

    with caplog.at_level(logging.WARNING):
        run(rig, body)
    assert "nothing is read straight into" in caplog.text


def test_blocks_larger_than_what_is_kept_for_a_read_come_up_into_dram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.store.straight.MOST_SLOT_BYTES", 4096)
    monkeypatch.setattr("kvstore.store.vram.LOOK_S", 0.01)
    rig = StraightRig(tmp_path)

    async def body(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        for _ in range(3):
            await rig.on_drive(session, chain(1, 4))
            grant = await rig.ask(session, chain(1, 4))
            assert rig.read(session, grant) == [content(key) for key in chain(1, 4)]
            rig.store.release(session, [grant.lease_id])
            await asyncio.sleep(0.03)
        assert rig.drive.straight_reads == 0
        assert rig.vram._slots_bytes == 0, "there is nothing that they were good for"
        reader.close()

    run(rig, body)


def test_a_gpu_that_is_lost_while_a_drive_reads_is_given_up_and_dram_serves(
    tmp_path: Path,
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        rig.drive.before.clear()
        asking = asyncio.create_task(rig.ask(session, chain(1, 2)))
        await until(lambda: rig.drive.straight_reads > 0)
        rig.gpu.say(lost=True)
        await until(lambda: not rig.stats.healthy)
        await until(lambda: rig.vram._made_bytes == 0)
        rig.drive.before.set()
        await asking
        assert not any(event[0] == "corrupt" for event in rig.seen.events)
        grant = await rig.ask(session, chain(1, 2))
        assert rig.read(session, grant) == [content(key) for key in chain(1, 2)]

    go(tmp_path, body)


def test_memory_that_may_be_written_for_ever_is_never_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        monkeypatch.setattr(_Straight, "close", lambda slot: closed.append(slot))
        await rig.on_drive(session, chain(1, 2))

        def deliver(*_: object) -> None:
            raise DeviceStuck("no answer")

        monkeypatch.setattr("kvstore.device.vram_stand_in._Straight.deliver", deliver)
        assert (await rig.ask(session, chain(1, 2))).held == 0
        await until(lambda: not rig.stats.healthy)
        assert rig.stats.off_because == "no answer"
        grant = await rig.ask(session, chain(1, 2))
        assert rig.read(session, grant) == [content(key) for key in chain(1, 2)]

    go(tmp_path, body)
    assert closed == []


def test_slots_are_given_back_once_and_only_when_no_drive_may_write_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = closed = 0

    class Counted(Drive):
        def read_straight(self, address: int, header: BlockHeader, fill: Fill) -> None:
            nonlocal under_way
            under_way += 1
            try:
                super().read_straight(address, header, fill)
            finally:
                under_way -= 1

    def close(_: object) -> None:
        nonlocal closed
        closed += 1
        assert not under_way

    rig = StraightRig(tmp_path)
    rig.drive.__class__ = Counted

    async def body(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        await rig.ready(session)
        monkeypatch.setattr(_Straight, "close", close)
        await rig.on_drive(session, chain(1, 2))
        rig.drive.before.clear()
        asking = asyncio.create_task(rig.ask(session, chain(1, 2)))
        await until(lambda: under_way > 0)
        asking.cancel()
        threading.Timer(0.3, rig.drive.before.set).start()
        reader.close()

    run(rig, body)
    assert closed == MAX_RUNNING


@pytest.mark.parametrize("hangs", ["deliver", "write_now"])
def test_a_gpu_that_hangs_keeps_the_drive_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    monkeypatch.setattr("kvstore.device.waits.PATIENCE_S", 2.5)

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        other = rig.store.open_session("u", local=True)
        await rig.on_drive(session, chain(1, 8))
        await rig.on_drive(other, chain(2, 4))
        rig.gpu.say(hangs=[hangs], refuses=["fill"] if hangs == "write_now" else [])
        began = time.monotonic()
        asking = asyncio.create_task(rig.ask(session, chain(1, 8), wait_ms=60_000))
        await until(lambda: not rig.stats.healthy)
        assert (await asking).held == 0
        assert time.monotonic() - began < 15, "of a batch, only the first is waited for"
        assert rig.stats.off_because == f"{hangs} has not ended"
        grant = await rig.ask(other, chain(2, 4), name=b"")
        assert rig.read(other, grant) == [content(key) for key in chain(2, 4)]
        await until(lambda: rig.vram._made_bytes == 0)

    go(tmp_path, body)


def test_a_library_that_is_not_as_thought_costs_straight_reads_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("there is no such function")

    async def while_reading(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        monkeypatch.setattr("kvstore.device.vram_stand_in._Straight.fill", broken)
        for base in range(1, 8):
            await rig.on_drive(session, chain(base, 1))
            grant = await rig.ask(session, chain(base, 1))
        assert rig.read(session, grant) == [content(chain(base, 1)[0])]
        assert "no such function" in rig.stats.not_straight_because
        assert rig.stats.healthy

    go(tmp_path, while_reading)
    monkeypatch.setattr("kvstore.device.vram_stand_in.StandInVram.straight", broken)
    rig = StraightRig(tmp_path)

    async def at_the_start(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        await rig.put(session, chain(1, 2))
        await until(lambda: "no such function" in rig.stats.not_straight_because)
        await rig.use(session, chain(1, 2))
        await until(lambda: rig.on_gpu == 2)
        reader.close()

    run(rig, at_the_start)


def test_nothing_is_taken_of_a_gpu_before_somebody_reads_there_nor_after(tmp_path: Path) -> None:
    rig = StraightRig(tmp_path)

    async def body(_: object) -> None:
        session = rig.session()
        rig.reader(session).close()
        await until(lambda: rig.stats.not_straight_because == UNUSED)
        await asyncio.sleep(0.3)
        assert rig.stats.held_bytes == 0
        worker = rig.session()
        rig.named_reader(worker).close()
        await until(lambda: rig.stats.reads_straight)
        assert rig.stats.held_bytes == SLOTS_BYTES
        rig.store.close_session(worker)
        await until(lambda: rig.vram._slots_bytes == 0)
        assert rig.stats.not_straight_because == UNUSED
        assert not any(event[0] == "straight_refused" for event in rig.seen.events)

    run(rig, body)


def test_slots_are_not_taken_where_others_have_not_enough_and_dram_serves(tmp_path: Path) -> None:
    rig = StraightRig(tmp_path)
    # What is reserved, and all slots once: half of what is asked for.
    rig.gpu.say(taken=(ONE - 1) * EXTENT)
    taken: list[int] = []

    async def body(_: object) -> None:
        session = rig.session()
        reader = rig.named_reader(session)
        await until(lambda: rig.stats.not_straight_because == SHORT)
        await rig.on_drive(session, chain(1, 4))
        for _ in range(2 * FAILURES):
            grant = await rig.ask(session, chain(1, 4))
            assert rig.read(session, grant) == [content(key) for key in chain(1, 4)]
            rig.store.release(session, [grant.lease_id])
            await rig.store.flush("t", drop=True)
            taken.append(rig.vram._slots_bytes)
        assert not any(taken)
        assert not rig.stats.short, "there is nothing that could be given back"
        assert rig.seen.events.count(("straight_refused", "memory")) == 1
        await rig.relieve()
        await rig.straight_at_last(session, chain(1, 4))
        reader.close()

    run(rig, body)


def test_what_finds_no_slot_comes_by_way_of_the_host_and_is_no_failure(tmp_path: Path) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, FAILURES + 1))
        away, rig.slots._idle = rig.slots._idle, []
        grant = await rig.ask(session, chain(1, FAILURES + 1))
        is_there(reader, grant, chain(1, FAILURES + 1))
        assert (rig.straight, rig.bounced) == (0, FAILURES + 1)
        rig.slots._idle = away
        rig.store.release(session, [grant.lease_id])
        await rig.on_drive(session, chain(2, 1))
        is_there(reader, await rig.ask(session, chain(2, 1)), chain(2, 1))
        assert rig.straight == 1
        assert ("straight_refused", "failed") not in rig.seen.events

    go(tmp_path, body)


def test_a_slot_that_failed_is_made_up_for_and_counted_for_ever(tmp_path: Path) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 1))
        rig.gpu.say(refuses=["fill"])
        is_there(reader, await rig.ask(session, chain(1, 1)), chain(1, 1))
        rig.gpu.say(refuses=[])
        await until(lambda: rig.slots._usable == MAX_RUNNING)
        assert rig.vram._slots_bytes == SLOTS_BYTES + SLOT
        rig.gpu.say(taken=16 * EXTENT)
        await until(lambda: rig.stats.held_bytes == SLOT)
        assert rig.vram._slots_bytes == SLOT

    go(tmp_path, body, extents=ONE + 1)


def test_a_slot_that_failed_is_done_without_where_another_would_take_from_others(
    tmp_path: Path,
) -> None:
    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 1))
        # Beyond what is reserved there is one slot more, which is half of what is asked for.
        rig.gpu.say(taken=rig.vram.free_bytes() - EXTENT - SLOT, refuses=["fill"])
        is_there(reader, await rig.ask(session, chain(1, 1)), chain(1, 1))
        rig.gpu.say(refuses=[])
        await until(lambda: rig.slots._aim == MAX_RUNNING - 1)
        for number in range(2, 2 + 2 * MAX_RUNNING):
            await rig.on_drive(session, chain(number, 1))
            grant = await rig.ask(session, chain(number, 1))
            is_there(reader, grant, chain(number, 1))
            rig.store.release(session, [grant.lease_id])
        assert rig.straight == 2 * MAX_RUNNING
        assert rig.vram._slots_bytes == SLOTS_BYTES
        assert ("straight_refused", "memory") not in rig.seen.events
        # Once it was there for all of them, there are as many as ever.
        rig.gpu.say(taken=16 * EXTENT)
        await until(lambda: rig.vram._slots_bytes == SLOT)
        await rig.relieve()
        await until(lambda: rig.slots._usable == MAX_RUNNING)
        assert rig.vram._slots_bytes == SLOTS_BYTES + SLOT

    go(tmp_path, body, extents=ONE + 1)


def test_nothing_is_asked_of_a_gpu_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before it is used no more either."""

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        asked: list[object] = []
        monkeypatch.setattr(rig.vram, "straight", asked.append)
        rig.slots.keep(rig.slots._idle.pop())
        rig.slots.stuck()
        await until(lambda: not rig.slots.want(True))
        await asyncio.to_thread(rig.slots.arrange, try_one=False)
        assert not asked

    go(tmp_path, body)


@pytest.mark.parametrize("error", [DeviceLost, DeviceStuck])
def test_a_gpu_that_fails_as_slots_are_taken_is_used_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fails(*_: object) -> None:
        raise error("no answer")

    rig = StraightRig(tmp_path)

    async def body(_: object) -> None:
        await until(lambda: rig.stats.not_straight_because == UNUSED)
        monkeypatch.setattr(rig.vram, "straight", fails)
        session = rig.session()
        rig.named_reader(session).close()
        await until(lambda: not rig.stats.healthy)
        assert rig.stats.off_because == rig.stats.not_straight_because == "no answer"
        assert not any(event[0] == "straight_refused" for event in rig.seen.events)

    run(rig, body)


def test_a_gpu_that_hangs_as_slots_go_back_holds_up_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than anybody waits: as giving memory back does."""
    hangs = threading.Event()
    close = _Straight.close

    def closing(slot: _Straight) -> None:
        assert hangs.wait(60)
        close(slot)

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        monkeypatch.setattr(_Straight, "close", closing)
        await rig.on_drive(session, chain(1, 2))
        rig.gpu.say(taken=16 * EXTENT)
        await until(lambda: rig.vram._made_bytes == 0)
        assert rig.stats.held_bytes == rig.vram._slots_bytes == SLOTS_BYTES
        grant = await rig.ask(session, chain(1, 2))
        assert rig.read(session, grant) == [content(key) for key in chain(1, 2)]
        await rig.relieve()
        await asyncio.sleep(0.3)
        assert rig.vram._slots_bytes <= SLOTS_BYTES, "none are taken beside those that go"
        hangs.set()
        rig.store.release(session, [grant.lease_id])
        await rig.straight_at_last(session, chain(1, 2))

    try:
        go(tmp_path, body)
    finally:
        hangs.set()


def test_a_gpu_that_does_not_answer_as_slots_go_back_is_used_no_more_and_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.device.waits.PATIENCE_S", 0.05)

    async def body(rig: StraightRig, session: Session, reader: Mirrors) -> None:
        await rig.on_drive(session, chain(1, 2))
        rig.gpu.say(taken=16 * EXTENT, hangs=["close"])
        await until(lambda: not rig.stats.healthy)
        assert rig.stats.off_because == "close has not ended"
        await until(lambda: rig.vram._made_bytes == 0)
        assert rig.vram._slots_bytes == rig.stats.held_bytes == SLOTS_BYTES
        rig.gpu.say(hangs=[])
        grant = await rig.ask(session, chain(1, 2))
        assert rig.read(session, grant) == [content(key) for key in chain(1, 2)]

    rig = go(tmp_path, body)
    assert rig.vram._slots_bytes == SLOTS_BYTES
