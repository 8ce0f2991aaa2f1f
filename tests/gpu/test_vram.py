"""Memory of a real GPU that processes share: the very bytes, given back for certain."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from kvstore.device.base import Memory, Piece
from kvstore.device.cuda import CudaDriver
from kvstore.device.cuda_vram import CudaVram
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.mirrors import Mirrors, MirrorTable
from kvstore.errors import DeviceError, DeviceFull
from kvstore.tiers.vram import VramArena
from kvstore_benchmarks.gpu.rig import Rig

EXTENT = 64 << 20
BLOCKS = 32


OPENS = """
import hashlib, sys
import numpy as np
from kvstore.device.cuda import CudaDriver
from kvstore.device.cuda_vram import CudaVram
driver = CudaDriver(0, lambda: 0, compiles=False)
vram = CudaVram(driver)
descriptor, nbytes = int(sys.argv[1]), int(sys.argv[2])
opened = vram.open(descriptor, nbytes)
host = driver.allocate_host(nbytes)
stream = driver.new_stream()
def look():
    ends = [np.array([each], np.uint64) for each in (host, opened.address, nbytes)]
    driver.copy(*ends, stream)
    driver.synchronize(driver.record(stream))
    import ctypes
    return hashlib.sha256(ctypes.string_at(host, nbytes)).hexdigest()
print(vram.name, look(), flush=True)
sys.stdin.readline()
print(look(), flush=True)
opened.close()
sys.stdin.readline()
"""


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_another_process_sees_the_bytes_and_keeps_the_memory(
    vram: CudaVram, random: np.random.Generator
) -> None:
    """Also after its maker has freed it; and it is the GPU's again once both have let go."""
    from hashlib import sha256

    data = random.bytes(EXTENT)
    arena = VramArena(vram, EXTENT)
    arena.open_extent(1)
    arena.write(EXTENT, memoryview(data))
    arena.finish()
    descriptor = arena.extent_fd(1)
    assert descriptor is not None
    reader = subprocess.Popen(
        [sys.executable, "-c", OPENS, str(descriptor), str(EXTENT)],
        pass_fds=[descriptor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        name, seen = reader.stdout.readline().split()
        assert name == vram.name
        assert seen == sha256(data).hexdigest()
        arena.close_extent(1)
        held = vram.free_bytes()
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline().strip() == sha256(data).hexdigest()
        reader.kill()
    assert vram.free_bytes() >= held + EXTENT, "a reader that dies gives it back"


def test_memory_that_is_made_anew_holds_nothing_of_who_had_it(
    vram: CudaVram, driver: CudaDriver
) -> None:
    for _ in range(2):
        made = [vram.make(EXTENT) for _ in range(4)]
        opened = [vram.open_to_write(each.descriptor, EXTENT, vram.name) for each in made]
        for each in opened:
            host = driver.allocate_host(EXTENT)
            stream = driver.new_stream()
            ends = [np.array([end], np.uint64) for end in (host, each.address, EXTENT)]
            driver.copy(*ends, stream)
            driver.synchronize(driver.record(stream))
            assert not any(ctypes.string_at(host, EXTENT))
            driver.free_host(host)
        for one in made:
            one.write(0, memoryview(b"\xab" * EXTENT))
        vram.finish()
        for one, each in zip(made, opened, strict=True):
            each.close()
            one.free()


def test_memory_that_the_gpu_has_not_is_refused_and_given_back_memory_is_there(
    vram: CudaVram,
) -> None:
    arena = VramArena(vram, 1 << 30)
    before = arena.free_bytes()
    opened = 0
    with pytest.raises(DeviceFull):
        while True:
            arena.open_extent(opened + 1)
            opened += 1
    assert opened > 0
    for extent in range(1, opened + 1):
        arena.close_extent(extent)
    assert arena.free_bytes() >= before - (64 << 20)


WAYS = pytest.mark.parametrize("way", ["engines", "kernel"])
SHAPES = pytest.mark.parametrize(
    "shape", [[(0, 1 << 20, 1 << 20)], [(layer << 20, 16 << 10, 16 << 10) for layer in range(32)]]
)


@WAYS
@SHAPES
def test_mirrors_are_loaded_into_a_kv_cache(
    driver: CudaDriver,
    vram: CudaVram,
    random: np.random.Generator,
    shape: list[tuple[int, int, int]],
    way: str,
) -> None:
    pieces = [Piece(*piece) for piece in shape]
    nbytes = sum(piece.nbytes for piece in pieces)
    tuning = Tuning(kernel_below=0 if way == "engines" else 1 << 40)
    arena, table = VramArena(vram, EXTENT), MirrorTable(BLOCKS, 1)
    arena.open_extent(1)
    table.open(1)
    datas = [random.bytes(nbytes) for _ in range(BLOCKS)]
    for index, data in enumerate(datas):
        arena.write(EXTENT + index * nbytes, memoryview(data))
        arena.finish()
        table.put(index + 1, EXTENT + index * nbytes, checksum=index)

    def fetch(extent: int) -> tuple[int, int]:
        descriptor = arena.extent_fd(extent)
        assert descriptor is not None
        return os.dup(descriptor), EXTENT

    mirrors = Mirrors(os.dup(table.fd), EXTENT, fetch, vram.open)
    room = 32 << 20
    with closing(Rig(driver, room)) as rig, closing(GpuDevice(driver, tuning, vram=vram)) as device:
        blocks = device.blocks(Memory(rig.on_gpu, room, rig), pieces, BLOCKS)
        order = random.permutation(BLOCKS).tolist()
        found = mirrors.find([index + 1 for index in order], order)
        assert found is not None
        assert len(found.indexes) == BLOCKS
        with closing(device.stream()) as stream:
            stream.load_within(blocks, range(BLOCKS), found.addresses).finish()
        assert mirrors.kept(found) == [True] * BLOCKS
        rig.copy_plainly(to_gpu=False)
        plain = np.frombuffer(rig.plain, np.uint8)
        for block, index in enumerate(order):
            starts = [(each.offset + block * each.stride, each.nbytes) for each in pieces]
            got = b"".join(plain[start : start + size].tobytes() for start, size in starts)
            assert got == datas[index]
        del plain
    mirrors.close()
    table.close()
    arena.close()


@WAYS
@SHAPES
@pytest.mark.parametrize("where", ["its own GPU", "another GPU"])
def test_what_is_handed_over_lands_where_others_load_it(
    driver: CudaDriver,
    vram: CudaVram,
    random: np.random.Generator,
    shape: list[tuple[int, int, int]],
    way: str,
    where: str,
) -> None:
    their_driver, theirs = (driver, vram) if where == "its own GPU" else second_gpu()
    pieces = [Piece(*piece) for piece in shape]
    nbytes = sum(piece.nbytes for piece in pieces)
    tuning = Tuning(kernel_below=0 if way == "engines" else 1 << 40)
    room = 32 << 20
    arena = VramArena(theirs, EXTENT)
    arena.open_extent(1)
    descriptor = arena.extent_fd(1)
    assert descriptor is not None
    here = vram.open_to_write(descriptor, EXTENT, theirs.name)
    there = theirs.open(descriptor, EXTENT)
    order = random.permutation(BLOCKS).tolist()
    places = [order[index] * nbytes for index in range(BLOCKS)]
    with closing(Rig(driver, room)) as rig, closing(GpuDevice(driver, tuning, vram=vram)) as device:
        plain = np.frombuffer(rig.plain, np.uint8)
        plain[:] = np.frombuffer(random.bytes(room), np.uint8)
        content = plain.copy()
        rig.copy_plainly(to_gpu=True)
        blocks = device.blocks(Memory(rig.on_gpu, room, rig), pieces, BLOCKS)
        with closing(device.stream()) as stream:
            at = [here.address + place for place in places]
            stream.save_within(blocks, range(BLOCKS), at).finish()
        del plain
    with (
        closing(Rig(their_driver, room)) as rig,
        closing(GpuDevice(their_driver, tuning, vram=theirs)) as device,
    ):
        blocks = device.blocks(Memory(rig.on_gpu, room, rig), pieces, BLOCKS)
        with closing(device.stream()) as stream:
            at = [there.address + place for place in places]
            stream.load_within(blocks, range(BLOCKS), at).finish()
        rig.copy_plainly(to_gpu=False)
        plain = np.frombuffer(rig.plain, np.uint8)
        for each in pieces:
            for block in range(BLOCKS):
                start = each.offset + block * each.stride
                stop = start + each.nbytes
                assert plain[start:stop].tobytes() == content[start:stop].tobytes()
        del plain
    here.close()
    there.close()
    arena.close()


def second_gpu() -> tuple[CudaDriver, CudaVram]:
    try:
        driver = CudaDriver(1, lambda: 0)
        return driver, CudaVram(driver)
    except DeviceError as error:
        pytest.skip(str(error))
