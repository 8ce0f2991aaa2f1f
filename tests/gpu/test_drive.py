"""Reads from a drive into a GPU's memory: every byte, where they can be made at all; and checksums
taken there."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvstore.device import checksum_kernel
from kvstore.device.cuda import CudaDriver
from kvstore.device.cufile import CuFileStraight
from kvstore.device.vram import Vram
from kvstore.errors import DeviceError
from kvstore.tiers.nvme_disk import Directory, DirectoryFile, write_all
from kvstore_benchmarks.gpu.drive import from_drive
from kvstore_benchmarks.gpu.rig import Rig

PAGE = 4096
LENGTHS = (1, 240, 241, 1000, 1024, 1025, PAGE, 5 * PAGE + 77, (1 << 20) - 1, 1 << 20, 2 << 20)
SLOTS, SLOT_BYTES = 4, 2 << 20
FILE_BYTES = 16 << 20


def test_what_is_read_straight_from_a_drive_is_what_is_there(
    driver: CudaDriver, tmp_path: Path
) -> None:
    with closing(Rig(driver, 32 << 20)) as rig:
        figures = from_drive(rig, tmp_path, 1 << 20, 2)
    assert figures["wrong"] == 0
    if not figures["straight"]:
        pytest.skip(figures["reason"])


def test_checksums_taken_on_the_gpu_are_those_of_the_host(driver: CudaDriver) -> None:
    if not driver.can_checksum():
        pytest.skip("the kernels that take checksums cannot be compiled")
    random = np.random.default_rng(0)
    stream = driver.new_stream()
    sums = driver.allocate(checksum_kernel.sums_bytes(SLOT_BYTES))
    result = driver.allocate_host(checksum_kernel.RESULT_BYTES)
    with closing(Rig(driver, SLOT_BYTES)) as rig:
        for nbytes in LENGTHS:
            if nbytes <= checksum_kernel.SHORT:
                continue
            data = random.bytes(nbytes)
            rig.plain[:nbytes] = data
            rig.copy_plainly(to_gpu=True)
            driver.run_checksum(rig.on_gpu, nbytes, sums, result, stream)
            driver.synchronize(driver.record(stream))
            raw = ctypes.string_at(result, checksum_kernel.RESULT_BYTES)
            words = np.frombuffer(raw, np.uint64).tolist()
            assert checksum_kernel.merged(words, nbytes) == xxhash.xxh3_64_intdigest(data), nbytes
    driver.free_host(result)
    driver.free(sums)


def test_blocks_read_straight_by_threads_are_delivered_and_damage_is_seen(
    driver: CudaDriver, vram: Vram, tmp_path: Path
) -> None:
    """Into memory that others may open."""
    with on_drive(driver, tmp_path) as (file, content, straight):
        made = vram.make(SLOTS * SLOT_BYTES)

        def read(slot: int) -> None:
            random = np.random.default_rng(slot)
            for nbytes in LENGTHS * 4:
                offset = PAGE * int(random.integers(0, (FILE_BYTES - SLOT_BYTES) // PAGE))
                data = content[offset : offset + nbytes]
                checksum = straight.fill(slot, file, offset, nbytes)
                assert checksum == xxhash.xxh3_64_intdigest(data)
                straight.deliver(slot, made, slot * SLOT_BYTES, nbytes)
                assert on_gpu(driver, made.address + slot * SLOT_BYTES, nbytes) == data

        with ThreadPoolExecutor(SLOTS) as threads:
            list(threads.map(read, range(SLOTS)))
        for at in (0, 12345, SLOT_BYTES - 1):
            page = memoryview(mmap.mmap(-1, PAGE))
            begin = at // PAGE * PAGE
            page[:] = content[begin : begin + PAGE]
            page[at - begin] ^= 1
            write_all(file, [page], begin)
            checksum = straight.fill(0, file, 0, SLOT_BYTES)
            assert checksum != xxhash.xxh3_64_intdigest(content[:SLOT_BYTES])
            page[at - begin] ^= 1
            write_all(file, [page], begin)
        made.free()


@contextmanager
def on_drive(
    driver: CudaDriver, directory: Path
) -> Iterator[tuple[DirectoryFile, bytes, CuFileStraight]]:
    """A file of random bytes that is read straight; skips the test where there is none."""
    content = np.random.default_rng(1).bytes(FILE_BYTES)
    try:
        file = Directory(directory).create("blocks", FILE_BYTES)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("no O_DIRECT for temporary files")
    with closing(file):
        pages = memoryview(mmap.mmap(-1, FILE_BYTES))
        pages[:] = content
        write_all(file, [pages], 0)
        file.fdatasync()
        try:
            straight = CuFileStraight(driver, SLOTS, SLOT_BYTES)
        except DeviceError as error:
            pytest.skip(str(error))
        with closing(straight):
            try:
                straight.fill(0, file, 0, PAGE)
            except DeviceError as error:
                pytest.skip(str(error))
            yield file, content, straight


def on_gpu(driver: CudaDriver, address: int, nbytes: int) -> bytes:
    stream, host = driver.new_stream(), driver.allocate_host(nbytes)
    ends = (np.array([each], np.uint64) for each in (host, address, nbytes))
    driver.copy(*ends, stream)
    driver.synchronize(driver.record(stream))
    data = ctypes.string_at(host, nbytes)
    driver.free_host(host)
    return data
