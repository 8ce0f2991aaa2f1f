"""`kvstore bench vllm`: what the store costs a cold prompt, and saves a warm one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.end_to_end.rounds import Measured, Round, measure
from kvstore_benchmarks.figures import finite, median, ratio, seconds_text

QUICK_ROUNDS = 1
QUICK_TOKENS = 1024

TIMES = {
    "cold_without": "cold, without the store",
    "cold_with": "cold, with the store",
    "local_without": "own prefix hit, without the store",
    "local_storing": "own prefix hit, while storing",
    "local_with": "own prefix hit, with the store",
    "warm_dram": "from DRAM",
    "warm_nvme": "from NVMe",
    "handed_over": "handed over by another engine",
    "handed_over_local": "own prefix hit after that",
    "memcpy": "plain copy of the loaded bytes",
    "stored": "until stored, after the first token",
}


class Ratio(NamedTuple):
    """One thing promised. `most`: what it must not exceed."""

    text: str
    most: float
    samples: list[float]


def ratios(rounds: list[Round]) -> dict[str, Ratio]:
    """Each taken within a round, where both sides met the same machine."""
    return {
        "cold_with_to_without": Ratio(
            "cold with the store / without",
            1.05,
            [ratio(r.cold_with, r.cold_without) for r in rounds],
        ),
        "dram_load_to_memcpy": Ratio(
            "(from DRAM - own prefix hit) / plain copy",
            2.0,
            [ratio(r.warm_dram - r.local_with, r.memcpy) for r in rounds],
        ),
        "handover_to_memcpy": Ratio(
            "(handed over - own prefix hit) / plain copy",
            1.3,
            [ratio(r.handed_over - r.handed_over_local, r.memcpy) for r in rounds],
        ),
        "local_storing_to_without": Ratio(
            "own prefix hit while storing / without the store",
            1.1,
            [ratio(r.local_storing, r.local_without) for r in rounds],
        ),
        "nvme_to_cold": Ratio(
            "from NVMe / cold without the store",
            1.0,
            [ratio(r.warm_nvme, r.cold_without) for r in rounds],
        ),
    }


def run(folder: Path | None, rounds: int, tokens: int, *, quick: bool, as_object: bool) -> int:
    """Print the figures; 1 when an answer was wrong or came from elsewhere."""
    if quick:
        rounds, tokens = QUICK_ROUNDS, QUICK_TOKENS
    console = Console(stderr=True)
    with console.status("starting") as status:
        measured = measure(folder, rounds, tokens, lambda step: status.update(step))
    if as_object:
        print(json.dumps(as_json(measured), indent=2))
    else:
        show(measured, Console())
    wrong = faults(measured)
    for line in wrong:
        console.print(f"[red]{line}[/red]")
    return 1 if wrong else 0


def faults(measured: Measured) -> list[str]:
    """What makes the figures worthless; nothing about how fast they are."""
    found = []
    if not all(r.agree for r in measured.rounds):
        found.append("a warm answer's log-probabilities differ from those of vLLM's own hit")
    if any(r.handed_tier != "DRAM" for r in measured.rounds):
        found.append("a prompt was computed again that had been handed over")
    tiers = {r.tiers for r in measured.rounds}
    if tiers != {("DRAM", "NVMe")}:
        found.append(f"warm requests were served from {sorted(tiers)}")
    return found


def as_json(measured: Measured) -> dict[str, Any]:
    """Seconds and ratios: medians, with every round's sample beside them."""
    times = {name: [getattr(r, name) for r in measured.rounds] for name in TIMES}
    return {
        "tokens": measured.tokens,
        "loaded_bytes": measured.loaded_bytes,
        "rounds": len(measured.rounds),
        "seconds": {name: _with_samples(samples) for name, samples in times.items()},
        "ratios": {
            name: _with_samples(taken.samples) | {"most": taken.most}
            for name, taken in ratios(measured.rounds).items()
        },
        "still_storing_rounds": sum(r.still_storing for r in measured.rounds),
        "logprobs_agree": all(r.agree for r in measured.rounds),
        "peak_memory_bytes": measured.peak_memory_bytes,
    }


def _with_samples(samples: list[float]) -> dict[str, Any]:
    return {"median": finite(median(samples)), "samples": [finite(sample) for sample in samples]}


def show(measured: Measured, console: Console) -> None:
    megabytes = measured.loaded_bytes / 1e6
    times = Table(
        title=f"{measured.tokens}-token prompts, {megabytes:.0f} MB of KV each;"
        f" medians of {len(measured.rounds)}"
    )
    times.add_column("time to first token")
    times.add_column("median", justify="right")
    for name, text in TIMES.items():
        times.add_row(text, seconds_text(median([getattr(r, name) for r in measured.rounds])))
    console.print(times)
    bounds = Table(title="Ratios within a round")
    for heading in ("ratio", "median", "least", "most", "promised"):
        bounds.add_column(heading, justify="left" if heading == "ratio" else "right")
    for taken in ratios(measured.rounds).values():
        bounds.add_row(
            taken.text,
            f"{median(taken.samples):.2f}x",
            f"{min(taken.samples):.2f}x",
            f"{max(taken.samples):.2f}x",
            f"<= {taken.most:g}x",
        )
    console.print(bounds)
    console.print(
        f"Stores were under way in {sum(r.still_storing for r in measured.rounds)} of"
        f" {len(measured.rounds)} rounds. Peak memory"
        f" {measured.peak_memory_bytes / (1 << 30):.1f} GiB."
    )
