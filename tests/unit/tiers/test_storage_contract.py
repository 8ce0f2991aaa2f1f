"""What every `StorageTier` that holds anything must do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from kvstore.clock import MonotonicClock
from kvstore.errors import CorruptBlock, TierFull
from kvstore.parts import find_device
from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.tiers.memory import HeapStorage
from kvstore.tiers.modelled import Modelled, ModelledDisk
from kvstore.tiers.null import NullStorage
from kvstore.tiers.nvme import NvmeTier, usable_bytes_of
from kvstore.types import ALIGNMENT
from tests.unit.tiers.blocks import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    aligned,
    get,
    header_of,
    payload_of,
    put,
    recovered,
)

CAPACITY_BYTES = 8 << 20
MAX_BLOCKS = 1 << 20
Maker = Callable[[Path], StorageTier]

MAKERS: dict[str, Maker] = {
    "heap": lambda path: HeapStorage(4 * EXTENT_BYTES, EXTENT_BYTES),
    "nvme": lambda path: NvmeTier.open(path, CAPACITY_BYTES, EXTENT_BYTES, MAX_BLOCKS),
    "nvme modelled": lambda path: NvmeTier.open(
        path,
        CAPACITY_BYTES,
        EXTENT_BYTES,
        MAX_BLOCKS,
        behind=partial(
            ModelledDisk, model=Modelled(find_device("modelled:gen4-nvme"), MonotonicClock())
        ),
    ),
    "nvme buffered": lambda path: NvmeTier.open(
        path, CAPACITY_BYTES, EXTENT_BYTES, MAX_BLOCKS, direct=False
    ),
}


@pytest.fixture(params=MAKERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageTier]:
    made = MAKERS[request.param](tmp_path / "data")
    yield made
    made.close()


def slots(tier: StorageTier, extent: int, nbytes: int = BLOCK_BYTES) -> list[int]:
    size = tier.slot_bytes(nbytes)
    return [extent * EXTENT_BYTES + i * size for i in range(EXTENT_BYTES // size)]


def test_reads_back_exactly_what_was_written(tier: StorageTier) -> None:
    for extent, nbytes in enumerate((1, 4095, 4096, 4097, BLOCK_BYTES, 65536)):
        if extent * EXTENT_BYTES >= tier.usable_bytes:
            tier.close_extent(extent - 1)
        tier.open_extent(extent, tier.slot_bytes(nbytes))
        address = slots(tier, extent, nbytes)[-1]
        header = put(tier, address, extent, nbytes)
        assert get(tier, address, header) == bytes(payload_of(extent, nbytes))


def test_bytes_around_the_block_are_neither_stored_nor_touched(tier: StorageTier) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    whole = aligned(2 * BLOCK_BYTES)
    whole[:] = b"s" * (2 * BLOCK_BYTES)
    header = header_of(1, whole[:BLOCK_BYTES])
    tier.write(0, header, whole)
    into = aligned(2 * BLOCK_BYTES)
    into[:] = b"x" * (2 * BLOCK_BYTES)
    tier.read(0, header, into)
    assert bytes(into) == b"s" * BLOCK_BYTES + b"x" * BLOCK_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"stored_key": b"K" * 16},
        {"parent": b"P" * 16},
        {"layout_id": b"M" * 16},
        {"tenant": "bob"},
        {"length": BLOCK_BYTES - 1},
        {"checksum": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_block_is_not_given_out_as_another(tier: StorageTier, change: dict[str, object]) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 0, 1)
    other: BlockHeader = header._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(CorruptBlock):
        get(tier, 0, other)


def test_a_slot_never_written_is_a_miss(tier: StorageTier) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    with pytest.raises(CorruptBlock):
        get(tier, 0, header_of(1, payload_of(1)))


def test_a_block_overwritten_is_gone_and_the_new_one_is_there(tier: StorageTier) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    old = put(tier, 0, 1)
    tier.forget(0, old)
    new = put(tier, 0, 2)
    with pytest.raises(CorruptBlock):
        get(tier, 0, old)
    assert get(tier, 0, new) == bytes(payload_of(2))


def test_forgetting_what_is_not_there_does_nothing(tier: StorageTier) -> None:
    tier.forget(99 * EXTENT_BYTES, header_of(1, payload_of(1)))
    tier.sync()


def test_a_reopened_extent_shows_nothing_of_its_former_life(tier: StorageTier) -> None:
    tier.open_extent(3, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 3 * EXTENT_BYTES, 1)
    tier.close_extent(3)
    tier.open_extent(3, tier.slot_bytes(BLOCK_BYTES))
    with pytest.raises(CorruptBlock):
        get(tier, 3 * EXTENT_BYTES, header)
    tier.sync()
    assert list(tier.recovered_blocks()) == []


def test_no_more_extents_than_the_capacity_has_room_for(tier: StorageTier) -> None:
    count = tier.usable_bytes // EXTENT_BYTES
    assert count >= 4
    for extent in range(count):
        tier.open_extent(extent, EXTENT_BYTES)
    with pytest.raises(TierFull):
        tier.open_extent(count, EXTENT_BYTES)
    tier.close_extent(0)
    tier.open_extent(count, EXTENT_BYTES)


def test_recovers_extents_blocks_and_layouts(tier: StorageTier) -> None:
    size = tier.slot_bytes(BLOCK_BYTES)
    tier.open_extent(0, size)
    tier.open_extent(2, size)
    first, second = slots(tier, 0)[:2]
    third = slots(tier, 2)[0]
    kept = put(tier, first, 1)
    gone = put(tier, second, 2)
    payload = payload_of(3)
    child = header_of(3, payload, parent=kept.stored_key, tenant="bøb")
    tier.write(third, child, payload)
    tier.forget(second, gone)
    tier.remember_layout("alice", b"L" * 16, {"model": "m", "block_tokens": 16})
    tier.remember_layout("bob", b"L" * 16, {"model": "m", "block_tokens": 16})
    tier.sync()
    assert sorted(tier.recovered_extents()) == [(0, size), (2, size)]
    assert recovered(tier) == {first: kept, third: child}
    spec = {"model": "m", "block_tokens": 16}
    assert sorted(tier.recovered_layouts(), key=str) == [("alice", spec), ("bob", spec)]


def test_threads_writing_and_reading_different_slots_do_not_mix(tier: StorageTier) -> None:
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    tier.open_extent(1, tier.slot_bytes(BLOCK_BYTES))
    places = slots(tier, 0) + slots(tier, 1)
    wrong: list[int] = []

    def work(worker: int) -> None:
        for turn in range(12):
            for place in range(worker, len(places), 4):
                number = turn * 1000 + place
                header = put(tier, places[place], number)
                if get(tier, places[place], header) != bytes(payload_of(number)):
                    wrong.append(number)
                if turn % 3 == 2:
                    tier.forget(places[place], header)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_addresses_are_whole_pages(tier: StorageTier) -> None:
    for nbytes in (1, 4096, BLOCK_BYTES):
        size = tier.slot_bytes(nbytes)
        assert size % ALIGNMENT == 0
        assert size >= nbytes


def test_null_holds_nothing_and_says_so() -> None:
    tier: StorageTier = NullStorage(EXTENT_BYTES)
    payload = payload_of(1)
    header = header_of(1, payload)
    assert tier.usable_bytes == 0
    with pytest.raises(TierFull):
        tier.open_extent(0, EXTENT_BYTES)
    with pytest.raises(TierFull):
        tier.write(0, header, payload)
    with pytest.raises(CorruptBlock):
        tier.read(0, header, payload)
    tier.forget(0, header)
    tier.sync()
    assert not list(tier.recovered_extents())
    assert not list(tier.recovered_blocks())
    assert not list(tier.recovered_layouts())
    tier.close()


def test_usable_bytes_are_whole_extents_within_the_capacity() -> None:
    for capacity in (0, 1 << 20, 8 << 20, 10_000_000_000):
        usable = usable_bytes_of(capacity, 64 << 20, 1 << 20)
        assert usable % (64 << 20) == 0
        assert usable <= capacity
