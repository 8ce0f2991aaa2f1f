"""The connector as on a GPU, for engines on a CPU: their KV cache stands in for one on the GPU of
the file that KVSTORE_TEST_GPU names."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from kvstore.device.host import HostDevice
from kvstore.device.vram_stand_in import PREFIX, StandInVram
from kvstore_connectors.vllm import KVStoreConnector, connector, reader, worker


def _device_of(kv_caches: Any) -> HostDevice:
    return HostDevice(StandInVram(PREFIX + os.environ["KVSTORE_TEST_GPU"]))


def _reader_of(vllm_config: Any, config: Any) -> bytes:
    transfer = vllm_config.kv_transfer_config
    on_gpu = SimpleNamespace(device_type="cuda")
    like = SimpleNamespace(kv_transfer_config=transfer, device_config=on_gpu)
    return reader.reader_of(like, config)  # type: ignore[arg-type]


worker.device_of = _device_of  # type: ignore[assignment]
connector.reader_of = _reader_of


class StraightConnector(KVStoreConnector):
    """Under a name that vLLM does not know yet."""
