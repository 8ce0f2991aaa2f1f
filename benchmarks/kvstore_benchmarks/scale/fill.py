"""A data directory as a server would have left it after storing millions of blocks.

    python -m kvstore_benchmarks.scale.fill DIRECTORY BLOCKS

Only the index is filled. The extents are files without contents, which a start does
not read: no measurement here brings up a block from them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from kvstore.naming import namer
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_file import file_name
from kvstore.tiers.nvme_index import Batch, Index, encode_layout, encode_record, map_bytes_for
from kvstore.tiers.nvme_slot import slot_bytes
from kvstore.types import LayoutSpec

BLOCK_BYTES = 4096
CHAIN = 256
EXTENT_BYTES = 128 << 20
MAX_BLOCKS = 10_000_000
SPEC = LayoutSpec("scale", "bfloat16", 16, BLOCK_BYTES)
KEPT, CLEARED = "kept", "cleared"
"""Two tenants, one of which is cleared."""

_BATCH = 8192


def tenant_key(secret: bytes, tenant: str) -> bytes:
    return blake2b(tenant.encode(), key=secret).digest()


def cleared_blocks(blocks: int) -> int:
    """How many of them are the tenant's who is cleared."""
    return min(blocks // 10, 25_600) // CHAIN * CHAIN


def chain(number: int) -> list[bytes]:
    """The keys of a chain."""
    return [(number * CHAIN + i).to_bytes(32, "little") for i in range(CHAIN)]


def capacity_for(blocks: int) -> int:
    """Of a tier with room for so many blocks and a few extents more."""
    extents = -(-blocks // (EXTENT_BYTES // slot_bytes(BLOCK_BYTES))) + 4
    # The index takes at most a thirty-second of it, rounded up here.
    return extents * EXTENT_BYTES * 31 // 30 + (8 << 20)


def fill(path: Path, blocks: int) -> None:
    """Make the directory; `blocks` is rounded down to whole chains."""
    capacity = capacity_for(blocks)
    tier = NvmeTier.open(path, capacity, EXTENT_BYTES, MAX_BLOCKS)
    secret = tier.secret()
    tier.close()
    index = Index.open(path / "index", map_bytes_for(capacity, MAX_BLOCKS), EXTENT_BYTES)
    size = slot_bytes(BLOCK_BYTES)
    each = EXTENT_BYTES // size
    layouts = Batch()
    for tenant in (KEPT, CLEARED):
        key, value = encode_layout(tenant, SPEC.layout_id, asdict(SPEC))
        layouts.layouts[key] = value
    for extent in range(1, -(-blocks // each) + 1):
        layouts.opened[extent] = size
        with (path / "extents" / file_name(extent)).open("wb") as file:
            file.truncate(EXTENT_BYTES)
    index.apply(layouts)
    batch = Batch()
    for slot, header in enumerate(_headers(secret, blocks)):
        extent, offset = divmod(slot, each)
        batch.blocks[(1 + extent) * EXTENT_BYTES + offset * size] = encode_record(header, slot)
        if len(batch.blocks) == _BATCH:
            index.apply(batch)
            batch = Batch()
    index.apply(batch)
    index.sync()
    index.close()


def _headers(secret: bytes, blocks: int) -> Iterator[BlockHeader]:
    """In the order in which write-back stores them, the last of a chain first."""
    chains = blocks // CHAIN
    first_kept = cleared_blocks(blocks) // CHAIN
    for number in range(chains):
        tenant = CLEARED if number < first_kept else KEPT
        name = namer(tenant_key(secret, tenant), SPEC.layout_id)
        names = [name(key) for key in chain(number)]
        for block, parent in reversed(list(zip(names, [b"", *names], strict=False))):
            checksum = int.from_bytes(block[:8], "little")
            yield BlockHeader(block, parent, SPEC.layout_id, tenant, BLOCK_BYTES, checksum)


if __name__ == "__main__":
    fill(Path(sys.argv[1]), int(sys.argv[2]))
