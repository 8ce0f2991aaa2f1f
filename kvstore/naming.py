"""How blocks are named inside the store.

A block's name is a keyed hash of its layout and key under its tenant's secret: a
real MAC, so that nobody without the secret can tell which blocks a tenant has, find
them, or make one that takes another's place.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

from kvstore.types import STORED_KEY_BYTES

Namer = Callable[[bytes], bytes]
"""From a block's key (32 bytes) to its name (16 bytes)."""


def namer(secret: bytes, layout_id: bytes) -> Namer:
    """Names the blocks of a layout as their tenant's. `secret`: 1 to 64 bytes.

    BLAKE2b (RFC 7693) in its keyed mode, over layout and key.
    """
    base = blake2b(layout_id, key=secret, digest_size=STORED_KEY_BYTES)

    def name(key: bytes) -> bytes:
        state = base.copy()
        state.update(key)
        return state.digest()

    return name
