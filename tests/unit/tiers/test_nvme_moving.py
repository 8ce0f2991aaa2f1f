"""What is not worth another write leaves the log when its segment is emptied."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvstore.errors import CorruptBlock
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme import NvmeTier
from tests.unit.tiers.blocks import EXTENT_BYTES, get, payload_of, put, recovered
from tests.unit.tiers.test_nvme import fill, open_tier


def overwritten(tier: NvmeTier, dropped: set[int], turns: int) -> dict[int, BlockHeader]:
    """Every address in use, blocks stored anew in any order: what is there then."""
    held = fill(tier, tier.usable_bytes // EXTENT_BYTES)
    places = list(held)
    rng = random.Random(1)
    for number in range(turns):
        address = rng.choice(places)
        held[address] = put(tier, address, 10**6 + number)
        dropped.discard(address)
    return {address: header for address, header in held.items() if address not in dropped}


@pytest.mark.parametrize("part", [1, 2])
def test_what_its_owner_forgets_is_not_appended_again(tmp_path: Path, part: int) -> None:
    tier = open_tier(tmp_path / "asks", 6 << 20)
    dropped: set[int] = set()

    def not_worth_moving(addresses: list[int]) -> Iterable[int]:
        dropped.update(addresses[::part])
        return addresses[::part]

    tier.ask_before_moving(not_worth_moving)
    held = overwritten(tier, dropped, 400)
    tier.check_integrity()
    asks_not = open_tier(tmp_path / "asks not", 6 << 20)
    overwritten(asks_not, set(), 400)
    assert tier.wear()["move"] <= asks_not.wear()["move"] * (part - 1) / part
    for address, header in held.items():
        number = int.from_bytes(header.stored_key, "big")
        assert get(tier, address, header) == bytes(payload_of(number))
    gone = next(iter(dropped))
    with pytest.raises(CorruptBlock):
        get(tier, gone, next(iter(held.values())))
    tier.close()
    asks_not.close()
    again = open_tier(tmp_path / "asks", 6 << 20)
    assert sorted(recovered(again).values()) == sorted(held.values())
    again.close()
