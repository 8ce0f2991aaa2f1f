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
    run = subprocess.run(
        [*command, "--dir", str(folder)], check=True, capture_output=True, text=True, timeout=110
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
    assert {size["flushed_blocks"] for size in figures["sizes"]} == {8192}


def test_a_number_of_blocks_that_means_nothing_is_refused(tmp_path: Path) -> None:
    for blocks in (10, 1 << 40):
        with pytest.raises(BadRequest):
            run_index(tmp_path, [blocks], as_object=True)
