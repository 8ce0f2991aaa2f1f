"""`kvstore status`: a running server at a glance."""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from kvstore.cli import output
from kvstore.cli.connection import (
    CALL_TIMEOUT_S,
    add_endpoint_argument,
    calling,
    endpoint_of,
    socket_of,
)
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.config import STATE_SUFFIX
from kvstore.types import Tier
from kvstore.wire.v1 import kvstore_pb2 as pb


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("status", help=COMMANDS["status"].summary)
    add_endpoint_argument(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    endpoint = endpoint_of(args)
    with calling(endpoint) as stub:
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_TIMEOUT_S)
        stats = stub.GetStats(pb.GetStatsRequest(), timeout=CALL_TIMEOUT_S)
    status = _status(endpoint, info, stats)
    if args.json:
        print(json.dumps(status, indent=2))
    else:
        _show(status)
    return 0


def _status(
    endpoint: str, info: pb.GetServerInfoResponse, stats: pb.GetStatsResponse
) -> dict[str, Any]:
    state = _state(socket_of(endpoint))
    return {
        "endpoint": endpoint,
        "version": info.version,
        "epoch": info.epoch.hex(),
        "pid": state.get("pid"),
        "admin": state.get("admin"),
        "listen": state.get("listen"),
        "device": state.get("device"),
        "uptime_seconds": stats.uptime_seconds,
        "sessions": stats.sessions,
        "leases": stats.leases,
        "reservations": stats.reservations,
        "acquired_positions": stats.acquired_positions,
        "acquired_hits": stats.acquired_hits,
        "acquired_hits_dram": stats.acquired_hits_dram,
        "committed_blocks": stats.committed_blocks,
        "corrupt_blocks": stats.corrupt_blocks,
        "mismatched_blocks": stats.mismatched_blocks,
        "tenant_blocks": stats.tenant_blocks,
        "tiers": [
            {
                "tier": Tier(tier.tier).label,
                "capacity_bytes": tier.capacity_bytes,
                "used_bytes": tier.used_bytes,
                "blocks": tier.blocks,
                "evictions": tier.evictions,
                "bytes_in": tier.bytes_in,
                "bytes_out": tier.bytes_out,
                "healthy": tier.healthy,
                "stalled": tier.stalled,
                "stalls": tier.stalls,
                "off_because": tier.off_because,
            }
            for tier in stats.tiers
        ],
        "vram": [
            {field.name: getattr(gpu, field.name) for field in pb.VramStats.DESCRIPTOR.fields}
            for gpu in stats.vram
        ],
    }


def _state(socket: Path | None) -> dict[str, Any]:
    """What the server wrote beside its socket; empty where that cannot be read."""
    if socket is None:
        return {}
    try:
        state = json.loads(Path(f"{socket}{STATE_SUFFIX}").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _show(status: dict[str, Any]) -> None:
    console = output.console()
    uptime = timedelta(seconds=round(status["uptime_seconds"]))
    asked, hits = status["acquired_positions"], status["acquired_hits"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("server", f"{status['version']} at {status['endpoint']}")
    facts.add_row("process", str(status["pid"] or "?"))
    facts.add_row("up", str(uptime))
    facts.add_row("admin", status["admin"] or "none")
    if status["device"]:
        facts.add_row("device", status["device"])
    facts.add_row(
        "in use",
        f"{status['sessions']} sessions, {status['leases']} leases, "
        f"{status['reservations']} reservations",
    )
    rate = f" ({hits / asked:.1%}, {status['acquired_hits_dram']} from DRAM)" if asked else ""
    facts.add_row("hits", f"{hits} of {asked} positions{rate}")
    facts.add_row("committed", f"{status['committed_blocks']} blocks")
    facts.add_row("damaged", f"{status['corrupt_blocks']} blocks")
    if status["mismatched_blocks"]:
        facts.add_row("mismatched", f"{status['mismatched_blocks']} blocks, with wrong checksums")
    console.print(facts)
    tiers = Table()
    for name in ("tier", "used", "capacity", "blocks", "evicted", "in", "out", "health"):
        tiers.add_column(name, justify=_justify(name))
    for tier in status["tiers"]:
        tiers.add_row(
            tier["tier"],
            _human(tier["used_bytes"]),
            _human(tier["capacity_bytes"]),
            str(tier["blocks"]),
            str(tier["evictions"]),
            _human(tier["bytes_in"]),
            _human(tier["bytes_out"]),
            _health(tier),
        )
    output.print_table(console, tiers)
    if status["vram"]:
        output.print_table(console, _gpus(status["vram"]))
    for name, each in (
        *((tier["tier"], tier) for tier in status["tiers"]),
        *((gpu["gpu"], gpu) for gpu in status["vram"]),
    ):
        if each["off_because"]:
            console.print(f"{name} is off: {each['off_because']}", markup=False, soft_wrap=True)
    for gpu in status["vram"]:
        if gpu["healthy"] and gpu["not_straight_because"]:
            console.print(
                f"nothing is read straight into {gpu['gpu']}: {gpu['not_straight_because']}",
                markup=False, soft_wrap=True,
            )  # fmt: skip


def _gpus(gpus: list[dict[str, Any]]) -> Table:
    table = Table()
    names = ("gpu", "used", "held", "capacity", "blocks", "hits", "handed over", "straight")
    for name in (*names, "health"):
        table.add_column(name, justify=_justify(name))
    for gpu in gpus:
        table.add_row(
            gpu["gpu"],
            _human(gpu["used_bytes"]),
            _human(gpu["held_bytes"]),
            _human(gpu["capacity_bytes"]),
            str(gpu["blocks"]),
            str(gpu["hits"]),
            _human(gpu["landed_bytes"]),
            _straight(gpu),
            _health(gpu),
        )
    return table


def _justify(column: str) -> Literal["left", "right"]:
    return "left" if column in ("tier", "gpu", "health") else "right"


def _straight(gpu: dict[str, Any]) -> str:
    """Blocks read straight from a drive, where they are or were."""
    read = f"{gpu['straight_blocks']} of {gpu['straight_blocks'] + gpu['bounced_blocks']}"
    if gpu["reads_straight"]:
        return read
    return f"{read}, off" if gpu["not_straight_because"] else "no"


def _health(tier: dict[str, Any]) -> str:
    if not tier["healthy"]:
        return "[bold red]off[/]"
    if tier.get("short"):
        return "gives way: the GPU's memory is short"
    return "[bold red]does not answer[/]" if tier.get("stalled") else "ok"


def _human(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
