"""The store decides again when a prediction breaks, and remembers what it learned."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from kvstore.clock import MonotonicClock
from kvstore.core.places.residency import NOMINAL
from kvstore.store import Session, Store
from kvstore.types import ChainQuery, Hints, LeaseGrant, Refusal, Tier
from tests.unit.test_store import BLOCK, SPEC, Rig, chain, run, until


class Timed(Rig):
    """A rig in real time."""

    def make_store(self) -> Store:
        self.clock = MonotonicClock()  # type: ignore[assignment]
        return super().make_store()

    async def ask(self, session: Session, keys: list[bytes], hints: Hints) -> LeaseGrant:
        lid = self.store.register_layout(session.tenant, SPEC)
        query = ChainQuery([lid], keys)
        return (await self.store.acquire(session, [query], 60_000, hints))[0]


def test_who_could_have_computed_by_now_is_not_kept_waiting() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Timed)
        session, keys = rig.session(), chain(1, 8)
        await rig.put(session, keys)
        await rig.store.flush("t", drop=True)
        assert rig.nvme is not None
        rig.nvme.gate.clear()
        a_position_in_5_ms = Hints(tokens_per_s=SPEC.block_tokens / 0.005)
        grant = await asyncio.wait_for(rig.ask(session, keys, a_position_in_5_ms), 30)
        assert grant.held == 0
        assert rig.store.transfer_stats().given_up == 1
        rig.nvme.gate.set()
        await until(lambda: not rig.store._planner.residency.transfers)

    run(Timed(), body)


def test_a_chain_that_is_computed_faster_is_refused_with_the_reason() -> None:
    async def body(rig: Rig) -> None:
        assert isinstance(rig, Timed)
        session, keys = rig.session(), chain(1, 8)
        await rig.put(session, keys)
        await rig.store.flush("t", drop=True)
        grant = await rig.ask(session, keys, Hints(tokens_per_s=1e8))
        assert (grant.held, grant.refusal) == (0, Refusal.RECOMPUTE)
        assert rig.store.transfer_stats().refused[Refusal.RECOMPUTE] == 1

    run(Timed(), body)


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"

    async def learn(rig: Rig) -> None:
        assert isinstance(rig, Timed)
        session, keys = rig.session(), chain(1, 8)
        await rig.put(session, keys)
        await rig.store.flush("t", drop=True)
        assert (await rig.ask(session, keys, Hints(tokens_per_s=123.0))).held == 8

    async def look(rig: Rig) -> None:
        learned = rig.store._planner.learned()
        assert list(learned["prefill"].values()) == [123.0]
        assert learned["read"] and learned["write"]

    run(Timed(costs=path), learn)
    assert set(json.loads(path.read_text())) == {"read", "write", "prefill", "endurance"}
    run(Timed(costs=path), look)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"read": 3}', '{"read": {"10": "x"}}', "\0"])
def test_a_damaged_file_of_costs_is_no_more_than_forgotten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)

    async def body(rig: Rig) -> None:
        cost = rig.store._planner.residency.transfers.costs[Tier.DRAM]
        work_ns = NOMINAL[Tier.DRAM].work_ns(BLOCK)
        assert cost.turnaround(work_ns).ns == work_ns

    run(Timed(costs=path), body)
