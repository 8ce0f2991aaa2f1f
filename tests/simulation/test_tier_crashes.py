"""The NVMe tier alone: what was synced before a crash is found after it, every block.

The store may lose blocks, so a model of the store cannot tell whether the tier loses
any. Here nothing fails but the power, again and again, at any call.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvstore.errors import CorruptBlock, DataUnusable
from kvstore.tiers import nvme, nvme_recovery
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.faulty import Crash, FaultyDisk, MemoryDisk, SeededFaults
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_index import Index
from tests.unit.tiers.blocks import aligned, get, header_of, recovered

EXTENT_BYTES = 64 << 10
CAPACITY_BYTES = 4 << 20
SIZES = (3000, 9000)
EXTENTS = 5
SEEDS = 25
CRASHES = 8


class Power:
    def __init__(self, seed: int, home: Path) -> None:
        self.rng = random.Random(seed)
        self.disk = MemoryDisk()
        self.home = home
        self.payloads: dict[BlockHeader, bytes] = {}
        self.durable: set[BlockHeader] = set()
        """Synced, and not forgotten since."""
        self.gone: set[BlockHeader] = set()
        """Forgotten, and synced since."""
        self.kept = 0
        self._number = 0

    def fail(self) -> None:
        """Work until the power fails, then look at what is left."""
        faults = SeededFaults(self.rng, {})
        faults.crash_after = int(self.rng.expovariate(1 / 150))
        tier = None
        try:
            tier = self.open(faults)
            self.verify(tier)
            self.work(tier)
        except (Crash, DataUnusable):
            pass
        if tier is not None:
            tier._log.close()
            tier._index.close()
            tier._home.close()
        self.disk.crash(self.rng)
        if self.rng.random() < 0.2:
            for file in (self.home / "index").iterdir():
                file.unlink()

    def open(self, faults: SeededFaults) -> NvmeTier:
        return NvmeTier.open(
            self.home, CAPACITY_BYTES, EXTENT_BYTES, 4096,
            disk=FaultyDisk(self.disk, faults, self.rng), open_index=Index.open_trusted,
        )  # fmt: skip

    def verify(self, tier: NvmeTier) -> None:
        tier.check_integrity()
        found = {header: address for address, header in recovered(tier).items()}
        assert self.durable <= found.keys(), "what was synced is lost"
        assert not self.gone & found.keys(), "what was forgotten is back"
        for header, address in found.items():
            try:
                assert get(tier, address, header) == self.payloads[header]
            except CorruptBlock:
                assert header not in self.durable, "what was synced is damaged"
        self.kept += len(self.durable)
        # What was found is durable now, or will not be found again.
        tier.sync()
        self.durable = set(found) & self.durable

    def work(self, tier: NvmeTier) -> None:
        rng = self.rng
        held = recovered(tier)
        sizes = dict(tier.recovered_extents())
        # Not all there may be: what was forgotten, but not for good, comes back with a
        # crash, and takes room.
        for extent in range(1, tier.usable_bytes // EXTENT_BYTES - 3):
            if extent not in sizes and len(sizes) < EXTENTS:
                sizes[extent] = tier.slot_bytes(rng.choice(SIZES))
                tier.open_extent(extent, sizes[extent])
        forgotten: set[BlockHeader] = set()
        while True:
            extent = rng.choice(list(sizes))
            slots = EXTENT_BYTES // sizes[extent]
            address = extent * EXTENT_BYTES + rng.randrange(slots) * sizes[extent]
            if address in held:
                self.durable.discard(held[address])
                forgotten.add(held[address])
                tier.forget(address, held.pop(address))
            if rng.random() < 0.9:
                self._number += 1
                nbytes = next(n for n in SIZES if tier.slot_bytes(n) == sizes[extent])
                payload = aligned(nbytes)
                payload[:] = self._number.to_bytes(4, "big") * (nbytes // 4)
                header = header_of(self._number, payload)
                self.payloads[header] = bytes(payload)
                tier.write(address, header, payload)
                held[address] = header
            if rng.random() < 0.05:
                tier.sync()
                self.durable = set(held.values())
                self.gone |= forgotten
                forgotten.clear()


@pytest.fixture
def home() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def test_what_was_synced_is_found_after_any_crash(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flushes between syncs too, with so few blocks.
    monkeypatch.setattr(nvme, "BATCH_ENTRIES", 32)
    # So that a seed runs again as it ran.
    monkeypatch.setattr(nvme_recovery, "SCANNERS", 1)
    kept = 0
    for seed in range(SEEDS):
        power = Power(seed, home / str(seed))
        try:
            for _ in range(CRASHES):
                power.fail()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        kept += power.kept
    assert kept > 20 * SEEDS
