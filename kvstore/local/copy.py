"""Bytes in and out of slots, with their checksum.

Measured on one core (us, copy alone, source and slot outside the cache):

    block      slice  numpy
    4 KiB        0.3    1.8
    64 KiB       6.4    7.2
    1 MiB        220    221
    4 MiB        849    852

A slice assignment is cheapest but holds the interpreter lock; NumPy's copy costs
1.5 us more and lets other threads run. So small blocks take the one and large
blocks the other. The checksum is taken of the destination, which the copy has
just put into the cache; it adds 15 % at 1 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from kvstore.local import crew

GIL_FREE_BYTES = 64 << 10
"""Copies larger than this let other threads run."""

PART_BYTES = 1 << 20
"""What a thread takes at a time of many blocks."""


def checksum(data: memoryview | bytes | bytearray) -> int:
    """XXH3-64 of a buffer."""
    return xxhash.xxh3_64_intdigest(data)


def copy_bytes(destination: memoryview, source: memoryview) -> None:
    """Copy `source` into `destination`: both flat bytes, equally long."""
    if source.nbytes <= GIL_FREE_BYTES:
        destination[:] = source
    else:
        np.copyto(np.frombuffer(destination, np.uint8), np.frombuffer(source, np.uint8))


def copy_checked(destination: memoryview, source: memoryview) -> int:
    """Copy like `copy_bytes` and return the XXH3-64 of what arrived."""
    copy_bytes(destination, source)
    return xxhash.xxh3_64_intdigest(destination)


def copy_many(destinations: Sequence[memoryview], sources: Sequence[memoryview]) -> list[int]:
    """Copy each source into the destination of its index, all flat bytes and equally
    long, on several cores. The XXH3-64 of what arrived, one each.

    Raises `ValueError` where lengths differ; then any of the copies may not be made.
    """
    if len(destinations) != len(sources):
        raise ValueError(f"{len(destinations)} destinations for {len(sources)} sources")
    arrived = [0] * len(sources)

    def work(start: int, stop: int) -> None:
        for index in range(start, stop):
            arrived[index] = copy_checked(destinations[index], sources[index])

    if sources:
        share(work, len(sources), sources[0].nbytes)
    return arrived


def checksum_many(datas: Sequence[memoryview | bytes]) -> list[int]:
    """The XXH3-64 of each of many buffers of one length, on several cores."""
    sums = [0] * len(datas)

    def work(start: int, stop: int) -> None:
        sums[start:stop] = map(xxhash.xxh3_64_intdigest, datas[start:stop])

    if datas:
        share(work, len(datas), memoryview(datas[0]).nbytes)
    return sums


def share(work: crew.Work, count: int, block_bytes: int) -> None:
    """`crew.share` of work on `count` blocks, where that is faster: smaller blocks are
    hashed with the interpreter lock held, and threads only wait for each other."""
    if block_bytes > GIL_FREE_BYTES:
        crew.share(work, count, max(1, PART_BYTES // block_bytes))
    else:
        work(0, count)
