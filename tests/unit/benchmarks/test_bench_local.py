"""`kvstore bench local` against a real server, small; and its bounds by themselves."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvstore.errors import Unavailable
from kvstore_benchmarks.local.baselines import DirectFile, aligned_blocks, memcpy_seconds
from kvstore_benchmarks.local.report import as_json
from kvstore_benchmarks.local.samples import (
    BLOCK_BYTES,
    CHAIN_LENGTHS,
    Bandwidth,
    PeerSamples,
    Samples,
)
from kvstore_benchmarks.local.tables import show
from kvstore_benchmarks.server import Server


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "kvstore.cli", "bench", "local", "--quick", "--json"]
    shown = subprocess.run(
        [*command, "--dir", str(folder)], check=True, capture_output=True, text=True, timeout=280
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


def test_lookups_are_there_for_hits_parts_and_misses(figures: dict[str, Any]) -> None:
    for kind in ("hit", "partial", "miss"):
        by_length = figures["lookup_us"][kind]
        wanted = {str(length) for length in CHAIN_LENGTHS if kind != "partial" or length > 1}
        assert by_length.keys() == wanted
        assert all(0 < taken["p50"] <= taken["p99"] for taken in by_length.values())
    assert figures["lookup_rpcs"].keys() == {"hit", "partial", "miss"}
    assert figures["harness_us"]["p50"] < figures["lookup_us"]["miss"]["1"]["p50"]


def test_a_miss_costs_no_call_to_the_server(figures: dict[str, Any]) -> None:
    assert figures["lookup_rpcs"]["miss"] == 0


def test_leases_are_measured_beside_the_smallest_call(figures: dict[str, Any]) -> None:
    assert figures["acquire_release_us"].keys() == {"1", "256", "2000"}
    for taken in (*figures["acquire_release_us"].values(), figures["rpc_us"]):
        assert 0 < taken["p50"] <= taken["p99"]


def samples() -> Samples:
    one = Samples(local=True)
    one.bandwidth[1 << 20] = Bandwidth(memcpy=[10.0], put=[5.0], get=[6.0])
    return one


def test_what_a_foreign_server_did_not_measure_is_null() -> None:
    figures = json.loads(json.dumps(as_json(samples()), allow_nan=False))
    assert figures["ratios"]["put_to_memcpy"] == {str(1 << 20): 0.5}
    assert figures["nvme_get_gbps"] == {str(1 << 20): None}
    assert figures["lookup_us"] == {}
    assert "peers" not in figures


def test_ratios_are_those_within_a_round() -> None:
    """Else a moment in which the machine was slow would count on one side only."""
    one = samples()
    one.bandwidth[1 << 20] = Bandwidth(memcpy=[10, 1, 10], put=[5, 0.5, 1], get=[6, 6, 6])
    one.latency.lookup = {"hit": {256: [2.0, 2.0, 9.0]}}
    one.peers["mooncake"] = PeerSamples(
        version="1",
        bandwidth={1 << 20: Bandwidth(put=[1, 0.1], get=[2, 3])},
        lookup={"hit": {256: [100.0]}},
    )
    figures = json.loads(json.dumps(as_json(one), allow_nan=False))
    assert figures["ratios"]["put_to_memcpy"] == {str(1 << 20): 0.5}
    beside = figures["ratios_to_peers"]["mooncake"]
    assert beside["put"] == {str(1 << 20): 5.0}
    assert beside["get"] == {str(1 << 20): 2.5}
    assert beside["lookup_hit"] == {"256": 50.0}
    assert figures["peers"]["mooncake"]["put_gbps"] == {str(1 << 20): 0.55}
    aims = {aim["figure"]: aim for aim in figures["aims"]}
    assert not aims["put of 1024 KiB to Mooncake's"]["reached"]
    assert aims["lookup of 256 to Mooncake's"]["reached"]


def test_a_peer_that_is_not_there_is_named_with_the_reason() -> None:
    one = samples()
    one.peers["lmcache"] = PeerSamples(reason="not set up")
    figures = json.loads(json.dumps(as_json(one), allow_nan=False))
    assert figures["peers"]["lmcache"] == {"available": False, "reason": "not set up"}
    assert figures["ratios_to_peers"]["lmcache"]["put"] == {str(1 << 20): None}


def test_tables_are_shown_for_whatever_was_measured() -> None:
    one = samples()
    one.latency.lookup = {"hit": {256: [2.0]}, "miss": {1: [1.0]}}
    one.peers["lmcache"] = PeerSamples(reason="not set up")
    one.peers["mooncake"] = PeerSamples(
        reason="it died", version="1", way="TCP", lookup={"hit": {256: [100.0]}}, wrong=3
    )
    console = Console(width=100, file=io.StringIO(), record=True)
    show(as_json(one), console)
    shown = console.export_text()
    assert "LMCache: not available: not set up" in shown
    assert "0 failed, 3 came back wrong; ended: it died" in shown
    assert "100 (50x)" in shown


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
