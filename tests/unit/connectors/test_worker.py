"""A worker's half: every order gets its answer, whoever carries it out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.device.base import Piece
from kvstore_connectors.vllm import worker as module
from kvstore_connectors.vllm.adapters import Adapter
from kvstore_connectors.vllm.blocks import Geometry
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.metadata import LoadJob, LoadPart, StepMetadata, StoreJob
from kvstore_connectors.vllm.worker import WorkerSide
from tests.unit.connectors.fakes import FAR_NS, FakeStore, spec

GEOMETRY = Geometry((Piece(0, 64, 64),), num_blocks=8, block_tokens=4, allocation_bytes=512)
STORE = StoreJob(1, "r", 0, [3], [b"key"], [b""])
LOAD = LoadJob("r", [LoadPart(0, [2, 3], [[1, 2]], [[0, 0]])], FAR_NS, b"epoch")


class Rank:
    def __init__(
        self, *, writes: bool = True, good_memory: bool = True, adapters: Any = None
    ) -> None:
        self.store = FakeStore()
        self.link = StoreLink(self.store.connect, [spec()], "test")
        self.link.start()
        assert self.link.wait_attached(30)
        self.side = WorkerSide(
            link=self.link,
            geometries=[GEOMETRY],
            rank=0,
            shard=0,
            writes=writes,
            loads=True,
            specs_for=lambda salt: [spec(block_bytes=64 + len(salt))],
            adapters=adapters,
        )
        memory = torch.zeros(512 if good_memory else 8, dtype=torch.uint8)
        self.side.register_kv_caches({"layer": memory})


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.store.gate.set()
    rank.side.close()


def test_a_rank_that_does_not_write_reports_for_the_one_that_does() -> None:
    rank = Rank(writes=False)
    meta = StepMetadata(stores=[STORE])
    rank.side.start_stores(meta)
    assert rank.side.take_loaded(meta) == (set(), set())
    report = rank.side.take_report()
    assert report is not None
    assert not report.jobs[1].lost
    assert "reserve" not in rank.store.calls
    rank.side.close()


@pytest.mark.parametrize("has", [True, False])
def test_a_rank_moves_blocks_of_the_adapter_it_has_and_of_no_other(has: bool) -> None:
    adapter = Adapter(1, "/p", b"i" * 32)
    mine = SimpleNamespace(
        has=lambda asked: has and asked == adapter,
        take_news=lambda: {1: b"new"},
        close=lambda: None,
    )
    rank = Rank(adapters=mine)
    meta = StepMetadata(loads=[LOAD], stores=[STORE], adapters={"r": adapter})
    rank.side.start_loads(meta)
    rank.side.start_stores(meta)
    loaded = rank.side.take_loaded(meta)
    report = rank.side.take_report()
    assert report is not None and report.adapters == {1: {0: b"new"}}
    refused = loaded == ({"r"}, {"r"}), 1 in report.jobs and report.jobs[1].lost
    assert refused == (not has, not has)
    rank.side.close()


def test_a_kv_cache_that_is_not_as_expected_fails_orders_and_nothing_else() -> None:
    rank = Rank(good_memory=False)
    meta = StepMetadata(loads=[LOAD], stores=[STORE], cancelled=[7], idle=True)
    rank.side.before_step(meta)
    rank.side.start_loads(meta)
    rank.side.start_stores(meta)
    assert rank.side.take_loaded(meta) == ({"r"}, {"r"})
    report = rank.side.take_report()
    assert report is not None
    assert report.jobs[1].lost
    assert rank.side.take_stats() is None
    rank.side.close()


def test_a_changed_salt_drops_what_was_computed_before(rank: Rank) -> None:
    rank.store.gate.clear()
    rank.side.start_stores(StepMetadata(stores=[STORE]))
    rank.side.before_step(StepMetadata(salt="new"))
    rank.store.gate.set()
    report = rank.side.take_report()
    assert report is not None
    assert report.jobs[1].lost
    time.sleep(0.02)
    assert not rank.store.blocks
    assert rank.link.specs == [spec(block_bytes=67)]


def test_only_an_idle_step_waits_for_copies(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_WAIT_S", 120.0)
    rank.store.gate.clear()
    rank.side.start_stores(StepMetadata(stores=[STORE]))
    started_s = time.monotonic()
    rank.side.take_loaded(StepMetadata(idle=False))
    assert time.monotonic() - started_s < 60
    rank.store.gate.set()
    rank.side.take_loaded(StepMetadata(idle=True))
    assert rank.side.take_report() is not None
    assert time.monotonic() - started_s < 100


def test_the_end_of_a_prefill_is_told_once(rank: Rank) -> None:
    rank.side.start_loads(StepMetadata(prefill=7))
    report = rank.side.take_report()
    assert report is not None and report.prefill == 7
    rank.side.start_loads(StepMetadata())
    assert rank.side.take_report() is None
