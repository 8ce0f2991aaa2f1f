"""The figures of `kvstore bench local` as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.figures import figure_text, size_text

HEADINGS = {
    "memcpy": "plain copy",
    "put": "put",
    "get": "get",
    "direct_write": "O_DIRECT write",
    "nvme_write": "flush to NVMe",
    "direct_read": "O_DIRECT read",
    "nvme_get": "get from NVMe",
}
IN_MEMORY = (("memcpy", ""), ("put", "put_to_memcpy"), ("get", "get_to_memcpy"))
ON_DISK = (
    ("direct_write", ""),
    ("nvme_write", "nvme_write_to_direct"),
    ("direct_read", ""),
    ("nvme_get", "nvme_get_to_direct"),
)
PEER_NAMES = {"mooncake": "Mooncake", "mooncake_shm": "Mooncake/shm", "lmcache": "LMCache"}


def show(figures: dict[str, Any], console: Console) -> None:
    way = "shared memory" if figures["local"] else "gRPC"
    console.print(_bandwidths(figures, IN_MEMORY, f"DRAM through {way}, GB/s"))
    if any(value is not None for value in figures["nvme_get_gbps"].values()):
        console.print(_bandwidths(figures, ON_DISK, "NVMe beside O_DIRECT, GB/s"))
    running = {name: peer for name, peer in figures.get("peers", {}).items() if "version" in peer}
    if running:
        console.print(_peer_bandwidths(figures, running))
    console.print(_lookups(figures, running))
    console.print(_calls(figures, running))
    for name, peer in figures.get("peers", {}).items():
        console.print(_about(PEER_NAMES.get(name, name), peer), soft_wrap=True, highlight=False)
    console.print(_aims(figures))


def _bandwidths(figures: dict[str, Any], columns: Sequence[tuple[str, str]], title: str) -> Table:
    """`columns`: what was measured, and its ratio to the bound ("" for a bound)."""
    table = _table(title, "block", *(HEADINGS[name] for name, _ in columns))
    for size in figures["memcpy_gbps"]:
        cells = [size_text(int(size))]
        for name, share in columns:
            of = figures["ratios"][share][size] if share else None
            cells.append(figure_text(figures[f"{name}_gbps"][size], of))
        table.add_row(*cells)
    return table


def _peer_bandwidths(figures: dict[str, Any], peers: dict[str, Any]) -> Table:
    """In brackets: how many times faster ours was in the same round."""
    table = _table("Peers, GB/s (ours / theirs)", "block", "", *map(_name, peers))
    for size in figures["memcpy_gbps"]:
        for way in ("put", "get"):
            cells = [
                figure_text(
                    peer[f"{way}_gbps"].get(size), figures["ratios_to_peers"][name][way].get(size)
                )
                for name, peer in peers.items()
            ]
            table.add_row(size_text(int(size)), way, *cells)
    return table


def _lookups(figures: dict[str, Any], peers: dict[str, Any]) -> Table:
    """Of the peers p50 alone and, in brackets, how many times longer than ours."""
    table = _table("Lookup, microseconds", "chain", "p50", "p99", *map(_name, peers))
    for kind, by_length in figures["lookup_us"].items():
        for length, taken in by_length.items():
            cells = []
            for name, peer in peers.items():
                theirs = peer["lookup_us"].get(kind, {}).get(length)
                times = figures["ratios_to_peers"][name][f"lookup_{kind}"].get(length)
                cells.append(f"{theirs['p50']:.0f} ({times:.0f}x)" if theirs else "-")
            table.add_row(f"{length}, {kind}", *_quantiles(taken), *cells)
    table.add_row("the harness", *_quantiles(figures["harness_us"]))
    return table


def _calls(figures: dict[str, Any], peers: dict[str, Any]) -> Table:
    """The smallest call over gRPC is there for scale: what asks the server costs at
    least that. A lease is an acquire and a release, one block is 64 KiB. In brackets: how
    many times longer than ours a peer takes."""
    table = _table("Calls, microseconds", "call", "p50", "p99", *map(_name, peers))
    table.add_row("smallest call", *_quantiles(figures["rpc_us"]))
    for length, taken in figures["acquire_release_us"].items():
        table.add_row(f"lease of {length}", *_quantiles(taken))
    for way in ("put", "get"):
        cells = []
        for name, peer in peers.items():
            p50, times = peer[f"{way}_one_us"]["p50"], figures["ratios_to_peers"][name]
            cells.append("-" if p50 is None else f"{p50:.0f} ({times[f'{way}_one']:.1f}x)")
        table.add_row(f"{way} one block", *_quantiles(figures[f"{way}_one_us"]), *cells)
    return table


def _aims(figures: dict[str, Any]) -> Table:
    table = _table("Aims", "figure", "here", "aim", "")
    for aim in figures["aims"]:
        reached = "reached" if aim["reached"] else "[bold red]missed[/]"
        table.add_row(aim["figure"], f"{aim['value']:.2f}", aim["aim"], reached)
    return table


def _about(name: str, peer: dict[str, Any]) -> str:
    if "version" not in peer:
        return f"{name}: not available: {peer['reason']}"
    text = f"{name} {peer['version']}: {peer['way']}"
    if peer["failed_blocks"] or peer["wrong_blocks"]:
        text += f"; {peer['failed_blocks']} failed, {peer['wrong_blocks']} came back wrong"
    return text if peer["available"] else f"{text}; ended: {peer['reason']}"


def _quantiles(taken: dict[str, float | None]) -> list[str]:
    return [
        "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
        for value in (taken["p50"], taken["p99"])
    ]


def _name(peer: str) -> str:
    return PEER_NAMES.get(peer, peer)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table
