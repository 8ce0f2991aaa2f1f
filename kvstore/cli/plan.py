"""`kvstore plan`: how much DRAM and NVMe a workload is worth, step by step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.cli import output
from kvstore.cli.arguments import number, positive, whole
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.errors import BadRequest
from kvstore.units import parse_size

if TYPE_CHECKING:
    from kvstore.core.cost import Prefill
    from kvstore.plan.demand import Demand
    from kvstore.plan.machine import Engine
    from kvstore.plan.report import Section

STATED = ("requests_per_s", "prompt_tokens", "shared_tokens", "output_tokens", "reuse_s")
"""What stands in for a trace."""
OF_TRACES = ("policy", "session_rate", "block_tokens")

_amount = number(0, 1e12, "a number of 0 or more")
_share = number(0, 1, "a share above 0 and up to 1", above=True)


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("plan", help=COMMANDS["plan"].summary)
    add = parser.add_argument
    add("traces", nargs="*", type=Path, metavar="TRACE", help="of the formats in docs/simulator.md")
    machine = parser.add_argument_group("machine (docs/planner.md has the names)")
    add = machine.add_argument
    add(
        "--model",
        default="llama-3.1-8b",
        help="name, or a model's config.json; default: %(default)s",
    )
    add("--parameters", type=positive, metavar="BILLIONS", help="of a config.json's model")
    add("--gpu", default="h100", help="default: %(default)s")
    add("--gpus", type=whole(4096), default=1, metavar="N", help="that share the model; default: 1")
    add("--ssd", default="gen4", help="default: %(default)s")
    add("--ssds", type=whole(4096), default=1, metavar="N", help="drives; default: 1")
    add("--parts", type=Path, metavar="TOML", help="more GPUs, SSDs and models")
    add("--weight-bytes", type=positive, default=2.0, metavar="B", help="a parameter; default: 2")
    add("--kv-bytes", type=positive, default=2.0, metavar="B", help="a number; default: 2")
    add("--mfu", type=_share, default=0.5, help="of peak arithmetic in prefill; default: 0.5")
    add("--utilisation", type=_share, default=0.7, help="a GPU may be kept at; default: 0.7")
    workload = parser.add_argument_group("workload, in place of a trace")
    add = workload.add_argument
    add("--requests-per-s", type=positive, metavar="R", help="or a trace's, sped up or slowed down")
    add("--prompt-tokens", type=positive, metavar="N", help="mean")
    add("--shared-tokens", type=_amount, metavar="N", help="of them asked for before, mean")
    add("--output-tokens", type=_amount, metavar="N", help="mean")
    add("--reuse-s", type=positive, metavar="S", help="until they are asked for again, mean")
    trace = parser.add_argument_group("a trace")
    add = trace.add_argument
    add(
        "--policy",
        metavar="NAME",
        help="it is replayed with (docs/policies.md); default: worth, as the server's",
    )
    add("--session-rate", type=positive, metavar="R",
        help="arrivals of sessions that carry no common time; default: 0.02")  # fmt: skip
    add("--block-tokens", type=whole(1 << 20), metavar="N",
        help="replay in blocks of so many tokens, a multiple of the trace's own; default: larger"
        " ones where prompts are long")  # fmt: skip
    sizes = parser.add_argument_group("sizes, in place of the knees")
    sizes.add_argument("--dram", type=_size, metavar="SIZE", help="such as 512GB")
    sizes.add_argument("--nvme", type=_size, metavar="SIZE", help="such as 8TB; 0 for none")
    add = sizes.add_argument
    add("--first-token-ms", type=positive, metavar="MS", help="the target, mean")
    prices = parser.add_argument_group("prices, in any one currency; the defaults are assumptions")
    add = prices.add_argument
    add("--gpu-hour", type=_amount, default=2.5, metavar="P", help="default: 2.5")
    add("--dram-gb", type=_amount, default=5.0, metavar="P", help="a GB; default: 5")
    add("--nvme-gb", type=_amount, default=0.15, metavar="P", help="a GB; default: 0.15")
    add("--years", type=positive, default=4.0, metavar="Y", help="to pay them off; default: 4")
    add("--write-amplification", type=positive, default=1.1, metavar="X",
        help="bytes on the drive for one of a block; default: 1.1")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the curves there, as PNG")
    return parser


def run(args: argparse.Namespace) -> int:
    from kvstore.plan.report import Wishes, as_json, make
    from kvstore.plan.sizes import GB, Prices, Sizing

    if args.plots is not None:
        from kvstore_benchmarks.plots import figure_into

        figure_into(args.plots)  # A trace's replays should not end in an error.
    engine = _engine(args)
    engine.check_fits()
    demand, block_tokens = _demand(args, engine.prefill)
    prices = Prices(args.gpu_hour, args.dram_gb, args.nvme_gb, args.years)
    sizing = Sizing(engine, demand, prices, args.utilisation)
    wishes = Wishes(
        dram_gb=None if args.dram is None else args.dram / GB,
        nvme_gb=None if args.nvme is None else args.nvme / GB,
        first_token_ms=args.first_token_ms,
        write_amplification=args.write_amplification,
        block_tokens=block_tokens,
    )
    sections = make(sizing, wishes)
    if args.plots is not None:
        from kvstore_benchmarks.policies.plan_plots import draw

        draw(as_json(sections), args.plots)
    if args.json:
        print(json.dumps(as_json(sections), indent=2))
    else:
        _show(sections)
    return 0


def _engine(args: argparse.Namespace) -> Engine:
    from kvstore.parts import find, find_model, load_parts
    from kvstore.plan.machine import Engine

    parts = load_parts(args.parts)
    return Engine(
        model=find_model(args.model, parts, args.parameters),
        gpu=find("GPU", args.gpu, parts.gpu),
        gpus=args.gpus,
        ssd=find("SSD", args.ssd, parts.ssd),
        ssds=args.ssds,
        weight_bytes=args.weight_bytes,
        kv_dtype_bytes=args.kv_bytes,
        mfu=args.mfu,
    )


def _demand(args: argparse.Namespace, prefill: Prefill) -> tuple[Demand, int]:
    """The demand, and the tokens of a block."""
    from kvstore.cli.simulate import progress
    from kvstore.plan.demand import from_numbers, from_trace
    from kvstore.sim.readers import read_traces
    from kvstore.sim.sweep import policy_called

    if args.traces:
        wrong = [name for name in STATED[1:] if getattr(args, name) is not None]
        if wrong:
            raise BadRequest(f"a trace tells {_flags(wrong)} itself")
        policy = policy_called(args.policy or "worth")
        with progress("reading"):
            trace = read_traces(args.traces, session_rate=args.session_rate or 0.02, seed=1)
        with progress("replaying") as tell:
            demand = from_trace(
                trace,
                prefill,
                requests_per_s=args.requests_per_s,
                policy=policy,
                block_tokens=args.block_tokens,
                progress=tell,
            )
        return demand, trace.block_tokens
    missing = [name for name in STATED if getattr(args, name) is None]
    if missing:
        raise BadRequest(f"name a trace, or say {_flags(missing)}")
    wrong = [name for name in OF_TRACES if getattr(args, name) is not None]
    if wrong:
        raise BadRequest(f"{_flags(wrong)} goes with a trace")
    stated = {name: getattr(args, name) for name in STATED}
    return from_numbers(prefill, **stated), 16


def _show(sections: Sequence[Section]) -> None:
    from rich.table import Table

    console = output.console()
    for section in sections:
        table = Table(title=section.title, title_justify="left", show_header=False, box=None)
        table.add_column(overflow="fold")
        table.add_column(justify="right", overflow="fold")
        table.add_column()
        table.add_column(style="dim", overflow="fold")
        for figure in section.figures:
            if isinstance(figure.value, str):
                table.add_row(figure.name, "", "", figure.value)
            else:
                table.add_row(figure.name, _text(figure.value), figure.unit, figure.formula)
        console.print(table)
        if section.steps:
            output.print_table(console, _curve(section))
        for note in section.notes:
            console.print(f"  ! {note}", highlight=False)
        console.print()


def _curve(section: Section) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="dim")
    columns = ("GB", "hits", "prefill saved", "first token, ms", "GPUs saved", "GPUs/TB more",
               "worth/h", "cost/h", "")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for step in section.steps:
        point = step.point
        table.add_row(
            _text(point.nvme_gb or point.dram_gb),
            f"{point.token_hits:.3f}",
            f"{point.saved:.3f}",
            _text(point.first_token_ms),
            _text(point.gpus_saved),
            _text(step.gpus_a_tb),
            _text(step.worth_hour),
            _text(step.cost_hour),
            "pays" if step.pays else "",
        )
    return table


def _text(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
