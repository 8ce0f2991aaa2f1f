"""A tiered store for the KV cache of LLM inference: the client.

    with kvstore.Client() as client:
        layout = client.register_layout(kvstore.LayoutSpec(...))
        client.put(layout, key, data)

Names are imported when they are first used, so that importing the package loads
neither gRPC nor NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore import errors as errors
    from kvstore.client.aio import AsyncClient as AsyncClient
    from kvstore.client.aio import AsyncLease as AsyncLease
    from kvstore.client.lease import Layout as Layout
    from kvstore.client.sync import Client as Client
    from kvstore.client.sync import Lease as Lease
    from kvstore.client.wire import ServerInfo as ServerInfo
    from kvstore.local.spawn import ensure_server as ensure_server
    from kvstore.types import ChainPresence as ChainPresence
    from kvstore.types import ChainQuery as ChainQuery
    from kvstore.types import CommitAnswer as CommitAnswer
    from kvstore.types import CommitOutcome as CommitOutcome
    from kvstore.types import Hints as Hints
    from kvstore.types import LayoutSpec as LayoutSpec
    from kvstore.types import LeaseGrant as LeaseGrant
    from kvstore.types import PutOutcome as PutOutcome
    from kvstore.types import Refusal as Refusal
    from kvstore.types import Retention as Retention
    from kvstore.types import Reuse as Reuse
    from kvstore.types import Segment as Segment
    from kvstore.types import SessionState as SessionState
    from kvstore.types import SlotGrant as SlotGrant
    from kvstore.types import StoreStats as StoreStats

_HOME = {
    "AsyncClient": "kvstore.client.aio",
    "AsyncLease": "kvstore.client.aio",
    "ChainPresence": "kvstore.types",
    "ChainQuery": "kvstore.types",
    "Client": "kvstore.client.sync",
    "CommitAnswer": "kvstore.types",
    "CommitOutcome": "kvstore.types",
    "Hints": "kvstore.types",
    "Layout": "kvstore.client.lease",
    "LayoutSpec": "kvstore.types",
    "Lease": "kvstore.client.sync",
    "LeaseGrant": "kvstore.types",
    "PutOutcome": "kvstore.types",
    "Refusal": "kvstore.types",
    "Retention": "kvstore.types",
    "Reuse": "kvstore.types",
    "Segment": "kvstore.types",
    "ServerInfo": "kvstore.client.wire",
    "SessionState": "kvstore.types",
    "SlotGrant": "kvstore.types",
    "StoreStats": "kvstore.types",
    "ensure_server": "kvstore.local.spawn",
    "errors": "kvstore",
}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # A type checker shall complain of names that are not above.

    def __getattr__(name: str) -> object:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
        value: object = (
            import_module("kvstore.errors")
            if name == "errors"
            else getattr(import_module(home), name)
        )
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
