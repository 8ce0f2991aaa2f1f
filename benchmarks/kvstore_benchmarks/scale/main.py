"""`kvstore bench index`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.config import default_data_path
from kvstore.config_keys import Policy
from kvstore.errors import BadRequest
from kvstore.sim.stacks import policy_of_a_server
from kvstore_benchmarks.figures import seconds_text
from kvstore_benchmarks.scale.fill import CHAIN, MOST_BLOCKS

QUICK = (2_560, 10_240)
LEAST = 10 * CHAIN
HELD, MOST_HELD = 32 * CHAIN, 1_000_000
"""Blocks in DRAM, where nothing is said; and at most."""

ROWS = (
    ("memory, bytes a block", "memory_bytes_per_block"),
    ("directory, bytes a block", "directory_bytes_per_block"),
    ("start", "start_s"),
    ("start, blocks a second", "start_blocks_per_s"),
    ("start, longest stall", "start_stall_ms"),
    ("lookup, all held", "lookup_hit_us"),
    ("lookup, none held", "lookup_miss_us"),
    ("lookup by RPC, without the RPC", "server_lookup_us"),
    ("acquire", "acquire_us"),
    ("release", "release_us"),
    ("commit", "commit_us"),
    ("clear of some blocks", "clear_s"),
    ("clear, longest stall", "clear_stall_ms"),
    ("acquire while clearing", "acquire_while_clearing_us"),
    ("flush, longest stall", "flush_stall_ms"),
    ("longest garbage collection", "longest_collection_ms"),
    ("one that visits every block", "full_collection_s"),
)


def run(
    folder: Path | None,
    sizes: Sequence[int],
    policy: str | None,
    held: int = HELD,
    *,
    as_object: bool,
) -> int:
    """`sizes`: numbers of blocks on NVMe. `policy`: None for a server's default. `held`: blocks
    in DRAM, all of which are acquired. Raises `BadRequest`."""
    policy = policy_of_a_server(policy or Policy().eviction)
    for blocks in sizes:
        if not LEAST <= blocks <= MOST_BLOCKS:
            raise BadRequest(f"from {LEAST} to {MOST_BLOCKS} blocks can be measured, not {blocks}")
    if not CHAIN <= held <= MOST_HELD:
        raise BadRequest(f"from {CHAIN} to {MOST_HELD} blocks can be in DRAM, not {held}")
    console = Console(stderr=True)
    measured = []
    with console.status("starting") as status:
        for blocks in sizes:
            status.update(f"measuring: {blocks} blocks")
            measured.append(_measured(folder, blocks, policy, held))
    if as_object:
        print(json.dumps({"chain": CHAIN, "sizes": measured}, indent=2))
    else:
        _show(measured, Console())
    return 0


def _measured(folder: Path | None, blocks: int, policy: str, held: int) -> dict[str, Any]:
    """In processes of their own, so that one size leaves nothing to the next."""
    parent = folder or default_data_path().parent
    parent.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="kvstore-bench-", dir=parent))
    try:
        _child("fill", home, blocks, str(held))
        figures: dict[str, Any] = json.loads(_child("child", home, blocks, policy, str(held)))
        return figures
    finally:
        shutil.rmtree(home)


def _child(module: str, home: Path, blocks: int, *more: str) -> str:
    name = f"kvstore_benchmarks.scale.{module}"
    command = [sys.executable, "-m", name, str(home / "data"), str(blocks), *more]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _show(measured: Sequence[dict[str, Any]], console: Console) -> None:
    first = measured[0]
    title = (
        f"Chains of {CHAIN} blocks under {first['policy']}, {first['dram_blocks']:,} blocks in"
        " DRAM; p50 / p99 where there are two"
    )
    table = Table(title=title)
    table.add_column("")
    for figures in measured:
        table.add_column(f"{figures['blocks']:,} blocks", justify="right")
    for title, name in ROWS:
        table.add_row(title, *(_text(name, figures[name]) for figures in measured))
    console.print(table)


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['p50']:.4g} / {value['p99']:.4g} µs"
    if name.endswith("_ms"):
        return f"{value:.1f} ms"
    return seconds_text(value) if name.endswith("_s") and "per" not in name else f"{value:,.0f}"
