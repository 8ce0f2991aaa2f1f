"""The NVMe tier asks before it writes blocks again, and what it wrote is paid for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

import pytest

from kvstore.config import StoreConfig
from kvstore.core.places.endurance import Weight
from kvstore.store import Store, wear
from kvstore.types import ChainQuery
from tests.unit.test_store import EXTENT, SLOT, SPEC, Faulty, Rig, chain, run, until


class Log(Faulty):
    """Says that it has written what it is told to say."""

    moved = 0
    not_worth_moving: Callable[[list[int]], Iterable[int]]

    def wear(self) -> Mapping[str, int]:
        return {"store": 999, "move": self.moved, "note": 1}

    def ask_before_moving(self, not_worth_moving: Callable[[list[int]], Iterable[int]]) -> None:
        self.not_worth_moving = not_worth_moving


class Budgeted(Rig):
    def config(self) -> StoreConfig:
        return StoreConfig(dram_capacity_bytes=0, nvme_bytes_per_day=25 * 64 * SLOT)

    def make_store(self) -> Store:
        self.nvme: Log = Log(64 * SLOT, EXTENT)
        return super().make_store()

    async def on_nvme_only(self) -> ChainQuery:
        """A chain that is not worth another write."""
        session, keys = self.session(), chain(1, 4)
        await self.put(session, keys)
        await self.store.flush("t", drop=True)
        endurance = self.store._planner.residency.endurance
        for _ in range(100):
            endurance.is_worth(Weight(1, 0.0), 1)
        endurance.spend(50 * SLOT)
        return ChainQuery([self.store.register_layout("t", SPEC)], keys)

    @property
    def addresses(self) -> list[int]:
        pool = self.store._planner.residency.nvme
        assert pool is not None
        return [replica.address for replica in pool.replicas()]


def test_what_the_tier_writes_by_itself_is_paid_for() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Budgeted)
        rig.nvme.moved = 5 * SLOT
        await until(lambda: rig.store.transfer_stats().endurance.written_bytes == 5 * SLOT)
        assert rig.store.transfer_stats().endurance.bytes_per_day == 25 * 64 * SLOT

    run(Budgeted(), body)


def test_a_thread_of_the_tier_hears_what_is_not_worth_another_write() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Budgeted)
        query = await rig.on_nvme_only()
        there = rig.addresses
        dropped = await asyncio.to_thread(rig.nvme.not_worth_moving, there)
        assert sorted(dropped) == sorted(there)
        assert (await rig.store.lookup("t", [query]))[0].held == 0
        await until(lambda: rig.addresses == [])
        assert rig.store.transfer_stats().endurance.refused_blocks == len(there)

    run(Budgeted(), body)


def test_a_thread_that_asks_is_not_held_up_by_a_loop_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wear, "PATIENCE_S", 0.01)

    async def body(rig: Rig) -> None:
        assert isinstance(rig, Budgeted)
        await rig.on_nvme_only()
        # On the loop itself, which is thereby busy.
        assert list(rig.nvme.not_worth_moving(rig.addresses)) == []

    run(Budgeted(), body)
