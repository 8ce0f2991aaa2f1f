"""LMCache's server and, in this process, the client's part of what its connector does.

Without a GPU its engine-driven transfer is the one that runs: the server names slots
in shared memory, the client copies, and a second call publishes or gives back. A
chain is its tokens; the server hashes them. A get begins with the lookup that locks
what is to be read.

    python -m kvstore_benchmarks.peers.lmcache
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc  # type: ignore[import-not-found]
from lmcache.v1.multiprocess.custom_types import (  # type: ignore[import-not-found]
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.transfer_context.base import (  # type: ignore[import-not-found]
    EngineDrivenContextMetadata,
    create_engine_driven_context,
)
from lmcache.v1.multiprocess.transport.factory import (  # type: ignore[import-not-found]
    RequestClientFactory,
)

from kvstore_benchmarks.peers.child import private_memory, serve
from kvstore_benchmarks.peers.processes import free_ports, start

POOL_GB = 1
BLOCK_TOKENS = 32
TIMEOUT_S = 30.0
LOCAL = "127.0.0.1"

Tokens = tuple[int, ...]


class LMCache:
    """A client; see `child.Store`. A chain is its tokens, a block a tensor."""

    version = metadata.version("lmcache")
    way = "shared memory, copied by the client, a chain a call"

    def __init__(self, requests: Any) -> None:
        self._requests = requests
        self._model = ""
        self._instance = 0
        self._context: Any = None
        self._looked_up: Any = None

    def memory(self, nbytes: int) -> memoryview:
        return private_memory(nbytes)

    def prepare(self, nbytes: int) -> None:
        """A model whose KV has the block's size, in one layer and one plane."""
        if self._context is not None:
            self._context.close()
        self._model, self._instance = f"kvstore-bench-{nbytes}", os.getpid() + nbytes
        width = nbytes // BLOCK_TOKENS
        registered = self._requests.register_kv_cache_engine_driven_context(
            RegisterEngineDrivenContextPayload(
                instance_id=self._instance,
                model_name=self._model,
                world_size=1,
                block_size=BLOCK_TOKENS,
                num_layers=1,
                hidden_dim_size=width,
                dtype_str="uint8",
                use_mla=True,
                num_physical_slots=BLOCK_TOKENS,
            )
        ).result(timeout=TIMEOUT_S)
        shape = torch.Size([1, BLOCK_TOKENS, width])
        layout = MemoryLayoutDesc(shapes=[shape], dtypes=[torch.uint8])
        self._context = create_engine_driven_context(
            EngineDrivenContextMetadata(layout, BLOCK_TOKENS, use_mla=True),
            self._requests,
            TIMEOUT_S,
            registered.shm_name,
            registered.pool_size,
        )

    def block(self, view: memoryview) -> torch.Tensor:
        return torch.frombuffer(view, dtype=torch.uint8).view(1, BLOCK_TOKENS, -1)

    def new_chain(self, length: int) -> Tokens:
        drawn = memoryview(secrets.token_bytes(4 * BLOCK_TOKENS * length)).cast("I")
        return tuple(drawn.tolist())

    def branch(self, chain: Tokens, keep: int) -> Tokens:
        kept = keep * BLOCK_TOKENS
        return chain[:kept] + self.new_chain(len(chain) // BLOCK_TOKENS - keep)

    def put(self, chain: Tokens, blocks: Sequence[torch.Tensor]) -> int:
        key = self._key(chain, 0)
        prepared = self._context.prepare_store(key, self._instance)
        if prepared is None:
            return len(blocks)
        slots, positions = prepared
        for slot, position in zip(slots, positions, strict=True):
            slot.copy_(blocks[position])
        stored = self._context.commit_store(key, self._instance, slots)
        self._requests.end_session(key.request_id)
        return len(blocks) - (len(slots) if stored else 0)

    def get(self, chain: Tokens, targets: Sequence[torch.Tensor]) -> int:
        if self.lookup(chain) != len(targets):
            self.after_lookup()
            return len(targets)
        key = self._key(chain, 0, self._looked_up.request_id)
        slots = self._context.prepare_retrieve(key, self._instance)
        if slots is None or len(slots) != len(targets):
            return len(targets)
        for target, slot in zip(targets, slots, strict=True):
            target.copy_(slot)
        kept = self._context.commit_retrieve(key, self._instance)
        self._requests.end_session(key.request_id)
        return 0 if kept else len(targets)

    def lookup(self, chain: Tokens) -> int:
        key = self._looked_up = self._key(chain, None)
        self._requests.lookup(key, 1).result(timeout=TIMEOUT_S)
        held = self._requests.wait_prefetch_status(key.request_id, TIMEOUT_S)
        return int(held.result(timeout=TIMEOUT_S) or 0)

    def after_lookup(self) -> None:
        key = self._looked_up
        self._requests.free_lookup_locks(key, 1).result(timeout=TIMEOUT_S)
        self._requests.end_session(key.request_id).result(timeout=TIMEOUT_S)

    def clear(self) -> None:
        self._requests.clear(True).result(timeout=TIMEOUT_S)

    def _key(self, chain: Tokens, worker: int | None, request: str = "") -> Any:
        return IPCCacheServerKey(
            model_name=self._model,
            world_size=1,
            worker_id=worker,
            token_ids=chain,
            start=0,
            end=len(chain),
            request_id=request or secrets.token_hex(8),
            num_kv_readers=1,
        )


def opened(stack: ExitStack) -> LMCache:
    torch.set_num_threads(1)  # The copy of the others is one thread's, too.
    port, http, metrics = free_ports(3)
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", LOCAL]
    command += ["--port", str(port), "--http-port", str(http), "--prometheus-port", str(metrics)]
    command += ["--l1-size-gb", str(POOL_GB), "--eviction-policy", "LRU"]
    command += ["--supported-transfer-mode", "engine_driven", "--chunk-size", str(BLOCK_TOKENS)]
    command += ["--shm-name", f"kvstore-bench-{os.getpid()}"]
    start(stack, command, port=http)
    requests = RequestClientFactory.create(f"{LOCAL}:{port}")
    stack.callback(requests.close)
    requests.noop().result(timeout=TIMEOUT_S)
    return LMCache(requests)


if __name__ == "__main__":
    sys.exit(serve(opened))
