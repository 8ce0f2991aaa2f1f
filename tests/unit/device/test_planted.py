"""Each wait of the GPU's device is needed: without any one of them bytes are wrong."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvstore.device import gpu
from kvstore.device.adversarial import Temper
from kvstore.device.base import Memory, Piece
from kvstore.errors import DeviceError
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.planting import waits, without

NAMES = ("wait", "synchronize")
BLOCKS, PIECE, LAYERS = 12, 32, 3
BLOCK_BYTES = PIECE * LAYERS


def right(module: ModuleType) -> bool:
    """Whether all bytes are, in every way that a copy can take."""
    ways = [(0, True), (1 << 20, True), (0, False), (1 << 20, False)]
    return all(
        _round_trip(module, *way, seed, temper)
        and _failure(module, *way, seed)
        and _within(module, way[0], seed, temper)
        for way in ways
        for temper in Temper
        for seed in range(3)
    )


def _make(module: ModuleType, kernel_below: int, pins: bool, driver: FakeDriver) -> gpu.GpuDevice:
    if not pins:
        driver.refuses.add("register")
    tuning = module.Tuning(kernel_below=kernel_below, step_bytes=2 * BLOCK_BYTES)
    made: gpu.GpuDevice = module.GpuDevice(driver, tuning, pin_in_background=False)
    return made


def _round_trip(
    module: ModuleType, kernel_below: int, pins: bool, seed: int, temper: Temper
) -> bool:
    driver = FakeDriver(seed, temper)
    device = _make(module, kernel_below, pins, driver)
    memory = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    pieces = [Piece(layer * BLOCKS * PIECE, PIECE, PIECE) for layer in range(LAYERS)]
    blocks = device.blocks(Memory(memory.ctypes.data, len(memory), memory), pieces, BLOCKS)
    content = np.random.default_rng(seed).integers(0, 256, len(memory), np.uint8)
    driver.launch(lambda: np.copyto(memory, content))
    out, into = device.stream(), device.stream()
    saved = _slots()
    out.wait_event(device.computed())
    out.save(blocks, range(BLOCKS), saved).finish()
    by_layer = content.reshape(LAYERS, BLOCKS, PIECE)
    good = all(bytes(slot) == by_layer[:, block].tobytes() for block, slot in enumerate(saved))
    driver.launch(lambda: memory.fill(0xEE))
    into.wait_event(device.computed())
    into.load(blocks, range(BLOCKS), saved).finish()
    # As the engine's next step may.
    good &= memory.tobytes() == content.tobytes()
    driver.settle()
    return good and memory.tobytes() == content.tobytes() and not driver.wrong


def _failure(module: ModuleType, kernel_below: int, pins: bool, seed: int) -> bool:
    """The third copy cannot be started; the first two touch nothing after that."""
    driver = FakeDriver(seed, Temper.LATE)
    device = _make(module, kernel_below, pins, driver)
    memory = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    pieces = [Piece(layer * BLOCKS * PIECE, PIECE, PIECE) for layer in range(LAYERS)]
    blocks = device.blocks(Memory(memory.ctypes.data, len(memory), memory), pieces, BLOCKS)
    stream = device.stream()
    real, count = driver.copy, 0

    def copy(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise DeviceError("refused")
        real(*arguments)  # type: ignore[arg-type]

    driver.copy = copy  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        stream.load(blocks, range(BLOCKS), _slots()).finish()
    memory[:] = 0x22
    driver.settle()
    return set(memory.tolist()) == {0x22}


def _within(module: ModuleType, kernel_below: int, seed: int, temper: Temper) -> bool:
    """From other memory of the GPU: what is loaded is there when it is said to be, and nothing
    is touched any more once it has failed."""
    driver = FakeDriver(seed, temper)
    device = _make(module, kernel_below, True, driver)
    memory = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    other = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    other[:] = np.random.default_rng(seed).integers(0, 256, len(other), np.uint8)
    addresses = [other.ctypes.data + index * BLOCK_BYTES for index in range(BLOCKS)]
    pieces = [Piece(layer * BLOCKS * PIECE, PIECE, PIECE) for layer in range(LAYERS)]
    blocks = device.blocks(Memory(memory.ctypes.data, len(memory), memory), pieces, BLOCKS)
    stream = device.stream()
    driver.launch(lambda: memory.fill(0xEE))
    stream.wait_event(device.computed())
    stream.load_within(blocks, range(BLOCKS), addresses).finish()
    by_block = memory.reshape(LAYERS, BLOCKS, PIECE).transpose(1, 0, 2)
    good = by_block.tobytes() == other.tobytes()
    real, count = driver.record, 0

    def record(at: object) -> object:
        nonlocal count
        count += 1
        if count == 1:
            raise DeviceError("refused")
        return real(at)  # type: ignore[arg-type]

    driver.record = record  # type: ignore[assignment]
    with pytest.raises(DeviceError):
        stream.load_within(blocks, range(BLOCKS), addresses)
    memory[:] = 0x22
    driver.settle()
    return good and set(memory.tolist()) == {0x22} and not driver.wrong


def _slots() -> list[memoryview]:
    mapping = memoryview((ctypes.c_ubyte * (BLOCKS * BLOCK_BYTES))()).cast("B")
    starts = range(0, BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
    return [mapping[start : start + BLOCK_BYTES] for start in starts]


def test_with_all_its_waits_it_is_right() -> None:
    assert right(gpu)


@pytest.mark.parametrize("line", waits(gpu, *NAMES))
def test_without_any_one_wait_it_is_not(line: int, tmp_path: Path) -> None:
    assert not right(without(gpu, line, NAMES, tmp_path))


def test_the_waits_are_found() -> None:
    """Two for an engine's event, two between a stream's own, and of copies over the link and
    within the GPU one each that finishes and that abandons."""
    assert len(waits(gpu, *NAMES)) == 8
