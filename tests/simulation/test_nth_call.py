"""One fault, at the first call, the second, the third ...: no path of the tier's code is
left without one. After each the tier answers with what was stored or not at all, now
and after a restart, and a disk that failed is not used on."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvstore.errors import CorruptBlock, DataUnusable, TierError, TierFailed, TierFull
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.faulty import Crash, Fault, FaultAtCall, FaultyDisk, MemoryDisk
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_index import Index
from tests.unit.tiers.blocks import get, header_of, payload_of, recovered

EXTENT_BYTES = 64 << 10
CAPACITY_BYTES = 4 << 20
BLOCK_BYTES = 5000
LAST = 50

FAULTS = {
    "EIO": (Fault("error", errno.EIO), None),
    "ENOSPC": (Fault("error", errno.ENOSPC), None),
    "short": (Fault("short"), frozenset(("pwritev", "preadv"))),
    "flip": (Fault("flip"), frozenset(("pwritev", "preadv"))),
    "misdirected": (Fault("misdirected"), frozenset(("pwritev", "preadv"))),
    "lost write": (Fault("lost"), frozenset(("pwritev",))),
    "lost sync": (Fault("lost"), frozenset(("fdatasync", "sync_names"))),
    "crash": (Fault("crash"), None),
}


class Work:
    """Stores, reads, forgets and syncs until something stops it; knows what is stored."""

    def __init__(self, home: Path, disk: MemoryDisk) -> None:
        self.home = home
        self.disk = disk
        self.payloads: dict[BlockHeader, bytes] = {}
        self.errors: list[TierError] = []
        self.corrupt = 0
        self._rng = random.Random(1)

    def open(self, plan: FaultAtCall) -> NvmeTier:
        return NvmeTier.open(
            self.home, CAPACITY_BYTES, EXTENT_BYTES, 4096,
            disk=FaultyDisk(self.disk, plan, random.Random(plan.left)),
            open_index=Index.open_trusted,
        )  # fmt: skip

    def run(self, tier: NvmeTier) -> None:
        held = recovered(tier)
        size = tier.slot_bytes(BLOCK_BYTES)
        # One less than there may be: bad places take from the room to work with.
        extents = tier.usable_bytes // EXTENT_BYTES - 1
        there = {number for number, _ in tier.recovered_extents()}
        for extent in range(1, extents + 1):
            if extent not in there:
                self._try(lambda extent=extent: tier.open_extent(extent, size))  # type: ignore[misc]
        slots = EXTENT_BYTES // size
        for number in range(150):
            address = self._rng.randint(1, extents) * EXTENT_BYTES
            address += self._rng.randrange(slots) * size
            if address // EXTENT_BYTES not in tier._log.extents:
                continue
            if address in held:
                self.check(tier, address, held[address])
                tier.forget(address, held.pop(address))
            payload = payload_of(number, BLOCK_BYTES)
            header = header_of(number, payload)
            self.payloads[header] = bytes(payload)
            if self._try(lambda: tier.write(address, header, payload)):  # noqa: B023
                held[address] = header
                self.check(tier, address, header)
            if number % 20 == 19:
                self._try(tier.sync)

    def check(self, tier: NvmeTier, address: int, header: BlockHeader) -> None:
        try:
            assert get(tier, address, header) == self.payloads[header]
        except CorruptBlock:
            self.corrupt += 1
        except TierFailed as error:
            self.errors.append(error)

    def _try(self, work: object) -> bool:
        try:
            work()  # type: ignore[operator]
        except TierError as error:
            self.errors.append(error)
            return False
        return True


@pytest.fixture
def home() -> Iterator[Path]:
    """In memory where that is possible: what LMDB syncs is not what is tried here."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_call_costs_blocks_at_most(name: str, home: Path) -> None:
    fault, calls = FAULTS[name]
    reached = 0
    for n in range(1, LAST + 1):
        disk = MemoryDisk()
        work = Work(home / str(n), disk)
        plan = FaultAtCall(fault, n, calls)
        try:
            tier = work.open(plan)
        except (DataUnusable, Crash):
            reached += 1
        else:
            try:
                work.run(tier)
                tier.check_integrity()
                reached += plan.left <= 0
                if plan.left <= 0:
                    convince(name, work, tier)
            except Crash:
                reached += 1
            tier._log.close()
            tier._index.close()
            tier._home.close()
        disk.crash(random.Random(n))
        again = work.open(FaultAtCall(fault, 0))
        for address, header in recovered(again).items():
            work.check(again, address, header)
        again.check_integrity()
        again.close()
    assert reached >= 40 or name == "lost sync"


def convince(name: str, work: Work, tier: NvmeTier) -> None:
    """The fault was noticed as what it is."""
    if name == "EIO":
        assert not tier.healthy
        assert {type(error) for error in work.errors} == {TierFailed}
    elif name == "ENOSPC":
        assert tier.healthy == (TierFailed not in {type(error) for error in work.errors})
        assert {type(error) for error in work.errors} <= {TierFull, TierFailed}
    else:
        assert tier.healthy
        assert not work.errors
