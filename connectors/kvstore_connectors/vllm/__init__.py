"""vLLM's connector to the store: `KVStoreConnector`.

The name is resolved on first use, so that registering the connector by name, which
vLLM does in every process, does not import torch and the connector with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore_connectors.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> object:
    if name == "KVStoreConnector":
        from kvstore_connectors.vllm.connector import KVStoreConnector

        return KVStoreConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
