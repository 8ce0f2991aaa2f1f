"""Each KV cache gets the device it lies on; one that cannot be used switches a rank off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.device import cuda
from kvstore.device.base import Coding
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.host import HostDevice
from kvstore.errors import ConfigError, DeviceFull, DriverTooOld, NoDevice
from kvstore_connectors.vllm import worker
from kvstore_connectors.vllm.blocks import device_of
from kvstore_connectors.vllm.loader import LoadResults
from kvstore_connectors.vllm.metadata import JobReport, StepMetadata
from tests.unit.connectors.test_copies import PIECE, data, eventually
from tests.unit.connectors.test_copies import Rank as CopyingRank
from tests.unit.connectors.test_worker import LOAD, STORE, Rank
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.round_trips import coded


class Tensor(torch.Tensor):
    """One that says it is on a GPU."""

    where = torch.device("cuda:1")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where


def on_gpu() -> torch.Tensor:
    return torch.zeros(64, dtype=torch.uint8).as_subclass(Tensor)  # type: ignore[no-untyped-call]


def test_host_memory_is_copied_by_the_host() -> None:
    assert isinstance(device_of({"a": torch.zeros(8)}), HostDevice)


def test_a_gpu_is_opened_by_its_number_with_the_engines_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(cuda, "open_gpu", lambda *arguments: opened.append(arguments))
    device_of({"a": on_gpu()})
    ((ordinal, engine_stream),) = opened
    assert ordinal == 1
    streams = {torch.device("cuda:1"): SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    assert engine_stream() == 77


def test_any_other_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="meta"):
        device_of({"a": torch.zeros(8, device="meta")})


@pytest.mark.parametrize("error", [NoDevice, DriverTooOld, DeviceFull])
def test_a_device_that_cannot_be_used_fails_orders_and_nothing_else(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kv_caches: object) -> None:
        raise error("no")

    monkeypatch.setattr(worker, "device_of", refuse)
    rank = Rank()
    meta = StepMetadata(loads=[LOAD], stores=[STORE])
    rank.side.before_step(meta)
    rank.side.start_loads(meta)
    rank.side.start_stores(meta)
    assert rank.side.take_loaded(meta) == ({"r"}, {"r"})
    report = rank.side.take_report()
    assert report is not None
    assert report.jobs[1].lost
    rank.side.close()


def rank_on_gpu(driver: FakeDriver, coding: Coding | None = None) -> CopyingRank:
    tuning = Tuning(step_bytes=4 * 2 * PIECE)
    device = GpuDevice(driver, tuning, pin_in_background=False)
    rank = CopyingRank(device=device, coding=coding)
    driver.on_gpu[rank.memory.data_ptr()] = rank.memory.nbytes
    return rank


def answers(rank: CopyingRank) -> tuple[LoadResults, JobReport]:
    """Of a load and a store that were ordered."""
    eventually(rank.loader.has_results)
    eventually(rank.saver.has_reports)
    return rank.loader.take_results(), rank.saver.take_reports()[1]


def test_what_a_gpu_has_is_stored_and_loaded() -> None:
    driver = FakeDriver()
    rank = rank_on_gpu(driver)
    datas = [data(seed) for seed in range(20)]
    stored = {bytes([1, block]): rank.bytes_of(block) for block in range(40, 60)}
    rank.loader.submit(rank.load_job(datas, list(range(20))))
    rank.saver.submit(rank.store_job(1, list(range(40, 60))))
    results, report = answers(rank)
    assert not report.lost
    assert not results.failed_blocks
    assert rank.store.blocks == stored
    assert [rank.bytes_of(block) for block in range(20)] == datas
    assert not driver.wrong
    rank.close()


@pytest.mark.parametrize("by_kernel", [True, False])
def test_what_a_gpu_codes_is_stored_coded_and_comes_back_within_bounds(by_kernel: bool) -> None:
    coding = Coding("int4", "bfloat16" if not by_kernel else "float16")
    driver = FakeDriver()
    driver.has_coding = by_kernel
    rank = rank_on_gpu(driver, coding)
    rank.layers.view(torch.float16 if by_kernel else torch.bfloat16).normal_()
    exact = {block: rank.bytes_of(block) for block in range(40, 60)}
    rank.saver.submit(rank.store_job(1, list(exact)))
    eventually(rank.saver.has_reports)
    expected = {bytes([1, block]): coded(each, coding) for block, each in exact.items()}
    assert rank.store.blocks == expected
    assert rank.load(rank.load_job(list(expected.values()), list(range(20)))) == []
    for block, was in zip(range(20), exact.values(), strict=True):
        now = rank.bytes_of(block)
        assert now != was
        assert coded(now, coding) == coded(was, coding)
    assert ("run_coding" in driver.calls) == by_kernel
    assert not driver.wrong
    rank.close()


@pytest.mark.parametrize("calls", range(0, 40, 3))
def test_a_gpu_that_disappears_costs_loads_and_stores_and_nothing_else(calls: int) -> None:
    """At whichever call, those on the engine's own thread too."""
    driver = FakeDriver()
    rank = rank_on_gpu(driver)
    driver.fails_after = calls
    rank.loader.submit(rank.load_job([data(1)] * 20, list(range(20))))
    rank.saver.submit(rank.store_job(1, list(range(40, 60))))
    results, report = answers(rank)
    assert results.finished == {"r"}
    assert results.failed_blocks
    assert report.lost or len(rank.store.blocks) == 20
    for part in (rank.loader, rank.saver):
        stats = part.take_stats()
        assert stats is not None
        assert not stats.data.get("thread_errors")
    rank.close()
