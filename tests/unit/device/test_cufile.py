"""Straight reads by cuFile: checksums of what is in the GPU's memory, deliveries that are over,
handles that mean the file they were made for, and nothing left behind, whatever fails."""

from __future__ import annotations

import mmap
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from kvstore.device import cufile, waits
from kvstore.device.adversarial import Temper
from kvstore.device.cuda import CudaDriver
from kvstore.device.cufile import CuFileStraight
from kvstore.errors import DeviceError, DeviceLost, DeviceStuck, DriverTooOld, InternalError
from kvstore.tiers.nvme_disk import Directory, DirectoryFile, direct_io_works, write_all
from tests.unit.device import planting
from tests.unit.device.cupy_standin import Machine
from tests.unit.device.fakes import FakeDriver

SLOTS, SLOT_BYTES = 3, 32 << 10
FILE_BYTES = 1 << 20
LENGTHS = (1, 240, 241, 1024, 4096, 5000, SLOT_BYTES)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(FakeDriver())
    machine.install(monkeypatch)
    return machine


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(FILE_BYTES)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Iterator[DirectoryFile]:
    if not direct_io_works(tmp_path):
        pytest.skip("no O_DIRECT for temporary files")
    made = written(tmp_path, "segment", content)
    yield made
    if made.descriptor is not None:
        made.close()


def written(directory: Path, name: str, content: bytes) -> DirectoryFile:
    made = Directory(directory).create(name, len(content))
    pages = memoryview(mmap.mmap(-1, len(content)))
    pages[:] = content
    write_all(made, [pages], 0)
    return made


def opened(machine: Machine) -> CuFileStraight:
    return CuFileStraight(CudaDriver(0, lambda: 0), SLOTS, SLOT_BYTES)


class Place:
    """Memory that was made to be shared."""

    descriptor = -1

    def __init__(self, machine: Machine, nbytes: int = SLOT_BYTES) -> None:
        self.memory = machine.driver.give_kv_cache(nbytes + 64)
        self.memory[:] = 0xEE
        self.address = self.memory.ctypes.data

    def write(self, offset: int, data: memoryview) -> None: ...
    def write_now(self, offset: int, data: memoryview) -> None: ...
    def free(self) -> None: ...


def nothing_left(machine: Machine, places: int = 0) -> bool:
    driver = machine.driver
    return not (machine.cufile.left or driver.on_host or driver.wrong) and (
        len(driver.on_gpu) == places
    )


@pytest.mark.parametrize("temper", Temper)
@pytest.mark.parametrize("reads", ["", "short"])
def test_blocks_are_read_checked_and_delivered(
    machine: Machine, file: DirectoryFile, content: bytes, temper: Temper, reads: str
) -> None:
    machine.driver._temper = temper
    machine.cufile.reads = reads
    straight, place = opened(machine), Place(machine)
    for number, nbytes in enumerate(LENGTHS):
        slot, offset = number % SLOTS, 4096 * (1 + number)
        part = content[offset : offset + nbytes]
        checksum = straight.fill(slot, file, offset, nbytes)
        assert checksum == xxhash.xxh3_64_intdigest(part)
        place.memory[:] = 0xEE
        straight.deliver(slot, place, 32, nbytes)
        assert place.memory[32 : 32 + nbytes].tobytes() == part
        assert set(place.memory[:32].tolist() + place.memory[32 + nbytes :].tolist()) == {0xEE}
    assert machine.cufile.registered == 1, "a file is registered once"
    straight.close()
    straight.close()
    assert nothing_left(machine, places=1)


def test_what_arrives_damaged_has_another_checksum(
    machine: Machine, file: DirectoryFile, content: bytes
) -> None:
    machine.cufile.spoils = True
    straight = opened(machine)
    assert straight.fill(0, file, 0, 5000) != xxhash.xxh3_64_intdigest(content[:5000])
    straight.close()


def test_threads_each_with_a_slot_do_not_meet(
    machine: Machine, file: DirectoryFile, content: bytes
) -> None:
    straight = opened(machine)
    places = [Place(machine) for _ in range(SLOTS)]

    def read(slot: int) -> bool:
        draws = random.Random(slot)
        for _ in range(10):
            nbytes, offset = draws.randint(1, SLOT_BYTES), 4096 * draws.randint(0, 200)
            part = content[offset : offset + nbytes]
            if straight.fill(slot, file, offset, nbytes) != xxhash.xxh3_64_intdigest(part):
                return False
            straight.deliver(slot, places[slot], 0, nbytes)
            if places[slot].memory[:nbytes].tobytes() != part:
                return False
        return True

    with ThreadPoolExecutor(SLOTS) as threads:
        assert all(threads.map(read, range(SLOTS)))
    straight.close()
    assert nothing_left(machine, places=SLOTS)


def test_a_handle_never_outlives_its_descriptor(
    machine: Machine, file: DirectoryFile, content: bytes, tmp_path: Path
) -> None:
    """Whose number the next file has."""
    straight = opened(machine)
    straight.fill(0, file, 0, 4096)
    number = file.descriptor
    file.close()
    other = written(tmp_path, "other", content[::-1])
    assert other.descriptor == number
    assert straight.fill(0, other, 0, 4096) == xxhash.xxh3_64_intdigest(content[::-1][:4096])
    with pytest.raises(DeviceError, match="O_DIRECT"):
        straight.fill(0, file, 0, 4096)
    straight.close()
    other.close()
    assert nothing_left(machine)


def test_gpus_share_the_driver_and_the_handles(machine: Machine, file: DirectoryFile) -> None:
    one, other = opened(machine), opened(machine)
    one.fill(0, file, 0, 4096)
    other.fill(0, file, 0, 4096)
    assert machine.cufile.registered == 1
    assert machine.cufile.left.count("driver") == 1
    one.close()
    other.fill(0, file, 0, 4096)
    other.close()
    assert nothing_left(machine)
    again = opened(machine)
    again.fill(0, file, 0, 4096)
    again.close()
    assert nothing_left(machine)


def test_a_thread_speaks_to_each_gpu_in_turn(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = sys.modules["cupy"].cuda.runtime
    spoken: list[int] = []
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(runtime, "setDevice", spoken.append)

    def speak() -> None:
        first, second = CudaDriver(0, lambda: 0), CudaDriver(1, lambda: 0)
        spoken.clear()
        for driver in (first, first, second, first):
            driver.enter()

    thread = threading.Thread(target=speak)
    thread.start()
    thread.join()
    assert spoken == [0, 1, 0]


@pytest.mark.parametrize("reads", ["nothing", "error", "untold"])
def test_what_is_not_read_straight_says_nothing_of_the_drive(
    machine: Machine, file: DirectoryFile, content: bytes, reads: str
) -> None:
    straight = opened(machine)
    machine.cufile.reads = reads
    with pytest.raises(DriverTooOld if reads == "untold" else DeviceError):
        straight.fill(0, file, 0, 5000)
    machine.cufile.reads = ""
    assert straight.fill(0, file, 0, 5000) == xxhash.xxh3_64_intdigest(content[:5000])
    straight.close()
    assert nothing_left(machine)


def test_a_file_that_is_cached_is_not_read_straight(machine: Machine, tmp_path: Path) -> None:
    cached = Directory(tmp_path, direct=False).create("cached", 1 << 16)
    straight = opened(machine)
    with pytest.raises(DeviceError, match="O_DIRECT"):
        straight.fill(0, cached, 0, 4096)
    straight.close()
    cached.close()
    assert nothing_left(machine)


def test_slots_have_room_for_the_last_page(
    machine: Machine, file: DirectoryFile, content: bytes
) -> None:
    straight = CuFileStraight(CudaDriver(0, lambda: 0), 2, 5000)
    for slot in (1, 0):
        assert straight.fill(slot, file, 0, 5000) == xxhash.xxh3_64_intdigest(content[:5000])
    straight.close()
    assert nothing_left(machine)


def test_a_block_that_is_too_large_is_a_bug(machine: Machine, file: DirectoryFile) -> None:
    straight = opened(machine)
    with pytest.raises(InternalError):
        straight.fill(0, file, 0, SLOT_BYTES + 1)
    straight.close()


def test_without_the_kernels_there_are_no_straight_reads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaDriver, "_compile", lambda *_: False)
    with pytest.raises(DeviceError, match="compiled"):
        opened(machine)
    assert nothing_left(machine)


@pytest.mark.parametrize("call", ["driver_open", "buf_register"])
def test_where_cufile_refuses_the_reason_is_told(machine: Machine, call: str) -> None:
    machine.cufile.refuses = call
    with pytest.raises(DeviceError, match=f"{call}: not supported"):
        opened(machine)
    assert nothing_left(machine)
    machine.cufile.refuses = ""
    opened(machine).close()
    assert nothing_left(machine)


@pytest.mark.parametrize("call", ["allocate", "allocate_host", "new_stream"])
def test_a_gpu_without_room_is_left_as_it_was(machine: Machine, call: str) -> None:
    driver = CudaDriver(0, lambda: 0)
    machine.driver.refuses.add(call)
    with pytest.raises(DeviceError):
        CuFileStraight(driver, SLOTS, SLOT_BYTES)
    assert nothing_left(machine)


def test_a_file_that_cufile_does_not_take_is_asked_again(
    machine: Machine, file: DirectoryFile, content: bytes
) -> None:
    straight = opened(machine)
    machine.cufile.refuses = "handle_register"
    with pytest.raises(DeviceError, match="not supported"):
        straight.fill(0, file, 0, 4096)
    machine.cufile.refuses = ""
    assert straight.fill(0, file, 0, 4096) == xxhash.xxh3_64_intdigest(content[:4096])
    straight.close()
    assert nothing_left(machine)


def fails_cleanly() -> bool:
    """Whether nothing is under way any more once it is said that a delivery has failed, which had
    begun."""
    driver = FakeDriver()
    straight, place = faked(driver), driver.give_kv_cache(SLOT_BYTES)
    copy = driver.copy

    def copy_and_fail(*arguments: Any) -> None:
        copy(*arguments)
        raise DeviceError("another copy cannot begin")

    driver.copy = copy_and_fail  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        straight.deliver(0, made_of(place), 0, 4096)
    place[:] = 0x22
    driver.settle()
    straight.close()
    return set(place.tolist()) == {0x22} and not driver.wrong


def test_what_fails_half_way_is_over_when_it_is_said() -> None:
    assert fails_cleanly()


@pytest.mark.parametrize("how", ["cannot be asked", "does not end"])
def test_copies_that_cannot_be_waited_for_keep_their_memory(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "PATIENCE_S", 0.02)
    driver = FakeDriver()
    straight, place = faked(driver), driver.give_kv_cache(SLOT_BYTES)
    driver.refuses |= {"!is_over"} if how == "cannot be asked" else set()
    driver.hangs = how == "does not end"
    with pytest.raises(DeviceStuck):
        straight.deliver(0, made_of(place), 0, 4096)
    driver.refuses.clear()
    driver.hangs = False
    straight.close()
    assert len(driver.on_gpu) == 3
    driver.settle()
    assert not driver.wrong


def test_a_gpu_that_does_not_answer_is_not_asked_for_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who does so waits for all that it is at, and others wait for him."""
    monkeypatch.setattr(waits, "PATIENCE_S", 0.02)
    driver = FakeDriver()
    straight = faked(driver)
    driver.hangs = True
    with pytest.raises(DeviceStuck):
        straight.close()
    straight.close()
    assert "free" not in driver.calls
    driver.hangs = False
    driver.settle()
    assert not driver.wrong


@pytest.mark.parametrize("slot_bytes", [1, 5000, SLOT_BYTES, 2 << 20, 16 << 20])
def test_what_slots_take_is_told_beforehand(slot_bytes: int) -> None:
    driver = FakeDriver()
    straight = faked(driver, slots=2, slot_bytes=slot_bytes)
    taken = sum(len(memory) for memory in driver.on_gpu.values())
    assert taken == cufile.bytes_taken(2, slot_bytes)
    straight.close()
    assert not driver.on_gpu


def test_slots_that_come_and_go_leave_nothing_with_the_files(
    machine: Machine, file: DirectoryFile
) -> None:
    for _ in range(3):
        straight = opened(machine)
        straight.fill(0, file, 0, 4096)
        straight.close()
    assert len(file._before_close) == 1
    file.close()
    assert not cufile._library._followed
    assert nothing_left(machine)


def test_a_driver_that_takes_its_time_to_open_keeps_no_file_from_being_closed(
    machine: Machine, file: DirectoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a drive's thread, which others wait for."""
    straight = opened(machine)
    straight.fill(0, file, 0, 4096)
    straight.close()
    opens, may_open, driver_open = threading.Event(), threading.Event(), machine.cufile.driver_open

    def slowly() -> None:
        opens.set()
        assert may_open.wait(60)
        driver_open()

    monkeypatch.setattr(machine.cufile, "driver_open", slowly)
    with ThreadPoolExecutor(2) as threads:
        opening = threads.submit(opened, machine)
        assert opens.wait(60)
        closing = threads.submit(file.close)
        try:
            closing.result(timeout=20)
        finally:
            may_open.set()
        opening.result().close()
    assert nothing_left(machine)


def test_a_process_that_stood_still_does_not_take_its_gpu_for_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waits, "PATIENCE_S", 0.02)
    driver = FakeDriver()
    straight, place = faked(driver), driver.give_kv_cache(SLOT_BYTES)
    driver.hangs = True
    is_over = driver.is_over

    def stand_still(stream: Any) -> bool:
        before = is_over(stream)
        time.sleep(0.05)
        driver.hangs = False
        driver.settle()
        return before

    monkeypatch.setattr(driver, "is_over", stand_still)
    straight.deliver(0, made_of(place), 0, 4096)
    straight.close()


def test_a_lost_gpu_is_lost(machine: Machine, file: DirectoryFile) -> None:
    straight, place = opened(machine), Place(machine)
    straight.fill(0, file, 0, 4096)
    machine.driver.fails_after = 0
    with pytest.raises(DeviceLost):
        straight.deliver(0, place, 0, 4096)
    straight.close()
    assert not machine.cufile.left


def made_of(memory: Any) -> Any:
    return SimpleNamespace(address=memory.ctypes.data)


class _NoFile:
    cuFileError = RuntimeError

    def buf_register(self, *_: int) -> None: ...
    def buf_deregister(self, *_: int) -> None: ...


def faked(driver: FakeDriver, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> CuFileStraight:
    """Over a driver, with slots that hold something already."""
    made = CuFileStraight.__new__(CuFileStraight)
    library = SimpleNamespace(open=_NoFile, close=lambda: None, handle=lambda file: 0)
    real, cufile._library = cufile._library, library  # type: ignore[assignment]
    try:
        made.__init__(driver, slots, slot_bytes)  # type: ignore[misc]
    finally:
        cufile._library = real
    return made


NAMES = ("_wait_in_time",)


def right(machine: Machine, file: DirectoryFile, content: bytes) -> bool:
    """Whether checksums are those of what was read, and deliveries are there."""
    good = True
    for seed in range(3):
        machine.driver._random.seed(seed)
        straight = opened(machine)
        for number, nbytes in enumerate((5000, 200, 4096)):
            place = Place(machine)
            part = content[4096 * number :][:nbytes]
            good &= straight.fill(0, file, 4096 * number, nbytes) == xxhash.xxh3_64_intdigest(part)
            straight.deliver(0, place, 0, nbytes)
            good &= place.memory[:nbytes].tobytes() == part
            machine.driver.settle()
        straight.close()
    return good and fails_cleanly()


def test_with_all_its_waits_it_is_right(
    machine: Machine, file: DirectoryFile, content: bytes
) -> None:
    assert right(machine, file, content)


@pytest.mark.parametrize("line", planting.waits(waits, *NAMES))
def test_without_any_one_wait_it_is_not(
    machine: Machine,
    file: DirectoryFile,
    content: bytes,
    line: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = planting.without(waits, line, NAMES, tmp_path)
    monkeypatch.setattr(cufile, "waited_for", planted.waited_for)
    assert not right(machine, file, content)


@pytest.mark.parametrize("line", planting.with_waits(cufile, "_waited_for"))
def test_without_waiting_for_a_checksum_or_a_copy_it_is_not(
    machine: Machine,
    file: DirectoryFile,
    content: bytes,
    line: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the places where a stream is waited for, this one does not."""

    def some(straight: CuFileStraight, slot: int) -> Any:
        waiting = sys._getframe(1).f_lineno != line
        return real(straight, slot) if waiting else nullcontext(straight._streams[slot])

    real = CuFileStraight._waited_for
    monkeypatch.setattr(CuFileStraight, "_waited_for", some)
    assert not right(machine, file, content)


def test_the_waits_are_found() -> None:
    assert len(planting.waits(waits, *NAMES)) == 2
    assert len(planting.with_waits(cufile, "_waited_for")) == 2
