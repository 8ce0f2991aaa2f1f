"""The name of who reads on GPUs: one for each engine, and none where a block that is in a GPU's
memory alone could cost more than it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvstore_connectors.vllm import connector as module
from kvstore_connectors.vllm.connector import KVStoreConnector
from kvstore_connectors.vllm.reader import READER_BYTES
from kvstore_connectors.vllm.worker import WorkerSide
from tests.unit.connectors.fakes import FakeStore
from tests.unit.connectors.test_layout import cache, engine

Names = Callable[..., tuple[bytes, bytes]]


class Elsewhere:
    """A connector of several that others are within."""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """What the scheduler asks as, and what a worker reads as, of an engine."""
    made: list[KVStoreConnector] = []
    store = FakeStore()
    told: list[bytes] = []
    group: list[Any] = []
    monkeypatch.setattr(module, "connector_of", lambda config: store.connect)
    monkeypatch.setattr(module, "get_kv_transfer_group", lambda: group[-1])
    monkeypatch.setattr(module, "has_kv_transfer_group", lambda: bool(group))
    monkeypatch.setattr(
        WorkerSide, "register_kv_caches", lambda self, caches, reader: told.append(reader)
    )

    def names(
        device: str = "cuda", role: str = "kv_both", engine_id: str = "e_dp0", *,
        alone: bool = True, **extra: Any,
    ) -> tuple[bytes, bytes]:  # fmt: skip
        config = engine()
        config.device_config.device_type = device
        config.parallel_config.world_size = 1
        config.cache_config.prefix_caching_hash_algo = "sha256"
        config.kv_events_config = config.lora_config = None
        config.kv_transfer_config = KVTransferConfig(
            kv_connector="KVStoreConnector",
            kv_role=role,
            engine_id=engine_id,
            kv_connector_extra_config={"untested_gpu": True} | extra,
        )
        scheduler = KVStoreConnector(config, KVConnectorRole.SCHEDULER, cache())
        worker = KVStoreConnector(config, KVConnectorRole.WORKER, cache())
        made.extend((scheduler, worker))
        group.append(worker if alone else Elsewhere())
        worker.register_kv_caches({})
        assert scheduler._scheduler is not None
        return scheduler._scheduler._queue._reader, told[-1]

    yield names
    for each in made:
        each.shutdown()


def test_scheduler_and_workers_of_an_engine_use_one_name_and_others_another(names: Names) -> None:
    asked, read = names()
    assert asked == read
    assert len(asked) == READER_BYTES
    assert names() == (asked, read)
    assert asked not in names(engine_id="e_dp1")


@pytest.mark.parametrize(
    "of",
    [
        pytest.param({"device": "cpu"}, id="it has no GPU"),
        pytest.param({"role": "kv_producer"}, id="it loads nothing"),
        pytest.param({"load_failure": "fail"}, id="its leases must hold what they name"),
    ],
)
def test_an_engine_that_has_no_use_for_one_has_none(names: Names, of: dict[str, str]) -> None:
    assert names(**of) == (b"", b"")


def test_one_of_several_connectors_reads_under_no_name(names: Names) -> None:
    """Whether a load that fails is an error is said outside, where it cannot be seen: so nobody
    reads under the name that is asked as."""
    assert names(alone=False)[1] == b""
