"""A disk behind a model is never faster than what is modelled, nor slower than it must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from kvstore.clock import ManualClock
from kvstore.drive import Drive
from kvstore.parts import Device, Gpu, Ssd
from kvstore.tiers.faulty import MemoryDisk
from kvstore.tiers.modelled import Modelled, ModelledDisk
from kvstore.types import ALIGNMENT

READS_1_GBPS = Ssd("ssd", 1.0, 1.0, 0.5, 1.0, read_us=100.0, write_us=10.0, depth=4)


class Rig:
    """A model whose waits move the clock."""

    def __init__(self, device: Device | None = None) -> None:
        self.clock = ManualClock()
        self.model = Modelled(device or Device(READS_1_GBPS, None), self.clock, self.pause)
        self.pauses = 0

    def pause(self, seconds: float) -> None:
        self.pauses += 1
        self.clock.advance_ms(math.ceil(seconds * 1e9) / 1e6)

    def taken_us(self, move: Callable[..., object], nbytes: int, real_us: float = 0.0) -> float:
        began_ns = self.clock.now_ns()
        move(nbytes, lambda: self.clock.advance_ms(real_us / 1e3))
        return (self.clock.now_ns() - began_ns) / 1e3


def test_a_request_takes_its_latency_and_its_bytes() -> None:
    rig = Rig()
    assert rig.taken_us(rig.model.reading, 1_000_000) == pytest.approx(1100, abs=0.01)
    assert rig.taken_us(rig.model.writing, 1_000_000) == pytest.approx(2010, abs=0.01)
    assert rig.taken_us(rig.model.writing, 0) == pytest.approx(10, abs=0.01)


def test_what_the_disk_takes_itself_is_part_of_that() -> None:
    rig = Rig()
    assert rig.taken_us(rig.model.reading, 1_000_000, real_us=700) == pytest.approx(1100, abs=0.01)
    assert rig.taken_us(rig.model.reading, 1_000_000, real_us=5000) == 5000
    assert rig.pauses == 1


def test_who_waits_too_long_is_not_slowed_down_again() -> None:
    rig = Rig()
    rig.taken_us(rig.model.reading, 1_000_000, real_us=5000)
    assert rig.taken_us(rig.model.reading, 1_000_000) == pytest.approx(1100, abs=0.01)


def test_one_that_comes_meanwhile_takes_its_share() -> None:
    rig = Rig()
    inner: list[float] = []

    def another() -> None:
        if not inner:
            inner.append(0.0)
            inner[0] = rig.taken_us(rig.model.reading, 1_000_000)

    began_ns = rig.clock.now_ns()
    rig.model.reading(1_000_000, another)
    # Both at once: two megabytes, and one latency beside the other.
    assert inner == [pytest.approx(2100, abs=0.01)]
    assert (rig.clock.now_ns() - began_ns) / 1e3 == pytest.approx(2100, abs=0.01)


def test_nothing_is_read_faster_than_goes_on_to_the_gpu() -> None:
    gpu = Gpu("gpu", 1.0, 1.0, 1.0, host_gbps=0.5)
    rig = Rig(Device(READS_1_GBPS, gpu))
    assert rig.taken_us(rig.model.reading, 1_000_000) == pytest.approx(2100, abs=0.01)
    assert rig.taken_us(rig.model.writing, 1_000_000) == pytest.approx(2010, abs=0.01)


def test_more_than_the_depth_waits_its_turn() -> None:
    drive = Drive(depth=2)
    requests = [drive.begin(100.0, 0.0) for _ in range(5)]
    assert [drive.ends_ns(request) for request in requests] == [100, 100, 200, 200, 300]
    drive.advance(200.0)
    assert [request.over for request in requests] == [True] * 4 + [False]


def test_a_large_one_does_not_hold_up_a_small_one() -> None:
    drive = Drive(depth=8)
    large, small = drive.begin(0.0, 1000.0), drive.begin(0.0, 10.0)
    assert drive.ends_ns(small) == pytest.approx(20)
    assert drive.ends_ns(large) == pytest.approx(1010)


def test_a_drive_that_hangs_goes_on_where_it_was() -> None:
    drive = Drive(depth=8)
    request = drive.begin(50.0, 50.0)
    drive.advance(60.0)
    drive.speed = 0.0
    assert drive.ends_ns(request) == drive.next_ns() == math.inf
    drive.advance(1060.0)
    drive.speed = 0.5
    assert drive.ends_ns(request) == pytest.approx(1060 + 80)


def test_a_clock_that_goes_back_stands_still() -> None:
    drive = Drive(depth=1, now_ns=1000.0)
    request = drive.begin(100.0, 0.0)
    drive.advance(0.0)
    assert drive.ends_ns(request) == 1100


def test_bytes_are_those_of_the_disk_behind() -> None:
    rig, disk = Rig(), MemoryDisk()
    behind = ModelledDisk(disk, rig.model)
    file = behind.create("a", 2 * ALIGNMENT)
    assert file.pwritev([memoryview(b"x" * ALIGNMENT)], ALIGNMENT) == ALIGNMENT
    file.fdatasync()
    behind.sync_names()
    into = memoryview(bytearray(ALIGNMENT))
    again = behind.open("a")
    assert again.nbytes == 2 * ALIGNMENT
    assert again.preadv([into], ALIGNMENT) == ALIGNMENT
    assert bytes(into) == b"x" * ALIGNMENT
    assert rig.pauses == 3
    behind.remove("a")
    assert behind.names() == disk.names() == []


def test_a_failure_is_not_held_back() -> None:
    rig = Rig()

    def fail() -> None:
        raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        rig.model.reading(1_000_000, fail)
    assert rig.pauses == 0
