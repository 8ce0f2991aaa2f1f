"""Blocks of layouts with a codec, on their way between DRAM and a storage tier.

The tier stores coded bytes as it stores any, with their length and checksum, and knows
nothing of codecs: the layout says which it is, in this life of the server and in later ones.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import xxhash

from kvstore.device import codec
from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.types import LayoutSpec, align_up


class CodedBlocks:
    """Used by several threads at once. `slot` is a block's in DRAM."""

    def __init__(self, tier: StorageTier) -> None:
        self._tier = tier
        self._idle: deque[memoryview] = deque()

    def write(self, address: int, header: BlockHeader, spec: LayoutSpec, slot: memoryview) -> int:
        """Raises what the tier's does. The checksum of what is stored, which `header` lacks."""
        with self._scratch(spec.stored_bytes) as scratch:
            stored = scratch[: spec.stored_bytes]
            codec.encode(spec.codec, spec.dtype, slot[: spec.block_bytes], stored)
            checksum = xxhash.xxh3_64_intdigest(stored)
            self._tier.write(address, header._replace(checksum=checksum), scratch)
        return checksum

    def read(self, address: int, header: BlockHeader, spec: LayoutSpec, slot: memoryview) -> int:
        """Raises what the tier's does. The checksum of what is in the slot then."""
        block = slot[: spec.block_bytes]
        with self._scratch(spec.stored_bytes) as scratch:
            self._tier.read(address, header, scratch)
            codec.decode(spec.codec, spec.dtype, scratch[: spec.stored_bytes], block)
        return xxhash.xxh3_64_intdigest(block)

    @contextmanager
    def _scratch(self, nbytes: int) -> Iterator[memoryview]:
        """As many as threads ever were at it at once, aligned as tiers want it."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = memoryview(b"")
        if len(scratch) < nbytes:
            scratch = memoryview(mmap.mmap(-1, align_up(nbytes)))
        try:
            yield scratch
        finally:
            self._idle.append(scratch)
