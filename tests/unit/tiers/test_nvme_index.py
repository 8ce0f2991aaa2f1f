"""The index: that it has room for what there can be, whatever is done to it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstore.tiers import nvme_index
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme import usable_bytes_of
from kvstore.tiers.nvme_index import Batch, Index, encode_record, map_bytes_for
from kvstore.tiers.nvme_slot import MIN_SLOT_BYTES, Place, Stored

EXTENT_BYTES = 1 << 20
LIFE = 9
TENANT = "t" * 64
"""The longest there is; an entry holds it."""


def record(rng: random.Random) -> bytes:
    header = BlockHeader(rng.randbytes(16), rng.randbytes(16), b"l" * 16, TENANT, 4096, 1)
    return encode_record(Stored(header, 1, Place(0, 0, LIFE)))


@pytest.mark.parametrize("bound", ["capacity", "max_blocks"])
def test_the_index_can_name_a_block_in_every_slot_there_can_be(tmp_path: Path, bound: str) -> None:
    """However many of them come and go, in whatever order."""
    slots = 10_000
    capacity = slots * MIN_SLOT_BYTES * (1 if bound == "capacity" else 100)
    max_blocks = slots * (100 if bound == "capacity" else 1)
    index = Index.open(tmp_path, map_bytes_for(capacity, max_blocks))
    rng = random.Random(1)
    addresses = [divmod(n, 128) for n in range(slots)]
    for gone in (1.0, 0.05, 0.5, 0.9, 0.3):
        changing = rng.sample(addresses, int(slots * gone))
        for start in range(0, len(changing), 256):
            part = changing[start : start + 256]
            index.apply(Batch(blocks=dict.fromkeys(part)))
        assert index.blocks == (0 if gone == 1.0 else slots - len(changing))
        rng.shuffle(changing)
        for start in range(0, len(changing), 256):
            part = changing[start : start + 256]
            assert index.room >= len(part)
            index.apply(Batch(blocks={address: record(rng) for address in part}))
        assert index.blocks == slots
    index.close()


@pytest.mark.parametrize("capacity", [8 << 20, 100 << 20, 10 << 30, 1 << 40])
def test_index_and_extents_share_the_capacity(capacity: int) -> None:
    for max_blocks in (1 << 20, 10_000_000):
        share = map_bytes_for(capacity, max_blocks)
        usable = usable_bytes_of(capacity, EXTENT_BYTES, max_blocks)
        assert usable + share <= capacity
        slots = min(max_blocks, usable // MIN_SLOT_BYTES)
        assert slots * 256 <= share
        assert share <= max(capacity // 4, max_blocks * 256 + (4 << 20))


def test_blocks_are_read_in_parts_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme_index, "_CHUNK", 7)
    index = Index.open(tmp_path, 8 << 20)
    rng = random.Random(1)
    others: dict[tuple[int, int], bytes | None] = {(n, 0): record(rng) for n in (1, 3)}
    index.apply(Batch(blocks=others))
    for count in (0, 6, 7, 8, 21, 50):
        blocks: dict[tuple[int, int], bytes | None] = {(2, n): record(rng) for n in range(count)}
        index.apply(Batch(blocks=blocks))
        found = index.entries(2)
        assert len(found) == (1 if count else 0)
        for slots, table in found:
            assert slots.tolist() == list(reversed(range(count)))
            assert [bytes(row) for row in table] == [blocks[2, slot] for slot in slots.tolist()]
            assert set(table["life"].tolist()) == {LIFE}
            assert set(table["tenant"].tolist()) == {TENANT.encode()}
    index.drop_segment(2)
    assert not index.entries(2)
    assert all(index.entries(n)[0].table.tobytes() == others[n, 0] for n in (1, 3))
    index.close()


def test_an_index_is_clean_only_between_two_lives(tmp_path: Path) -> None:
    index = Index.open(tmp_path, 8 << 20)
    assert not index.clean
    index.begin_life(4)
    index.end_life()
    index.close()
    index = Index.open(tmp_path, 8 << 20)
    assert (index.clean, index.life) == (True, 4)
    index.begin_life(5)
    index.close()
    index = Index.open(tmp_path, 8 << 20)
    assert (index.clean, index.life) == (False, 5)
    index.close()
