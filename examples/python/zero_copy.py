"""Read and write blocks in place, in the server's own memory, as a connector does.

    python examples/python/zero_copy.py [unix:///path/kvstore.sock]

Needs a server on this host. The rules that keep this safe:

  * write only into slots a reservation granted, and never after `abort`;
  * use what a view shows only if the lease has not `expired` *after* it was used;
  * never keep a view beyond its lease.
"""

# ruff: noqa: T201 - an example shows what it got.
from __future__ import annotations

import sys

import numpy as np
import xxhash

import kvstore
from kvstore.config import default_socket_path

SHAPE = (2, 16, 8, 64)  # key and value, tokens, heads, head size
BLOCK_BYTES = int(np.prod(SHAPE)) * np.dtype(np.float16).itemsize


def write_in_place(client: kvstore.Client, layout: kvstore.Layout, keys: list[bytes]) -> None:
    """Reserve, compute straight into the slots, commit what was granted."""
    entries = list(zip(keys, [b"", *keys], strict=False))
    grant = client.reserve(layout, entries, wait_ms=1000)
    try:
        written: list[int] = []
        checksums: list[int] = []
        for index, result in enumerate(grant.results):
            if result.outcome is not kvstore.ReserveOutcome.GRANTED:
                continue  # Somebody has it already, or is writing it, or there is no space.
            slot = client.slot(result.address, BLOCK_BYTES, writable=True)
            np.frombuffer(slot, np.float16).reshape(SHAPE)[:] = index
            written.append(index)
            checksums.append(xxhash.xxh3_64_intdigest(slot))
        if written:
            client.commit(grant.reservation_id, written, checksums)
    except BaseException:
        client.abort(grant.reservation_id)
        raise


def sum_in_place(client: kvstore.Client, layout: kvstore.Layout, keys: list[bytes]) -> list[float]:
    """Sums of the held prefix, read where the blocks lie."""
    with client.acquire(layout, keys) as lease:
        sums = [
            float(np.frombuffer(lease.view(index), np.float16).sum(dtype=np.float64))
            for index in range(lease.held)
        ]
        # Asked after the reading: only then were the bytes the blocks' all along.
        return [] if lease.expired else sums


def main() -> None:
    endpoint = sys.argv[1] if len(sys.argv) > 1 else None
    if endpoint is None:
        kvstore.ensure_server(default_socket_path())
    with kvstore.Client(endpoint) as client:
        layout = client.register_layout(
            kvstore.LayoutSpec(
                model="example/zero-copy", dtype="float16", block_tokens=16, block_bytes=BLOCK_BYTES
            )
        )
        keys = [bytes([position]) * 32 for position in range(4)]
        write_in_place(client, layout, keys)
        print("sums:", sum_in_place(client, layout, keys))


if __name__ == "__main__":
    main()
