"""The kernels that take checksums compile for the GPUs they are meant for, and say what xxhash
says: on the processor, thread after thread."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvstore.device import checksum_kernel as kernel
from tests.unit.device import xxh3
from tests.unit.device.compiling import ARCHITECTURES, compile_for, on_processor

KERNELS = [kernel.SUMS_KERNEL, kernel.CHAIN_KERNEL]
LAUNCH = """
extern "C" void launch(unsigned int blocks, unsigned int threads, int backwards,
                       const unsigned char* from, u64 nbytes, u64* rows, u64* to)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (unsigned int number = 0; number < blocks * threads; number++) {
        const unsigned int thread = backwards ? blocks * threads - 1 - number : number;
        blockIdx.x = thread / threads;
        threadIdx.x = thread % threads;
        kvstore_checksum_sums(from, nbytes, rows);
    }
    gridDim.x = 1;
    blockIdx.x = 0;
    for (threadIdx.x = 0; threadIdx.x < 8; threadIdx.x++)
        kvstore_checksum_chain(rows, nbytes, to);
}
"""

LENGTHS = sorted(
    {241, 255, 256, 257, 300, 511, 512, 1000, *range(1022, 1030), 1087, 1088, 1089}
    | {each for rounds in (2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 64, 100, 513)
       for each in range(1024 * rounds - 2, 1024 * rounds + 3)}
    | {1024 * 8 + 63, 1024 * 8 + 64, 1024 * 8 + 65, 4096 + 1, 3 * 4096 - 1, (2 << 20) + 12345}
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return on_processor(kernel.SOURCE + LAUNCH, [], "", tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_compile(architecture: str, tmp_path: Path) -> None:
    compile_for(architecture, kernel.SOURCE, KERNELS, tmp_path)


def checksum(
    library: ctypes.CDLL, data: np.ndarray, blocks: int, threads: int, *, backwards: bool = False
) -> int:
    """As the device takes it. What follows the bytes, and what is written to, is as hostile as
    it may be."""
    room = np.full(len(data) + 4096 + 16, 0xEE, np.uint8)
    begin = -room.ctypes.data % 16
    room[begin : begin + len(data)] = data
    rows = np.full(kernel.sums_bytes(len(data)) // 8 + 1, 0xDDDD, np.uint64)
    to = np.full(kernel.LANES + 1, 0xCCCC, np.uint64)
    pointers = [ctypes.c_void_p(each) for each in (rows.ctypes.data, to.ctypes.data)]
    source = ctypes.c_void_p(room.ctypes.data + begin)
    library.launch(blocks, threads, backwards, source, ctypes.c_uint64(len(data)), *pointers)
    assert rows[-1] == 0xDDDD
    assert to[-1] == 0xCCCC
    return kernel.merged(to[:-1].tolist(), len(data))


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_checksums_are_those_of_xxhash(library: ctypes.CDLL, nbytes: int) -> None:
    data = np.frombuffer(np.random.default_rng(nbytes).bytes(nbytes), np.uint8)
    expected = xxhash.xxh3_64_intdigest(data)
    grid = kernel.grid_of(nbytes)
    assert checksum(library, data, grid, kernel.THREADS) == expected
    # However few go through however many rounds, in whatever order.
    assert checksum(library, data, 3, 8, backwards=True) == expected


def test_many_lengths_of_every_remainder(library: ctypes.CDLL) -> None:
    random = np.random.default_rng(1)
    for nbytes in (*range(241, 700), *random.integers(241, 40_000, 300).tolist()):
        data = np.frombuffer(random.bytes(nbytes), np.uint8)
        assert checksum(library, data, 2, 16) == xxhash.xxh3_64_intdigest(data), nbytes


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_sums_that_overflow_and_words_that_are_nothing(library: ctypes.CDLL, byte: int) -> None:
    data = np.full(9 * 1024 + 100, byte, np.uint8)
    assert checksum(library, data, 1, 8) == xxhash.xxh3_64_intdigest(data)


def test_any_bit_that_changes_is_seen(library: ctypes.CDLL) -> None:
    data = np.frombuffer(np.random.default_rng(2).bytes(5000), np.uint8).copy()
    expected = checksum(library, data, 2, 16)
    for bit in np.random.default_rng(3).integers(0, 8 * len(data), 200).tolist():
        data[bit >> 3] ^= 1 << (bit & 7)
        assert checksum(library, data, 2, 16) != expected
        data[bit >> 3] ^= 1 << (bit & 7)


@pytest.mark.parametrize("nbytes", [241, 1024, 1025, 4096, 9 * 1024 + 77])
def test_the_stand_in_for_them_is_right_too(nbytes: int) -> None:
    data = np.frombuffer(np.random.default_rng(nbytes).bytes(nbytes), np.uint8)
    rows = xxh3.rows(data)
    assert rows.nbytes <= kernel.sums_bytes(nbytes)
    chained = xxh3.chained(rows).tolist()
    assert kernel.merged(chained, nbytes) == xxhash.xxh3_64_intdigest(data)
