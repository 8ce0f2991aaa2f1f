"""The rows of `kvstore simulate --json` as simulate.png, with simulate.json beside it.

They can be drawn again from the file:

    python -m kvstore_benchmarks.policies.plots FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore_benchmarks.plots import DPI, TITLE, figure_into

PANELS = {
    "block_hit_ratio": "block hits",
    "token_hit_ratio": "token hits, prefix-contiguous",
    "compute_saved_ratio": "prefill saved",
}
OURS = "worth"
BOUNDS = ("belady", "belady-bypass", "cost-belady")


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Into a folder, which is made. Raises `NoPlots`."""
    figure = figure_into(folder)
    (folder / "simulate.json").write_text(json.dumps(rows, indent=2) + "\n")
    picture = figure(figsize=(13, 4.5), layout="constrained")
    panels = picture.subplots(1, len(PANELS))
    names = list(dict.fromkeys(row["policy"] for row in rows))
    for axes, (ratio, title) in zip(panels, PANELS.items(), strict=True):
        for number, name in enumerate(names):
            points = sorted((r["capacity_blocks"], r[ratio]) for r in rows if r["policy"] == name)
            sizes, heights = zip(*points, strict=True)
            # There are ten colours.
            line = "-" if number < 10 else ":"
            style: dict[str, Any] = {"linewidth": 1, "alpha": 0.8, "linestyle": line}
            if name == OURS:
                style = {"linewidth": 2.5, "color": "#0b6e4f", "zorder": 3}
            elif name in BOUNDS:
                style = {"linewidth": 1.5, "linestyle": "--", "color": "#8a8f98"}
            axes.plot(sizes, heights, marker="o", markersize=3, label=name, **style)
        axes.set_xscale("log")
        axes.set_title(title, **TITLE)
        axes.set_xlabel("blocks held")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8)
    picture.savefig(folder / "simulate.png", dpi=DPI)


def main(folder: Path) -> int:
    draw(json.loads((folder / "simulate.json").read_text()), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
