"""The faults themselves: a simulation on a disk that cannot fail would prove nothing."""

from __future__ import annotations

import errno
import random

import pytest

from kvstore.tiers.faulty import (
    SECTOR_BYTES,
    Crash,
    Fault,
    FaultAtCall,
    FaultyDisk,
    MemoryDisk,
    SeededFaults,
)
from kvstore.tiers.nvme_disk import DiskFile

PAGE = 4096
OLD, NEW = b"o" * PAGE, b"n" * PAGE


def view(data: bytes) -> list[memoryview]:
    return [memoryview(bytearray(data))]


def read(file: DiskFile, offset: int = 0, nbytes: int = PAGE) -> bytes:
    into = bytearray(nbytes)
    file.preadv([memoryview(into)], offset)
    return bytes(into)


def test_a_crash_tears_what_was_not_synced_by_sectors_and_nothing_else() -> None:
    seen = set()
    for seed in range(40):
        disk = MemoryDisk()
        file = disk.create("f", 4 * PAGE)
        disk.sync_names()
        file.pwritev(view(OLD), 0)
        file.fdatasync()
        file.pwritev(view(NEW), 0)
        assert read(file) == NEW
        disk.crash(random.Random(seed))
        sectors = [read(file)[at : at + SECTOR_BYTES] for at in range(0, PAGE, SECTOR_BYTES)]
        assert {*sectors} <= {OLD[:SECTOR_BYTES], NEW[:SECTOR_BYTES]}
        seen.add("torn" if len({*sectors}) == 2 else sectors[0][:1].decode())
        assert read(file, PAGE) == bytes(PAGE)
    assert seen == {"torn", "o", "n"}


def test_a_crash_reorders_writes_to_one_place() -> None:
    kept = set()
    for seed in range(60):
        disk = MemoryDisk()
        file = disk.create("f", PAGE)
        disk.sync_names()
        for data in (b"1", b"2"):
            file.pwritev(view(data * PAGE), 0)
        disk.crash(random.Random(seed))
        kept.add(read(disk.open("f"), nbytes=1))
    assert kept == {b"\0", b"1", b"2"}


def test_names_not_synced_may_be_gone_or_back_after_a_crash() -> None:
    outcomes = set()
    for seed in range(40):
        disk = MemoryDisk()
        disk.create("old", PAGE)
        disk.create("removed", PAGE)
        disk.sync_names()
        disk.remove("removed")
        disk.create("new", PAGE)
        disk.crash(random.Random(seed))
        assert "old" in disk.names()
        outcomes.add(frozenset(disk.names()) - {"old"})
    assert len(outcomes) == 4


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("pwritev", "lost"), ("pwritev", "short"), ("pwritev", "misdirected"), ("pwritev", "flip"),
        ("preadv", "short"), ("preadv", "misdirected"), ("preadv", "flip"),
    ],
)  # fmt: skip
def test_each_fault_spoils_just_the_call_it_was_meant_for(call: str, kind: str) -> None:
    memory = MemoryDisk()
    plan = FaultAtCall(Fault(kind), 2, frozenset((call,)))
    file = FaultyDisk(memory, plan, random.Random(3)).create("f", 16 * PAGE)
    pattern = random.Random(1).randbytes(2 * PAGE)
    results, contents = [], []
    for _ in range(3):
        results.append(file.pwritev([memoryview(bytearray(pattern))], 8 * PAGE))
        if call == "preadv":
            into = memoryview(bytearray(2 * PAGE))
            results[-1] = file.preadv([into], 8 * PAGE)
            contents.append(bytes(into))
        else:
            contents.append(read(memory.files["f"], 8 * PAGE, 2 * PAGE))
            memory.files["f"].pwritev(view(bytes(2 * PAGE)), 8 * PAGE)
    assert (results[0], results[2]) == (2 * PAGE, 2 * PAGE)
    assert contents[0] == contents[2] == pattern
    assert contents[1] != pattern
    assert results[1] == (PAGE if kind == "short" else 2 * PAGE)


def test_errors_delays_lost_syncs_and_crashes_come_when_told() -> None:
    memory = MemoryDisk()
    file = memory.create("f", PAGE)
    memory.sync_names()
    slept: list[float] = []

    def disk(fault: Fault) -> DiskFile:
        plan = FaultAtCall(fault, 1, frozenset(("pwritev", "fdatasync")))
        return FaultyDisk(memory, plan, random.Random(1), pause=slept.append).open("f")

    with pytest.raises(OSError, match="space") as caught:
        disk(Fault("error", errno.ENOSPC)).pwritev(view(NEW), 0)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(Crash):
        disk(Fault("crash")).pwritev(view(NEW), 0)
    assert read(file) == bytes(PAGE)
    disk(Fault("delay", seconds=3.0)).pwritev(view(NEW), 0)
    assert slept == [3.0]
    disk(Fault("lost")).fdatasync()
    memory.crash(random.Random(2))
    assert read(memory.open("f")) != NEW


def test_seeded_faults_come_about_as_often_as_they_should() -> None:
    faults = SeededFaults(random.Random(1), {"preadv": {"flip": 0.2, "short": 0.1}})
    drawn = [faults("preadv") for _ in range(5000)]
    assert faults("pwritev") is None
    assert 800 < sum(f == Fault("flip") for f in drawn) < 1200
    assert 350 < sum(f == Fault("short") for f in drawn) < 650
    faults.crash_after = 2
    assert [faults("create"), faults("create")] == [None, None]
    assert faults("create") == Fault("crash")
