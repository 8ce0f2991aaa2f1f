"""A pipeline's scheduler learns from the workers what there is to store, or does without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
)

from kvstore_connectors.vllm import connector as module
from kvstore_connectors.vllm.connector import KVStoreConnector
from kvstore_connectors.vllm.metadata import WorkerLayouts
from tests.unit.connectors.fakes import FakeStore
from tests.unit.connectors.test_layout import engine, staged

STAGES = [staged([["f0"], ["w0", "w1"]]), staged([["f1"], ["w2"]])]


class Pipeline:
    """A connector for each process of an engine with two stages and two KV cache groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = FakeStore()
        self.registered: list[Any] = []
        monkeypatch.setattr(module, "connector_of", lambda config: self.store.connect)
        self.scheduler = KVStoreConnector(configured(0), KVConnectorRole.SCHEDULER, STAGES[0])
        # vLLM's own, of a process.
        self.group: Any = None
        monkeypatch.setattr(module, "get_kv_transfer_group", lambda: self.group)
        monkeypatch.setattr(module, "has_kv_transfer_group", lambda: self.group is not None)
        self.workers = [self._worker(rank) for rank in range(2)]

    def _worker(self, rank: int) -> KVStoreConnector:
        worker = KVStoreConnector(configured(rank), KVConnectorRole.WORKER, STAGES[rank])
        size = max(tensor.size for tensor in STAGES[rank].kv_cache_tensors)
        memory = torch.zeros(size, dtype=torch.int8)
        names = [name for group in STAGES[rank].kv_cache_groups for name in group.layer_names]
        places = {name: memory[self._at(rank, name) :] for name in names}
        worker.register_kv_caches(places)
        return worker

    def _at(self, rank: int, name: str) -> int:
        for tensor in STAGES[rank].kv_cache_tensors:
            if name in tensor.layers:
                return int(tensor.offset + tensor.layers.index(name) * tensor.layer_stride)
        raise AssertionError(name)

    def told(self) -> dict[tuple[int, int], KVConnectorHandshakeMetadata]:
        """As vLLM gathers it."""
        told = {}
        for rank, worker in enumerate(self.workers):
            self.group = worker
            metadata = worker.get_handshake_metadata()
            if metadata is not None:
                told[rank, 0] = metadata
        return told

    def close(self) -> None:
        for each in (self.scheduler, *self.workers):
            each.shutdown()


def configured(rank: int) -> Any:
    config = engine(pp=2, rank=rank)
    config.parallel_config.world_size = 2
    config.cache_config.prefix_caching_hash_algo = "sha256"
    config.kv_events_config = config.lora_config = None
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="KVStoreConnector",
        kv_role="kv_both",
        kv_connector_module_path="kvstore_connectors.vllm",
    )
    return config


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    pipeline = Pipeline(monkeypatch)
    yield pipeline
    pipeline.close()


def test_the_scheduler_attaches_when_every_stage_has_told_its_layouts(pipeline: Pipeline) -> None:
    link = pipeline.scheduler._link
    assert link is not None and not link.up
    told = pipeline.told()
    pipeline.scheduler.set_xfer_handshake_metadata_pp_aware(told)
    assert link.up
    places = [(spec.group, spec.rank) for spec in link.specs]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for rank, metadata in enumerate(told.values()):
        assert isinstance(metadata, WorkerLayouts)
        assert metadata.specs == [spec for spec in link.specs if spec.rank == rank]


def test_a_changed_salt_changes_the_layouts_of_all_stages(pipeline: Pipeline) -> None:
    pipeline.scheduler.set_xfer_handshake_metadata_pp_aware(pipeline.told())
    link = pipeline.scheduler._link
    assert link is not None
    before = {spec.layout_id for spec in link.specs}
    pipeline.scheduler.reset_cache()
    assert len(link.specs) == 4
    assert not before & {spec.layout_id for spec in link.specs}


def test_one_of_several_connectors_tells_nothing(pipeline: Pipeline) -> None:
    """vLLM hands what the first connector tells to all of them, and some refuse to start."""
    assert pipeline.workers[0].get_handshake_metadata() is None


def test_what_others_tell_or_a_stage_does_not_switches_it_off(pipeline: Pipeline) -> None:
    class Foreign(KVConnectorHandshakeMetadata):
        pass

    told = pipeline.told()
    told[1, 0] = Foreign()
    pipeline.scheduler.set_xfer_handshake_metadata_pp_aware(told)
    link = pipeline.scheduler._link
    assert link is not None and not link.up
    assert pipeline.scheduler.build_connector_meta(None).loads == []  # type: ignore[arg-type, attr-defined]
