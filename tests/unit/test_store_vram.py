"""Blocks in a GPU's memory, from the store to a reader, on a stand-in for the GPU."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.config import StoreConfig
from kvstore.core.places.mirrors import Mirrors as MirrorsOf
from kvstore.core.places.mirrors import MirrorWork
from kvstore.core.places.shares import Mirror
from kvstore.device.mirrors import Mirrors
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import BadRequest, DeviceError, DeviceFull, DeviceStuck, UnknownLayout
from kvstore.store import Session, Store
from kvstore.types import LeaseGrant
from tests.unit.device.gpus import StandInGpu
from tests.unit.test_store import BLOCK, EXTENT, SPEC, Rig, chain, content, run, until


class VramRig(Rig):
    """With a GPU of `extents` extents, of which one is to be left free."""

    def __init__(self, directory: Path, *, extents: int = 16, **sizes: int) -> None:
        self.gpu = StandInGpu(directory / "gpu.json", extents * EXTENT)
        super().__init__(**sizes)

    def make_store(self) -> Store:
        self.vram = StandInVram(self.gpu.name)
        return Store(
            config=StoreConfig(
                dram_capacity_bytes=0, lease_ms=1000, reservation_ms=1000,
                vram_capacity_bytes=8 * EXTENT, vram_reserve_bytes=EXTENT,
            ),
            clock=self.clock, dram=self.dram, nvme=self.nvme,
            tenant_key=lambda tenant: tenant.encode(),
            executor=ThreadPoolExecutor(4), observer=self.seen, vram=[self.vram],
        )  # fmt: skip

    def reader(self, session: Session) -> Mirrors:
        layout_id = self.store.register_layout(session.tenant, SPEC)
        handout = self.store.open_vram(session, self.gpu.name, [layout_id])

        def fetch(extent: int) -> tuple[int, int]:
            found = self.store.vram_extent(session, self.gpu.name, extent)
            return os.dup(found.descriptor), found.extent_bytes

        vram = StandInVram(self.gpu.name)
        return Mirrors(os.dup(handout.descriptor), handout.extent_bytes, fetch, vram.open)

    async def use(self, session: Session, keys: list[bytes], times: int = 2) -> LeaseGrant:
        for _ in range(times):
            grant = await self.acquire(session, keys)
            assert grant.held == len(keys)
            self.store.release(session, [grant.lease_id])
        return grant

    @property
    def on_gpu(self) -> int:
        return self.store.vram_stats()[0].blocks


def read(reader: Mirrors, grant: LeaseGrant) -> dict[int, bytes]:
    """What is kept of the blocks that are (or were) leased, by index."""
    found = reader.find(grant.addresses, grant.checksums)
    if found is None:
        return {}
    datas = [ctypes.string_at(each, BLOCK) for each in found.addresses]
    kept = reader.kept(found)
    return {i: data for i, data, same in zip(found.indexes, datas, kept, strict=True) if same}


def test_what_is_loaded_again_is_found_in_the_gpus_memory(tmp_path: Path) -> None:
    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        keys = chain(1, 6)
        await rig.put(session, keys)
        grant = await rig.use(session, keys)
        await until(lambda: rig.on_gpu == 6)
        await until(lambda: len(read(reader, grant)) == 6)
        assert read(reader, grant) == {i: content(key) for i, key in enumerate(keys)}
        reader.close()

    run(VramRig(tmp_path), body)


def test_what_was_whole_when_it_was_copied_and_is_damaged_later_counts_as_corrupt(
    tmp_path: Path,
) -> None:
    async def body(rig: VramRig) -> None:
        session = rig.session()
        rig.reader(session).close()
        keys = chain(1, 2)
        await rig.put(session, keys)
        rig.dram.view((await rig.use(session, keys, times=1)).addresses[0], BLOCK)[17] ^= 1
        addresses = (await rig.use(session, keys)).addresses
        await until(lambda: rig.on_gpu == 1)
        rig.dram.view(addresses[1], BLOCK)[17] ^= 1
        await rig.store.report_damage("t", addresses)
        stats = rig.store.stats()
        assert (stats.mismatched_blocks, stats.corrupt_blocks) == (1, 1)

    run(VramRig(tmp_path), body)


def test_blocks_come_and_go_under_a_reader_who_never_gets_another(tmp_path: Path) -> None:
    """DRAM is so small that slots change hands all the time."""

    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        hits = 0
        for turn in range(60):
            keys = chain(turn % 4, 8)
            await rig.put(session, keys)
            for _ in range(3):
                grant = await rig.acquire(session, keys)
                for index, data in read(reader, grant).items():
                    assert data == content(keys[index])
                    hits += 1
                rig.store.release(session, [grant.lease_id])
                await asyncio.sleep(0.005)
        assert hits > 20
        reader.close()

    run(VramRig(tmp_path), body)


def test_a_lease_that_was_cut_short_finds_nothing_of_who_has_its_slots_now(
    tmp_path: Path,
) -> None:
    """A worker may be loading yet when the session of its scheduler, which leased, is cut."""

    async def body(rig: VramRig) -> None:
        session, scheduler = rig.session(), rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 8))
        grant = await rig.acquire(scheduler, chain(1, 8))
        assert grant.held == 8
        rig.store.close_session(scheduler)
        mirrored: set[int] = set()
        for base in range(2, 20):
            await rig.put(session, chain(base, 8))
            mirrored = set((await rig.use(session, chain(base, 8))).addresses)
            if mirrored & set(grant.addresses):
                break
        assert mirrored & set(grant.addresses)
        last = await rig.acquire(session, chain(base, 8))
        await until(lambda: len(read(reader, last)) == 8)
        assert read(reader, grant) == {}
        reader.close()

    run(VramRig(tmp_path), body)


def test_memory_that_others_take_is_given_back_and_readers_let_go(tmp_path: Path) -> None:
    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        keys = chain(1, 12)
        await rig.put(session, keys)
        grant = await rig.use(session, keys)
        await until(lambda: len(read(reader, grant)) == 12)
        assert rig.store.vram_stats()[0].held_bytes == 3 * EXTENT
        assert reader.opened_extents == 3
        rig.gpu.say(taken=13 * EXTENT)
        await until(lambda: rig.store.vram_stats()[0].held_bytes == 2 * EXTENT)
        reader.look()
        assert reader.opened_extents == 2
        left = read(reader, grant)
        assert 0 < len(left) < 12
        assert all(data == content(keys[index]) for index, data in left.items())
        assert (await rig.acquire(session, keys)).held == 12, "DRAM has them all"
        assert rig.store.vram_stats()[0].extents_given_back == 1
        reader.close()

    run(VramRig(tmp_path), body)


def test_a_gpu_that_has_no_memory_to_spare_costs_nothing_but_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(rig: VramRig) -> None:
        rig.gpu.say(refuses=["make"])
        session = rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 4))
        await rig.use(session, chain(1, 4), times=4)
        await until(lambda: "cannot grow now" in caplog.text and rig.on_gpu == 0)
        rig.gpu.say(refuses=[])
        rig.clock.advance_ms(6000)
        await rig.use(session, chain(1, 4), times=1)
        await until(lambda: rig.on_gpu == 4)
        reader.close()

    with caplog.at_level(logging.WARNING):
        run(VramRig(tmp_path), body)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_gpu_that_is_lost_is_left_alone_and_the_store_goes_on(tmp_path: Path, when: str) -> None:
    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 4))
        if when == "after":
            grant = await rig.use(session, chain(1, 4))
            await until(lambda: rig.on_gpu == 4)
        rig.gpu.say(lost=True)
        await rig.use(session, chain(1, 4))
        await until(lambda: ("off", "vram") in rig.seen.events)
        await until(lambda: not rig.store.vram_stats()[0].healthy)
        await until(lambda: rig.store.vram_stats()[0].held_bytes == 0)
        assert rig.on_gpu == 0
        if when == "after":
            assert read(reader, grant) == {}
        reader.look()
        assert reader.opened_extents == 0
        await until(lambda: rig.vram._made_bytes == 0)
        with pytest.raises(BadRequest, match="no memory on"):
            rig.reader(rig.session())
        assert (await rig.acquire(session, chain(1, 4))).held == 4
        reader.close()

    run(VramRig(tmp_path), body)


def test_an_error_that_nobody_foresaw_gives_the_gpu_up_and_all_of_its_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 4))
        grant = await rig.use(session, chain(1, 4))
        await until(lambda: len(read(reader, grant)) == 4)

        def work(*_: object) -> MirrorWork:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(MirrorsOf, "work", work)
        await until(lambda: rig.vram._made_bytes == 0)
        (stats,) = rig.store.vram_stats()
        assert (stats.healthy, stats.held_bytes) == (False, 0)
        assert "a bug" in stats.off_because
        assert {("off", "vram"), ("io_error", "vram", "ZeroDivisionError")} <= set(rig.seen.events)
        assert read(reader, grant) == {}
        assert (await rig.acquire(session, chain(1, 4))).held == 4
        reader.close()

    run(VramRig(tmp_path), body)


@pytest.mark.parametrize("times", [3, 1000])
def test_a_gpu_that_does_not_tell_what_is_free_is_asked_some_times_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr("kvstore.store.vram.LOOK_S", 0.01)

    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 4))
        await rig.use(session, chain(1, 4))
        # Not only that they have a place there.
        await until(lambda: rig.store.vram_stats()[0].copied_bytes == 4 * BLOCK)
        real, left = rig.vram.free_bytes, times

        def free_bytes() -> int:
            nonlocal left
            left -= 1
            if left >= 0:
                raise DeviceError("refused")
            return real()

        monkeypatch.setattr(rig.vram, "free_bytes", free_bytes)
        if times == 3:
            await until(lambda: left < -2)
        else:
            await until(lambda: rig.vram._made_bytes == 0)
        await until(lambda: rig.store.vram_stats()[0].healthy == (times == 3))
        assert rig.on_gpu == (4 if times == 3 else 0)
        reader.close()

    run(VramRig(tmp_path), body)


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_copy_that_was_started_is_waited_for_though_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited_for: bool
) -> None:
    """Its place is somebody else's after that; where it cannot be waited for, nobody's."""
    under_way: list[int] = []
    outcomes: deque[DeviceFull | None] = deque([None, DeviceFull("no staging memory")])

    def write(made: object, offset: int, data: memoryview) -> None:
        error = outcomes.popleft() if outcomes else None
        if error is not None:
            raise error
        under_way.append(offset)

    def finish(vram: object) -> None:
        if not waited_for and under_way:
            raise DeviceStuck("no answer")
        under_way.clear()

    real = MirrorsOf.ended

    def ended(mirrors: MirrorsOf, mirror: Mirror, *, well: bool) -> None:
        assert not (waited_for and under_way)
        real(mirrors, mirror, well=well)

    monkeypatch.setattr("kvstore.device.vram_stand_in._Made.write", write)
    monkeypatch.setattr(StandInVram, "finish", finish)
    monkeypatch.setattr(MirrorsOf, "ended", ended)

    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 4))
        await rig.use(session, chain(1, 4))
        if waited_for:
            await until(lambda: not outcomes and rig.on_gpu == 0)
        else:
            await until(lambda: not rig.store.vram_stats()[0].healthy)
        assert rig.store.vram_stats()[0].healthy == waited_for
        reader.close()

    run(VramRig(tmp_path), body)


def test_damage_in_memory_is_not_copied_to_where_nobody_compares(tmp_path: Path) -> None:
    async def body(rig: VramRig) -> None:
        session = rig.session()
        reader = rig.reader(session)
        await rig.put(session, chain(1, 2))
        grant = await rig.acquire(session, chain(1, 2))
        rig.dram.view(grant.addresses[0], 1)[0] ^= 1
        grant = await rig.use(session, chain(1, 2))
        await until(lambda: rig.on_gpu == 1)
        await until(lambda: list(read(reader, grant)) == [1])
        reader.close()

    run(VramRig(tmp_path), body)


def test_who_reads_is_known_until_the_session_ends(tmp_path: Path) -> None:
    async def body(rig: VramRig) -> None:
        worker, scheduler = rig.session(), rig.session()
        reader = rig.reader(worker)
        rig.reader(worker).close()
        await rig.put(scheduler, chain(1, 4))
        await rig.use(scheduler, chain(1, 4))
        await until(lambda: rig.on_gpu == 4)
        rig.store.close_session(worker)
        await until(lambda: rig.store.vram_stats()[0].held_bytes == 0)
        reader.close()

    run(VramRig(tmp_path), body)


def test_tenants_reach_nothing_of_each_others(tmp_path: Path) -> None:
    async def body(rig: VramRig) -> None:
        session, other = rig.session("t"), rig.session("u")
        reader = rig.reader(session)
        await rig.put(session, chain(1, 4))
        grant = await rig.use(session, chain(1, 4))
        await until(lambda: len(read(reader, grant)) == 4)
        theirs = rig.reader(other)
        assert theirs.find(grant.addresses, grant.checksums) is None
        assert theirs.opened_extents == 0
        with pytest.raises(UnknownLayout):
            rig.store.open_vram(other, rig.gpu.name, [bytes(32)])
        reader.close()

    run(VramRig(tmp_path), body)
