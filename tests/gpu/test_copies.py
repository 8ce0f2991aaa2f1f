"""Copies on a real GPU: every byte, on every way that a copy can take."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest

from kvstore.device import codec
from kvstore.device.base import Coding, Memory, Piece
from kvstore.device.coding_kernels import DTYPES
from kvstore.device.cuda import CudaDriver
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.types import CODECS, align_up
from kvstore_benchmarks.gpu.rig import Rig

ROOM = 32 << 20
SHAPES = {
    "one piece": [(0, 1 << 20, 1 << 20)],
    "layers": [(layer << 20, 16 << 10, 16 << 10) for layer in range(32)],
    "odd": [(5, 8209, 4097), (16 << 20, 77, 33), (24 << 20, 16, 16)],
}
WAYS = {
    "batch": Tuning(kernel_below=0),
    "kernel": Tuning(kernel_below=1 << 40),
    "small steps": Tuning(kernel_below=1 << 40, step_bytes=1 << 20),
}
BLOCKS = 32


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_is_loaded_elsewhere(
    driver: CudaDriver, shape: str, way: str, pinned: bool
) -> None:
    pieces = [Piece(*piece) for piece in SHAPES[shape]]
    random = np.random.default_rng(0)
    with closing(Rig(driver, ROOM)) as rig, closing(GpuDevice(driver, WAYS[way])) as device:
        blocks = device.blocks(Memory(rig.on_gpu, ROOM, rig), pieces, BLOCKS)
        slots = rig.slots(BLOCKS, blocks.block_bytes)
        if pinned and not rig.pin(device, slots):
            pytest.skip("this machine pins no shared memory")
        if not pinned:
            device.pins.close()
        plain = np.frombuffer(rig.plain, np.uint8)
        plain[:] = np.frombuffer(random.bytes(ROOM), np.uint8)
        before = plain.copy()
        rig.copy_plainly(to_gpu=True)
        with closing(device.stream()) as stream:
            sums = stream.save(blocks, range(BLOCKS), slots).finish()
            plain[:] = 0xEE
            rig.copy_plainly(to_gpu=True)
            order = random.permutation(BLOCKS).tolist()
            assert stream.load(blocks, order, slots).finish() == sums
        rig.copy_plainly(to_gpu=False)
        expected = np.full(ROOM, 0xEE, np.uint8)
        for from_, to in enumerate(order):
            for piece in pieces:
                source, target = (piece.offset + block * piece.stride for block in (from_, to))
                expected[target : target + piece.nbytes] = before[source : source + piece.nbytes]
        assert np.array_equal(plain, expected)
        del slots


CODED_SHAPES = {
    "one piece": [(0, 1 << 20, 1 << 20)],
    "layers": [(layer << 20, 16 << 10, 16 << 10) for layer in range(31)],
    "odd": [(6, 8206, 4096), (16 << 20, 130, 128)],
}
"""Pieces of whole groups; the last lie where a GPU does not like them."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("shape", CODED_SHAPES)
def test_coded_blocks_are_the_references_bytes(
    driver: CudaDriver, shape: str, codec_name: str, dtype: str
) -> None:
    """Of random bits, so of every number of 16 bits there is, and what is none."""
    coding = Coding(codec_name, dtype)
    pieces = [Piece(*piece) for piece in CODED_SHAPES[shape]]
    assert driver.can_code()
    with closing(Rig(driver, ROOM)) as rig, closing(GpuDevice(driver)) as device:
        blocks = device.blocks(Memory(rig.on_gpu, ROOM, rig), pieces, BLOCKS, coding)
        slots = rig.slots(BLOCKS, blocks.block_bytes)
        plain = np.frombuffer(rig.plain, np.uint8)
        plain[:] = np.frombuffer(np.random.default_rng(0).bytes(ROOM), np.uint8)
        expected = plain.copy()
        rig.copy_plainly(to_gpu=True)
        with closing(device.stream()) as stream:
            stream.save(blocks, range(BLOCKS), slots).finish()
            for block, slot in enumerate(slots):
                assert bytes(slot) == code_and_bring_back(expected, pieces, block, coding)
            stream.load(blocks, range(BLOCKS), slots).finish()
            rig.copy_plainly(to_gpu=False)
            assert np.array_equal(plain, expected)
            # Within the GPU's memory, where what was coded once stays as it is.
            each = align_up(blocks.block_bytes)
            other = driver.allocate(BLOCKS * each)
            places = [other + block * each for block in range(BLOCKS)]
            stream.save_within(blocks, range(BLOCKS), places).finish()
            order = np.random.default_rng(1).permutation(BLOCKS).tolist()
            stream.load_within(blocks, order, places).finish()
            driver.free(other)
        rig.copy_plainly(to_gpu=False)
        for from_, to in enumerate(order):
            for source, target in zip(parts_of(pieces, from_), parts_of(pieces, to), strict=True):
                assert np.array_equal(plain[target], expected[source])
        del slots


def parts_of(pieces: list[Piece], block: int) -> list[slice]:
    starts = [(each.offset + block * each.stride, each.nbytes) for each in pieces]
    return [slice(start, start + nbytes) for start, nbytes in starts]


def code_and_bring_back(memory: Any, pieces: list[Piece], block: int, coding: Coding) -> bytes:
    """By the reference, in place; what the block is coded to."""
    parts = parts_of(pieces, block)
    raw = np.concatenate([memory[part] for part in parts])
    coded = bytearray(coding.nbytes(len(raw)))
    codec.encode(*coding, raw.data, memoryview(coded))
    codec.decode(*coding, memoryview(coded), raw.data)
    at = 0
    for part in parts:
        memory[part] = raw[at : at + part.stop - part.start]
        at += part.stop - part.start
    return bytes(coded)


def test_a_store_waits_for_the_engine_and_a_load_does(driver: CudaDriver, torch: Any) -> None:
    """Behind computing that takes longer than the copies: saved is what it computes at its
    end, loaded is not what it overwrites."""
    memory = torch.zeros(ROOM, dtype=torch.uint8, device="cuda")
    large = torch.randn(4096, 4096, device="cuda")
    with closing(Rig(driver, ROOM)) as rig, closing(GpuDevice(driver)) as device:
        blocks = device.blocks(
            Memory(memory.data_ptr(), ROOM, memory), [Piece(0, 1 << 20, 1 << 20)], BLOCKS
        )
        slots = rig.slots(BLOCKS, blocks.block_bytes)
        rig.pin(device, slots)
        with closing(device.stream()) as stream:
            for number in range(1, 6):
                for _ in range(50):
                    large = torch.tanh(large @ large)
                memory.fill_(number)
                stream.wait_event(device.computed())
                stream.save(blocks, range(BLOCKS), slots).finish()
                assert {slot[0] for slot in slots} == {slot[-1] for slot in slots} == {number}
                for _ in range(50):
                    large = torch.tanh(large @ large)
                memory.fill_(0)
                stream.wait_event(device.computed())
                stream.load(blocks, range(BLOCKS), slots).finish()
                assert bool((memory == number).all())
        del slots


def test_the_connectors_threads_store_and_load(driver: CudaDriver, torch: Any) -> None:
    from tests.unit.connectors.test_copies import Rank, data, eventually

    device = GpuDevice(driver)
    rank = Rank(device=device, where="cuda")
    rank.memory.random_(0, 256)
    rank.saver.submit(rank.store_job(1, [5, 9, 2]))
    eventually(lambda: rank.saver.take_reports())
    assert rank.store.blocks == {bytes([1, b]): rank.bytes_of(b) for b in (5, 9, 2)}
    datas = [data(seed) for seed in range(40)]
    block_ids = list(range(50, 10, -1))
    rank.memory.fill_(3)
    assert rank.load(rank.load_job(datas, block_ids)) == []
    assert [rank.bytes_of(block) for block in block_ids] == datas
    rank.close()
    device.close()
