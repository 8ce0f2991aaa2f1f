"""The last descriptors are not for extents."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import TierFull
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme_disk import Directory

EXTENT_BYTES = 1 << 20


@pytest.fixture
def allowed() -> Iterator[int]:
    """As many as are open, and 64 more."""
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 64, hard))
    yield lowest + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def last_ones(allowed: int, whose: str) -> list[str]:
    """What of theirs is open among the last fifth. Others' files lie anywhere."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        if int(number) >= allowed - allowed // 5:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in found if whose in link]


def test_memory_stops_growing_before_descriptors_run_out(allowed: int) -> None:
    tier = DramTier(EXTENT_BYTES, 200 * EXTENT_BYTES, spare_extents=0)
    with pytest.raises(TierFull):
        for extent in range(100):
            tier.open_extent(extent)
    assert not last_ones(allowed, "kvstore-extent")
    tier.check_integrity()
    tier.close_extent(0)
    tier.open_extent(0)
    tier.close()


def test_a_disk_stops_growing_before_descriptors_run_out(tmp_path: Path, allowed: int) -> None:
    disk = Directory(tmp_path, direct=False)
    files = []
    with pytest.raises(OSError, match="Too many open files"):
        for number in range(100):
            files.append(disk.create(str(number), 4096))
    assert not last_ones(allowed, str(tmp_path))
    assert len(disk.names()) == len(files)
    for file in files:
        file.close()
