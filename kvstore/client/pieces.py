"""Callers' buffers, and how many blocks a flow moves at a time.

Many blocks go in pieces, so that a call of any size pins and reserves a bounded
amount, and calls are under way while bytes are copied. The client's timeout bounds
each piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import BadRequest, BadSize

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 32 << 20
PIECE_BLOCKS = 512


def blocks_a_piece(block_bytes: int) -> int:
    return max(1, min(PIECE_BLOCKS, PIECE_BYTES // block_bytes))


def source_view(data: Buffer, nbytes: int) -> memoryview:
    """A caller's block as flat bytes. Raises `BadSize` unless it has `nbytes`."""
    view = _flat(data)
    if view.nbytes != nbytes:
        raise BadSize(f"a block of this layout is {nbytes} bytes, not {view.nbytes}")
    return view


def target_view(buffer: Buffer, nbytes: int) -> memoryview:
    """The first `nbytes` of a caller's buffer. Raises `BadSize` if there are fewer."""
    view = _flat(buffer)
    if view.readonly:
        raise BadRequest("the buffer to get into is read-only")
    if view.nbytes < nbytes:
        raise BadSize(f"a block of this layout is {nbytes} bytes, the buffer {view.nbytes}")
    return view if view.nbytes == nbytes else view[:nbytes]


def _flat(data: Buffer) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise BadRequest(f"a block is a contiguous buffer of plain elements: {error}") from error
