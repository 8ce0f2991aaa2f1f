"""`kvstore simulate`: what each policy would have held of a trace, in one tier of so many
blocks, or in the whole stack (`cli.simulate_stack`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.cli import output, simulate_stack
from kvstore.cli.arguments import count, counts, names, number
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.errors import BadRequest, KVStoreError

if TYPE_CHECKING:
    from kvstore.sim.trace import Trace

DEFAULT_POLICIES = "worth,lru,arc,s3-fifo,belady-bypass"
DEFAULT_OF_STACKS = "worth,lru"
DEFAULT_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
"""Of the trace's blocks."""
RATIOS = {
    "block_hit_ratio": "Block hits",
    "token_hit_ratio": "Token hits, up to the first missing block",
    "compute_saved_ratio": "Prefill saved",
}

_rate = number(0, 1e6, "a rate above 0", above=True)


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("simulate", help=COMMANDS["simulate"].summary)
    parser.add_argument(
        "traces",
        nargs="+",
        type=Path,
        metavar="TRACE",
        help="files of the formats in docs/simulator.md, .xz or not; several are one workload",
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        metavar="NAME,NAME",
        help=f"policies (docs/policies.md) and bounds; default: {DEFAULT_POLICIES}; with tiers,"
        f" policies: {DEFAULT_OF_STACKS}",
    )
    parser.add_argument(
        "--capacity-blocks",
        type=counts,
        metavar="N,N",
        help="sizes of the tier; default: 1, 5, 10, 25 and 50 %% of the trace's blocks",
    )
    parser.add_argument(
        "--block-tokens",
        type=count,
        metavar="N",
        help="replay in blocks of so many tokens, a multiple of the trace's own; default: those",
    )
    parser.add_argument(
        "--tiers",
        type=simulate_stack.tiers,
        action="append",
        metavar="dram=SIZE,nvme=SIZE,endurance=SIZE",
        help="simulate the whole stack with tiers of these sizes instead, and so many bytes a day"
        " that may be written to NVMe; more than once for more",
    )
    parser.add_argument(
        "--machine",
        type=simulate_stack.stated,
        metavar="NAME=VALUE,...",
        help="that they are in, parts by the names in docs/planner.md:"
        f" {', '.join(simulate_stack.Stated._fields)}",
    )
    parser.add_argument(
        "--order",
        choices=("own", "published", "chain"),
        help="of the references within a request: block by block from the root on, as published,"
        " or the deepest first, as in the server; default: what the policy is made for",
    )
    parser.add_argument(
        "--no-hints",
        action="store_true",
        help="do not tell policies which session a request is of, and what that does next",
    )
    parser.add_argument(
        "--expected",
        type=number(0, math.nextafter(1, 0), "a share from 0 to below 1"),
        metavar="P",
        help="tell policies when each session will be back, too, off by a factor of up to 1 - P or"
        " 1 + P; default: only what the trace says",
    )
    parser.add_argument(
        "--session-rate",
        type=_rate,
        default=0.02,
        metavar="PER_SECOND",
        help="arrivals of sessions that carry no common time; default: 0.02",
    )
    parser.add_argument("--seed", type=int, default=1, help="of those arrivals; default: 1")
    parser.add_argument(
        "--processes", type=count, metavar="N", help="at a time; default: one a core"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the ratios there, as PNG")
    return parser


def run(args: argparse.Namespace) -> int:
    from kvstore.sim.readers import read_traces
    from kvstore.sim.trace import coarsened, expecting

    wrong = ("capacity_blocks", "order") if args.tiers else ("machine",)
    for name in wrong:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise BadRequest(f"{flag} goes {'without' if args.tiers else 'with'} --tiers")
    if args.expected is not None and args.no_hints:
        raise BadRequest("--expected goes without --no-hints")
    if args.plots is not None:
        from kvstore_benchmarks.plots import figure_into

        figure_into(args.plots)  # An hour's replays should not end in an error.
    with progress("reading"):
        trace = read_traces(args.traces, session_rate=args.session_rate, seed=args.seed)
        if args.block_tokens is not None:
            trace = coarsened(trace, args.block_tokens)
        if args.expected is not None:
            trace = expecting(trace, args.expected, args.seed)
    rows = (_run_stacks if args.tiers else _run_tier)(args, trace)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        (simulate_stack.show if args.tiers else _show)(trace, rows)
    return 0


def _run_tier(args: argparse.Namespace, trace: Trace) -> list[dict[str, Any]]:
    from kvstore.sim.sweep import Point, cores, sweep

    order = args.order or "own"
    by_chain = {"own": None, "published": False, "chain": True}[order]
    policies = args.policy or _policies(DEFAULT_POLICIES)
    capacities = args.capacity_blocks or _shares(trace)
    hints = not args.no_hints
    points = [Point(name, size, by_chain, hints) for name in policies for size in capacities]
    with progress("replaying") as tell:
        rows = sweep(trace, points, args.processes or cores(), tell)
    if args.plots is not None:
        from kvstore_benchmarks.policies.plots import draw

        draw(rows, args.plots)
    return rows


def _run_stacks(args: argparse.Namespace, trace: Trace) -> list[dict[str, Any]]:
    from kvstore.sim.stacks import Run, sweep_stacks
    from kvstore.sim.sweep import cores

    machine = simulate_stack.machine_of(args.machine or simulate_stack.Stated())
    policies = args.policy or _policies(DEFAULT_OF_STACKS)
    runs = [Run(name, tiers) for tiers in dict.fromkeys(args.tiers) for name in policies]
    processes = args.processes or cores()
    with progress("simulating") as tell:
        rows = sweep_stacks(trace, runs, machine, processes, tell, hints=not args.no_hints)
    if args.plots is not None:
        from kvstore_benchmarks.policies.stack_plots import draw

        draw(rows, args.plots)
    return rows


def _shares(trace: Trace) -> list[int]:
    return sorted({max(1, round(trace.blocks * share)) for share in DEFAULT_SHARES})


@contextmanager
def progress(step: str) -> Iterator[Callable[[float], None]]:
    """A bar on the standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda part: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Not refreshed by a thread of its own: this process is about to fork.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(step, total=1.0)
        bar.refresh()
        yield lambda part: bar.update(task, completed=part, refresh=True)


def _show(trace: Trace, rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    console = output.console()
    references = rows[0]["block_references"]
    console.print(
        f"{len(trace.requests)} requests, {references} block references, {trace.blocks} blocks"
        f" of {trace.block_tokens} tokens"
    )
    sizes = list(dict.fromkeys(row["capacity_blocks"] for row in rows))
    cells = {(row["policy"], row["capacity_blocks"]): row for row in rows}
    for ratio, title in RATIOS.items():
        table = Table(title=f"{title}, by size in blocks")
        table.add_column("policy")
        for size in sizes:
            table.add_column(str(size), justify="right")
        for policy in dict.fromkeys(row["policy"] for row in rows):
            table.add_row(policy, *(f"{cells[policy, size][ratio]:.4f}" for size in sizes))
        output.print_table(console, table)


def _policies(text: str) -> list[str]:
    from kvstore.sim.sweep import policy_called

    policies = names(text)
    try:
        for name in policies:
            policy_called(name)
    except KVStoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return list(policies)
