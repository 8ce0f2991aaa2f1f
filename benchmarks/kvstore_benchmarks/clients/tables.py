"""The figures of `kvstore bench clients` as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.clients.report import KINDS

SCENARIOS = {
    "flood": "flood of large calls",
    "hoard": "hoard of leases, slots",
    "stall": "stopped in mid-copy",
}


def show(figures: dict[str, Any], console: Console) -> None:
    rows: dict[str, Any] = {}
    for count, one in figures["clients"].items():
        rows |= {count: one, f"{count}, apart": figures["apart"][count]}
    console.print(_throughput(rows, figures["memcpy_gbps"]))
    console.print(_latency(rows, "Calls, ms, p50 / p99", "clients"))
    rude = figures["rude"]
    console.print(_rude(rude))
    named = {SCENARIOS.get(name, name): one for name, one in rude["scenarios"].items()}
    console.print(_latency(named, f"Calls of {rude['crowd']} clients, ms, p50 / p99", "beside"))


def _throughput(rows: dict[str, Any], copy: float) -> Table:
    """`slowest`: the steps it completed, to the fastest client's. `server`: the cores it
    uses. Apart: the server has a core to itself, and the clients the others."""
    title = f"Many clients; one thread copies {copy:.2f} GB/s"
    headings = ("clients", "put GB/s", "get GB/s", "calls/s", "Jain", "slowest", "server")
    table = _table(title, *headings, "errors")
    for count, one in rows.items():
        table.add_row(
            count,
            f"{one['gbps_in']:.2f}",
            f"{one['gbps_out']:.2f}",
            f"{one['calls_per_s']:.0f}",
            f"{one['jain']:.3f}",
            f"{one['slowest_to_fastest']:.2f}",
            f"{one['server_cpu']:.2f}",
            _trouble(one),
        )
    return table


def _latency(rows: dict[str, Any], title: str, first: str) -> Table:
    table = _table(title, first, *KINDS, "longest call")
    for name, one in rows.items():
        cells = [_ms(one[f"{kind}_us"]) for kind in KINDS]
        longest = max((one[f"{kind}_us"]["max"] or 0) for kind in KINDS)
        table.add_row(name, *cells, f"{longest / 1e3:.0f}")
    return table


def _rude(rude: dict[str, Any]) -> Table:
    title = f"What {rude['crowd']} clients get beside another one"
    table = _table(title, "beside", "steps/s", "lookup", "get", "put", "errors")
    for name, one in rude["scenarios"].items():
        cells = [f"{one['p99_to_one_more'][kind] or 0:.2f}x" for kind in KINDS]
        steps = f"{one['steps_per_s']:.0f}"
        table.add_row(SCENARIOS.get(name, name), steps, *cells, _trouble(one))
    table.caption = "p99 as a multiple of that beside one more polite client"
    return table


def _trouble(one: dict[str, Any]) -> str:
    """Errors and wrong blocks; denied blocks are no error, but said."""
    errors = sum(one["errors"].values()) + one["wrong_blocks"]
    denied = f" ({one['denied_blocks']} blocks denied)" if one["denied_blocks"] else ""
    return f"{errors}{denied}"


def _ms(taken: dict[str, float | None]) -> str:
    return " / ".join(
        "-" if taken[name] is None else f"{taken[name] / 1e3:.3g}"  # type: ignore[operator]
        for name in ("p50", "p99")
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table
