"""`kvstore bench transfers`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.config import default_data_path
from kvstore.core.links.learned import LinkCost, Speed
from kvstore.core.transfers import Link, TransferClass
from kvstore.types import Tier
from kvstore_benchmarks.figures import finite, machine, percentile, ratio
from kvstore_benchmarks.present import present
from kvstore_benchmarks.progress import Progress
from kvstore_benchmarks.transfers.devices import Device, Modelled, Real
from kvstore_benchmarks.transfers.first_token import CASES, figures_of
from kvstore_benchmarks.transfers.rivals import Queue, fifo, strict
from kvstore_benchmarks.transfers.run import (
    BACKGROUND,
    BLOCK_BYTES,
    BLOCKS_A_LOAD,
    HIGH,
    HIGH_SHARE,
    LOW,
    Capacity,
    Run,
    Seen,
    Stream,
    capacity_of,
)

SEED = 20261
DEPTH = 4
OPERATING = 0.95
MODELLED = (3e9, 1e-4)
"""Bytes a second and latency of the drive that is calculated: a PCIe 3 or 4 one."""
SHARES = {"a": 3.0, "b": 1.0}
ORDERS = ("ours", "fifo", "strict")


@dataclass(frozen=True, slots=True)
class Options:
    """`loads`: of demand, as parts of what the device reads. `seconds`: of each
    measurement on the drive that is there, `modelled_s` on the one that is calculated, and
    `requests` of each case of times to the first token. `drive`: "modelled", "real" or
    "both"."""

    loads: tuple[float, ...] = (0.3, 0.6, 0.8, 0.9, 0.95, 1.05)
    real_loads: tuple[float, ...] = (0.6, 0.95)
    seconds: float = 6.0
    modelled_s: float = 40.0
    requests: int = 100
    drive: str = "both"
    folder: Path | None = None


QUICK = Options(loads=(0.5, 0.95), real_loads=(0.95,), seconds=0.5, modelled_s=5.0, requests=40)


def run(options: Options, *, as_object: bool, plots: Path | None) -> int:
    present(
        partial(_figures, options),
        lambda pictures, figures: pictures.transfers(figures),
        _show,
        as_object=as_object,
        plots=plots,
    )
    return 0


def _figures(options: Options, step: Progress) -> dict[str, Any]:
    figures: dict[str, Any] = {**machine(), "seed": SEED, "depth": DEPTH, "operating": OPERATING}
    figures |= {"block_bytes": BLOCK_BYTES, "blocks_a_load": BLOCKS_A_LOAD, "devices": {}}
    if options.drive != "real":
        seconds = options.modelled_s
        figures["devices"]["modelled"] = _on(
            Modelled(*MODELLED), options.loads, seconds, step, "modelled"
        )
        figures["first_token"] = _first_tokens(options.requests, step)
    if options.drive != "modelled":
        parent = options.folder or default_data_path().parent
        parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent))
            step("real: a file")
            device = Real(Path(folder), DEPTH, BLOCK_BYTES)
            stack.callback(device.close)
            figures["devices"]["real"] = _on(
                device, options.real_loads, options.seconds, step, "real"
            )
    return figures


def _first_tokens(requests: int, step: Progress) -> dict[str, Any]:
    figures = {}
    for case in CASES:
        step(f"first token: {case.name}")
        figures[case.name] = figures_of(case, requests, SEED)
    return figures


def _on(
    device: Device, loads: Sequence[float], seconds: float, step: Progress, name: str
) -> dict[str, Any]:
    step(f"{name}: capacity")
    capacity = capacity_of(device, DEPTH, seconds / 2)
    figures: dict[str, Any] = {
        "read_gbps": finite(capacity.read / 1e9),
        "write_gbps": finite(capacity.write / 1e9),
        "by_load": {},
    }
    for load in loads:
        step(f"{name}: load {load:.0%}, alone")
        high = Stream(HIGH, load * HIGH_SHARE)
        alone = _run(_ours(capacity), device, capacity, [high], seconds, (0, 0))
        unloaded_s = percentile(alone.latency_s[0], 99)
        point: dict[str, Any] = {"alone": {"high_p99_ms": _ms(unloaded_s)}}
        streams = [high, Stream(LOW, load * (1 - HIGH_SHARE))]
        for order in ORDERS:
            step(f"{name}: load {load:.0%}, {order}")
            seen = _run(_line(order, capacity), device, capacity, streams, seconds, BACKGROUND)
            point[order] = _point(seen, capacity, load, unloaded_s)
        figures["by_load"][f"{load:g}"] = point
    step(f"{name}: tenants")
    figures["tenants"] = _tenants(device, capacity, seconds)
    return figures


def _line(order: str, capacity: Capacity) -> Queue:
    makers: dict[str, Callable[[], Queue]] = {
        "ours": lambda: _ours(capacity),
        "fifo": lambda: fifo(DEPTH),
        "strict": lambda: strict(DEPTH),
    }
    return makers[order]()


def _ours(capacity: Capacity) -> Link:
    costs = {
        Tier.DRAM: LinkCost(Speed(0.0, capacity.read)),
        Tier.NVME: LinkCost(Speed(0.0, capacity.write)),
    }
    return Link(DEPTH, costs, lambda tenant: SHARES.get(tenant, 1.0))


def _run(
    line: Queue, device: Device, capacity: Capacity, streams: Sequence[Stream], seconds: float,
    background: tuple[int, int],
) -> Seen:  # fmt: skip
    run = Run(line, device, capacity, streams, background=background, seed=SEED)
    return run.run(seconds / 6, seconds)


def _point(seen: Seen, capacity: Capacity, load: float, unloaded_s: float) -> dict[str, Any]:
    high, low = seen.latency_s
    demand = seen.moved[TransferClass.DEMAND] / capacity.read / seen.seconds
    prefetch = seen.moved[TransferClass.PREFETCH] / capacity.read / seen.seconds
    written = seen.moved[TransferClass.WRITE_BACK] / capacity.write / seen.seconds
    left = max(0.0, 1 - min(load, demand))
    high_p99_s = percentile(high, 99)
    return {
        "high_p50_ms": _ms(percentile(high, 50)),
        "high_p99_ms": _ms(high_p99_s),
        "high_p99_of_alone": finite(ratio(high_p99_s, unloaded_s), 2),
        "low_p50_ms": _ms(percentile(low, 50)),
        "low_p99_ms": _ms(percentile(low, 99)),
        "demand_part": finite(demand, 3),
        "prefetch_part": finite(prefetch, 4),
        "write_back_part": finite(written, 4),
        "background_of_left": finite(ratio(prefetch + written, left), 2),
        "refused": sum(seen.refused),
        "late": sum(seen.late),
        "loads": len(high) + len(low),
        "longest_wait_ms": {
            each.label: _ms(seen.longest_wait_s[each])
            for each in (TransferClass.DEMAND, TransferClass.PREFETCH, TransferClass.WRITE_BACK)
        },
    }


def _tenants(device: Device, capacity: Capacity, seconds: float) -> dict[str, Any]:
    """Two that want all there is, and each alone."""
    figures: dict[str, Any] = {"shares": SHARES}
    streams = [Stream(LOW, 0.0, tenant, waiting=4) for tenant in SHARES]
    both = _run(_ours(capacity), device, capacity, streams, seconds, (0, 0))
    figures["ratio"] = finite(ratio(both.of_tenant["a"], both.of_tenant["b"]), 3)
    for stream in streams:
        alone = _run(_ours(capacity), device, capacity, [stream], seconds / 2, (0, 0))
        part = alone.of_tenant[stream.tenant] / capacity.read / alone.seconds
        figures[f"{stream.tenant}_alone_part"] = finite(part, 3)
    return figures


def _ms(seconds: float) -> float | None:
    return finite(seconds * 1e3, 2)


ROWS = (
    ("high p50, ms", "high_p50_ms"),
    ("high p99, ms", "high_p99_ms"),
    ("high p99, of alone", "high_p99_of_alone"),
    ("low p99, ms", "low_p99_ms"),
    ("demand, part of the device", "demand_part"),
    ("background, of what is left", "background_of_left"),
    ("refused", "refused"),
    ("late", "late"),
    ("loads", "loads"),
)


RATIOS = ("ratio_p50", "ratio_p99", "ratio_worst", "ratio_mean", "time_saved", "given")


def _show(figures: dict[str, Any], console: Console) -> None:
    for name, device in figures["devices"].items():
        speeds = f"reads {device['read_gbps']} GB/s, writes {device['write_gbps']} GB/s"
        table = Table(title=f"{name} drive: {speeds}")
        table.add_column("load")
        table.add_column("")
        for order in ORDERS:
            table.add_column(order, justify="right")
        for load, point in device["by_load"].items():
            for title, row in ROWS:
                values = [point[order][row] for order in ORDERS]
                table.add_row(load, title, *("-" if v is None else f"{v:g}" for v in values))
            table.add_section()
        console.print(table)
        tenants = device["tenants"]
        console.print(
            f"tenants 3:1 get {tenants['ratio']}:1; alone {tenants['a_alone_part']:.0%} "
            f"and {tenants['b_alone_part']:.0%} of the device"
        )
    if "first_token" in figures:
        table = Table(title="time to the first token, over that of computing everything")
        table.add_column("")
        for name in ("p50", "p99", "worst", "mean", "time saved", "given of what is held"):
            table.add_column(name, justify="right")
        for name, case in figures["first_token"].items():
            table.add_row(name, *(f"{case[row]:g}" for row in RATIOS))
        console.print(table)
