"""Makes the connector known to vLLM by name.

Installed as the entry point `kvstore` of the group `vllm.general_plugins`, which
vLLM calls in each of its processes, sometimes more than once.
"""

from __future__ import annotations

NAME = "KVStoreConnector"


def register() -> None:
    """Register `KVStoreConnector` with vLLM's factory. Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(NAME, "kvstore_connectors.vllm", NAME)
    except ValueError:
        # The factory's only complaint: the name is registered already.
        return
