"""`kvstore simulate --tiers`: the flags that describe a stack, and what is printed of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.cli import output
from kvstore.nearest import nearest
from kvstore.units import format_size, parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from kvstore.sim.machine import Machine, Tiers
    from kvstore.sim.trace import Trace


class Stated(NamedTuple):
    """What `--machine` says. `parameters`: billions; `kv_bytes`: of a number; `gpus`: of an
    engine; `engines`: that share the tiers; `parts`: a file with more of them."""

    model: str = "llama-3.1-8b"
    parameters: float | None = None
    kv_bytes: float = 2.0
    gpu: str = "h100"
    gpus: int = 1
    mfu: float = 0.5
    engines: int = 1
    ssd: str = "gen4"
    ssds: int = 1
    acquire_timeout_ms: int = 1000
    parts: str | None = None


WHOLE = {"gpus": 4096, "ssds": 4096, "engines": 1024, "acquire_timeout_ms": 60_000}
REAL = {"parameters": 1e6, "kv_bytes": 64.0, "mfu": 1.0}
"""The most that each may be."""


def tiers(text: str) -> Tiers:
    """Of "dram=64GiB,nvme=1TiB,endurance=2TB"."""
    from kvstore.sim.machine import Tiers

    sizes = {}
    for name, value in _pairs(text, ("dram", "nvme", "endurance")):
        try:
            sizes[name] = parse_size(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from error
    if not sizes.get("dram"):
        raise argparse.ArgumentTypeError("say how large DRAM is, as in dram=64GiB,nvme=1TiB")
    if "endurance" in sizes and not (sizes["endurance"] and sizes.get("nvme")):
        raise argparse.ArgumentTypeError("endurance is what may be written to nvme a day")
    return Tiers(sizes["dram"], sizes.get("nvme", 0), sizes.get("endurance", 0))


def stated(text: str) -> Stated:
    """Of "gpu=h100,engines=2,ssd=gen5"."""
    said: dict[str, Any] = {name: _value(name, v) for name, v in _pairs(text, Stated._fields)}
    return Stated(**said)


def _pairs(text: str, known: Sequence[str]) -> Iterator[tuple[str, str]]:
    met = set()
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if name not in known:
            hint = nearest(name, known)
            raise argparse.ArgumentTypeError(f"no {name!r} ({', '.join(known)}){hint}")
        if not equals or not value or name in met:
            raise argparse.ArgumentTypeError(f"say {name} once, as {name}=VALUE")
        met.add(name)
        yield name, value


def _value(name: str, text: str) -> str | int | float:
    if name in WHOLE:
        if text.isdecimal() and 0 < int(text) <= WHOLE[name]:
            return int(text)
        raise argparse.ArgumentTypeError(f"{name}: {text!r} is not from 1 to {WHOLE[name]}")
    if name not in REAL:
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= REAL[name]:
        raise argparse.ArgumentTypeError(f"{name}: {text!r} is not above 0 and to {REAL[name]:g}")
    return value


def machine_of(said: Stated) -> Machine:
    """Raises `BadRequest` for parts that are not known."""
    from kvstore.parts import find, find_model, load_parts
    from kvstore.plan.machine import Engine
    from kvstore.sim.machine import Machine

    parts = load_parts(None if said.parts is None else Path(said.parts))
    ssd = find("SSD", said.ssd, parts.ssd)
    engine = Engine(
        model=find_model(said.model, parts, said.parameters),
        gpu=find("GPU", said.gpu, parts.gpu),
        gpus=said.gpus,
        ssd=ssd,
        ssds=said.ssds,
        kv_dtype_bytes=said.kv_bytes,
        mfu=said.mfu,
    )
    return Machine(
        prefill=engine.prefill,
        kv_bytes=engine.kv_bytes,
        engines=said.engines,
        dram_bytes_per_s=engine.dram_gbps * 1e9,
        read_bytes_per_s=said.ssds * ssd.read_gbps * 1e9,
        write_bytes_per_s=said.ssds * ssd.write_gbps * 1e9,
        read_latency_s=ssd.read_us / 1e6,
        write_latency_s=ssd.write_us / 1e6,
        acquire_timeout_ms=said.acquire_timeout_ms,
    )


def show(trace: Trace, rows: Sequence[Mapping[str, Any]]) -> None:
    console = output.console()
    block_bytes = rows[0]["block_bytes"]
    console.print(
        f"{len(trace.requests)} requests, {rows[0]['block_references']} block references,"
        f" {trace.blocks} blocks of {trace.block_tokens} tokens and {block_bytes} bytes",
        highlight=False,
    )
    hits = _table(
        "Hits, and how far below the bound for as many blocks",
        (),
        ("blocks", "tokens", "prefill saved", "saved, s", "from DRAM", "from NVMe"),
    )
    for row in rows:
        below = row["below_bound"]
        hits.add_row(
            *_name(row),
            *(f"{row[ratio]:.4f} -{below[ratio]:.4f}" for ratio in below),
            f"{row['compute_saved_ms'] / 1e3:,.1f}",
            *(f"{blocks:,}" for blocks in row["block_hits_from"].values()),
        )
    output.print_table(console, hits)
    first = _table(
        "Time to the first token, ms", ("priority",), ("requests", "mean", "median", "p99")
    )
    for row in rows:
        for priority, times in (("all", row["first_token_ms"]), *_by_priority(row)):
            first.add_row(*_name(row), priority, *_times(times))
    first.add_row("none held", "", "", "all", *_times(rows[0]["first_token_ms_without"]))
    output.print_table(console, first)
    drive = _table(
        "NVMe, and where first tokens wait, ms in the mean",
        (),
        ("written, GB", "drive writes a day", "read, GB", "wait", "load", "compute"),
    )
    for row in rows:
        writes = row["nvme_drive_writes_a_day"]
        drive.add_row(
            *_name(row),
            f"{row['nvme_written_bytes'] / 1e9:,.1f}",
            "" if writes is None else f"{writes:.3g}",
            f"{row['nvme_read_bytes'] / 1e9:,.1f}",
            *(f"{row[f'mean_{part}_ms']:,.1f}" for part in ("wait", "load", "compute")),
        )
    output.print_table(console, drive)


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """A row each for a policy and its tiers, as `_name` has them."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("policy", "DRAM", "NVMe", *texts):
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _name(row: Mapping[str, Any]) -> tuple[str, str, str]:
    nvme = row["nvme_bytes"]
    return row["policy"], format_size(row["dram_bytes"]), format_size(nvme) if nvme else ""


def _by_priority(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    each = row["first_token_ms_by_priority"]
    return list(each.items()) if len(each) > 1 else []


def _times(times: Mapping[str, float]) -> list[str]:
    return [f"{times['requests']:,}", *(f"{times[n]:,.1f}" for n in ("mean", "median", "p99"))]
