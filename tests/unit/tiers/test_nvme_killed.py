"""The process is killed at any moment: what is found then is exact or a miss."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import CorruptBlock
from kvstore.tiers.nvme import NvmeTier
from tests.unit.tiers.blocks import EXTENT_BYTES, get, payload_of, put, recovered

CAPACITY_BYTES = 8 << 20
MAX_BLOCKS = 1 << 20
BLOCK_BYTES = 3000
EXTENTS = 9


def churn(path: str) -> None:
    """Overwrite slots for ever, saying so now and then; never sync, never close."""
    tier = NvmeTier.open(path, CAPACITY_BYTES, EXTENT_BYTES, MAX_BLOCKS)
    size = tier.slot_bytes(BLOCK_BYTES)
    held = recovered(tier)
    open_already = {extent for extent, _ in tier.recovered_extents()}
    for extent in set(range(1, EXTENTS + 1)) - open_already:
        tier.open_extent(extent, size)
    number = 1 + max([int.from_bytes(h.stored_key, "big") for h in held.values()], default=0)
    slots = [
        extent * EXTENT_BYTES + slot * size
        for extent in range(1, EXTENTS + 1)
        for slot in range(EXTENT_BYTES // size)
    ]
    while True:
        address = slots[number * 7 % len(slots)]
        if address in held:
            tier.forget(address, held.pop(address))
        held[address] = put(tier, address, number, BLOCK_BYTES)
        number += 1
        if number % 100 == 0:
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


@pytest.mark.parametrize("lines", [1, 4, 9])
def test_killed_while_slots_are_used_again(tmp_path: Path, lines: int) -> None:
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import churn; churn({str(tmp_path)!r})"],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": ":".join(sys.path)},
        ) as child:
            assert child.stdout is not None
            said = [child.stdout.readline() for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
        assert all(said), "the child ended by itself"

        tier = NvmeTier.open(tmp_path, CAPACITY_BYTES, EXTENT_BYTES, MAX_BLOCKS)
        exact = 0
        for address, header in recovered(tier).items():
            number = int.from_bytes(header.stored_key, "big")
            try:
                got = get(tier, address, header)
            except CorruptBlock:
                continue
            assert got == bytes(payload_of(number, BLOCK_BYTES))
            exact += 1
        assert exact or lines < 4, "nothing at all survived"
        tier.check_integrity()
        tier.close()
