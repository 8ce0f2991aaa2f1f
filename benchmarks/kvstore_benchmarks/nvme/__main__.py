"""The NVMe tier, checksums on, against O_DIRECT on a file, round by round.

    python -m kvstore_benchmarks.nvme DIRECTORY

prints one JSON object: GB/s of both (medians), and the median of the rounds' ratios,
because a shared disk is not equally fast in two rounds. Writes end with a sync in both.
"""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import xxhash

from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme import NvmeTier
from kvstore_benchmarks.figures import timed
from kvstore_benchmarks.local.baselines import DIRECT_THREADS, Blocks, DirectFile, aligned_blocks

BLOCK_BYTES = 2 << 20
BLOCKS = 96
ROUNDS = 9
EXTENT_BYTES = 128 << 20
CAPACITY_BYTES = 2 << 30


class Tier:
    """The blocks, in a tier of their own."""

    def __init__(self, folder: Path, blocks: Blocks) -> None:
        self._tier = NvmeTier.open(folder / "data", CAPACITY_BYTES, EXTENT_BYTES, 1 << 20)
        self._pool = ThreadPoolExecutor(DIRECT_THREADS)
        self._size = self._tier.slot_bytes(BLOCK_BYTES)
        self._slots = EXTENT_BYTES // self._size
        for extent in range(1, 2 + len(blocks) // self._slots):
            self._tier.open_extent(extent, self._size)
        self._headers = [
            BlockHeader(
                number.to_bytes(16, "big"), b"", bytes(16), "t", BLOCK_BYTES,
                xxhash.xxh3_64_intdigest(block),
            )
            for number, block in enumerate(blocks)
        ]  # fmt: skip

    def _address(self, number: int) -> int:
        extent, slot = divmod(number, self._slots)
        return (1 + extent) * EXTENT_BYTES + slot * self._size

    def write_seconds(self, blocks: Blocks) -> float:
        def one(number: int) -> None:
            # As the store does: what a client wrote is compared before it is kept.
            if xxhash.xxh3_64_intdigest(blocks[number]) != self._headers[number].checksum:
                raise AssertionError("a block changed")
            self._tier.write(self._address(number), self._headers[number], blocks[number])

        with timed() as timer:
            list(self._pool.map(one, range(len(blocks))))
            self._tier.sync()
        return timer.seconds

    def read_seconds(self, blocks: Blocks) -> float:
        def one(number: int) -> None:
            self._tier.read(self._address(number), self._headers[number], blocks[number])

        with timed() as timer:
            list(self._pool.map(one, range(len(blocks))))
        return timer.seconds

    def close(self) -> None:
        self._pool.shutdown()
        self._tier.close()


def measure(folder: Path) -> dict[str, float]:
    blocks = aligned_blocks(BLOCKS, BLOCK_BYTES)
    pattern = np.random.default_rng(1).integers(0, 256, BLOCK_BYTES, np.uint8)
    for block in blocks:
        np.copyto(np.frombuffer(block, np.uint8), pattern)
    into = aligned_blocks(BLOCKS, BLOCK_BYTES)
    nbytes = BLOCKS * BLOCK_BYTES
    taken: dict[str, list[float]] = {name: [] for name in ("raw_w", "tier_w", "raw_r", "tier_r")}
    tier = Tier(folder, blocks)
    with DirectFile(folder) as raw:
        # What is written first pays for the file system's making room.
        raw.write_seconds(blocks)
        for _ in range(CAPACITY_BYTES // nbytes):
            tier.write_seconds(blocks)
        for _ in range(ROUNDS):
            taken["raw_w"].append(raw.write_seconds(blocks))
            taken["tier_w"].append(tier.write_seconds(blocks))
            taken["raw_r"].append(raw.read_seconds(into))
            taken["tier_r"].append(tier.read_seconds(into))
    tier.close()
    figures = {f"{name}_gb_s": round(nbytes / median(s) / 1e9, 2) for name, s in taken.items()}
    for kind in ("w", "r"):
        pairs = zip(taken[f"raw_{kind}"], taken[f"tier_{kind}"], strict=True)
        figures[f"ratio_{kind}"] = round(median(raw / ours for raw, ours in pairs), 3)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as made:
        print(json.dumps(measure(Path(made))))
