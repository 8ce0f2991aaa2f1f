"""How blocks are named inside the store.

A block's name is a keyed hash of its layout and key under its tenant's secret: a
real MAC, so that nobody without the secret can tell which blocks a tenant has, find
them, or make one that takes another's place.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b, blake2s

from kvstore.types import STORED_KEY_BYTES

Namer = Callable[[bytes], bytes]
"""From a block's key (32 bytes) to its name (16 bytes)."""


def namer(secret: bytes, layout_id: bytes) -> Namer:
    """Names the blocks of a layout as their tenant's. `secret`: 1 to 64 bytes.

    The layout's own secret is BLAKE2b (RFC 7693) of its id, keyed with the tenant's; a
    name is BLAKE2s of that secret and the key, 32 bytes each. They fill a block of the
    hash function exactly, so a name costs one compression, where BLAKE2's keyed mode
    takes two for the same: it also puts the secret before the message, but padded.
    """
    of_layout = blake2b(layout_id, key=secret, digest_size=32).digest()
    copy = blake2s(of_layout, digest_size=STORED_KEY_BYTES).copy

    def name(key: bytes) -> bytes:
        state = copy()
        state.update(key)
        return state.digest()

    return name
