"""Blocks to store, made from a number, in memory aligned as a tier needs it."""

from __future__ import annotations

import mmap
import random

import xxhash

from kvstore.tiers.base import BlockHeader, StorageTier
from kvstore.types import align_up

EXTENT_BYTES = 256 << 10
BLOCK_BYTES = 20_000
"""Not a multiple of a page, so that every test crosses the padding."""


def aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, align_up(nbytes)))[:nbytes]


def payload_of(number: int, nbytes: int = BLOCK_BYTES) -> memoryview:
    payload = aligned(nbytes)
    payload[:] = random.Random(number).randbytes(nbytes)
    return payload


def header_of(
    number: int, payload: memoryview, *, parent: bytes = b"", tenant: str = "alice"
) -> BlockHeader:
    return BlockHeader(
        stored_key=number.to_bytes(16, "big"),
        parent=parent,
        layout_id=b"L" * 16,
        tenant=tenant,
        length=len(payload),
        checksum=xxhash.xxh3_64_intdigest(payload),
    )


def put(tier: StorageTier, address: int, number: int, nbytes: int = BLOCK_BYTES) -> BlockHeader:
    payload = payload_of(number, nbytes)
    header = header_of(number, payload)
    tier.write(address, header, payload)
    return header


def get(tier: StorageTier, address: int, header: BlockHeader) -> bytes:
    into = aligned(header.length)
    tier.read(address, header, into)
    return bytes(into)


def recovered(tier: StorageTier) -> dict[int, BlockHeader]:
    """What the tier found when it was opened, by address."""
    found: dict[int, BlockHeader] = {}
    for part in tier.recovered_blocks():
        headers = {address: part.header(row) for row, address in enumerate(part.addresses)}
        assert len(headers) == len(part)
        assert found.keys().isdisjoint(headers)
        found |= headers
    return found
