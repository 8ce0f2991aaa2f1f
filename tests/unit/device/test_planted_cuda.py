"""Each wait of the calls to CUDA is needed too: without any one of them bytes are wrong."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvstore.device import cuda
from kvstore.device.adversarial import Temper
from kvstore.device.base import Memory, Piece
from kvstore.device.gpu import GpuDevice, Tuning
from tests.unit.device.cupy_standin import Machine
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.planting import waits, without
from tests.unit.device.test_planted import BLOCK_BYTES, BLOCKS, LAYERS, PIECE, _slots

NAMES = ("eventRecord", "streamWaitEvent", "eventSynchronize")
PIECES = [Piece(layer * BLOCKS * PIECE, PIECE, PIECE) for layer in range(LAYERS)]


def right(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *, batched: bool = True) -> bool:
    """Whether all bytes are, by copies and by the kernel."""
    return all(
        _round_trip(module, monkeypatch, Machine(FakeDriver(seed, temper), batched=batched), below)
        for below in (0, 1 << 20)
        for temper in Temper
        for seed in range(4)
    )


def _round_trip(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: Machine, kernel_below: int
) -> bool:
    machine.install(monkeypatch)
    driver = machine.driver
    tuning = Tuning(kernel_below=kernel_below, step_bytes=2 * BLOCK_BYTES)
    gpu = GpuDevice(module.CudaDriver(0, lambda: 0), tuning, pin_in_background=False)
    memory = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    blocks = gpu.blocks(Memory(memory.ctypes.data, len(memory), memory), PIECES, BLOCKS)
    content = np.random.default_rng(1).integers(0, 256, len(memory), np.uint8)
    driver.launch(lambda: np.copyto(memory, content))
    saved = _slots()
    with closing(gpu.stream()) as out, closing(gpu.stream()) as into:
        out.wait_event(gpu.computed())
        out.save(blocks, range(BLOCKS), saved).finish()
        by_layer = content.reshape(LAYERS, BLOCKS, PIECE)
        good = all(bytes(slot) == by_layer[:, block].tobytes() for block, slot in enumerate(saved))
        driver.launch(lambda: memory.fill(0xEE))
        into.wait_event(gpu.computed())
        into.load(blocks, range(BLOCKS), saved).finish()
        good &= memory.tobytes() == content.tobytes()
        driver.settle()
    assert machine.batches if machine.batched else not machine.batches
    assert bool(machine.launches) == bool(kernel_below)
    return good and memory.tobytes() == content.tobytes() and not driver.wrong


@pytest.mark.parametrize("batched", [True, False])
def test_with_all_its_waits_it_is_right(monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    assert right(cuda, monkeypatch, batched=batched)


@pytest.mark.parametrize("line", waits(cuda, *NAMES))
def test_without_any_one_wait_it_is_not(
    line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not right(without(cuda, line, NAMES, tmp_path), monkeypatch)


def test_the_waits_are_found() -> None:
    assert len(waits(cuda, *NAMES)) == 3
