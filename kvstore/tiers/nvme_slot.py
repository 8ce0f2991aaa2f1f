"""What a slot on disk looks like: one page that describes itself, then the payload.

    +0     8  magic
    +8     4  CRC-32C of this whole page with these four bytes zero
    +12    2  version
    +14    1  length of `parent`: 0 or 16
    +15    1  length of `tenant` in UTF-8
    +16   16  stored_key
    +32   16  parent
    +48   16  layout_id
    +64    8  length of the payload
    +72    8  XXH3-64 of the payload
    +80    8  sequence: grows with every block stored, also across restarts
    +88    8  life of the segment
    +96    4  number of the segment
    +100   4  number of the slot in it
    +104      tenant, then zeros up to 4096

Integers are little-endian. The checksum covers every byte of the page, so no
bit of it can change unseen; the payload has its own. The slot says where it is and
in which of its segment's lives it was written, so a write that went elsewhere, or
one of an earlier life, is never taken for the block. Payload is padded to a page
with zeros, never with what happened to follow it in memory.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import google_crc32c

from kvstore.errors import BadRequest, CorruptBlock
from kvstore.tiers.base import BlockHeader
from kvstore.types import ALIGNMENT, STORED_KEY_BYTES, align_up

HEADER_BYTES = ALIGNMENT
MIN_SLOT_BYTES = HEADER_BYTES + ALIGNMENT
SLOT_VERSION = 2
MAX_TENANT_BYTES = 255

_MAGIC = b"KVSTSLOT"
_FIELDS = struct.Struct("<8sIHBB16s16s16sQQQQII")
_CRC_OFFSET = 8
_NO_CRC = bytes(4)
_ZEROS = bytes(HEADER_BYTES)


def slot_bytes(block_bytes: int) -> int:
    """Bytes of a slot for blocks of this size, header and padding included."""
    return HEADER_BYTES + align_up(block_bytes)


def tenant_bytes(tenant: str) -> bytes:
    """`tenant` as stored. Raises `BadRequest` when it is too long to be."""
    encoded = tenant.encode()
    if len(encoded) > MAX_TENANT_BYTES:
        raise BadRequest(f"a tenant's name is at most {MAX_TENANT_BYTES} bytes")
    return encoded


class Place(NamedTuple):
    """Where a block lies: a slot, in one life of a segment."""

    segment: int
    slot: int
    life: int


class Stored(NamedTuple):
    """What a slot's header says."""

    header: BlockHeader
    sequence: int
    place: Place


def encode_header(page: memoryview, stored: Stored) -> None:
    """Fill `page` (4096 bytes) with the header of a block."""
    header, sequence, place = stored
    tenant = tenant_bytes(header.tenant)
    if len(header.parent) not in (0, STORED_KEY_BYTES):
        raise BadRequest(f"a parent is a stored key of {STORED_KEY_BYTES} bytes, or nothing")
    page[:] = _ZEROS
    _FIELDS.pack_into(
        page, 0, _MAGIC, 0, SLOT_VERSION, len(header.parent), len(tenant),
        header.stored_key, header.parent, header.layout_id, header.length, header.checksum,
        sequence, place.life, place.segment, place.slot,
    )  # fmt: skip
    page[_FIELDS.size : _FIELDS.size + len(tenant)] = tenant
    struct.pack_into("<I", page, _CRC_OFFSET, google_crc32c.value(bytes(page)))


def decode_header(page: memoryview) -> Stored:
    """What the page says, which is spoilt. Raises `CorruptBlock`."""
    (
        magic, crc, version, parent_bytes, name_bytes, stored_key, parent, layout_id,
        length, checksum, sequence, life, segment, slot,
    ) = _FIELDS.unpack_from(page)  # fmt: skip
    if magic != _MAGIC:
        raise CorruptBlock("no block was written there")
    page[_CRC_OFFSET : _CRC_OFFSET + 4] = _NO_CRC
    if google_crc32c.value(bytes(page)) != crc:
        raise CorruptBlock("the header fails its checksum")
    if version != SLOT_VERSION:
        raise CorruptBlock(f"the header has version {version}, not {SLOT_VERSION}")
    tenant = bytes(page[_FIELDS.size : _FIELDS.size + name_bytes]).decode(errors="replace")
    header = BlockHeader(stored_key, parent[:parent_bytes], layout_id, tenant, length, checksum)
    return Stored(header, sequence, Place(segment, slot, life))


def decode_header_at(page: memoryview, place: Place) -> Stored:
    """`decode_header` of the page found at `place`. Raises `CorruptBlock` when it was
    written for another."""
    stored = decode_header(page)
    if stored.place != place:
        raise CorruptBlock("what is there was written for another place")
    return stored


def aligned(nbytes: int) -> memoryview:
    """New memory that O_DIRECT takes."""
    return memoryview(mmap.mmap(-1, nbytes))


class Scratch:
    """Two aligned pages that one transfer uses: the header, and the payload's last
    page when it is not full."""

    __slots__ = ("header", "tail")

    def __init__(self) -> None:
        pages = aligned(2 * ALIGNMENT)
        self.header = pages[:ALIGNMENT]
        self.tail = pages[ALIGNMENT:]

    def buffers(self, payload: memoryview, length: int) -> list[memoryview]:
        """The slot's pieces in order, whole pages each."""
        whole = length - length % ALIGNMENT
        pieces = [self.header]
        if whole:
            pieces.append(payload[:whole])
        if whole < length:
            pieces.append(self.tail)
        return pieces

    def fill_tail(self, payload: memoryview, length: int) -> None:
        whole = length - length % ALIGNMENT
        if whole < length:
            self.tail[: length - whole] = payload[whole:length]
            self.tail[length - whole :] = _ZEROS[length - whole :]

    def take_tail(self, into: memoryview, length: int) -> None:
        whole = length - length % ALIGNMENT
        if whole < length:
            into[whole:length] = self.tail[: length - whole]


class ScratchPool:
    """As many scratches as transfers ever ran at once."""

    def __init__(self) -> None:
        self._idle: deque[Scratch] = deque()

    @contextmanager
    def take(self) -> Iterator[Scratch]:
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = Scratch()
        try:
            yield scratch
        finally:
            self._idle.append(scratch)
