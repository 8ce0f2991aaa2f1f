"""The bounds: a plain copy in memory, and O_DIRECT on a file.

Measured between the store's own figures, in the same process and run, so that a
busy or throttled machine slows both.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.figures import timed

DIRECT_THREADS = 4
"""Enough requests in flight to keep one drive busy."""

Blocks = list[memoryview]


def memcpy_seconds(destinations: Blocks, sources: Blocks) -> float:
    """Seconds to copy each source to its destination, one after the other."""
    pairs = [
        (np.frombuffer(destination, np.uint8), np.frombuffer(source, np.uint8))
        for destination, source in zip(destinations, sources, strict=True)
    ]
    with timed() as timer:
        for destination, source in pairs:
            np.copyto(destination, source)
    return timer.seconds


def aligned_blocks(count: int, nbytes: int) -> Blocks:
    """`count` blocks of `nbytes`, page-aligned and faulted in."""
    memory = memoryview(mmap.mmap(-1, count * nbytes))
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
    return [memory[at : at + nbytes] for at in range(0, count * nbytes, nbytes)]


class DirectFile(Closing):
    """Blocks written to and read from one file past the page cache.

    Raises `OSError` where the file system knows no O_DIRECT. A context manager.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "direct.bin"
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        self._pool = ThreadPoolExecutor(DIRECT_THREADS)

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)
        self._path.unlink()

    def write_seconds(self, blocks: Blocks) -> float:
        """Seconds until every block is written and the device has them."""
        with timed() as timer:
            self._each(blocks, os.pwritev)
            os.fdatasync(self._descriptor)
        return timer.seconds

    def read_seconds(self, blocks: Blocks) -> float:
        """Seconds to fill the blocks from what was written last."""
        with timed() as timer:
            self._each(blocks, os.preadv)
        return timer.seconds

    def _each(self, blocks: Blocks, transfer: Callable[[int, list[memoryview], int], int]) -> None:
        def one(index: int) -> None:
            block = blocks[index]
            moved = transfer(self._descriptor, [block], index * block.nbytes)
            if moved != block.nbytes:
                raise OSError(f"{moved} of {block.nbytes} bytes moved")

        for _ in self._pool.map(one, range(len(blocks))):
            pass
