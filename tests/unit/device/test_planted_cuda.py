"""Each wait of the calls to CUDA is needed too: without any one of them bytes are wrong."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from kvstore.device import cuda
from kvstore.device.adversarial import Temper
from kvstore.device.base import Coding
from kvstore.device.coding_kernels import DECODE_KERNEL, ENCODE_KERNEL
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.kernels import COPY_KERNEL
from tests.unit.device.cupy_standin import Machine
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.planting import waits, without
from tests.unit.device.round_trips import BLOCK_BYTES, round_trip

NAMES = ("eventRecord", "streamWaitEvent", "eventSynchronize")


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
    tuning = Tuning(kernel_below=kernel_below, step_bytes=2 * BLOCK_BYTES)
    device = GpuDevice(module.CudaDriver(0, lambda: 0), tuning, pin_in_background=False)
    good = round_trip(machine.driver, device, seed=1)
    good = round_trip(machine.driver, device, 2, Coding("fp8", "float16")) and good
    assert machine.batches if machine.batched else not machine.batches
    assert (COPY_KERNEL in machine.launches) == bool(kernel_below)
    assert {ENCODE_KERNEL, DECODE_KERNEL} <= set(machine.launches)
    return good


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
