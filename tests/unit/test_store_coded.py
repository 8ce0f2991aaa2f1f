"""Blocks of a layout with a codec come back from NVMe within its bounds, and never as others
than a lease says; those of other layouts come back exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvstore.store import Session
from kvstore.tiers.memory import HeapStorage
from kvstore.tiers.nvme import NvmeTier
from kvstore.types import CODECS, ChainQuery, CommitOutcome, LayoutSpec, Segment
from tests.unit.test_store import EXTENT, SLOT, Rig, SlowMemory, chain, run

NBYTES = 2 * SLOT
EXACT = LayoutSpec("m", "float32", 16, NBYTES)
CODED = {name: replace(EXACT, codec=name) for name in CODECS}
KEYS = chain(1, 4)
OFF = {"fp8": 1 / 16, "int4": 17 / 224}
"""Of the largest in a group, at most."""


def content(key: bytes) -> bytes:
    random = np.random.default_rng(list(key))
    return random.normal(size=NBYTES // 4).astype(np.float32).tobytes()


async def put(rig: Rig, session: Session, spec: LayoutSpec) -> list[CommitOutcome]:
    lid = rig.store.register_layout(session.tenant, spec)
    grant = await rig.store.reserve(session, lid, len(KEYS), 5000)
    slots = range(grant.first_slot, grant.first_slot + len(KEYS))
    for slot, key in zip(slots, KEYS, strict=True):
        rig.store.slot_view(session, slot)[:] = content(key)
    sums = [xxhash.xxh3_64_intdigest(content(key)) for key in KEYS]
    segment = Segment(b"", KEYS, slots, sums)
    return (await rig.store.commit(session, lid, [segment], 0)).outcomes


async def get(rig: Rig, session: Session, spec: LayoutSpec) -> list[bytes]:
    """What is leased, which is what the lease says it is."""
    lid = rig.store.register_layout(session.tenant, spec)
    (grant,) = await rig.store.acquire(session, [ChainQuery([lid], KEYS)], 5000)
    got = [bytes(rig.store.lease_view(session, grant.lease_id, i)) for i in range(grant.held)]
    assert [xxhash.xxh3_64_intdigest(each) for each in got] == grant.checksums
    rig.store.release(session, [grant.lease_id])
    return got


def near(got: list[bytes], name: str) -> bool:
    """Within the bounds, and not exactly what was put."""
    assert len(got) == len(KEYS)
    now, was = (
        np.array([np.frombuffer(each, np.float32) for each in side]).reshape(-1, 32)
        for side in (got, map(content, KEYS))
    )
    off = np.abs(now - was).max(axis=1)
    return bool(off.any() and (off <= OFF[name] * np.abs(was).max(axis=1)).all())


@pytest.mark.parametrize("name", CODECS)
def test_what_went_through_a_codec_is_near_and_says_so(name: str) -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        await put(rig, session, CODED[name])
        exact = list(map(content, KEYS))
        assert await get(rig, session, CODED[name]) == exact, "in DRAM it is what was put"
        await rig.store.flush("t", False)
        assert await get(rig, session, CODED[name]) == exact
        await rig.store.flush("t", True)
        once = await get(rig, session, CODED[name])
        assert near(once, name)
        coded = [event[1:] for event in rig.seen.events if event[0] == "coded"]
        assert coded == [(name, "dram", "nvme")] * 4 + [(name, "nvme", "dram")] * 4
        await rig.store.flush("t", True)
        assert await get(rig, session, CODED[name]) == once

    run(Rig(), body)


def test_whoever_did_not_ask_for_a_codec_gets_exact_bytes() -> None:
    """Of the same model, at the same time, under the same keys."""

    async def body(rig: Rig) -> None:
        session, other = rig.session(), rig.session("u")
        for owner, spec in ((session, CODED["int4"]), (session, EXACT), (other, EXACT)):
            await put(rig, owner, spec)
        await rig.store.flush("t", True)
        await rig.store.flush("u", True)
        exact = list(map(content, KEYS))
        assert near(await get(rig, session, CODED["int4"]), "int4")
        assert await get(rig, session, EXACT) == exact
        assert await get(rig, other, EXACT) == exact
        assert await get(rig, other, CODED["int4"]) == []

    run(Rig(dram_slots=64), body)


def test_coded_blocks_take_less_room() -> None:
    used = {}
    for name, spec in (("exact", EXACT), *CODED.items()):

        async def body(rig: Rig, name: str = name, spec: LayoutSpec = spec) -> None:
            session = rig.session()
            await put(rig, session, spec)
            await rig.store.flush("t", True)
            used[name] = rig.store.stats("t").tiers[1].used_bytes

        run(Rig(), body)
    # In whole pages.
    assert used == {"exact": 4 * NBYTES, "fp8": 4 * 8192, "int4": 4 * 4096}


def test_the_same_block_is_not_put_twice() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        await put(rig, session, CODED["fp8"])
        await rig.store.flush("t", True)
        assert set(await put(rig, session, CODED["fp8"])) == {CommitOutcome.PRESENT}
        once = await get(rig, session, CODED["fp8"])
        assert set(await put(rig, session, CODED["fp8"])) == {CommitOutcome.PRESENT}
        assert await get(rig, session, CODED["fp8"]) == once

    run(Rig(), body)


def _heap(path: Path) -> Callable[[], HeapStorage]:
    tier = HeapStorage(64 * SLOT, EXTENT)
    return lambda: tier


def _disk(path: Path) -> Callable[[], NvmeTier]:
    return lambda: NvmeTier.open(path, 32 << 20, EXTENT, 1000)


@pytest.mark.parametrize("tier", [_heap, _disk])
def test_after_a_restart_it_is_what_it_was(
    tier: Callable[[Path], Callable[[], HeapStorage | NvmeTier]], tmp_path: Path
) -> None:
    opened = tier(tmp_path)
    got = {}

    async def before(rig: Rig) -> None:
        session = rig.session()
        for name, spec in (("exact", EXACT), *CODED.items()):
            await put(rig, session, spec)
            await rig.store.flush("t", True)
            got[name] = await get(rig, session, spec)

    async def after(rig: Rig) -> None:
        session = rig.session()
        for name, spec in (("exact", EXACT), *CODED.items()):
            assert await get(rig, session, spec) == got[name]
        assert near(got["fp8"], "fp8")
        assert near(got["int4"], "int4")

    for body in (before, after):
        rig = Rig()
        rig.dram = SlowMemory(EXTENT, 64 * SLOT)
        rig.nvme = opened()  # type: ignore[assignment]
        rig.store = rig.make_store()
        run(rig, body)


def test_coded_bytes_that_are_damaged_are_a_miss() -> None:
    async def body(rig: Rig) -> None:
        session = rig.session()
        await put(rig, session, CODED["fp8"])
        await rig.store.flush("t", True)
        assert rig.nvme is not None
        for address, (header, payload) in list(rig.nvme._blocks.items()):
            rig.nvme._blocks[address] = (header, payload[:-1] + bytes([payload[-1] ^ 1]))
        assert await get(rig, session, CODED["fp8"]) == []
        assert ("corrupt", "nvme") in rig.seen.events

    run(Rig(), body)
