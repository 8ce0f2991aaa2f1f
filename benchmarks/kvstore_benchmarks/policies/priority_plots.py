"""The figures of `kvstore bench priorities --json` as priorities.png, with priorities.json
beside it.

They can be drawn again from the file:

    python -m kvstore_benchmarks.policies.priority_plots FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvstore_benchmarks.plots import DPI, TITLE, figure_into
from kvstore_benchmarks.policies.plots import OURS

AIM = 0.95


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Into a folder, which is made. Raises `NoPlots`."""
    figure = figure_into(folder)
    (folder / "priorities.json").write_text(json.dumps(figures, indent=2) + "\n")
    rows = figures["rows"]
    sizes = list(dict.fromkeys(row["capacity_blocks"] for row in rows))
    picture = figure(figsize=(1 + 4 * len(sizes), 4), layout="constrained")
    panels = picture.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for name in dict.fromkeys(row["policy"] for row in rows):
            points = [r for r in rows if (r["policy"], r["capacity_blocks"]) == (name, size)]
            style: dict[str, Any] = {"linewidth": 1, "alpha": 0.8}
            if name == OURS:
                style = {"linewidth": 2.5, "color": "#0b6e4f", "zorder": 3}
            loads, kept = [r["load"] for r in points], [r["kept"] for r in points]
            axes.plot(loads, kept, marker="o", markersize=3, label=name, **style)
        axes.axhline(AIM, linestyle=":", color="#8a8f98")
        axes.set_title(f"{size} blocks", **TITLE)
        axes.set_xlabel("requests of low priority, of those of high priority")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("hits of high priority, of those alone")
    panels[0].legend(fontsize=8)
    picture.savefig(folder / "priorities.png", dpi=DPI)


def main(folder: Path) -> int:
    draw(json.loads((folder / "priorities.json").read_text()), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
