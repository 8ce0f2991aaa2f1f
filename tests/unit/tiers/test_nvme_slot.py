"""A slot's header: what is written is what is found, and no byte of it may change."""

from __future__ import annotations

import pytest

from kvstore.errors import BadRequest, CorruptBlock
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme_slot import (
    HEADER_BYTES,
    MAX_TENANT_BYTES,
    Place,
    Scratch,
    Stored,
    decode_header,
    decode_header_at,
    encode_header,
)
from kvstore.types import ALIGNMENT

HEADER = BlockHeader(b"k" * 16, b"p" * 16, b"l" * 16, "alice", 123_456, (1 << 64) - 1)
PLACE = Place(3, 17, (1 << 41) + 5)


def page_of(header: BlockHeader, sequence: int = 7) -> bytes:
    page = Scratch().header
    encode_header(page, Stored(header, sequence, PLACE))
    return bytes(page)


@pytest.mark.parametrize("parent", [b"", b"p" * 16])
@pytest.mark.parametrize("tenant", ["", "bøb", "x" * MAX_TENANT_BYTES])
def test_a_header_comes_back_whole(parent: bytes, tenant: str) -> None:
    header = HEADER._replace(parent=parent, tenant=tenant)
    assert decode_header(memoryview(bytearray(page_of(header, 9)))) == (
        header,
        9,
        PLACE,
    )


def test_any_bit_changed_is_a_corrupt_block() -> None:
    page = page_of(HEADER)
    assert len(page) == HEADER_BYTES
    for bit in range(8 * HEADER_BYTES):
        spoilt = bytearray(page)
        spoilt[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(CorruptBlock):
            decode_header(memoryview(spoilt))


@pytest.mark.parametrize(
    "place",
    [PLACE._replace(segment=4), PLACE._replace(slot=16), PLACE._replace(life=PLACE.life - 1)],
)
def test_what_was_written_for_another_place_is_not_taken_for_what_is_here(place: Place) -> None:
    assert decode_header_at(memoryview(bytearray(page_of(HEADER))), PLACE).header == HEADER
    with pytest.raises(CorruptBlock, match="another place"):
        decode_header_at(memoryview(bytearray(page_of(HEADER))), place)


def test_a_used_page_leaves_nothing_in_the_next_header() -> None:
    scratch = Scratch()
    scratch.header[:] = b"\xff" * HEADER_BYTES
    encode_header(scratch.header, Stored(HEADER, 7, PLACE))
    assert bytes(scratch.header) == page_of(HEADER)


def test_a_name_too_long_for_the_header_is_refused() -> None:
    with pytest.raises(BadRequest):
        page_of(HEADER._replace(tenant="x" * (MAX_TENANT_BYTES + 1)))


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 3 * 4096 + 5])
def test_padding_is_zeros_and_every_piece_is_whole_pages(length: int) -> None:
    scratch = Scratch()
    scratch.tail[:] = b"\xff" * ALIGNMENT
    payload = memoryview(bytearray(b"s" * (length + 100)))
    scratch.fill_tail(payload, length)
    pieces = scratch.buffers(payload, length)
    assert all(len(piece) % ALIGNMENT == 0 for piece in pieces)
    stored = b"".join(pieces)[HEADER_BYTES:]
    assert stored == b"s" * length + bytes(-length % ALIGNMENT)
