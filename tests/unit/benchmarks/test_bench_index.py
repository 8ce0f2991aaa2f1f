"""`kvstore bench index`, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import BadRequest
from kvstore_benchmarks.scale.main import ROWS
from kvstore_benchmarks.scale.main import run as run_index


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "kvstore.cli", "bench", "index", "--quick", "--json"]
    command += ["--dram-blocks", "2600"]
    run = subprocess.run(
        [*command, "--dir", str(folder)], check=True, capture_output=True, text=True, timeout=280
    )
    assert list(folder.iterdir()) == [], "data was left behind"
    measured: dict[str, Any] = json.loads(run.stdout)
    return measured


def test_every_size_has_every_figure(figures: dict[str, Any]) -> None:
    assert [size["blocks"] for size in figures["sizes"]] == [2_560, 10_240]
    for size in figures["sizes"]:
        for _, name in ROWS:
            value = size[name]
            assert all(v > 0 for v in (value.values() if isinstance(value, dict) else [value]))


def test_all_that_was_to_be_cleared_and_flushed_was(figures: dict[str, Any]) -> None:
    assert [size["cleared_blocks"] for size in figures["sizes"]] == [256, 1024]
    assert {size["flushed_blocks"] for size in figures["sizes"]} == {2560}
    assert {size["dram_blocks"] for size in figures["sizes"]} == {2560}


def test_a_number_of_blocks_that_means_nothing_is_refused(tmp_path: Path) -> None:
    for blocks in (10, 1 << 40):
        with pytest.raises(BadRequest):
            run_index(tmp_path, [blocks], "worth", as_object=True)
    with pytest.raises(BadRequest):
        run_index(tmp_path, [10_240], "belady", as_object=True)
    for held in (255, 1 << 30):
        with pytest.raises(BadRequest, match="can be in DRAM"):
            run_index(tmp_path, [10_240], "worth", held, as_object=True)
