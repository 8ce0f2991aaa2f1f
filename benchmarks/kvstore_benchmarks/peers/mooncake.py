"""Mooncake Store: a master, a process that owns the memory, and this one, the client.

Two ways of use. By TCP, its default: this process and the owner move the bytes
through a socket. By shared memory: the owner copies them between its memory and a
pool that it shares with this process, which must have allocated its blocks there.
Both use the calls that take many registered blocks at a time, its fastest.

    python -m kvstore_benchmarks.peers.mooncake tcp|shm
"""

from __future__ import annotations

import ctypes
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import mooncake  # type: ignore[import-not-found]
from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

from kvstore_benchmarks.peers.child import address, private_memory, serve
from kvstore_benchmarks.peers.processes import free_ports, start

SEGMENT_BYTES = 1 << 30
POOL_BYTES = 512 << 20
"""Shared by owner and client: twice what a round moves, and as much again."""
BUFFER_BYTES = 64 << 20
FILL_BLOCK_BYTES = 4 << 20

BINARIES = Path(mooncake.__file__).parent
LOCAL = "127.0.0.1"
NO_METADATA = "P2PHANDSHAKE"


class Mooncake:
    """A client; see `child.Store`. A chain is a list of keys, a block its address."""

    version = metadata.version("mooncake-transfer-engine-non-cuda")

    def __init__(self, store: Any, way: str) -> None:
        self.way = way
        self._store = store
        self._nbytes = 0

    def memory(self, nbytes: int) -> memoryview:
        view = private_memory(nbytes)
        _checked("register_buffer", self._store.register_buffer(address(view), nbytes))
        return view

    def prepare(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def block(self, view: memoryview) -> int:
        return address(view)

    def new_chain(self, length: int) -> list[str]:
        return [secrets.token_hex(32) for _ in range(length)]

    def branch(self, chain: list[str], keep: int) -> list[str]:
        return chain[:keep] + self.new_chain(len(chain) - keep)

    def put(self, chain: list[str], blocks: Sequence[int]) -> int:
        statuses = self._store.batch_put_from(chain, blocks, [self._nbytes] * len(chain))
        return sum(status != 0 for status in statuses)

    def get(self, chain: list[str], targets: Sequence[int]) -> int:
        sizes = self._store.batch_get_into(chain, targets, [self._nbytes] * len(chain))
        return sum(size != self._nbytes for size in sizes)

    def lookup(self, chain: list[str]) -> int:
        return sum(there == 1 for there in self._store.batch_is_exist(chain))

    def after_lookup(self) -> None:
        """It holds nothing."""

    def clear(self) -> None:
        self._store.remove_all(True)


class Pooled(Mooncake):
    """Its blocks lie in the pool that it shares with the owner."""

    def memory(self, nbytes: int) -> memoryview:
        start = self._store.alloc_from_mem_pool(nbytes)
        if not start:
            raise RuntimeError(f"no {nbytes} bytes in the shared pool")
        _checked("register_buffer", self._store.register_buffer(start, nbytes))
        return memoryview((ctypes.c_char * nbytes).from_address(start)).cast("B")


def by_tcp(stack: ExitStack) -> Mooncake:
    master, _ = _servers(stack)
    return Mooncake(_client(stack, master), "TCP, registered memory, many blocks a call")


def by_shared_memory(stack: ExitStack) -> Mooncake:
    master, owner = _servers(stack)
    filling = ExitStack()
    with filling:
        _client(filling, master)
    store = MooncakeDistributedStore()
    _checked("setup_dummy", store.setup_dummy(POOL_BYTES, BUFFER_BYTES, f"{LOCAL}:{owner}"))
    stack.callback(store.close)
    return Pooled(store, "shared memory, copied by the owner, many blocks a call")


def _servers(stack: ExitStack) -> tuple[int, int]:
    """The ports of the master and of the process that owns the memory."""
    master, metrics, owner = free_ports(3)
    command = [str(BINARIES / "mooncake_master"), f"--rpc_address={LOCAL}", f"--rpc_port={master}"]
    command += [f"--metrics_host={LOCAL}", f"--metrics_port={metrics}"]
    start(stack, command, port=master)
    command = [str(BINARIES / "mooncake_client"), f"--host={LOCAL}", f"--port={owner}"]
    command += [f"--global_segment_size={SEGMENT_BYTES >> 20} MB", "--protocol=tcp"]
    command += [f"--master_server_address={LOCAL}:{master}", f"--metadata_server={NO_METADATA}"]
    start(stack, command, port=owner)
    return master, owner


def _client(stack: ExitStack, master: int) -> Any:
    """A client by TCP, when every page of the owner's memory has been written once."""
    store = MooncakeDistributedStore()
    address = f"{LOCAL}:{master}"
    _checked("setup", store.setup(LOCAL, NO_METADATA, 0, BUFFER_BYTES, "tcp", "", address))
    stack.callback(store.close)
    value = bytes(FILL_BLOCK_BYTES)
    for _ in range(SEGMENT_BYTES // FILL_BLOCK_BYTES):
        store.put(secrets.token_hex(32), value)
    store.remove_all(True)
    return store


def _checked(what: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"{what}: status {status}")


WAYS = {"tcp": by_tcp, "shm": by_shared_memory}

if __name__ == "__main__":
    sys.exit(serve(WAYS[sys.argv[1]]))
