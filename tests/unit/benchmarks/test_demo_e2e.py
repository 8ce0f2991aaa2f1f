"""The demo as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_serves_every_tier_and_agrees_exactly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstore.cli", "demo", "--json", "--dir", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=1450)
    assert shown.returncode == 0, shown.stderr
    figures = json.loads(shown.stdout)
    assert [run["tier"] for run in figures["runs"]] == [
        "none", "vLLM", "none", "DRAM", "DRAM", "NVMe",
    ]  # fmt: skip
    assert all(run["logprobs_agree"] for run in figures["runs"])
    assert all(min(run["cached_tokens"]) > 1900 for run in figures["runs"] if run["tier"] != "none")
    assert "s  a new server on the same data" in shown.stderr, "progress is visible"
