"""What a user can write wrong, and how the connector gets its name."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvstore.errors import ConfigError
from kvstore_connectors.vllm import plugin
from kvstore_connectors.vllm.config import ConnectorConfig
from kvstore_connectors.vllm.metadata import JobReport, WorkerReport
from kvstore_connectors.vllm.stats import COUNTERS, ConnectorStats


def test_nothing_configured_is_a_configuration() -> None:
    assert ConnectorConfig.parse({}) == ConnectorConfig(None, (), 1000)


@pytest.mark.parametrize("endpoint", ["/run/k.sock", "unix:///run/k.sock"])
def test_an_endpoint_is_a_socket_path(endpoint: str) -> None:
    assert ConnectorConfig.parse({"endpoint": endpoint}).endpoint == "/run/k.sock"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"endpont": "/x"}, "did you mean 'endpoint'"),
        ({"zzz": 1}, "known are endpoint"),
        ({"endpoint": "localhost:80"}, "absolute path"),
        ({"endpoint": 7}, "string"),
        ({"acquire_timeout_ms": 0}, "1 to"),
        ({"acquire_timeout_ms": True}, "whole number"),
        ({"recompute": True}, "'when_sooner' or 'never'"),
        ({"load_failure": "retry"}, "'recompute' or 'fail'"),
        ({"codec": "fp9"}, "'none' or 'fp8' or 'int4'"),
        ({"untested_gpu": "yes"}, "true or false"),
        ({"server_args": "--x"}, "list of strings"),
        ({"server_args": ["--x"], "endpoint": "/x"}, "starts none"),
    ],
)
def test_mistakes_are_named(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ConnectorConfig.parse(extra)


def test_registering_twice_is_no_error_and_gives_the_connector() -> None:
    plugin.register()
    plugin.register()
    connector = KVConnectorFactory.get_connector_class_by_name("KVStoreConnector")
    import kvstore_connectors.vllm

    assert connector is kvstore_connectors.vllm.KVStoreConnector


def test_counts_of_all_ranks_add_up() -> None:
    first, second = ConnectorStats(), ConnectorStats()
    first.add(loaded_blocks=2, loaded_bytes=4e9, load_seconds=2, failed_loads=0)
    second.add(loaded_blocks=3)
    taken = first.take()
    assert taken is not None
    assert first.take() is None
    assert taken.aggregate(second).data == {
        "loaded_blocks": 5, "loaded_bytes": 4e9, "load_seconds": 2,
    }  # fmt: skip
    assert taken.reduce()["load_GBps"] == 2
    assert set(taken.data) <= set(COUNTERS)


def test_reports_of_all_ranks_add_up() -> None:
    one = WorkerReport({1: JobReport(1, False), 2: JobReport(1, False)})
    other = WorkerReport({1: JobReport(1, True), 3: JobReport(1, False)})
    merged = one.aggregate(other).jobs
    assert merged == {1: JobReport(2, True), 2: JobReport(1, False), 3: JobReport(1, False)}
    assert WorkerReport(prefill=7).aggregate(WorkerReport(prefill=7)).prefill == 7
