"""`kvstore bench prefetch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.config_keys import Policy
from kvstore.core.places.foreseen import Waste
from kvstore.core.space import Space
from kvstore.drive import Pace
from kvstore.sim.batches import Batches
from kvstore.sim.events import BEGIN_NS, Events
from kvstore.sim.readers import read_traces
from kvstore.sim.shell import Shell, planner
from kvstore.types import LayoutSpec, Tier
from kvstore_benchmarks.figures import finite, machine, percentile, ratio
from kvstore_benchmarks.prefetch.engine import Engine, Mode
from kvstore_benchmarks.prefetch.sessions import Asked, asked_of
from kvstore_benchmarks.present import present
from kvstore_benchmarks.progress import Progress

BLOCK_TOKENS = 1024
"""Of a block: larger than an engine's, as it is not the number of blocks that is looked at. What
runs is not divided, so of much larger ones a load waits for others' to be over."""
TOKEN_BYTES = 24_576
"""Keys and values of 12 layers with 2 heads of 256, BF16: Qwen3-Next's full attention."""
DRIVE_GBPS = 6.0
DRIVE = Pace(1e5, 1 / DRIVE_GBPS)
"""A PCIe 4 drive, each way."""
DEPTH = 4
TENANT = "bench"
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
    """`sessions_per_s`: so many begin, at random. `requests`: the first so many.
    `eviction`: as the server's configuration has it."""

    trace: Path
    dram_gib: float = 32.0
    sessions_per_s: float = 0.02
    requests: int = 1500
    seed: int = 1
    eviction: str = Policy().eviction


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
        "drive_gbps": DRIVE_GBPS, "eviction": options.eviction, "modes": {},
    }  # fmt: skip
    for name in MODES:
        step(name)
        figures["modes"][name] = measure(options, asked, block_tokens, name)
    return figures


def measure(
    options: Options, asked: Sequence[Asked], block_tokens: int, mode: str
) -> dict[str, Any]:
    """What requests meet where the store is told what `mode` names."""
    spec = LayoutSpec("bench", "bf16", block_tokens, block_tokens * TOKEN_BYTES)
    extent = 8 * spec.block_bytes
    plans = planner(
        options.eviction,
        Space(int(options.dram_gib * 2**30), extent),
        Space(NVME_BYTES, extent),
        slot_bytes=lambda nbytes: nbytes,
        batches=DEPTH,
    )
    layout = plans.catalog.layout(TENANT, plans.register_layout(TENANT, spec))
    session = plans.open_session(bytes(16), TENANT, local=True)
    events = Events()
    drive = Batches(events, dict.fromkeys(Tier, DRIVE))
    shell = Shell(plans, events, drive)
    engine = Engine(shell, events, session, layout, MODES[mode], options.seed)
    engine.serve(asked)
    plans.check_integrity()
    seen, foreseen = engine.seen, plans.holdings.foreseen
    used, wasted, left = foreseen.used_bytes, foreseen.wasted_bytes, foreseen.unused_bytes
    seconds = (events.now_ns - BEGIN_NS) / 1e9
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
        "read_gb": finite(shell.moved_bytes[Tier.DRAM] / 1e9, 0),
        "drive_busy": finite(drive.busy_ns / 1e9 / seconds, 3),
    }


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
