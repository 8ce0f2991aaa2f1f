"""The name under which an engine's workers read on their GPUs, and its scheduler asks for what
they are to read: blocks that are nowhere but there may then be leased."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvstore_connectors.vllm.config import ConnectorConfig

READER_BYTES = 16


def reader_of(vllm_config: VllmConfig, config: ConnectorConfig) -> bytes:
    """The same in all processes of one engine, another in every other; empty where its workers
    read on no GPU, and where a load that fails would be an error: what is there alone may go
    before it is loaded.

    vLLM's id of the engine is a random one unless somebody wrote one; each data-parallel replica
    has its own, and vLLM gives the first worker's to all others before it makes their connectors.
    """
    transfer = vllm_config.kv_transfer_config
    on_gpu = vllm_config.device_config.device_type == "cuda"
    if not on_gpu or config.load_failure != "recompute":
        return b""
    if transfer is None or not transfer.is_kv_consumer or not transfer.engine_id:
        return b""
    return hashlib.blake2b(transfer.engine_id.encode(), digest_size=READER_BYTES).digest()
