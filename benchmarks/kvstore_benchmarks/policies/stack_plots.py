"""The rows of `kvstore simulate --tiers --json` as stacks.png, with stacks.json beside it.

They can be drawn again from the file:

    python -m kvstore_benchmarks.policies.stack_plots FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.units import format_size
from kvstore_benchmarks.plots import DPI, TITLE, figure_into

DRAM, NVME, BOUND = "#0b6e4f", "#8fc7b0", "#8a8f98"
FIRST = {"mean": "#0b6e4f", "median": "#e0a100", "p99": "#b3403a"}


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Into a folder, which is made. Raises `NoPlots`."""
    figure = figure_into(folder)
    (folder / "stacks.json").write_text(json.dumps(rows, indent=2) + "\n")
    height = 2.0 + 0.45 * len(rows)
    picture = figure(figsize=(13, height), layout="constrained")
    hits, saved, first = picture.subplots(1, 3, sharey=True)
    places = range(len(rows))
    references = [max(1, row["block_references"]) for row in rows]
    left = [0.0] * len(rows)
    for tier, colour in (("dram", DRAM), ("nvme", NVME)):
        widths = [
            row["block_hits_from"][tier] / each for row, each in zip(rows, references, strict=True)
        ]
        hits.barh(places, widths, left=left, color=colour, label=f"from {tier.upper()}")
        left = [before + width for before, width in zip(left, widths, strict=True)]
    hits.set_title("blocks loaded, of those asked for", **TITLE)
    saved.barh(places, [row["compute_saved_ratio"] for row in rows], color=DRAM)
    saved.set_title("prefill saved", **TITLE)
    for axes, ratio in ((hits, "block_hit_ratio"), (saved, "compute_saved_ratio")):
        bounds = [row["bounds"]["same_size"][ratio] for row in rows]
        axes.plot(bounds, places, "|", color=BOUND, markersize=16, label="bound")
        axes.legend(fontsize=8, loc="lower right")
    for name, colour in FIRST.items():
        first.plot(
            [row["first_token_ms"][name] for row in rows], places, "o", color=colour, label=name
        )
    first.set_xscale("log")
    first.set_title("time to the first token, ms", **TITLE)
    first.legend(fontsize=8)
    hits.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    hits.invert_yaxis()
    for axes in (hits, saved, first):
        axes.grid(alpha=0.3, axis="x")
    picture.savefig(folder / "stacks.png", dpi=DPI)


def _label(row: dict[str, Any]) -> str:
    sizes = [format_size(row["dram_bytes"])]
    if row["nvme_bytes"]:
        sizes.append(format_size(row["nvme_bytes"]))
    return f"{row['policy']}, {' + '.join(sizes)}"


def main(folder: Path) -> int:
    draw(json.loads((folder / "stacks.json").read_text()), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
