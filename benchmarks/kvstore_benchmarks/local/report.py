"""The figures of `kvstore bench local`, as one object and as tables."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.figures import finite, median, percentile, ratio, size_text
from kvstore_benchmarks.local.measure import Latency, Samples

BANDWIDTHS = ("memcpy", "put", "get", "direct_write", "direct_read", "nvme_write", "nvme_get")
RATIOS = {
    "put_to_memcpy": ("put", "memcpy"),
    "get_to_memcpy": ("get", "memcpy"),
    "nvme_write_to_direct": ("nvme_write", "direct_write"),
    "nvme_get_to_direct": ("nvme_get", "direct_read"),
}


def as_json(samples: Samples) -> dict[str, Any]:
    """One object. Bandwidths in 10^9 bytes a second by block size in bytes, latencies
    in microseconds, ratios of medians. null: not measured on this server."""
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
            str(size): finite(ratio(medians[over][size], medians[under][size]), 3)
            for size in samples.bandwidth
        }
        for name, (over, under) in RATIOS.items()
    }
    return figures


def _quantiles(samples: list[float]) -> dict[str, float | None]:
    return {f"p{p}": finite(percentile(samples, p), 1) for p in (50, 99)}


def show(samples: Samples, console: Console) -> None:
    figures = as_json(samples)
    way = "shared memory" if samples.local else "gRPC"
    console.print(_bandwidth_table(samples, figures, f"Bandwidth, GB/s, through {way}"))
    console.print(_latency_table(samples.latency))


def _bandwidth_table(samples: Samples, figures: dict[str, Any], title: str) -> Table:
    table = Table(title=title)
    for heading in ("block", "memcpy", "put", "get"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("direct write", "to NVMe", "direct read", "from NVMe"):
        table.add_column(heading, justify="right")
    for nbytes in samples.bandwidth:
        key = str(nbytes)

        def cell(name: str, share: str | None = None, key: str = key) -> str:
            value = figures[f"{name}_gbps"][key]
            if value is None:
                return "-"
            of = "" if share is None else f" ({figures['ratios'][share][key]:.2f}x)"
            return f"{value:.1f}{of}"

        table.add_row(
            size_text(nbytes),
            cell("memcpy"),
            cell("put", "put_to_memcpy"),
            cell("get", "get_to_memcpy"),
            cell("direct_write"),
            cell("nvme_write", "nvme_write_to_direct"),
            cell("direct_read"),
            cell("nvme_get", "nvme_get_to_direct"),
        )
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
