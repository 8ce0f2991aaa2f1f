"""Read and write blocks in place, in the server's own memory, as a connector does.

    python examples/python/zero_copy.py [unix:///path/kvstore.sock]

The server has to be on this host. Without an argument it is this user's own, which is started
if there is none, and ends a minute after its last client has left. The rules that keep this safe:

  * write only into slots that were reserved, inside `write_slots`, and never after `commit`
    or `abort`;
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
    """Reserve slots, compute straight into them, say which blocks they are."""
    grant = client.reserve(layout, len(keys), wait_ms=1000)
    # There may be fewer than asked for: the first blocks of the chain come first.
    slots = [grant.first_slot + index for index in range(len(grant.addresses))]
    try:
        checksums = client.write_slots(slots, grant.addresses, BLOCK_BYTES, compute)
        segment = kvstore.Segment(b"", keys[: len(slots)], slots, checksums)
        answer = client.commit(layout, [segment])
    except BaseException:
        client.abort(slots)
        raise
    print("committed:", [outcome.name for outcome in answer.outcomes])


def compute(blocks: list[memoryview]) -> list[int]:
    """Fill the blocks' memory; the checksum of each."""
    for index, block in enumerate(blocks):
        np.frombuffer(block, np.float16).reshape(SHAPE)[:] = index
    return [xxhash.xxh3_64_intdigest(block) for block in blocks]


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
    try:
        main()
    except kvstore.errors.Unavailable as error:
        sys.exit(f"No server of the store can be used: {error}")
