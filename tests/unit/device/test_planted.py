"""Each wait of the GPU's device is needed: without any one of them bytes are wrong."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvstore.device import gpu, gpu_steps, gpu_stream
from kvstore.device.adversarial import Temper
from kvstore.device.base import Coding
from kvstore.errors import DeviceError
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.planting import waits, without
from tests.unit.device.round_trips import (
    BLOCK_BYTES,
    BLOCKS,
    by_block,
    kv_cache,
    round_trip,
    slots,
)

NAMES = ("wait", "synchronize", "drain")
MODULES = (gpu, gpu_stream, gpu_steps)
WAITS = [(module, line) for module in MODULES for line in waits(module, *NAMES)]
SEEDS = range(3)


def right() -> bool:
    """Whether all bytes are, in every way that a copy can take."""
    ways = [(0, True), (1 << 20, True), (0, False), (1 << 20, False)]
    return all(
        _comes_back(*way, seed, temper)
        and _comes_back(*way, seed, temper, Coding("fp8", "bfloat16"))
        and _fails_cleanly(*way, seed)
        and _comes_from_within(way[0], seed, temper)
        for way in ways
        for temper in Temper
        for seed in SEEDS
    )


def _device(driver: FakeDriver, kernel_below: int, *, pins: bool = True) -> gpu.GpuDevice:
    if not pins:
        driver.refuses.add("register")
    tuning = gpu.Tuning(kernel_below=kernel_below, step_bytes=2 * BLOCK_BYTES)
    return gpu.GpuDevice(driver, tuning, pin_in_background=False)


def _comes_back(
    kernel_below: int, pins: bool, seed: int, temper: Temper, coding: Coding | None = None
) -> bool:
    driver = FakeDriver(seed, temper)
    return round_trip(driver, _device(driver, kernel_below, pins=pins), seed, coding)


def _fails_cleanly(kernel_below: int, pins: bool, seed: int) -> bool:
    """The third copy cannot be started; the first two touch nothing after that."""
    driver = FakeDriver(seed, Temper.LATE)
    device = _device(driver, kernel_below, pins=pins)
    memory, blocks = kv_cache(driver, device)
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
        stream.load(blocks, range(BLOCKS), slots()).finish()
    memory[:] = 0x22
    driver.settle()
    return set(memory.tolist()) == {0x22}


def _comes_from_within(kernel_below: int, seed: int, temper: Temper) -> bool:
    """From other memory of the GPU: what is loaded is there when it is said to be, and nothing
    is touched any more once it has failed."""
    driver = FakeDriver(seed, temper)
    device = _device(driver, kernel_below)
    memory, blocks = kv_cache(driver, device)
    other = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    other[:] = np.random.default_rng(seed).integers(0, 256, len(other), np.uint8)
    addresses = [other.ctypes.data + index * BLOCK_BYTES for index in range(BLOCKS)]
    stream = device.stream()
    driver.launch(lambda: memory.fill(0xEE))
    stream.wait_event(device.computed())
    stream.load_within(blocks, range(BLOCKS), addresses).finish()
    good = b"".join(by_block(memory)) == other.tobytes()
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


def test_with_all_its_waits_it_is_right() -> None:
    assert right()


@pytest.mark.parametrize("line", waits(gpu_steps, "wait"))
def test_coded_blocks_need_each_wait_between_their_streams(
    line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They alone: the kernel that codes comes before the copy out, the one that brings back
    after the copy in."""
    _plant(gpu_steps, line, tmp_path, monkeypatch)
    assert not all(
        _comes_back(0, True, seed, temper, Coding("int4", "float16"))
        for temper in Temper
        for seed in SEEDS
    )


@pytest.mark.parametrize(("module", "line"), WAITS)
def test_without_any_one_wait_it_is_not(
    module: ModuleType, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(module, line, tmp_path, monkeypatch)
    assert not right()


def _plant(module: ModuleType, line: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all that is of the module come of a copy of it that does not wait at this line."""
    made = without(module, line, NAMES, folder)
    for user in MODULES:
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == module.__name__ and hasattr(user, name):
                monkeypatch.setattr(user, name, getattr(made, name))


def test_the_waits_are_found() -> None:
    """Two for an engine's event, two between a stream's own, one that finishes and one that
    abandons."""
    assert len(WAITS) == 6
