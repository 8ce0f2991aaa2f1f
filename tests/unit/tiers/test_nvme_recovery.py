"""What a start makes of slots that nobody vouches for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_recovery import scan
from kvstore.tiers.nvme_slot import HEADER_BYTES
from tests.unit.tiers.blocks import recovered
from tests.unit.tiers.test_nvme import abandon, fill_more, open_tier, slot_file


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"torn")


def test_half_a_block_is_not_found_where_it_may_be_half(tmp_path: Path) -> None:
    """Behind the last sync only what is whole counts; before it, headers are enough."""
    tier = open_tier(tmp_path, direct=False)
    headers = fill_more(tier, 1)
    tier.sync()
    headers |= fill_more(tier, 2, slots=2)
    # A second sync notes that all before it had arrived.
    tier.forget(next(iter(headers)), headers.pop(next(iter(headers))))
    tier.sync()
    late = fill_more(tier, 3, slots=2)
    torn, whole = late
    file, offset = slot_file(tier, tmp_path, torn)
    spoil(file, offset + HEADER_BYTES + 5000)
    early = next(iter(headers))
    file, offset = slot_file(tier, tmp_path, early)
    spoil(file, offset + HEADER_BYTES + 5000)
    segment = tier._log.where(early)
    assert segment is not None
    settled = segment[0].settled
    assert 0 < settled < segment[0].next
    abandon(tier)
    again = open_tier(tmp_path)
    found = set(recovered(again).values())
    assert late[whole] in found
    assert late[torn] not in found
    assert headers[early] in found
    scanned = {stored.header for stored in scan(again._log.segments[segment[0].number])}
    assert late[torn] not in scanned
    again.close()


@pytest.mark.parametrize("end", [NvmeTier.close, abandon])
def test_however_often_it_starts_there_is_what_there_was(
    tmp_path: Path, end: Callable[[NvmeTier], None]
) -> None:
    """Above all in a segment that was half full: it is not gone on with."""
    tier = open_tier(tmp_path, direct=False)
    headers = fill_more(tier, 1)
    headers |= fill_more(tier, 2, slots=3)
    tier.forget(next(iter(headers)), headers.pop(next(iter(headers))))
    tier.sync()
    for _ in range(4):
        end(tier)
        tier = open_tier(tmp_path, direct=False)
        tier.check_integrity()
        assert set(recovered(tier).values()) == set(headers.values())
        assert sum(s.living for s in tier._log.segments.values()) == len(headers)
        tier.sync()
    tier.close()
