"""Opens the GPU, measures, and prints tables; the last says what was aimed at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.device.cuda import CudaDriver
from kvstore.errors import DeviceError
from kvstore_benchmarks.figures import figure_text, machine, size_text
from kvstore_benchmarks.gpu.engine import connector_figures, engine_stream, matrix_product
from kvstore_benchmarks.gpu.measure import Options, measure
from kvstore_benchmarks.gpu.rig import gpu_name
from kvstore_benchmarks.progress import progress

WHOLE_AIM, PIECES_AIM, WITHIN_AIM, SLOWDOWN_AIM = 0.95, 0.7, 0.8, 0.05


def run(options: Options, *, as_object: bool) -> int:
    """Exit code: 0; 1 where wrong bytes arrived; 69 without a GPU, with the reason."""
    console = Console(stderr=True)
    try:
        driver = CudaDriver(0, engine_stream)
    except DeviceError as error:
        # As it is: the reason may name what to install, with brackets.
        console.print(
            f"kvstore: nothing measured: {error}", highlight=False, markup=False, soft_wrap=True
        )
        return os.EX_UNAVAILABLE
    with progress() as step:
        figures = machine() | gpu_name()
        figures |= measure(driver, options, matrix_product(), step)
        step("the connector's copies")
        figures["connector"] = connector_figures(driver, options)
    figures["aims"] = list(_aims(figures))
    if as_object:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, Console())
    return 1 if wrong_blocks(figures) else 0


def _aims(figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def aim(name: str, value: float, of: float, *, most: bool = False) -> dict[str, Any]:
        reached = value <= of if most else value >= of
        return {"figure": name, "value": value, "aim": of, "reached": reached}

    for way in ("to_gpu", "to_host"):
        large = [
            one[way]["ratio"] for size, one in figures["blocks"].items() if int(size) >= 2 << 20
        ]
        if large:
            yield aim(f"{way}, blocks from 2 MiB, least", min(large), WHOLE_AIM)
        small = [
            max(ways["kernel"][way]["ratio"], ways["batch"][way]["ratio"])
            for size, ways in figures["pieces"].items()
            if 16 << 10 <= int(size) <= 64 << 10
        ]
        if small:
            yield aim(f"{way}, pieces of 16 to 64 KiB, least", min(small), PIECES_AIM)
    for name, one in figures["within"].items():
        yield aim(f"from the GPU's own memory, {name}", one["ratio"], WITHIN_AIM)
    for name, one in (figures["computing"] or {}).items():
        yield aim(f"slow-down of computing, {name}", one["slowdown"], SLOWDOWN_AIM, most=True)
    yield aim("wrong blocks", wrong_blocks(figures), 0, most=True)


def wrong_blocks(figures: dict[str, Any]) -> int:
    wrong: int = figures["moved"]["wrong_blocks"] + figures["drive"]["wrong"]
    wrong += sum(one["wrong"] for one in (figures["connector"] or {}).values())
    return wrong


def show(figures: dict[str, Any], console: Console) -> None:
    facts = f"{figures.get('gpu', 'no GPU')}, {figures['date']}"
    table = Table(title=f"GB/s, and as a part of a plain pinned copy's ({facts})")
    for column in ("", "to GPU", "to host"):
        table.add_column(column, justify="right")
    for size, one in figures["blocks"].items():
        table.add_row(f"blocks of {size_text(int(size))}", *_ways(one))
    for size, ways in figures["pieces"].items():
        for name, one in ways.items():
            table.add_row(f"pieces of {size_text(int(size))}, {name}", *_ways(one))
    for name, one in figures["coded"].items():
        table.add_row(f"coded by {name}", *_ways(one))
    table.add_row("2 MiB, with checksums", *_ways(figures["checked"]))
    for name, one in (figures["connector"] or {}).items():
        table.add_row(f"connector, {name}", *_ways(one))
    for name, one in figures["within"].items():
        table.add_row(f"from the GPU, {name}", figure_text(one["gbps"], one["ratio"]), "")
    console.print(table)
    drive = figures["drive"]
    read = Table(title="Blocks of 2 MiB from a drive into the GPU's memory, GB/s")
    read.add_column("by way of the host's memory", justify="right")
    read.add_column("straight, and to the other")
    straight = figure_text(drive["straight"], drive["ratio"]) if drive["straight"] else ""
    read.add_row(str(drive["by_host"] or ""), Text(straight or drive["reason"]))
    console.print(read)
    aims = Table(title=f"{figures['moved']['nbytes'] / 1e9:.1f} GB looked at")
    for column in ("", "measured", "aim", ""):
        aims.add_column(column, justify="right")
    for one in figures["aims"]:
        aims.add_row(
            one["figure"], f"{one['value']:.3f}", f"{one['aim']}", "yes" if one["reached"] else "no"
        )
    console.print(aims)


def _ways(one: dict[str, Any]) -> list[str]:
    return [figure_text(one[way]["gbps"], one[way]["ratio"]) for way in ("to_gpu", "to_host")]
