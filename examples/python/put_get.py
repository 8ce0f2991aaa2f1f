"""Store a prompt's blocks and get them back: the whole of the simple API.

    python examples/python/put_get.py [unix:///path/kvstore.sock | host:port]

Without an argument it uses this user's own server, and starts one if there is
none; that one ends a minute after its last client has left.
"""

# ruff: noqa: T201 - an example shows what it got.
from __future__ import annotations

import hashlib
import os
import sys

import kvstore
from kvstore.config import default_socket_path

BLOCK_TOKENS = 16
BLOCK_BYTES = 256 * 1024


def chain_keys(tokens: list[int]) -> list[bytes]:
    """One key for each whole block. Each covers everything before it too, so that
    equal keys mean equal prefixes: that is what makes a block reusable."""
    keys: list[bytes] = []
    parent = b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        parent = hashlib.sha256(parent + repr(block).encode()).digest()
        keys.append(parent)
    return keys


def main() -> None:
    endpoint = sys.argv[1] if len(sys.argv) > 1 else None
    if endpoint is None:
        kvstore.ensure_server(default_socket_path())

    with kvstore.Client(endpoint) as client:
        where = "shared memory" if client.is_local else "gRPC"
        print(f"connected; bytes go over {where}")

        # Everything that makes two blocks' bytes interchangeable. Whatever is
        # left out here is a way to read another model's bytes as your own.
        layout = client.register_layout(
            kvstore.LayoutSpec(
                model="example/tiny",
                dtype="bfloat16",
                block_tokens=BLOCK_TOKENS,
                block_bytes=BLOCK_BYTES,
            )
        )

        keys = chain_keys(list(range(8 * BLOCK_TOKENS)))
        print("before:", client.lookup(layout, keys))

        # A random engine computes other bytes each time, and other bytes under
        # the same key are refused; so only what is missing is put.
        held = client.lookup(layout, keys).held
        blocks = [os.urandom(BLOCK_BYTES) for _ in keys[held:]]
        parent = keys[held - 1] if held else b""
        outcomes = client.put_many(layout, keys[held:], blocks, parent=parent)
        print("put:", [outcome.value for outcome in outcomes])
        print("after:", client.lookup(layout, keys))

        # Getting into a buffer of one's own avoids an allocation a block.
        buffer = bytearray(BLOCK_BYTES)
        for key, block in zip(keys[held:], blocks, strict=True):
            got = client.get(layout, key, into=buffer)
            assert got is None or got == block, "a get is a miss or exactly the bytes"

        for tier in client.stats().tiers:
            print(f"{tier.tier.label}: {tier.blocks} blocks, {tier.used_bytes >> 20} MiB")


if __name__ == "__main__":
    try:
        main()
    except kvstore.errors.Unavailable as error:
        sys.exit(f"No server of the store can be used: {error}")
