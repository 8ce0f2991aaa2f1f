"""Figures as pictures, PNG, with the JSON they are drawn from beside them.

A picture is drawn from the object that `--json` prints and from nothing else, so it
can be drawn again from the file:

    python -m kvstore_benchmarks.plots FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError
from kvstore_benchmarks.figures import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "memcpy": "#8a8f98",
    "ours": "#0b6e4f",
    "mooncake": "#d1495b",
    "mooncake_shm": "#edae49",
    "lmcache": "#30638e",
}
LABELS = {
    "memcpy": "plain copy, one thread",
    "ours": "kvstore",
    "mooncake": "Mooncake, TCP",
    "mooncake_shm": "Mooncake, shared memory",
    "lmcache": "LMCache server",
}
CALL_COLORS = {"lookup": "#0b6e4f", "get": "#30638e", "put": "#d1495b"}
ORDER_COLORS = {"ours": "#0b6e4f", "fifo": "#d1495b", "strict": "#30638e"}
ORDER_LABELS = {"ours": "kvstore", "fifo": "first come, first served", "strict": "strict priority"}
DPI = 150
TITLE: dict[str, Any] = {"fontsize": 10}
KIND_TITLES = {"hit": "all held", "partial": "partly held", "miss": "nothing held"}


class NoPlots(KVStoreError):
    """matplotlib is not installed, or there is no such folder."""


def figure_into(folder: Path) -> type[Figure]:
    """matplotlib's `Figure`, and the folder made. Raises `NoPlots`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots("plots need matplotlib: pip install 'tiered-kvstore[bench]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoPlots(f"{folder}: {error.strerror}") from error
    return Figure


class Plots:
    """Draws into a folder, which is made. Raises `NoPlots`."""

    def __init__(self, folder: Path) -> None:
        self._figure = figure_into(folder)
        self._folder = folder

    def local(self, figures: dict[str, Any]) -> None:
        """`kvstore bench local`: bandwidth.png, lookup.png, local.json."""
        self._write("local.json", figures)
        picture = self._new(10, 4)
        both = picture.subplots(1, 2, sharey=True)
        for axes, way in zip(both, ("put", "get"), strict=True):
            _bandwidth(axes, figures, way)
        both[0].set_ylabel("GB/s")
        _legend(picture, both[0])
        self._save(picture, "bandwidth.png")
        picture = self._new(11, 4)
        kinds = list(figures["lookup_us"])
        each = picture.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(each, kinds, strict=True):
            _lookup(axes, figures, kind)
        each[0].set_ylabel("µs, p50 to p99")
        _legend(picture, each[0])
        self._save(picture, "lookup.png")

    def clients(self, figures: dict[str, Any]) -> None:
        """`kvstore bench clients`: clients.png, rude.png, clients.json."""
        self._write("clients.json", figures)
        picture = self._new(12, 4)
        left, middle, right = picture.subplots(1, 3)
        _throughput(left, figures)
        _many(middle, figures["clients"], "on the same cores as the server")
        _many(right, figures["apart"], "the server on a core of its own")
        middle.sharey(right)
        self._save(picture, "clients.png")
        picture = self._new(10, 4)
        _beside(picture.subplots(), figures["rude"])
        self._save(picture, "rude.png")

    def transfers(self, figures: dict[str, Any]) -> None:
        """`kvstore bench transfers`: transfers.png, transfers.json."""
        self._write("transfers.json", figures)
        devices = figures["devices"]
        picture = self._new(11, 4 * len(devices))
        rows = picture.subplots(len(devices), 2, squeeze=False)
        for (left, right), (name, device) in zip(rows, devices.items(), strict=True):
            _loaded(left, name, device, figures["operating"])
            _left_over(right, name, device)
        self._save(picture, "transfers.png")

    def _new(self, width: float, height: float) -> Figure:
        return self._figure(figsize=(width, height), layout="constrained")

    def _save(self, picture: Figure, name: str) -> None:
        picture.savefig(self._folder / name, dpi=DPI)

    def _write(self, name: str, figures: dict[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(figures, indent=2) + "\n")


def _bandwidth(axes: Axes, figures: dict[str, Any], way: str) -> None:
    """Bars by block size; on each the ratio to the plain copy."""
    copy = figures["memcpy_gbps"]
    series = {"memcpy": copy, "ours": figures[f"{way}_gbps"]}
    for name, peer in figures.get("peers", {}).items():
        if f"{way}_gbps" in peer:
            series[name] = peer[f"{way}_gbps"]
    width = 0.85 / len(series)
    for place, (name, by_size) in enumerate(series.items()):
        at = [index + place * width for index in range(len(copy))]
        heights = [by_size.get(size) or 0 for size in copy]
        bars = axes.bar(at, heights, width * 0.92, label=LABELS.get(name), color=COLORS.get(name))
        if name != "memcpy":
            shares = zip(heights, copy.values(), strict=True)
            texts = [f"{height / bound:.2f}×" for height, bound in shares]
            axes.bar_label(bars, texts, padding=2, fontsize=7, rotation=90)
    axes.set_xticks([index + 0.425 - width / 2 for index in range(len(copy))])
    axes.set_xticklabels([size_text(int(size)) for size in copy])
    axes.set_title(f"{way}, by block size (×: of the plain copy)", **TITLE)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _lookup(axes: Axes, figures: dict[str, Any], kind: str) -> None:
    """Lines of p50, shaded up to p99, both axes logarithmic."""
    series = {"ours": figures["lookup_us"][kind]}
    for name, peer in figures.get("peers", {}).items():
        if peer.get("lookup_us", {}).get(kind):
            series[name] = peer["lookup_us"][kind]
    for name, by_length in series.items():
        lengths = [int(length) for length in by_length]
        p50 = [taken["p50"] for taken in by_length.values()]
        p99 = [taken["p99"] for taken in by_length.values()]
        color = COLORS.get(name)
        axes.plot(lengths, p50, marker="o", markersize=4, color=color, label=LABELS.get(name))
        axes.fill_between(lengths, p50, p99, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([int(length) for length in figures["lookup_us"][kind]])
    axes.set_xticklabels(list(figures["lookup_us"][kind]))
    axes.minorticks_off()
    axes.set_title(f"lookup, {KIND_TITLES[kind]}", **TITLE)
    axes.set_xlabel("blocks in the chain")
    axes.grid(alpha=0.3)


def _throughput(axes: Axes, figures: dict[str, Any]) -> None:
    """Beside each other: on the same cores as the server, and apart from it (hatched)."""
    counts = list(figures["clients"])
    for place, (group, hatch) in enumerate((("clients", ""), ("apart", "//"))):
        at = [index + (place - 0.5) * 0.4 for index in range(len(counts))]
        bottom = [0.0] * len(counts)
        for name, kind in (("gbps_out", "get"), ("gbps_in", "put")):
            heights = [one[name] for one in figures[group].values()]
            label = None if place else kind
            style: dict[str, Any] = {"color": CALL_COLORS[kind], "hatch": hatch}
            axes.bar(at, heights, 0.36, bottom, label=label, edgecolor="white", **style)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(counts)))
    axes.set_xticklabels(counts)
    copy = figures["memcpy_gbps"]
    axes.axhline(copy, color=COLORS["memcpy"], linestyle="--", label=LABELS["memcpy"])
    axes.set_title("all clients together\n(hatched: the server on a core of its own)", **TITLE)
    axes.set_xlabel("clients")
    axes.set_ylabel("GB/s")
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)


def _many(axes: Axes, by_count: dict[str, Any], where: str) -> None:
    """Lines of p50, shaded up to p99, by the number of clients."""
    counts = [int(count) for count in by_count]
    for kind, color in CALL_COLORS.items():
        taken = [one[f"{kind}_us"] for one in by_count.values()]
        p50, p99 = ([_ms(each[p]) for each in taken] for p in ("p50", "p99"))
        axes.plot(counts, p50, marker="o", markersize=4, color=color, label=kind)
        axes.plot(counts, p99, marker="^", markersize=4, color=color, linestyle=":")
        axes.fill_between(counts, p50, p99, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts)
    axes.set_xticklabels(list(by_count))
    axes.minorticks_off()
    axes.set_title(f"a call, p50 (●) to p99 (▲),\n{where}", **TITLE)
    axes.set_xlabel("clients")
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _beside(axes: Axes, rude: dict[str, Any]) -> None:
    """Bars of p99 by scenario and kind of call."""
    names = list(rude["scenarios"])
    width = 0.8 / len(CALL_COLORS)
    for place, (kind, color) in enumerate(CALL_COLORS.items()):
        at = [index + place * width for index in range(len(names))]
        heights = [_ms(one[f"{kind}_us"]["p99"]) for one in rude["scenarios"].values()]
        bars = axes.bar(at, heights, width * 0.92, label=kind, color=color)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], padding=2, fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(names))])
    axes.set_xticklabels(names)
    axes.set_title(f"p99 of the calls of {rude['crowd']} clients, beside:", **TITLE)
    axes.set_ylabel("ms")
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)


def _loaded(axes: Axes, name: str, device: dict[str, Any], operating: float) -> None:
    """p99 of the loads that matter (lines) and of the others (dotted), by load."""
    loads = [float(load) for load in device["by_load"]]
    points = list(device["by_load"].values())
    for order, color in ORDER_COLORS.items():
        high = [point[order]["high_p99_ms"] or math.nan for point in points]
        low = [point[order]["low_p99_ms"] or math.nan for point in points]
        axes.plot(loads, high, marker="o", markersize=4, color=color, label=ORDER_LABELS[order])
        axes.plot(loads, low, linestyle=":", color=color)
    alone = [point["alone"]["high_p99_ms"] for point in points]
    axes.plot(loads, alone, linestyle="--", color=COLORS["memcpy"], label="nothing beside it")
    axes.axvline(operating, color="black", alpha=0.3, linewidth=6)
    axes.set_yscale("log")
    axes.set_title(f"{name} drive: p99 of loads, high priority (●) and low (··)", **TITLE)
    axes.set_xlabel("demand, part of what the drive reads")
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _left_over(axes: Axes, name: str, device: dict[str, Any]) -> None:
    """What demand and background get of the drive, by load."""
    loads = [float(load) for load in device["by_load"]]
    points = list(device["by_load"].values())
    for order, color in ORDER_COLORS.items():
        parts = [point[order] for point in points]
        beside = [part["prefetch_part"] + part["write_back_part"] for part in parts]
        axes.plot(loads, beside, marker="o", markersize=4, color=color, label=ORDER_LABELS[order])
    left = [max(0.0, 1 - load) for load in loads]
    axes.plot(loads, left, linestyle="--", color=COLORS["memcpy"], label="what demand leaves")
    axes.set_title(f"{name} drive: prefetch and write-back together", **TITLE)
    axes.set_xlabel("demand, part of what the drive reads")
    axes.set_ylabel("part of the drive")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _ms(microseconds: float | None) -> float:
    """NaN, which is not drawn, where nothing was called."""
    return math.nan if microseconds is None else microseconds / 1e3


def _legend(picture: Figure, axes: Axes) -> None:
    """One for all axes, above them."""
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)


def main(folder: Path) -> int:
    plots = Plots(folder)
    pictures = (
        ("local.json", plots.local),
        ("clients.json", plots.clients),
        ("transfers.json", plots.transfers),
    )
    for name, draw in pictures:
        if (folder / name).exists():
            draw(json.loads((folder / name).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
