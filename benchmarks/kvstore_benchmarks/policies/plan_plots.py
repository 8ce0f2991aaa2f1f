"""The curves of `kvstore plan --json` as plan.png, with plan.json beside it.

They can be drawn again from the file:

    python -m kvstore_benchmarks.policies.plan_plots FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvstore_benchmarks.plots import DPI, TITLE, figure_into

PANELS = {"dram": ("dram_gb", "DRAM alone"), "nvme": ("nvme_gb", "NVMe behind the chosen DRAM")}


def draw(plan: dict[str, Any], folder: Path) -> None:
    """Into a folder, which is made. Raises `NoPlots`."""
    figure = figure_into(folder)
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    picture = figure(figsize=(10, 4), layout="constrained")
    for axes, (key, (size, title)) in zip(picture.subplots(1, 2), PANELS.items(), strict=True):
        curve = plan[key].get("curve", [])
        axes.set_title(title, **TITLE)
        axes.set_xlabel("GB")
        axes.set_ylabel("GPUs saved")
        axes.grid(alpha=0.3)
        if not curve:
            continue
        axes.plot(
            [point[size] for point in curve],
            [point["gpus_saved"] for point in curve],
            marker="o",
            markersize=3,
            color="#0b6e4f",
        )
        for name, label, style in (("knee_gb", "knee", "--"), ("pays_up_to_gb", "pays up to", ":")):
            at = plan[key][name]
            axes.axvline(at, linestyle=style, color="#8a8f98", label=f"{label} {at:,.0f} GB")
        axes.legend(fontsize=8)
    picture.savefig(folder / "plan.png", dpi=DPI)


def main(folder: Path) -> int:
    draw(json.loads((folder / "plan.json").read_text()), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
