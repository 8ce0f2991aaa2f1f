"""A data directory as a server would have left it after storing millions of blocks.

    python -m kvstore_benchmarks.scale.fill DIRECTORY BLOCKS HELD

Only the index and the segments' summaries are filled. The slots are without contents,
which a start does not read: no measurement here brings up a block from them.
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
from kvstore.tiers.nvme_disk import Directory, write_all
from kvstore.tiers.nvme_index import Batch, Index, encode_record, map_bytes_for
from kvstore.tiers.nvme_log import spare_segments
from kvstore.tiers.nvme_segment import Geometry, Segment, file_name
from kvstore.tiers.nvme_slot import Place, Stored, aligned, slot_bytes
from kvstore.types import LayoutSpec

BLOCK_BYTES = 4096
CHAIN = 256
EXTENT_BYTES = 128 << 20
MOST_BLOCKS = 10_000_000
"""To be measured."""
_SLOTS = EXTENT_BYTES // slot_bytes(BLOCK_BYTES)
MAX_BLOCKS = -(-MOST_BLOCKS // _SLOTS) * _SLOTS
"""For the store, which opens whole extents."""
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


def capacity_for(blocks: int, held: int) -> int:
    """Of a tier with room for so many blocks, those that DRAM holds and a few extents more."""
    extents = -(-(blocks + held) // _SLOTS) + 4
    extents += 2 * spare_segments(extents)
    # The index takes at most a thirty-second of it, rounded up here.
    return extents * EXTENT_BYTES * 31 // 30 + (8 << 20)


def fill(path: Path, blocks: int, held: int) -> None:
    """Make the directory; `blocks` is rounded down to whole chains. `held`: blocks that DRAM is
    going to have beside them."""
    capacity = capacity_for(blocks, held)
    tier = NvmeTier.open(path, capacity, EXTENT_BYTES, MAX_BLOCKS)
    secret = tier.secret()
    for tenant in (KEPT, CLEARED):
        tier.remember_layout(tenant, SPEC.layout_id, asdict(SPEC))
    tier.close()
    index = Index.open(path / "index", map_bytes_for(capacity, MAX_BLOCKS))
    index.begin_life(1)
    disk = Directory(path / "segments", direct=False)
    geometry = Geometry(EXTENT_BYTES)
    size = slot_bytes(BLOCK_BYTES)
    batch = Batch()
    segment = None
    for number, header in enumerate(_headers(secret, blocks)):
        if segment is None or segment.next == segment.slots:
            segment = _begin(disk, geometry, 0 if segment is None else segment.number + 1, size)
            batch.segments[segment.number] = (segment.life, segment.slots)
        place = Place(segment.number, segment.next, segment.life)
        segment.next += 1
        batch.blocks[place[:2]] = encode_record(Stored(header, (1 << 40) + number, place))
        if len(batch.blocks) == _BATCH:
            index.apply(batch)
            batch = Batch()
    if segment is not None:
        batch.segments[segment.number] = (segment.life, segment.next)
    index.apply(batch)
    index.end_life()
    index.sync()
    index.vouch()
    index.close()


def _begin(disk: Directory, geometry: Geometry, number: int, size: int) -> Segment:
    """A new segment on disk, without contents."""
    file = disk.path / file_name(number)
    with file.open("wb") as stream:
        stream.truncate(geometry.file_bytes)
    segment = Segment(number, disk.open(file.name), geometry)
    segment.begin((1 << 40) + number, size)
    summary, offset = segment.encode()
    page = aligned(len(summary))
    page[:] = summary
    write_all(segment.file, [page], offset)
    segment.file.close()
    return segment


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
    fill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
