"""`kvstore bench prefetch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.core.foreseen import Waste
from kvstore.core.limits import Limits
from kvstore.core.planner import Planner
from kvstore.core.space import Space
from kvstore.sim.readers import read_traces
from kvstore.types import LayoutSpec, Tier
from kvstore_benchmarks.figures import finite, machine, percentile, ratio
from kvstore_benchmarks.prefetch.engine import Engine, Mode
from kvstore_benchmarks.prefetch.sessions import Asked, asked_of
from kvstore_benchmarks.prefetch.stack import Stack
from kvstore_benchmarks.present import present
from kvstore_benchmarks.progress import Progress
from kvstore_benchmarks.transfers.devices import Modelled

BLOCK_TOKENS = 4096
"""Of a block: large, as it is not the number of blocks that is looked at."""
TOKEN_BYTES = 24_576
"""Keys and values of 12 layers with 2 heads of 256, BF16: Qwen3-Next's full attention."""
DRIVE = (6e9, 1e-4)
"""Bytes a second and latency of a PCIe 4 drive."""
DEPTH = 4
NVME_BYTES = 4 << 40

MODES: Mapping[str, Mode] = {
    "off": Mode(),
    "queue": Mode(queued=True),
    "states": Mode(queued=True, states=True),
    "tools +-25 %": Mode(queued=True, states=True, tools_off=0.25),
    "all +-25 %": Mode(queued=True, states=True, tools_off=0.25, people_off=0.25),
    "all x 2": Mode(queued=True, states=True, tools_off=0.7, people_off=0.7),
}


@dataclass(frozen=True, slots=True)
class Options:
    """`sessions_per_s`: so many begin, at random. `requests`: the first so many."""

    trace: Path
    dram_gib: float = 32.0
    sessions_per_s: float = 0.02
    requests: int = 1500
    seed: int = 1
    eviction: str = "lru"


def run(options: Options, *, as_object: bool) -> int:
    """Raises `TraceError`."""
    present(
        lambda step: _figures(options, step), lambda pictures, figures: None, _show,
        as_object=as_object, plots=None,
    )  # fmt: skip
    return 0


def _figures(options: Options, step: Progress) -> dict[str, Any]:
    step("reading")
    trace = read_traces([options.trace], session_rate=options.sessions_per_s, seed=options.seed)
    together = max(1, BLOCK_TOKENS // trace.block_tokens)
    asked = asked_of(trace, together)[: options.requests]
    block_tokens = together * trace.block_tokens
    figures: dict[str, Any] = {
        **machine(), "seed": options.seed, "requests": len(asked),
        "sessions": len({request.session for request in asked}),
        "hours": finite((asked[-1].at_s - asked[0].at_s) / 3600, 2),
        "dram_gib": options.dram_gib, "block_bytes": block_tokens * TOKEN_BYTES,
        "drive_gbps": DRIVE[0] / 1e9, "eviction": options.eviction, "modes": {},
    }  # fmt: skip
    for name in MODES:
        step(name)
        figures["modes"][name] = measure(options, asked, block_tokens, name)
    return figures


def measure(
    options: Options, asked: Sequence[Asked], block_tokens: int, mode: str
) -> dict[str, Any]:
    """What requests meet where the store is told what `mode` names."""
    block_bytes = block_tokens * TOKEN_BYTES
    planner = _planner(int(options.dram_gib * 2**30), block_bytes, options.eviction)
    stack = Stack(planner, Modelled(*DRIVE))
    session = planner.open_session(bytes(16), "bench", local=True)
    spec = LayoutSpec("bench", "bf16", block_tokens, block_bytes)
    layout_id = planner.register_layout("bench", spec)
    engine = Engine(stack, session, layout_id, block_bytes, block_tokens, MODES[mode], options.seed)
    engine.serve(asked)
    planner.check_integrity()
    seen, foreseen = engine.seen, planner.holdings.foreseen
    used, wasted, left = foreseen.used_bytes, foreseen.wasted_bytes, foreseen.unused_bytes
    seconds = stack.now_ns() / 1e9
    return {
        "prefetched_gb": finite((used + wasted + left) / 1e9, 1),
        "left_gb": finite(left / 1e9, 1),
        "used": finite(ratio(used, used + wasted)),
        **{f"{why.value}_gb": finite(nbytes / 1e9, 1) for why, nbytes in foreseen.wasted.items()},
        "load_p50_ms": _ms(percentile(seen.load_s, 50)),
        "load_p90_ms": _ms(percentile(seen.load_s, 90)),
        "load_p99_ms": _ms(percentile(seen.load_s, 99)),
        "load_mean_ms": _ms(sum(seen.load_s) / len(seen.load_s)),
        "first_token_p50_ms": _ms(percentile(seen.first_token_s, 50)),
        "first_token_p99_ms": _ms(percentile(seen.first_token_s, 99)),
        "queued_share": finite(sum(s > 0.001 for s in seen.waited_s) / len(seen.waited_s)),
        "found": finite(ratio(seen.held, seen.blocks)),
        "found_in_dram": finite(ratio(seen.from_dram, seen.blocks)),
        "not_stored": seen.denied,
        "read_gb": finite(stack.moved[Tier.DRAM] / 1e9, 0),
        "drive_busy": finite(stack.busy_ns / 1e9 / seconds, 3),
    }


def _planner(dram_bytes: int, block_bytes: int, eviction: str) -> Planner:
    extent = 8 * block_bytes
    return Planner(
        Limits(
            lease_ms=600_000,
            reservation_ms=600_000,
            max_sessions=1,
            max_leases=1 << 20,
            max_reservations=1 << 20,
            max_layouts=1,
            max_running=DEPTH,
        ),
        tenant_key=lambda tenant: bytes(32),
        eviction=eviction,
        dram=Space(dram_bytes, extent),
        nvme=Space(NVME_BYTES, extent),
        nvme_slot_bytes=lambda nbytes: nbytes,
    )


def _ms(seconds: float) -> float | None:
    return finite(seconds * 1e3, 1)


ROWS = (
    ("prefetched, GB", "prefetched_gb"),
    ("not used yet at the end, GB", "left_gb"),
    ("of the rest used", "used"),
    *((f"{why.value}, GB", f"{why.value}_gb") for why in Waste),
    ("load p50, ms", "load_p50_ms"),
    ("load p90, ms", "load_p90_ms"),
    ("load p99, ms", "load_p99_ms"),
    ("load mean, ms", "load_mean_ms"),
    ("first token p50, ms", "first_token_p50_ms"),
    ("first token p99, ms", "first_token_p99_ms"),
    ("blocks found", "found"),
    ("in DRAM", "found_in_dram"),
    ("read from NVMe, GB", "read_gb"),
    ("drive busy", "drive_busy"),
)


def _show(figures: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{figures['requests']} requests of {figures['sessions']} sessions in"
        f" {figures['hours']} h, {figures['dram_gib']:g} GiB of DRAM"
    )
    table.add_column("")
    for name in figures["modes"]:
        table.add_column(name, justify="right")
    for title, row in ROWS:
        values = [figures["modes"][name][row] for name in figures["modes"]]
        table.add_row(title, *("-" if value is None else f"{value:g}" for value in values))
    console.print(table)
