"""What every `MemoryTier` must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvstore.errors import InternalError, TierFull
from kvstore.tiers.base import MemoryTier
from kvstore.tiers.dram import DramTier
from kvstore.tiers.memory import HeapMemory

EXTENT_BYTES = 1 << 20
CAPACITY_BYTES = 3 * EXTENT_BYTES + 4096

MAKERS: dict[str, Callable[[], MemoryTier]] = {
    "heap": lambda: HeapMemory(EXTENT_BYTES, CAPACITY_BYTES),
    "dram": lambda: DramTier(EXTENT_BYTES, CAPACITY_BYTES, spare_extents=2),
    "dram without spares": lambda: DramTier(EXTENT_BYTES, CAPACITY_BYTES, spare_extents=0),
}


@pytest.fixture(params=MAKERS)
def tier(request: pytest.FixtureRequest) -> Iterator[MemoryTier]:
    made = MAKERS[request.param]()
    yield made
    made.close()


def test_views_of_one_slot_show_the_same_bytes_and_no_others(tier: MemoryTier) -> None:
    tier.open_extent(5)
    first = tier.view(5 * EXTENT_BYTES, 4096)
    second = tier.view(5 * EXTENT_BYTES + 4096, 4096)
    second[:] = b"b" * 4096
    first[:] = b"a" * 4096
    assert bytes(tier.view(5 * EXTENT_BYTES + 4096, 4096)) == b"b" * 4096
    assert not first.readonly


def test_an_extent_is_whole_to_its_last_byte(tier: MemoryTier) -> None:
    tier.open_extent(0)
    tier.view(0, EXTENT_BYTES)[-1] = 7
    assert tier.view(EXTENT_BYTES - 1, 1)[0] == 7
    with pytest.raises(InternalError):
        tier.view(EXTENT_BYTES - 1, 2)


def test_capacity_is_never_exceeded(tier: MemoryTier) -> None:
    assert tier.usable_bytes == 3 * EXTENT_BYTES
    for extent in range(3):
        tier.open_extent(extent)
    with pytest.raises(TierFull):
        tier.open_extent(3)
    tier.close_extent(1)
    tier.open_extent(3)


def test_a_live_view_survives_the_closing_of_its_extent(tier: MemoryTier) -> None:
    tier.open_extent(0)
    view = tier.view(0, 4096)
    view[:] = b"a" * 4096
    tier.close_extent(0)
    assert len(bytes(view)) == 4096
    view[:] = b"b" * 4096


def test_what_is_not_open_cannot_be_used(tier: MemoryTier) -> None:
    with pytest.raises(InternalError):
        tier.view(0, 1)
    with pytest.raises(InternalError):
        tier.close_extent(0)
    tier.open_extent(0)
    with pytest.raises(InternalError):
        tier.open_extent(0)
    tier.close_extent(0)
    with pytest.raises(InternalError):
        tier.view(0, 1)


def test_a_new_extent_shows_nothing_of_an_old_one(tier: MemoryTier) -> None:
    for extent in range(6):
        tier.open_extent(extent)
        view = tier.view(extent * EXTENT_BYTES, EXTENT_BYTES)
        assert not any(bytes(view))
        view[:] = b"s" * EXTENT_BYTES
        tier.close_extent(extent)
