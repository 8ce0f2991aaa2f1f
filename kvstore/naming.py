"""How blocks are named inside the store.

A block's name is a keyed hash of its layout and key under its tenant's secret: a
real MAC, so that nobody without the secret can tell which blocks a tenant has, find
them, or make one that takes another's place.
"""

from __future__ import annotations

from collections import deque
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


class RememberedNames:
    """Namers for a server, which is asked for the names of the same keys again and again:
    by a commit, and by an acquire for every prompt that begins with them.

    A name that is remembered costs a sixth of one that is made. One that is made here
    costs two to three times as much as elsewhere, because it takes the place of the
    oldest; keys that are asked for three times make up for it. All namers together
    remember `most` names, at 170 bytes each. Not thread-safe.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # Two queues in step: pairs would be objects for the garbage collector to visit.
        self._keys: deque[bytes] = deque()
        self._memories: deque[_Memory] = deque()

    def __len__(self) -> int:
        return len(self._keys)

    def namer(self, secret: bytes, layout_id: bytes) -> Namer:
        """As `namer`. Keys must be of the right length: they are kept."""
        return _Memory(namer(secret, layout_id), self).__getitem__

    def _remember(self, memory: _Memory, key: bytes) -> None:
        if len(self._keys) >= self._most:
            del self._memories.popleft()[self._keys.popleft()]
        self._keys.append(key)
        self._memories.append(memory)


class _Memory(dict[bytes, bytes]):
    """Names by key, made where they are missing. What is there is found without Python."""

    def __init__(self, name: Namer, names: RememberedNames) -> None:
        super().__init__()
        self._name = name
        self._names = names

    def __missing__(self, key: bytes) -> bytes:
        self._names._remember(self, key)
        made = self[key] = self._name(key)
        return made
