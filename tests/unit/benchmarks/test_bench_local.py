"""`kvstore bench local` against a real server, small; and its bounds by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import Unavailable
from kvstore_benchmarks.local.baselines import DirectFile, aligned_blocks, memcpy_seconds
from kvstore_benchmarks.local.measure import BLOCK_BYTES, CHAIN_LENGTHS, Bandwidth, Samples
from kvstore_benchmarks.local.report import as_json
from kvstore_benchmarks.server import Server


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "kvstore.cli", "bench", "local", "--quick", "--json"]
    shown = subprocess.run(
        [*command, "--dir", str(folder)], check=True, capture_output=True, text=True, timeout=100
    )
    assert list(folder.iterdir()) == [], "a measurement leaves nothing behind"
    answer: dict[str, Any] = json.loads(shown.stdout)
    return answer


def test_bandwidth_is_there_for_every_block_size(figures: dict[str, Any]) -> None:
    sizes = {str(size) for size in BLOCK_BYTES}
    assert figures["local"] is True
    for name in ("memcpy", "put", "get", "direct_read", "nvme_get"):
        assert figures[f"{name}_gbps"].keys() == sizes
        assert all(value > 0 for value in figures[f"{name}_gbps"].values())
    for by_size in figures["ratios"].values():
        assert by_size.keys() == sizes


def test_lookups_are_there_for_hits_and_misses(figures: dict[str, Any]) -> None:
    for kind in ("hit", "miss"):
        by_length = figures["lookup_us"][kind]
        assert by_length.keys() == {str(length) for length in CHAIN_LENGTHS}
        assert all(0 < taken["p50"] <= taken["p99"] for taken in by_length.values())


def test_what_a_foreign_server_did_not_measure_is_null() -> None:
    samples = Samples(local=True)
    samples.bandwidth[1 << 20] = Bandwidth(memcpy=[10.0], put=[5.0], get=[6.0])
    figures = json.loads(json.dumps(as_json(samples), allow_nan=False))
    assert figures["ratios"]["put_to_memcpy"] == {str(1 << 20): 0.5}
    assert figures["nvme_get_gbps"] == {str(1 << 20): None}
    assert figures["lookup_us"] == {"hit": {}, "miss": {}}


def test_the_bounds_really_move_the_bytes(tmp_path: Path) -> None:
    sources, targets = aligned_blocks(3, 64 << 10), aligned_blocks(3, 64 << 10)
    for index, block in enumerate(sources):
        block[:] = bytes([index + 1]) * len(block)
    assert memcpy_seconds(targets, sources) > 0
    assert targets == sources
    for block in targets:
        block[:] = bytes(len(block))
    with DirectFile(tmp_path) as file:
        assert file.write_seconds(sources) > 0
        assert file.read_seconds(targets) > 0
    assert targets == sources
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match=r"dram\.capacity"),
        Server(dram="1KiB", nvme="0", folder=tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
