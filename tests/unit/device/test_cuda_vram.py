"""Memory that is shared through CUDA's driver: bytes that are there when they are said to be,
and nothing left behind, whichever call fails."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.device.cuda import CudaDriver
from kvstore.device.cuda_vram import CudaVram
from kvstore.errors import DeviceError, DeviceFull, DeviceLost, DeviceStuck, DriverTooOld
from kvstore.tiers.vram import VramArena
from kvstore.types import align_up
from tests.unit.descriptors import open_descriptors
from tests.unit.device.cupy_standin import Machine
from tests.unit.device.fakes import FakeDriver
from tests.unit.tiers.blocks import BLOCK_BYTES, payload_of, put
from tests.unit.tiers.test_nvme import open_tier

NBYTES = 1 << 16
LEFT = b"\xab"
"""By who had the memory before."""
DATA = bytes(range(256)) * (NBYTES // 256)
READ, BOTH = 1, 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED = 0x10


class Memory:
    """The driver's calls for it, over memfds. `fails`: by call, the status that it answers."""

    def __init__(self, machine: Machine) -> None:
        self.fails: dict[str, int] = {}
        self.supported = True
        self.handles: set[int] = set()
        self.reserved: set[int] = set()
        self.mapped: set[int] = set()
        self.allowed: dict[int, int] = {}
        self._machine = machine

    def install(self) -> None:
        driver = sys.modules["cuda.bindings"].driver
        names = ("CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
                 "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")  # fmt: skip
        driver.CUdevice_attribute = SimpleNamespace(**dict.fromkeys(names, 0))
        driver.CUmemAllocationHandleType = SimpleNamespace(
            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR="descriptor"
        )
        driver.CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
        driver.CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
        driver.CUmemAllocationGranularity_flags = SimpleNamespace(
            CU_MEM_ALLOC_GRANULARITY_MINIMUM=0
        )
        driver.CUmemAccess_flags = SimpleNamespace(
            CU_MEM_ACCESS_FLAGS_PROT_READ=READ, CU_MEM_ACCESS_FLAGS_PROT_READWRITE=BOTH
        )
        driver.CUmemAllocationProp = lambda: SimpleNamespace(location=SimpleNamespace())
        driver.CUmemAccessDesc = lambda: SimpleNamespace(location=SimpleNamespace())
        for name in dir(self):
            if name.startswith("cu"):
                setattr(driver, name, self._call(name))

    def _call(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            status = self.fails.get(name, 0)
            if status:
                return (status, None, None)
            answer = getattr(self, name)(*arguments)
            return (0,) if answer is None else (0, *answer)

        return call

    def cuDeviceGet(self, ordinal: int) -> tuple[int]:
        return (ordinal,)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int]:
        return (int(self.supported),)

    def cuDeviceGetCount(self) -> tuple[int]:
        return (3,)

    def cuDeviceGetUuid(self, device: int) -> tuple[Any]:
        return (SimpleNamespace(bytes=bytes(range(device, device + 16))),)

    def cuDeviceCanAccessPeer(self, device: int, other: int) -> tuple[int]:
        return (int((device, other) == (0, 1)),)

    def cuMemGetAllocationGranularity(self, properties: Any, which: int) -> tuple[int]:
        assert properties.location.id == 0
        return (mmap.PAGESIZE,)

    def cuMemGetInfo(self) -> tuple[int, int]:
        return 1000, 2000

    def cuMemCreate(self, nbytes: int, properties: Any, flags: int) -> tuple[int]:
        assert properties.requestedHandleTypes == "descriptor"
        handle = os.memfd_create("vram")
        os.write(handle, LEFT * nbytes)
        self.handles.add(handle)
        return (handle,)

    def cuMemExportToShareableHandle(self, handle: int, kind: str, flags: int) -> tuple[int]:
        return (os.dup(handle),)

    def cuMemImportFromShareableHandle(self, descriptor: int, kind: str) -> tuple[int]:
        handle = os.dup(descriptor)
        self.handles.add(handle)
        return (handle,)

    def cuMemRelease(self, handle: int) -> None:
        self.handles.remove(handle)
        os.close(handle)

    def cuMemAddressReserve(self, nbytes: int, alignment: int, at: int, flags: int) -> tuple[int]:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, nbytes, 0, private, -1, 0)
        self.reserved.add(address)
        return (address,)

    def cuMemAddressFree(self, address: int, nbytes: int) -> None:
        assert address not in self.mapped
        self.reserved.remove(address)
        _libc.munmap(address, nbytes)

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> None:
        both = mmap.PROT_READ | mmap.PROT_WRITE
        _libc.mmap(address, nbytes, both, mmap.MAP_SHARED | _FIXED, handle, 0)
        self.mapped.add(address)
        self._machine.driver.on_gpu[address] = nbytes

    def cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], count: int) -> None:
        self.allowed[address] = access[0].flags

    def cuMemUnmap(self, address: int, nbytes: int) -> None:
        self.mapped.remove(address)
        del self._machine.driver.on_gpu[address]

    def cuMemcpyHtoDAsync(self, to: int, from_: int, nbytes: int, stream: int) -> None:
        assert self.allowed[max(each for each in self.mapped if each <= to)] == BOTH
        driver = self._machine.driver
        with driver._lock:
            driver._put(self._machine.stream(stream), lambda: ctypes.memmove(to, from_, nbytes))

    def cuMemsetD8Async(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        driver = self._machine.driver
        with driver._lock:
            driver._put(self._machine.stream(stream), lambda: ctypes.memset(address, byte, nbytes))

    @property
    def left(self) -> tuple[int, int, int]:
        return len(self.handles), len(self.reserved), len(self.mapped)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    machine = Machine(FakeDriver())
    machine.install(monkeypatch)
    memory = Memory(machine)
    memory.install()
    return memory


def opened(memory: Memory) -> CudaVram:
    return CudaVram(CudaDriver(0, lambda: 0, compiles=False))


def test_what_is_written_and_waited_for_is_seen_by_who_opens_it(memory: Memory) -> None:
    server, worker = opened(memory), opened(memory)
    assert server.name == worker.name == "GPU-000102030405060708090a0b0c0d0e0f"
    assert server.free_bytes() == 1000
    before = open_descriptors()
    made = server.make(NBYTES)
    made.write(0, memoryview(DATA)[:4096])
    made.write(4096, memoryview(DATA)[4096:])
    server.finish()
    theirs = worker.open(made.descriptor, NBYTES)
    assert memory.allowed[theirs.address] == READ
    assert ctypes.string_at(theirs.address, NBYTES) == DATA
    made.free()
    made.free()
    assert ctypes.string_at(theirs.address, NBYTES) == DATA, "it lasts for who has it open"
    theirs.close()
    theirs.close()
    assert memory.left == (0, 0, 0)
    assert open_descriptors() == before


def test_what_is_written_now_is_there_and_leaves_others_alone(memory: Memory) -> None:
    """Beside what was only started, whose bytes stay the device's."""
    server = opened(memory)
    made = server.make(NBYTES)
    made.write(0, memoryview(DATA)[:4096])
    made.write_now(4096, memoryview(DATA)[4096:8192])
    assert ctypes.string_at(made.address + 4096, 4096) == DATA[4096:8192]
    memory.fails = {"cuMemcpyHtoDAsync": 1}
    with pytest.raises(DeviceError):
        made.write_now(0, memoryview(DATA)[:4096])
    memory.fails = {}
    server.finish()
    assert ctypes.string_at(made.address, 8192) == DATA[:8192]
    made.free()


def test_a_copy_that_cannot_be_waited_for_is_said_to_be_stuck(memory: Memory) -> None:
    server = opened(memory)
    made = server.make(NBYTES)
    memory._machine.driver.refuses |= {"!is_over"}
    with pytest.raises(DeviceStuck):
        made.write_now(0, memoryview(DATA))
    memory._machine.driver.refuses.clear()
    made.free()


def test_a_block_on_a_drive_ends_where_another_process_sees_it(
    memory: Memory, tmp_path: Path
) -> None:
    """All that is real, but for CUDA and cuFile."""
    tier = open_tier(tmp_path)
    if not tier.direct:
        pytest.skip("no O_DIRECT for temporary files")
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    header = put(tier, 0, 7)
    arena = VramArena(opened(memory), 1 << 18)
    straight = arena.vram.straight(2, align_up(BLOCK_BYTES))
    arena.open_extent(1)
    tier.read_straight(0, header, partial(straight.fill, 1))
    assert arena.deliver(SimpleNamespace(address=(1 << 18) + 4096), straight, 1, BLOCK_BYTES)
    descriptor = arena.extent_fd(1)
    assert descriptor is not None
    theirs = opened(memory).open(descriptor, 1 << 18)
    seen = ctypes.string_at(theirs.address, 1 << 18)
    assert seen[4096:].startswith(bytes(payload_of(7)) + b"\0")
    assert not any(seen[:4096])
    cufile = memory._machine.cufile
    cufile.spoils = True
    with pytest.raises(DeviceError, match="not what the drive holds"):
        tier.read_straight(0, header, partial(straight.fill, 1))
    tier.close()
    theirs.close()
    straight.close()
    arena.close()
    assert memory.left == (0, 0, 0)
    assert not memory._machine.driver.wrong
    assert not cufile.left


def test_memory_that_was_anothers_is_empty_before_anybody_opens_it(memory: Memory) -> None:
    made = opened(memory).make(NBYTES)
    theirs = opened(memory).open(made.descriptor, NBYTES)
    assert ctypes.string_at(theirs.address, NBYTES) == bytes(NBYTES)
    theirs.close()
    made.free()


def name_of(device: int) -> str:
    return f"GPU-{bytes(range(device, device + 16)).hex()}"


@pytest.mark.parametrize("gpu", [name_of(0), name_of(1), name_of(9)])
def test_memory_of_a_gpu_within_reach_is_opened_to_be_written(memory: Memory, gpu: str) -> None:
    """This one's, another's, and one's that this process is not shown."""
    vram = opened(memory)
    made = vram.make(NBYTES)
    opened_ = vram.open_to_write(made.descriptor, NBYTES, gpu)
    assert memory.allowed[opened_.address] == BOTH
    opened_.close()
    made.free()
    assert memory.left == (0, 0, 0)


def test_memory_of_a_gpu_out_of_reach_is_refused(memory: Memory) -> None:
    vram = opened(memory)
    made = vram.make(NBYTES)
    with pytest.raises(DeviceError, match="no access"):
        vram.open_to_write(made.descriptor, NBYTES, name_of(2))
    memory.fails = {"cuMemSetAccess": 217}
    with pytest.raises(DeviceError):
        vram.open_to_write(made.descriptor, NBYTES, name_of(9))
    memory.fails = {}
    made.free()
    assert memory.left == (0, 0, 0)


def test_a_driver_that_knows_no_reading_alone_is_asked_for_both(memory: Memory) -> None:
    vram = opened(memory)
    made = vram.make(NBYTES)
    real, asked = memory.cuMemSetAccess, []

    def set_access(address: int, nbytes: int, access: list[Any], count: int) -> tuple[int]:
        asked.append(access[0].flags)
        if access[0].flags == READ:
            return (801,)
        real(address, nbytes, access, count)
        return (0,)

    sys.modules["cuda.bindings"].driver.cuMemSetAccess = set_access
    theirs = vram.open(made.descriptor, NBYTES)
    assert asked == [READ, BOTH]
    theirs.close()
    made.free()
    assert memory.left == (0, 0, 0)


@pytest.mark.parametrize(
    "call",
    ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemAddressReserve", "cuMemMap",
     "cuMemSetAccess", "cuMemsetD8Async", "cuMemImportFromShareableHandle"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("status", "error"), [(2, DeviceFull), (1, DeviceError), (719, DeviceLost)]
)
def test_a_call_that_fails_leaves_nothing_behind(
    memory: Memory, call: str, status: int, error: type[DeviceError]
) -> None:
    vram = opened(memory)
    made = vram.make(NBYTES)
    left, before = memory.left, open_descriptors()
    memory.fails = {call: status}
    with pytest.raises(error):
        if call != "cuMemImportFromShareableHandle":
            vram.make(NBYTES)
        vram.open(made.descriptor, NBYTES)
    assert memory.left == left
    assert open_descriptors() == before
    memory.fails = {}
    made.free()


def test_a_gpu_that_shares_no_memory_this_way_is_said_to_be_too_old(memory: Memory) -> None:
    memory.supported = False
    with pytest.raises(DriverTooOld):
        opened(memory)


def test_after_the_gpu_is_lost_nothing_hangs_and_letting_go_raises_nothing(memory: Memory) -> None:
    vram = opened(memory)
    made = vram.make(NBYTES)
    theirs = vram.open(made.descriptor, NBYTES)
    memory.fails = {"cuMemGetInfo": 719}
    with pytest.raises(DeviceLost):
        vram.free_bytes()
    with pytest.raises(DeviceLost):
        made.write(0, memoryview(DATA))
    with pytest.raises(DeviceLost):
        vram.make(NBYTES)
    theirs.close()
    made.free()
    assert memory.left == (0, 0, 0)
    vram.close()


def test_copies_are_waited_for_without_an_event_too(memory: Memory) -> None:
    vram = opened(memory)
    made = vram.make(NBYTES)
    theirs = vram.open(made.descriptor, NBYTES)
    driver = memory._machine.driver
    made.write(0, memoryview(DATA))
    driver.refuses = {"!record"}
    with pytest.raises(DeviceError):
        vram.finish()
    assert ctypes.string_at(theirs.address, NBYTES) == DATA, "nothing of it is under way"
    driver.refuses = {"!record", "!drain"}
    with pytest.raises(DeviceStuck):
        vram.finish()
    driver.refuses = set()
    vram.finish()
    theirs.close()
    made.free()
