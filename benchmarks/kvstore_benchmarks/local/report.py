"""The figures of `kvstore bench local`, as one object and as tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.figures import finite, median, percentile, ratio, size_text
from kvstore_benchmarks.local.measure import Bandwidth, Latency, Samples

BANDWIDTHS = ("memcpy", "put", "get", "direct_write", "direct_read", "nvme_write", "nvme_get")
RATIOS = {
    "put_to_memcpy": ("put", "memcpy"),
    "get_to_memcpy": ("get", "memcpy"),
    "nvme_write_to_direct": ("nvme_write", "direct_write"),
    "nvme_get_to_direct": ("nvme_get", "direct_read"),
}


def as_json(samples: Samples) -> dict[str, Any]:
    """One object. Bandwidths in 10^9 bytes a second by block size in bytes, latencies
    in microseconds; medians, of ratios those within a round. null: not measured on
    this server."""
    medians = {
        name: {
            nbytes: median(getattr(bandwidth, name))
            for nbytes, bandwidth in samples.bandwidth.items()
        }
        for name in BANDWIDTHS
    }
    figures: dict[str, Any] = {"local": samples.local, "cores": os.cpu_count()}
    for name, by_size in medians.items():
        figures[f"{name}_gbps"] = {str(size): finite(value) for size, value in by_size.items()}
    latency = samples.latency
    figures["lookup_us"] = {
        kind: {str(length): _quantiles(taken) for length, taken in by_length.items()}
        for kind, by_length in (("hit", latency.hit), ("miss", latency.miss))
    }
    for name in ("rpc", "put_one", "get_one"):
        figures[f"{name}_us"] = _quantiles(getattr(latency, name))
    figures["ratios"] = {
        name: {
            str(size): finite(median(_paired(bandwidth, over, under)), 3)
            for size, bandwidth in samples.bandwidth.items()
        }
        for name, (over, under) in RATIOS.items()
    }
    return figures


def _paired(bandwidth: Bandwidth, over: str, under: str) -> list[float]:
    """The ratio in each round, where both sides met the same machine."""
    if not getattr(bandwidth, over):
        return []
    pairs = zip(getattr(bandwidth, over), getattr(bandwidth, under), strict=True)
    return [ratio(value, bound) for value, bound in pairs]


def _quantiles(samples: list[float]) -> dict[str, float | None]:
    return {f"p{p}": finite(percentile(samples, p), 1) for p in (50, 99)}


def show(samples: Samples, console: Console) -> None:
    figures = as_json(samples)
    way = "shared memory" if samples.local else "gRPC"
    in_memory = (("memcpy", ""), ("put", "put_to_memcpy"), ("get", "get_to_memcpy"))
    on_disk = (
        ("direct_write", ""),
        ("nvme_write", "nvme_write_to_direct"),
        ("direct_read", ""),
        ("nvme_get", "nvme_get_to_direct"),
    )
    console.print(_bandwidth_table(figures, in_memory, f"DRAM through {way}, GB/s"))
    if any(taken.nvme_get for taken in samples.bandwidth.values()):
        console.print(_bandwidth_table(figures, on_disk, "NVMe beside O_DIRECT, GB/s"))
    console.print(_latency_table(samples.latency))


HEADINGS = {
    "memcpy": "plain copy",
    "put": "put",
    "get": "get",
    "direct_write": "O_DIRECT write",
    "nvme_write": "flush to NVMe",
    "direct_read": "O_DIRECT read",
    "nvme_get": "get from NVMe",
}


def _bandwidth_table(
    figures: dict[str, Any], columns: Sequence[tuple[str, str]], title: str
) -> Table:
    """`columns`: what was measured, and its ratio to the bound ("" for a bound)."""
    table = Table(title=title)
    table.add_column("block", justify="right")
    for name, _ in columns:
        table.add_column(HEADINGS[name], justify="right")
    for size in figures["memcpy_gbps"]:
        cells = [size_text(int(size))]
        for name, share in columns:
            of = f" ({figures['ratios'][share][size]:.2f}x)" if share else ""
            cells.append(f"{figures[f'{name}_gbps'][size]:.2f}{of}")
        table.add_row(*cells)
    return table


def _latency_table(latency: Latency) -> Table:
    """The smallest call over gRPC is there for scale: what asks the server costs at
    least that, what only reads shared memory does not."""
    table = Table(title="Latency, microseconds")
    table.add_column("call", no_wrap=True)
    for heading in ("p50", "p99"):
        table.add_column(heading, justify="right")
    rows = [("smallest call over gRPC", latency.rpc)]
    for length in latency.hit:
        rows.append((f"lookup of {length}, hit", latency.hit[length]))
        rows.append((f"lookup of {length}, miss", latency.miss[length]))
    rows += [("put one 64 KiB block", latency.put_one), ("get one 64 KiB block", latency.get_one)]
    for name, samples in rows:
        table.add_row(name, f"{percentile(samples, 50):.0f}", f"{percentile(samples, 99):.0f}")
    return table
