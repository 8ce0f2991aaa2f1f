"""A drive is taken for one that hangs by a call that does not come back, and by nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvstore.clock import ManualClock
from kvstore.tiers.faulty import Fault, FaultyDisk, MemoryDisk
from kvstore.tiers.nvme_calls import DATA_NS, UPKEEP_NS, Calls, WatchedDisk

MS = 1_000_000


def disk_of(clock: ManualClock, during: Callable[[], None]) -> tuple[Calls, WatchedDisk]:
    """`during`: what happens while it is asked something."""
    behind = FaultyDisk(
        MemoryDisk(),
        lambda call: Fault("delay", seconds=1.0),
        random.Random(1),
        pause=lambda seconds: during(),
    )
    calls = Calls(clock)
    return calls, WatchedDisk(behind, calls)


@pytest.mark.parametrize(
    ("call", "patience_ns"),
    [
        ("create", UPKEEP_NS),
        ("sync_names", UPKEEP_NS),
        ("fdatasync", UPKEEP_NS),
        ("pwritev", DATA_NS),
        ("preadv", DATA_NS),
    ],
)
def test_each_call_is_waited_for_as_long_as_it_may_take_and_no_longer(
    call: str, patience_ns: int
) -> None:
    clock = ManualClock()
    seen: list[bool] = []

    def during() -> None:
        for milliseconds in (patience_ns // MS - 1, 1):
            clock.advance_ms(milliseconds)
            seen.append(calls.overdue())

    calls, disk = disk_of(clock, during)
    if call == "create":
        disk.create("name", 4096)
    elif call == "sync_names":
        disk.sync_names()
    else:
        file = disk.create("name", 4096)
        seen.clear()
        buffers = [memoryview(bytearray(4096))]
        arguments = () if call == "fdatasync" else (buffers, 0)
        getattr(file, call)(*arguments)
    assert seen == [False, True]
    assert not calls.overdue(), "it has come back"


def test_a_call_that_fails_has_come_back() -> None:
    clock = ManualClock()
    calls = Calls(clock)
    with pytest.raises(ZeroDivisionError), calls.under_way(DATA_NS):
        raise ZeroDivisionError
    clock.advance_ms(DATA_NS // MS)
    assert not calls.overdue()
